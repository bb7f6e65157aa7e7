"""What of a cache directory is readable at one moment."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.cache.index import KeyIndex
from logitstream.cache.manifest import INDEX_HEADER, read_index
from logitstream.cache.open_records import OpenRecords
from logitstream.cache.open_shard import OPEN_SUFFIX
from logitstream.cache.shard import SPAN_DTYPE, Spans, read_schema, scan, scanned_spans, token_width
from logitstream.cache.shard_file import Row
from logitstream.errors import CacheError

logger = logging.getLogger(__name__)

OPEN_PLACE = 1 << 31
"""Places from here on are records of open shards."""
LOOKS = 8
"""How often a directory is looked at whose shards keep disappearing."""
_Sealed = tuple[npt.NDArray[np.void], Spans | None]
"""Keys of a sealed shard, and its spans where they had to be found again."""
_Grown = dict[Path, tuple[int, list[Spans]]]
"""Where the whole batches of each open shard end, and the spans of those that are new."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Sealed shards by their order of discovery, open ones by what was flushed; never changed, only replaced.

    rebuilt: spans of sealed shards whose index is missing or damaged; of the others only the index on disk is read.
    growing: where the whole batches of each open shard end; num_open: how many of open_records were there by then.
    """

    sealed: KeyIndex = field(default_factory=KeyIndex.empty)
    shards: tuple[str, ...] = ()
    starts: tuple[int, ...] = (0,)
    rebuilt: dict[str, Spans] = field(default_factory=dict)
    growing: dict[Path, int] = field(default_factory=dict)
    open_records: OpenRecords = field(default_factory=OpenRecords)
    num_open: int = 0
    open_index: KeyIndex = field(default_factory=KeyIndex.empty)

    @property
    def num_sealed(self) -> int:
        return self.starts[-1]

    def places(self, key: bytes) -> list[int]:
        """Where a key's records are."""
        found = self.sealed.find(key)
        return [*found, *self.open_index.find(key)] if self.num_open else found

    def rows_of(self, keys: Sequence[bytes]) -> list[tuple[str, Row]]:
        """Path of the shard and row of each key's first record, KeyError where there is none.

        Where keys share their first half it may be another one's: the span there tells.
        """
        places = self.sealed.find_many(keys)
        if min(places) >= 0:
            return list(map(self.shard_of, places))
        found = zip(keys, places, strict=True)
        return [self.row_of(place if place >= 0 else self._open_place(key)) for key, place in found]

    def _open_place(self, key: bytes) -> int:
        for place in self.open_index.find(key):
            return place
        raise KeyError(key)

    def row_of(self, place: int) -> tuple[str, Row]:
        """Path of the shard that holds a place, and the row there."""
        return self.open_records.row(place - OPEN_PLACE) if place >= OPEN_PLACE else self.shard_of(place)

    def shard_of(self, place: int) -> tuple[str, Row]:
        """The sealed shard that holds a place, and the row there."""
        number = bisect_right(self.starts, place) - 1
        return self.shards[number], place - self.starts[number]

    def sealed_spans(self, number: int) -> Spans:
        """Of one of the sealed shards; FileNotFoundError where it was pruned."""
        path = self.shards[number]
        if path in self.rebuilt:
            return self.rebuilt[path]
        count = self.starts[number + 1] - self.starts[number]
        return np.fromfile(index_path(path), SPAN_DTYPE, count, offset=INDEX_HEADER.size)

    def open_spans(self) -> Iterator[tuple[str, Spans]]:
        """Of each open shard."""
        for path, _, spans in self.open_records.by_shard(self.num_open):
            yield path, spans

    def keys_of(self, number: int) -> list[bytes]:
        """The keys of a sealed shard, even of one that was pruned."""
        place = self.sealed.place
        positions = np.flatnonzero((place >= self.starts[number]) & (place < self.starts[number + 1]))
        return [self.sealed.key(position) for position in positions.tolist()]

    def num_records(self) -> dict[str, int]:
        """Records of each shard, by its name once it is sealed."""
        counts = {_sealed_name(path): self.starts[n + 1] - self.starts[n] for n, path in enumerate(self.shards)}
        return counts | {_sealed_name(path): len(spans) for path, spans in self.open_spans()}

    def among(self, num_records: dict[str, int]) -> npt.NDArray[np.bool_]:
        """Whether each sealed record, then each open one, is among its shard's first `num_records`."""
        among = np.zeros(self.num_sealed + self.num_open, bool)
        for n, path in enumerate(self.shards):
            count = min(num_records.get(_sealed_name(path), 0), self.starts[n + 1] - self.starts[n])
            among[self.starts[n] : self.starts[n] + count] = True
        for path, numbers, _ in self.open_records.by_shard(self.num_open):
            among[self.num_sealed + numbers[: num_records.get(_sealed_name(path), 0)]] = True
        return among

    def draw_sets(self) -> npt.NDArray[np.uint64]:
        """The draw set of every sealed record, then of every open one."""
        sealed = (self.sealed_spans(number)["draw_set"] for number in range(len(self.shards)))
        return np.concatenate([np.zeros(0, np.uint64), *sealed, self.open_records.spans(self.num_open)["draw_set"]])

    def all_keys(self) -> KeyIndex:
        """Sealed and open records' keys in rising order."""
        if not self.num_open:
            return self.sealed
        return self.sealed.extended([self.open_records.spans(self.num_open)["key"]], OPEN_PLACE)


