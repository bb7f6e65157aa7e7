"""The index of a shard: a log of where its records lie.

A writer appends an entry to `<shard>.index` after each record batch: a header with the batch's place and checksum, and
one span a record. Readers follow the log; a torn or damaged entry ends it. The first entry is that of the schema. The
shard alone is enough to make its index again, byte for byte.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import Manifest
from logitstream.cache.shard import END_OF_STREAM, NO_SPANS, SPAN, SPAN_DTYPE, Spans, scan, shard_schema
from logitstream.errors import CacheError

FILE_HEAD = struct.Struct("<8s32s")
"""Magic, and the digest of the fingerprint."""
MAGIC = b"LSINDEX3"
ENTRY_HEAD = struct.Struct("<III")
"""Number of records, first byte and end of a message in the shard."""
ENTRY_SUMS = struct.Struct("<QQ")
"""XXH3 of the message, XXH3 of the entry without this."""
ENTRY_BYTES = ENTRY_HEAD.size + ENTRY_SUMS.size


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
