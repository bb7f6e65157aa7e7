"""Places of records: the index of each shard, and the keys of a whole cache at one moment.

A writer appends an entry to `<shard>.index` after each record batch: a header with the batch's place and checksum, and
one span a record. Readers follow the log; a torn or damaged entry ends it. The first entry is that of the schema. The
shard alone is enough to make its index again, byte for byte.

Keys are an array uint64 [4, N] in rising order: a key's two halves, the place of its record, and its draw set: 32 bytes
a record. A place is the number of a shard and, in the lower 32 bits, an offset in its index. Keys may repeat.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import Manifest
from logitstream.cache.shard import (
    END_OF_STREAM,
    NO_SPANS,
    OPEN_SUFFIX,
    SPAN,
    SPAN_DTYPE,
    Spans,
    age,
    scan,
    shard_schema,
)
from logitstream.errors import CacheError

logger = logging.getLogger(__name__)

FILE_HEAD = struct.Struct("<8s32s")
"""Magic, and the digest of the fingerprint."""
MAGIC = b"LSINDEX3"
ENTRY_HEAD = struct.Struct("<III")
"""Number of records, first byte and end of a message in the shard."""
ENTRY_SUMS = struct.Struct("<QQ")
"""XXH3 of the message, XXH3 of the entry without this."""
ENTRY_BYTES = ENTRY_HEAD.size + ENTRY_SUMS.size
LOOK_SECONDS = 10.0
"""How long a folder is listed again and again while its shards change."""
HALVES = struct.Struct(">QQ")
SHARD_BITS = np.uint64(32)
OFFSET_MASK = np.uint64((1 << 32) - 1)
Keys = npt.NDArray[np.uint64]


class Entry(NamedTuple):
    """A message at the bytes [start, end) of its shard, and its records' spans, which lie at `offset` of the index."""

    start: int
    end: int
    checksum: int
    spans: Spans
    offset: int


class Log(NamedTuple):
    """Entries and where they end in their index; what the index should hold and why, if it is damaged."""

    entries: list[Entry]
    end: int
    rebuilt: bytes = b""
    problem: str = ""

    @property
    def spans(self) -> Spans:
        return np.concatenate([NO_SPANS, *(entry.spans for entry in self.entries)])


def index_path(shard: Path) -> Path:
    """Return the path of the index of a shard, given by its sealed name."""
    return shard.with_suffix(".index")


def file_head(manifest: Manifest) -> bytes:
    return FILE_HEAD.pack(MAGIC, bytes.fromhex(manifest.fingerprint.digest))


def pack_entry(start: int, content: pa.Buffer, spans: Spans) -> bytes:
    message, span_bytes = memoryview(content), spans.tobytes()
    head = ENTRY_HEAD.pack(len(spans), start, start + len(message))
    content_sum = xxh3(message)
    return head + ENTRY_SUMS.pack(content_sum, xxh3(span_bytes, xxh3(head, content_sum))) + span_bytes


def parse_index(content: bytes, start: int = 0) -> Log:
    """Return the whole entries in the content of an index from byte `start` on."""
    view, entries = memoryview(content), list[Entry]()
    position = 0 if start else min(FILE_HEAD.size, len(view))
    while (body := position + ENTRY_BYTES) <= len(view):
        head = view[position : position + ENTRY_HEAD.size]
        count, first, end = ENTRY_HEAD.unpack(head)
        content_sum, own = ENTRY_SUMS.unpack_from(view, position + ENTRY_HEAD.size)
        stop = body + SPAN.size * count
        spans = view[body:stop]
        if stop > len(view) or own != xxh3(spans, xxh3(head, content_sum)):
            break
        entries.append(Entry(first, end, content_sum, np.frombuffer(spans, SPAN_DTYPE), start + body))
        position = stop
    return Log(entries, start + position)


