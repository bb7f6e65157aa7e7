"""The index of a shard, a log of where its records lie, and the keys of many shards in memory.

A writer appends an entry to `<shard>.index` after each record batch: a header with the batch's place and checksum, and
one span a record. Readers follow the log; a torn or damaged entry ends it. The first entry is that of the schema.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import Manifest
from logitstream.cache.shard import END_OF_STREAM, SPAN, SPAN_DTYPE, Message, Spans, head_bytes, scan, shard_schema
from logitstream.errors import CacheError

FILE_HEAD = struct.Struct("<8s32s")
"""Magic, and the digest of the fingerprint."""
MAGIC = b"LSINDEX3"
ENTRY_HEAD = struct.Struct("<III")
"""Number of records, first byte and end of a message in the shard."""
ENTRY_SUMS = struct.Struct("<QQ")
"""XXH3 of the message, XXH3 of the entry without this."""
ENTRY_BYTES = ENTRY_HEAD.size + ENTRY_SUMS.size
HALVES = struct.Struct(">QQ")


class Entry(NamedTuple):
    """A message at the bytes [start, end) of its shard; `offset`: where its spans lie in the index, -1 if nowhere."""

    start: int
    end: int
    checksum: int
    spans: Spans
    offset: int


def index_path(shard: Path) -> Path:
    """Return the path of a shard's index, whether the shard is sealed or open."""
    return shard.with_name(shard.name.removesuffix(".open").removesuffix(".arrow") + ".index")


def file_head(fingerprint_digest: str) -> bytes:
    return FILE_HEAD.pack(MAGIC, bytes.fromhex(fingerprint_digest))


def pack_entry(message: Message) -> bytes:
    content, spans = memoryview(message.content), message.spans.tobytes()
    head = ENTRY_HEAD.pack(len(message.spans), message.start, message.start + len(content))
    own = xxh3(spans, xxh3(head, content_sum := xxh3(content)))
    return head + ENTRY_SUMS.pack(content_sum, own) + spans


def read_entries(path: Path, fingerprint_digest: str, start: int = 0) -> tuple[list[Entry], int]:
    """Read the whole entries from byte `start` of an index on; return them and where they end.

    Raises FileNotFoundError if there is no index, CacheError if it is damaged at its head or of another fingerprint.
    """
    with path.open("rb") as file:
        file.seek(start)
        content = memoryview(file.read())
    position, entries = 0, []
    if start == 0 and content:  # a writer may be about to write its first bytes
        position = FILE_HEAD.size
        if content[:position] != file_head(fingerprint_digest):
            raise CacheError(f"{path} is damaged, or belongs to targets of another fingerprint")
    while position + ENTRY_BYTES <= len(content):
        head = content[position : position + ENTRY_HEAD.size]
        count, first, end = ENTRY_HEAD.unpack(head)
        content_sum, own = ENTRY_SUMS.unpack_from(content, position + ENTRY_HEAD.size)
        body = position + ENTRY_BYTES
        stop = body + SPAN.size * count
        spans = content[body:stop]
        if stop > len(content) or own != xxh3(spans, xxh3(head, content_sum)):
            break
        entries.append(Entry(first, end, content_sum, np.frombuffer(spans, SPAN_DTYPE), start + body))
        position = stop
    return entries, start + position


