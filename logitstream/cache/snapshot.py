"""The records of a cache folder at one moment: which shards there are, and where each key's records lie in them."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstream.cache.index import (
    Entry,
    KeyIndex,
    empty_index,
    index_path,
    joined,
    places_of,
    read_entries,
    sealed_entries,
)
from logitstream.cache.manifest import Manifest
from logitstream.cache.open_shard import origin
from logitstream.cache.shard import OPEN_SUFFIX, Spans
from logitstream.errors import CacheError

logger = logging.getLogger(__name__)

LOOKS = 20
"""How often a folder is listed while its shards change."""
SHARD_BITS = np.uint64(32)
DRAW_SET_OFFSET = 40
"""Place of the draw set in a span."""
OFFSET_MASK = np.uint64((1 << 32) - 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard by its sealed name; `end`: how much of its index was read; `scanned`: its spans if that is damaged."""

    path: Path
    is_sealed: bool = False
    end: int = 0
    scanned: Spans | None = field(default=None, compare=False)

    def content(self) -> bytes:
        """Return the bytes that places are offsets in."""
        return self.scanned.tobytes() if self.scanned is not None else index_path(self.path).read_bytes()

    def spans(self, fingerprint_digest: str) -> Spans:
        """Return the spans of all records that the index names by now."""
        if self.scanned is not None:
            return self.scanned
        return joined(read_entries(index_path(self.path), fingerprint_digest)[0])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Shards in the order of their discovery, and their keys; never changed, only replaced.

    New keys are sorted into `recent` and join `keys` once they are many.
    """

    shards: tuple[Shard, ...] = ()
    keys: KeyIndex = field(default_factory=empty_index)
    recent: KeyIndex = field(default_factory=empty_index)

    def places(self, key: bytes) -> list[int]:
        """Return the places of a key's records."""
        return [*self.keys.find(key), *self.recent.find(key)]

    def ordered(self, ends: Mapping[str, int] | None = None) -> KeyIndex:
        """Return each key once, in rising order; ends: only records before these offsets of the named shards."""
        index = KeyIndex.joined([self.keys, self.recent]) if len(self.recent) else self.keys
        if ends is not None:
            limits = np.array([ends.get(shard.path.name, 0) for shard in self.shards], np.uint64)
            index = index.select((index.place & OFFSET_MASK) < limits[index.place >> SHARD_BITS])
        return index.distinct()

    def without(self, gone: set[Path]) -> Snapshot:
        """Return the records of the other shards, which are numbered anew."""
        stays = np.array([shard.path not in gone for shard in self.shards], np.bool_)
        numbers = (np.cumsum(stays) - 1).astype(np.uint64)

        def renumbered(index: KeyIndex) -> KeyIndex:
            index = index.select(stays[index.place >> SHARD_BITS])
            places = numbers[index.place >> SHARD_BITS] << SHARD_BITS
            return replace(index, place=places | (index.place & OFFSET_MASK))

        shards = tuple(shard for shard in self.shards if shard.path not in gone)
        return Snapshot(shards, renumbered(self.keys), renumbered(self.recent))

    def draw_sets(self, index: KeyIndex) -> npt.NDArray[np.uint64]:
        """Return the draw set of each record of an index; FileNotFoundError if a shard is gone."""
        found = np.zeros(len(index), np.uint64)
        at = np.arange(8, dtype=np.uint64) + np.uint64(DRAW_SET_OFFSET)
        for number, shard in enumerate(self.shards):
            mine = np.flatnonzero(index.place >> SHARD_BITS == number)
            if len(mine):
                content = np.frombuffer(shard.content(), np.uint8)
                found[mine] = content[(index.place[mine] & OFFSET_MASK)[:, None] + at].view("<u8")[:, 0]
        return found


def survey(
    directory: Path, manifest: Manifest, before: Snapshot, *, remote: Mapping[Path, int] | None = None
) -> Snapshot:
    """Return what is readable now, reading only what is new since `before`.

    A prune writes a record's new shard before it removes the old one, and a listing of the folder may show neither. So
    shards that one listing lacks are dropped once a later listing, which shows the new ones, has been read as a whole.
    remote: sizes of sealed shards that can be fetched, whose indexes are in the folder already.
    """
    remote, now = remote or {}, before
    gone: set[Path] = set()
    for look in range(LOOKS):
        names, previous = _listed(directory, remote), now
        now, is_whole = _extended(previous, names, manifest, remote)
        if is_whole and look > 0:
            gone -= names.keys()
            return now.without(gone) if gone else now
        gone = {shard.path for shard in now.shards} - names.keys()
        if is_whole and now is previous and not gone:
            break
    return now


def _listed(directory: Path, remote: Mapping[Path, int]) -> dict[Path, bool]:
    """Return the paths of all shards, and whether they are sealed. An index alone is no shard."""
    names = os.listdir(directory)
    shards = {directory / name.removesuffix(OPEN_SUFFIX): False for name in names if name.endswith(OPEN_SUFFIX)}
    return shards | {directory / name: True for name in names if name.endswith(".arrow")} | dict.fromkeys(remote, True)


def _extended(
    before: Snapshot, names: dict[Path, bool], manifest: Manifest, remote: Mapping[Path, int]
) -> tuple[Snapshot, bool]:
    """Return `before` with what was written since, and whether all of these shards were still there."""
    shards, parts, is_whole = list(before.shards), [], True
    numbers = {shard.path: number for number, shard in enumerate(shards)}
    for path in sorted(names, key=lambda path: (origin(path)[1], path.name)):
        number = numbers.get(path, len(shards))
        known = shards[number] if number < len(shards) else Shard(path)
        if known.is_sealed:
            continue
        try:
            shard, entries = _read(known, names[path], manifest, remote.get(path))
        except FileNotFoundError:
            is_whole = False
            continue
        shards[number : number + 1] = [shard]
        parts.append(places_of(number, entries))
    if not any(map(len, parts)):
        return (before if shards == list(before.shards) else replace(before, shards=tuple(shards))), is_whole
    recent = KeyIndex.joined([before.recent, *parts])
    if len(recent) * 8 > len(before.keys):
        return Snapshot(tuple(shards), KeyIndex.joined([before.keys, recent])), is_whole
    return Snapshot(tuple(shards), before.keys, recent), is_whole


def _read(known: Shard, is_sealed: bool, manifest: Manifest, remote_bytes: int | None) -> tuple[Shard, list[Entry]]:
    """Read the new entries of a shard, or all of a sealed one that is new; FileNotFoundError if it is gone."""
    path, digest = known.path, manifest.fingerprint.digest
    if not is_sealed or known.end:
        try:
            entries, end = read_entries(index_path(path), digest, known.end)
        except FileNotFoundError:
            raise
        except (CacheError, OSError) as error:
            _warn_once(f"{error}; the records of {path.name} are skipped")
            entries, end = [], 0
        return Shard(path, is_sealed, end), entries
    entries, end, problem = sealed_entries(path, manifest, remote_bytes=remote_bytes)
    if problem:
        logger.warning(problem)
    scanned = joined(entries) if problem else None
    return Shard(path, True, end if scanned is None else scanned.nbytes, scanned), entries


@functools.cache
def _warn_once(message: str) -> None:
    """Log what is found again at every refresh."""
    logger.warning(message)