def survey(
    directory: Path, manifest: dict[str, Any], before: Snapshot, *, remote: dict[Path, int] | None = None
) -> Snapshot:
    """What is readable now, reading only what is new since `before`.

    remote: sizes of sealed shards that can be fetched; their sidecars are in the directory already.
    """
    remote, read = remote or {}, dict[Path, _Sealed]()
    for _ in range(LOOKS - 1):
        try:
            return _look(directory, manifest, before, remote, read)
        except FileNotFoundError:  # sealed, removed or replaced between listing and reading it: what was read is kept
            continue
    return _look(directory, manifest, before, remote, read, tolerant=True)


def _look(
    directory: Path,
    manifest: dict[str, Any],
    before: Snapshot,
    remote: dict[Path, int],
    read: dict[Path, _Sealed],
    *,
    tolerant: bool = False,
) -> Snapshot:
    """One try of `survey`: FileNotFoundError where something disappears meanwhile, or, tolerant, a snapshot without it.

    read: sealed shards that earlier tries have read, and this one reads.
    """
    ignored = (FileNotFoundError,) if tolerant else ()
    growing: _Grown = {}
    for path in sorted(directory.glob(f"*{OPEN_SUFFIX}")):
        with contextlib.suppress(*ignored):
            growing[path] = _grown(path, manifest, before.growing.get(path, 0))
    sealed = {*directory.glob("*.arrow"), *remote}  # after the open ones: no shard is in neither
    growing = {path: grown for path, grown in growing.items() if path.with_suffix("") not in sealed}
    pruned = not set(before.shards) <= set(map(str, sealed))
    if pruned and not tolerant and sealed != {*directory.glob("*.arrow"), *remote}:
        raise FileNotFoundError  # what takes the place of the pruned ones may not be listed
    earlier, before = before, Snapshot() if pruned else before
    known = set(before.shards)
    new = sorted(path for path in sealed if str(path) not in known)
    if not (new or pruned) and {path: end for path, (end, _) in growing.items()} == before.growing:
        return before
    for path in [path for path in new if path not in read]:
        with contextlib.suppress(*ignored):
            spans, is_rebuilt = _sealed_spans(path, manifest, remote.get(path))
            read[path] = (np.ascontiguousarray(spans["key"]), spans if is_rebuilt else None)
    return _extended(before, {path: read[path] for path in new if path in read}, earlier, growing)