def sealed_entries(shard: Path, manifest: Manifest, *, remote_bytes: int | None = None) -> tuple[list[Entry], int, str]:
    """Return the entries of a sealed shard, where they end in its index, and what is wrong with the index.

    An index that is missing or damaged gives way to a scan of the shard. remote_bytes: its size in a store, from which
    it need not have been fetched. Raises FileNotFoundError if the shard is gone.
    """
    index, entries, end = index_path(shard), list[Entry](), 0
    if remote_bytes is None and not shard.is_file():
        if not os.path.lexists(shard):
            raise FileNotFoundError(shard)
        return [], 0, f"{shard.name} is no regular file"
    try:
        entries, end = read_entries(index, manifest.fingerprint.digest)
        size = shard.stat().st_size if remote_bytes is None else remote_bytes
        if end == index.stat().st_size and entries and entries[-1].end + len(END_OF_STREAM) >= size:
            return entries, end, ""
        problem = f"{index} is damaged"
    except (CacheError, OSError) as error:
        problem = f"{index} is missing" if isinstance(error, FileNotFoundError) else str(error)
    schema = shard_schema(manifest)
    if not (start := head_bytes(shard, schema)):
        if remote_bytes is None and not os.path.lexists(shard):  # pruned meanwhile
            raise FileNotFoundError(shard)
        return [], 0, f"{problem}; {shard.name} is no shard of this cache, or its head is damaged"
    messages = scan(shard, schema, start)
    scanned = [Entry(m.start, m.start + m.content.size, 0, m.spans, -1) for m in messages]
    return scanned, 0, f"{problem}; {shard.name} is scanned instead"


@dataclass(frozen=True, slots=True)
class KeyIndex:
    """Keys as two 64-bit halves in rising order, and where each one's record lies: 24 bytes a record; keys may repeat.

    A place is the number of a shard and, in its lower 32 bits, an offset in the shard's index.
    """

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    place: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, keys: npt.NDArray[np.void], places: npt.NDArray[np.uint64]) -> KeyIndex:
        """Return some keys (dtype V16), unsorted."""
        halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)
        return cls(halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64), places)

    @classmethod
    def joined(cls, parts: Iterable[KeyIndex]) -> KeyIndex:
        """Sort several into one; of equal keys those of earlier parts come first."""
        parts = [*parts]
        high, low, place = (
            np.concatenate([np.zeros(0, np.uint64), *(getattr(part, name) for part in parts)])
            for name in ("high", "low", "place")
        )
        order = np.argsort(high, kind="stable")
        high = high[order]
        if (high[1:] == high[:-1]).any():
            order = np.lexsort((low, high_unsorted := np.concatenate([part.high for part in parts])))
            high = high_unsorted[order]
        return cls(high, low[order], place[order])

    def __len__(self) -> int:
        return len(self.high)

    def find(self, key: bytes) -> list[int]:
        """Return the places of a key's records."""
        high, low = HALVES.unpack(key)
        highs, found = memoryview(self.high), list[int]()  # type: ignore[arg-type]
        position = bisect_left(highs, high)
        while position < len(highs) and highs[position] == high:
            if self.low[position] == low:
                found.append(int(self.place[position]))
            position += 1
        return found

    def select(self, chosen: npt.NDArray[np.bool_]) -> KeyIndex:
        return self if chosen.all() else KeyIndex(self.high[chosen], self.low[chosen], self.place[chosen])

    def distinct(self) -> KeyIndex:
        """Keep the first record of each key."""
        repeats = (self.high[1:] == self.high[:-1]) & (self.low[1:] == self.low[:-1])
        return self.select(np.concatenate([np.ones(min(len(self), 1), bool), ~repeats]))

    def key(self, position: int) -> bytes:
        return HALVES.pack(int(self.high[position]), int(self.low[position]))


def empty_index() -> KeyIndex:
    return KeyIndex.joined([])


def joined(entries: Iterable[Entry]) -> Spans:
    """Return the spans of some entries."""
    return np.concatenate([np.zeros(0, SPAN_DTYPE), *(entry.spans for entry in entries)])


def places_of(number: int, entries: Sequence[Entry]) -> KeyIndex:
    """Return the keys of a shard's entries; those that a scan has found are placed one after the other."""
    row, keys, offsets = 0, [np.zeros(0, "V16")], [np.zeros(0, np.uint64)]
    for entry in entries:
        first = entry.offset if entry.offset >= 0 else SPAN.size * row
        offsets.append(np.arange(first, first + entry.spans.nbytes, SPAN.size, dtype=np.uint64))
        keys.append(entry.spans["key"])
        row += len(entry.spans)
    return KeyIndex.of(np.concatenate(keys), np.concatenate(offsets) + np.uint64(number << 32))
