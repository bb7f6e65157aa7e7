"""Reading a shard: single records, or many in order block by block.

All reading is pread: a page of a memory map that cannot be read (a failing disk, a file that somebody cuts off) kills
the process with SIGBUS, a failing pread is an error like any other, and what was read stays out of the resident size.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import INDEX_HEADER
from logitstream.cache.shard import HEAD, SPAN, Record, Spans, checksum, unpack_record
from logitstream.errors import CorruptRecord

BLOCK_BYTES = 1 << 19

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
        block, ends = b"", _batch_ends(spans)
        start = stop = 0
        for span in SPAN.iter_unpack(spans.tobytes()):
            key, at, num_bytes, tokens_at, num_tokens, mask_at, mask_bytes, draw_set, version, wanted = span
            try:
                if not start <= tokens_at <= at + num_bytes <= stop and at + num_bytes - tokens_at <= BLOCK_BYTES:
                    i = bisect_right(ends, tokens_at + BLOCK_BYTES) - 1
                    size = ends[i] - tokens_at if i >= 0 and ends[i] >= at + num_bytes else BLOCK_BYTES
                    block = os.pread(self._fd, size, tokens_at)
                    start, stop = tokens_at, tokens_at + len(block)
                if start <= tokens_at <= at + num_bytes <= stop:
                    tokens = block[tokens_at - start : tokens_at - start + 4 * num_tokens]
                    mask = block[mask_at - start : mask_at - start + mask_bytes] if mask_bytes else b""
                    payload = block[at - start : at - start + num_bytes]
                    head = key + HEAD.pack(draw_set, version, 4 * num_tokens, mask_bytes)
                    if xxh3(payload, xxh3(mask, xxh3(tokens, xxh3(head)))) == wanted:  # `checksum`, without the call
                        yield key, unpack_record(span, tokens, mask, payload)
                        continue
                record: Record | None = unpack_record(span, *self.record(span))
            except (CorruptRecord, OSError):
                record = None
            yield key, record


def _batch_ends(spans: Spans) -> list[int]:
    """Where the record batches end: blocks that end there too hold nothing that the next one needs again."""
    ends = spans["payload_start"].astype(np.int64) + spans["payload_count"]
    last = np.append(spans["tokens_start"][1:] >= ends[:-1], True)[: len(ends)]
    found: list[int] = ends[last].tolist()
    return found
