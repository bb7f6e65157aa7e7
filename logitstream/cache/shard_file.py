"""Reading a shard: single records with pread, many in order through a memory map.

A page that cannot be read (a failing disk, a file cut off by somebody) would raise SIGBUS where it is touched, which
kills the process. So each block of the map is populated first: MADV_POPULATE_READ (Linux 5.14) answers with an error
instead. Where there is no such call, or it fails, records are read singly. Pages are let go of block by block, so that
the resident size stays flat.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import INDEX_HEADER
from logitstream.cache.shard import HEAD, SPAN, Record, Spans, checksum, unpack_record
from logitstream.errors import CorruptRecord

MADV_POPULATE_READ = 22
"""Of Linux; Python 3.11's mmap does not name it."""
BLOCK_BYTES = 1 << 20
PAGE_MASK = ~(mmap.PAGESIZE - 1)

Parts = tuple[bytes, bytes, bytes]
"""Token bytes, mask bytes and payload of a record."""


class ShardFile:
    """A shard and its index, open for reading; closed once nobody holds it any more."""

    def __init__(self, path: str, *, index: str | None = None, spans: Spans | None = None) -> None:
        """index: path of a sealed shard's index; spans: what takes its place where it is damaged."""
        self._fd = self._index = -1
        self._spans = spans
        self._fd = os.open(path, os.O_RDONLY)
        if index is not None and spans is None:
            self._index = os.open(index, os.O_RDONLY)

    def __del__(self) -> None:
        for fd in (self._fd, self._index):
            if fd >= 0:
                os.close(fd)

    def span(self, row: int) -> tuple[Any, ...]:
        """SPAN's fields of a record; CorruptRecord where the index has been cut off."""
        if self._spans is not None:
            return SPAN.unpack(self._spans[row].tobytes())
        content = os.pread(self._index, SPAN.size, INDEX_HEADER.size + SPAN.size * row)
        if len(content) != SPAN.size:
            raise CorruptRecord("the index is cut off")
        return SPAN.unpack(content)

    def record(self, span: tuple[Any, ...]) -> Parts:
        """The record of a span; CorruptRecord where its bytes do not match its checksum, OSError where none come."""
        key, at, num_bytes, tokens_at, num_tokens, mask_at, mask_bytes, draw_set, version, wanted = span
        tokens = os.pread(self._fd, 4 * num_tokens, tokens_at)
        mask = os.pread(self._fd, mask_bytes, mask_at) if mask_bytes else b""
        payload = os.pread(self._fd, num_bytes, at)
        found = checksum(key, tokens, mask, payload, draw_set, version)
        if found != wanted or len(payload) != num_bytes:
            raise CorruptRecord(f"record {key.hex()}: expected checksum {wanted:016x}, got {found:016x}")
        return tokens, mask, payload

    def records(self, spans: Spans) -> Iterator[tuple[bytes, Record | None]]:
        """Each span's key and record, or None where that is damaged; fastest in the file's order."""
        size = os.fstat(self._fd).st_size
        content = mmap.mmap(self._fd, size, prot=mmap.PROT_READ) if size else None
        start = stop = 0
        for span in SPAN.iter_unpack(spans.tobytes()):
            key, at, num_bytes, tokens_at, num_tokens, mask_at, mask_bytes, draw_set, version, wanted = span
            end = at + num_bytes
            if content is not None and not start <= tokens_at <= end <= stop:
                start, stop = tokens_at, min(max(end, tokens_at + BLOCK_BYTES), size)
                if not _populate(content, start, stop):
                    content = None
            if content is not None and start <= tokens_at <= end <= stop:
                tokens = content[tokens_at : tokens_at + 4 * num_tokens]
                mask = content[mask_at : mask_at + mask_bytes] if mask_bytes else b""
                payload = content[at:end]
                head = key + HEAD.pack(draw_set, version, 4 * num_tokens, mask_bytes)
                if xxh3(payload, xxh3(mask, xxh3(tokens, xxh3(head)))) == wanted:  # `checksum`, without the call
                    yield key, unpack_record(span, tokens, mask, payload)
                    continue
            try:
                yield key, unpack_record(span, *self.record(span))
            except (CorruptRecord, OSError):
                yield key, None


def _populate(content: mmap.mmap, start: int, stop: int) -> bool:
    """Let go of the pages before a block and bring the block's in; whether that was possible."""
    first = start & PAGE_MASK
    if stop <= start:
        return False
    try:
        content.madvise(mmap.MADV_DONTNEED)
        content.madvise(MADV_POPULATE_READ, first, stop - first)
    except (OSError, ValueError):
        return False
    return True