def read_index(shard: Path, manifest: Manifest, start: int = 0) -> Log:
    """Read the whole entries from byte `start` of a shard's index on.

    Raises OSError if it cannot be read, CacheError if it is damaged at its head or of another fingerprint.
    """
    with index_path(shard).open("rb") as file:
        file.seek(start)
        content = file.read()
    if start == 0 and content and content[: FILE_HEAD.size] != file_head(manifest):
        raise CacheError(f"{index_path(shard)} is damaged, or belongs to targets of another fingerprint")
    log = parse_index(content, start)
    return log if log.end == start + len(content) else log._replace(problem=f"{index_path(shard)} is damaged")


def rebuild_index(path: Path, manifest: Manifest) -> bytes:
    """Make the index of a shard's file from that alone; empty if it is no shard of this cache."""
    entries = [pack_entry(*message) for message in scan(path, shard_schema(manifest))]
    return b"".join([file_head(manifest), *entries]) if entries else b""


def sealed_index(shard: Path, manifest: Manifest, start: int = 0, *, shard_bytes: int | None = None) -> Log:
    """Read the entries of a sealed shard's index, which is made again if it is missing or damaged.

    shard_bytes: the shard's size in a store, from which it need not have been fetched. Raises OSError if the shard is
    gone or cannot be read.
    """
    size = shard.stat().st_size if shard_bytes is None else shard_bytes
    problem = f"{index_path(shard)} is damaged"
    try:
        log = read_index(shard, manifest, start)
        is_whole = log.entries[-1].end + len(END_OF_STREAM) >= size if log.entries else start > 0
        if is_whole and not log.problem:
            return log
    except (CacheError, OSError) as error:
        problem = str(error)
    rebuilt = rebuild_index(shard, manifest)
    found = "its records are found by a scan" if rebuilt else "it is no shard of this cache, or its head is damaged"
    return parse_index(rebuilt[start:], start)._replace(rebuilt=rebuilt, problem=f"{shard.name}: {problem}; {found}")


def sorted_keys(parts: Sequence[Keys]) -> Keys:
    """Sort several arrays of keys into one; of equal keys those of earlier parts come first."""
    keys = np.concatenate([np.zeros((4, 0), np.uint64), *parts], axis=1)
    order = np.argsort(keys[0], kind="stable")
    if not np.diff(keys[0, order]).all():  # some share their first half
        order = np.lexsort((keys[1], keys[0]))
    return keys.take(order, axis=1)


def keys_of(number: int, log: Log) -> Keys:
    """Return the keys that a shard's index names, unsorted."""
    spans = log.spans
    halves = np.ascontiguousarray(spans["key"]).view(">u8").reshape(-1, 2).T
    offsets = [np.arange(e.offset, e.offset + e.spans.nbytes, SPAN.size, dtype=np.uint64) for e in log.entries]
    places = np.concatenate(offsets) | np.uint64(number << 32)
    return np.stack([*halves.astype(np.uint64), places, spans["draw_set"]])


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard by its sealed name, how much of its index was read, and the index if its file is damaged."""

    path: Path
    is_sealed: bool = False
    end: int = 0
    rebuilt: bytes = b""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Shards in the order of their discovery, and their keys; never changed, only replaced.

    New keys are sorted into `recent` and join `keys` once they are many.
    """

    shards: tuple[Shard, ...] = ()
    keys: Keys = field(default_factory=lambda: sorted_keys([]))
    recent: Keys = field(default_factory=lambda: sorted_keys([]))

    def places(self, key: bytes) -> list[int]:
        """Return the places of a key's records."""
        (high, low), found = HALVES.unpack(key), list[int]()
        for keys in (self.keys, self.recent):
            highs = memoryview(keys[0])
            position = bisect_left(highs, high)
            while position < len(highs) and highs[position] == high:
                if keys[1, position] == low:
                    found.append(int(keys[2, position]))
                position += 1
        return found

    def distinct(self, ends: Mapping[str, int] | None = None) -> Keys:
        """Return each key once; ends: only records before these offsets of the named shards' indexes."""
        keys = sorted_keys([self.keys, self.recent]) if self.recent.size else self.keys
        if ends is not None:
            limits = np.array([ends.get(shard.path.name, 0) for shard in self.shards], np.uint64)
            keys = keys.compress((keys[2] & OFFSET_MASK) < limits[keys[2] >> SHARD_BITS], axis=1)
        is_first = np.ones(keys.shape[1], bool)
        is_first[1:] = (keys[:2, 1:] != keys[:2, :-1]).any(axis=0)
        return keys if is_first.all() else keys.compress(is_first, axis=1)