def _extended(before: Snapshot, new: dict[Path, _Sealed], earlier: Snapshot, growing: _Grown) -> Snapshot:
    """`before` with new sealed shards, and `earlier`'s open ones as they are by now."""
    keys = [shard_keys for shard_keys, _ in new.values()]
    records, index = _open_records(earlier, growing)
    return Snapshot(
        sealed=before.sealed.extended(keys, before.num_sealed) if keys else before.sealed,
        shards=(*before.shards, *map(str, new)),
        starts=(*before.starts[:-1], *accumulate(map(len, keys), initial=before.num_sealed)),
        rebuilt=before.rebuilt | {str(path): spans for path, (_, spans) in new.items() if spans is not None},
        growing={path: end for path, (end, _) in growing.items()},
        open_records=records,
        num_open=records.count,
        open_index=index,
    )


def _open_records(before: Snapshot, growing: _Grown) -> tuple[OpenRecords, KeyIndex]:
    """Open shards' records and the places of their keys; while no shard leaves they only grow, and do so in place."""
    records, index = before.open_records, before.open_index
    if not before.growing.keys() <= growing.keys() or records.count != before.num_open:
        records, index = OpenRecords(), KeyIndex.empty()
        for path, spans in before.open_spans():
            if Path(path) in growing:
                records.append(path, spans)
        index = index.extended([records.spans(records.count)["key"]], OPEN_PLACE)
    known = records.count
    new = [(str(path), spans) for path, (_, parts) in growing.items() for spans in parts]
    for path, spans in new:
        records.append(path, spans)
    return records, index.extended([spans["key"] for _, spans in new], OPEN_PLACE + known) if new else index


def _grown(path: Path, manifest: dict[str, Any], end: int) -> tuple[int, list[Spans]]:
    """Where the whole batches of an open shard end, and the spans of those after `end`.

    A torn tail is ignored, it may be a write under way. Of a shard that cannot be read what was known is kept;
    FileNotFoundError where it was sealed meanwhile.
    """
    try:
        if path.stat().st_size == end or not (end or read_schema(path, manifest)):
            return end, []
        more = list(scan(path, token_width(manifest), end))
    except FileNotFoundError:
        raise
    except OSError as error:
        _warn_once(path, str(error))
        return end, []
    return (more[-1].start + more[-1].size if more else end), [message.spans for message in more]


@functools.cache
def _warn_once(path: Path, problem: str) -> None:
    """Open shards are looked at again and again."""
    logger.warning("%s cannot be read: %s; its new records are skipped", path, problem)


def _sealed_spans(path: Path, manifest: dict[str, Any], remote_bytes: int | None) -> tuple[Spans, bool]:
    """A sealed shard's spans, and whether they had to be found again in the shard itself.

    FileNotFoundError where it was pruned meanwhile.
    """
    nothing = np.zeros(0, SPAN_DTYPE)
    try:
        size = path.stat().st_size if remote_bytes is None else remote_bytes
        return read_index(path.with_suffix(".index"), manifest["fingerprint_digest"], size), False
    except (CacheError, OSError) as error:
        problem = error
    if remote_bytes is None and not os.path.lexists(path):
        raise FileNotFoundError(path)
    if not path.is_file():
        logger.warning("%s; its shard is skipped", problem)
        return nothing, True
    try:
        if not read_schema(path, manifest):
            logger.warning("%s is skipped: it is no shard of this cache, or its head is damaged", path)
            return nothing, True
        logger.warning("%s; %s is scanned instead", problem, path.name)
        return scanned_spans(path, token_width(manifest)), True
    except OSError as error:
        logger.warning("%s is skipped: %s", path, error)
        return nothing, True


def _sealed_name(shard: str) -> str:
    return os.path.basename(shard).removesuffix(OPEN_SUFFIX)


def index_path(shard: str) -> str:
    """The index of a sealed shard."""
    return shard.removesuffix(".arrow") + ".index"
