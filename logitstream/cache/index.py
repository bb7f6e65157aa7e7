"""Where each key's records are: sorted arrays, 20 bytes a record, exact for any keys."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

LARGE = 1 << 16
MUCH = 8
"""New keys are sorted in with the others where they are no less than one to so many."""
HALVES = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class KeyIndex:
    """Keys as two big-endian 64-bit halves in rising order, and the place of each one's record; keys may repeat."""

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    place: npt.NDArray[np.uint32]
    _views: tuple[memoryview, memoryview, memoryview] = field(init=False, repr=False, compare=False)
    """The same: Python's look-up of one number is several times as fast as numpy's."""

    def __post_init__(self) -> None:
        views = tuple(memoryview(part) for part in (self.high, self.low, self.place))  # type: ignore[arg-type]
        object.__setattr__(self, "_views", views)

    @classmethod
    def empty(cls) -> KeyIndex:
        return cls(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint32))

    def extended(self, keys: list[npt.NDArray[np.void]], first_place: int) -> KeyIndex:
        """With more keys (arrays of dtype V16), whose places count up from `first_place`."""
        halves = [np.ascontiguousarray(part).view(">u8").reshape(-1, 2) for part in keys]
        num_new = sum(map(len, halves))
        if not num_new:
            return self
        if num_new < len(self.high) // MUCH and (inserted := self._inserted(np.concatenate(halves), first_place)):
            return inserted
        high = np.concatenate([self.high, *(part[:, 0].astype(np.uint64) for part in halves)])
        low = np.concatenate([self.low, *(part[:, 1].astype(np.uint64) for part in halves)])
        place = np.concatenate(
            [self.place, np.arange(first_place, first_place + len(high) - len(self.high), dtype="u4")]
        )
        order = np.argsort(high, kind="stable")
        sorted_high = high[order]
        if np.any(sorted_high[1:] == sorted_high[:-1]):
            order = np.lexsort((low, high))
        sorted_index = KeyIndex(sorted_high, low[order], place[order])
        del high, low, place, order
        if len(sorted_high) >= LARGE:
            _return_freed_memory()
        return sorted_index

    def _inserted(self, halves: npt.NDArray[Any], first_place: int) -> KeyIndex | None:
        """As `extended`, by moving what is there instead of sorting it; None where first halves repeat."""
        order = np.argsort(halves[:, 0], kind="stable")
        high, low = (halves[order, half].astype(np.uint64) for half in range(2))
        at = self.high.searchsorted(high)
        if np.any(high[1:] == high[:-1]) or np.any(self.high.take(at, mode="clip") == high):
            return None
        place = (first_place + order).astype(np.uint32)
        return KeyIndex(np.insert(self.high, at, high), np.insert(self.low, at, low), np.insert(self.place, at, place))

    def find(self, key: bytes) -> list[int]:
        """The places of a key's records."""
        high, low = HALVES.unpack(key)
        highs, lows, places = self._views
        position, found = bisect_left(highs, high), []
        while position < len(highs) and highs[position] == high:
            if lows[position] == low:
                found.append(places[position])
            position += 1
        return found

    def find_many(self, keys: Sequence[bytes]) -> list[int]:
        """The first place of each key, -1 where there is none; not of keys that share their first half with others."""
        if not len(self.high):
            return [-1] * len(keys)
        high = np.frombuffer(b"".join(keys), ">u8")[::2].astype(np.uint64)
        position = self.high.searchsorted(high)
        place = self.place.take(position, mode="clip").astype(np.int64)
        places: list[int] = np.where(self.high.take(position, mode="clip") == high, place, -1).tolist()
        return places

    def first_of_each(self) -> npt.NDArray[np.uint32] | None:
        """Positions where a key differs from the one before it; None where no key repeats."""
        repeats = (self.high[1:] == self.high[:-1]) & (self.low[1:] == self.low[:-1])
        return np.flatnonzero(np.concatenate([[True], ~repeats])).astype(np.uint32) if repeats.any() else None

    def key(self, position: int) -> bytes:
        return int(self.high[position]).to_bytes(8, "big") + int(self.low[position]).to_bytes(8, "big")


def _return_freed_memory() -> None:
    """Sorting leaves holes in glibc's heap that are larger than the index itself; other C libraries are left alone."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