def shards_in(directory: Path) -> dict[Path, bool]:
    """Return the sealed names of the shards in a folder, and if they are sealed."""
    names = os.listdir(directory)
    found = {directory / name.removesuffix(OPEN_SUFFIX): False for name in names if name.endswith(OPEN_SUFFIX)}
    return found | {directory / name: True for name in names if name.endswith(".arrow")}


def survey(directory: Path, manifest: Manifest, before: Snapshot, remote: Mapping[Path, int]) -> Snapshot:
    """Return what is readable now, reading only what is new since `before`, or everything if shards are gone.

    A prune writes a record's new shard before it removes the old one, and one listing of the folder may show neither:
    so a second one must show nothing new. remote: sizes of sealed shards that can be fetched, whose indexes are in the
    folder already.
    """

    def listed() -> dict[Path, bool]:
        return shards_in(directory) | dict.fromkeys(remote, True)

    deadline, now, names = time.monotonic() + LOOK_SECONDS, before, listed()
    while True:
        now, is_whole = _extended(now, names, manifest, remote)
        names, previous = listed(), names
        if names == previous or (is_whole and names.items() <= previous.items()):
            if all(shard.path in names for shard in now.shards):
                return now
            anew, is_whole = _extended(Snapshot(), names, manifest, remote)
            names, previous = listed(), names
            if names == previous or (is_whole and names.items() <= previous.items()):
                return anew
        if time.monotonic() > deadline:
            return now


def _extended(
    before: Snapshot, names: Mapping[Path, bool], manifest: Manifest, remote: Mapping[Path, int]
) -> tuple[Snapshot, bool]:
    """Return `before` with what was written since, and whether all of these shards were still there."""
    is_whole = True
    shards, parts = {shard.path: shard for shard in before.shards}, [before.recent]
    numbers = {path: number for number, path in enumerate(shards)}
    for path in sorted((path for path in names if path not in shards or not shards[path].is_sealed), key=age):
        known = shards.get(path, Shard(path))
        try:
            if names[path]:
                log = sealed_index(path, manifest, known.end, shard_bytes=remote.get(path))
            else:  # its last entry may be being written
                log = read_index(path, manifest, known.end)._replace(problem="")
        except FileNotFoundError:  # sealed or pruned meanwhile: the next listing shows it
            is_whole = False
            continue
        except (CacheError, OSError) as error:
            log = Log([], known.end, problem=f"{path.name}: {error}; its records are skipped")
        if log.problem:
            _warn_once(log.problem)
        shards[path] = Shard(path, names[path], log.end, log.rebuilt)
        number = numbers.setdefault(path, len(numbers))
        if log.entries:
            parts.append(keys_of(number, log))
    found = tuple(shards.values())
    if len(parts) == 1:
        return (before if found == before.shards else replace(before, shards=found)), is_whole
    recent = sorted_keys(parts)
    if recent.size * 8 > before.keys.size:
        return Snapshot(found, sorted_keys([before.keys, recent]) if before.keys.size else recent), is_whole
    return Snapshot(found, before.keys, recent), is_whole


@functools.cache
def _warn_once(message: str) -> None:
    """Log what is found again at every refresh."""
    logger.warning(message)
