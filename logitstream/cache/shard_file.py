"""Reading a shard: single records by their spans, or many in order block by block.

All reading is pread: a page of a memory map that cannot be read (a failing disk, a file that somebody cuts off) kills
the process with SIGBUS, a failing pread is an error like any other, and what was read stays out of the resident size.

Beside the copy out of the page cache, what Python does for a record takes longer than its checksum: where many are
read, as much as possible is done in numpy or inside `map` and `zip`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, pairwise, repeat
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import INDEX_HEADER
from logitstream.cache.shard import HEAD, SPAN, TOKEN_DTYPES, Record, Spans, heads_of, unpack_mask, unpack_record
from logitstream.errors import CorruptRecord

BLOCK_BYTES = 1 << 19
LARGE_BYTES = 1 << 16
"""Records of this size are a block each, whose payload is not copied out of it."""
SPANS_AT_A_TIME = 4096

Span = tuple[Any, ...]
"""SPAN's fields of a record, in order."""
Row = int | Span
"""Number of a record in a sealed shard, or the span of one in an open shard."""
Parts = tuple[bytes, bytes, bytes]
"""Token bytes, mask bytes and payload of a record."""
Range = tuple[int, int]
"""First byte and number of bytes."""


class ShardFile:
    """A shard and its index, open for reading; closed once nobody holds it any more."""

    def __init__(self, path: str, width: int, *, index: str | None = None, spans: Spans | None = None) -> None:
        """width: bytes of a token id; index: path of a sealed shard's; spans: what takes its place if it is damaged."""
        self.fd = self.index = -1
        self.width = width
        self._spans = spans
        self.fd = os.open(path, os.O_RDONLY)
        if index is not None and spans is None:
            self.index = os.open(index, os.O_RDONLY)

    def __del__(self) -> None:
        for fd in (self.fd, self.index):
            if fd >= 0:
                os.close(fd)

    def span(self, row: Row) -> Span:
        """SPAN's fields of a record; CorruptRecord where the index has been cut off."""
        if isinstance(row, tuple):
            return row
        if self._spans is not None:
            return SPAN.unpack(self._spans[row].tobytes())
        content = os.pread(self.index, SPAN.size, INDEX_HEADER.size + SPAN.size * row)
        if len(content) != SPAN.size:
            raise CorruptRecord("the index is cut off")
        return SPAN.unpack(content)

    def record(self, span: Span) -> Parts:
        """The record of a span; CorruptRecord where its bytes do not match its checksum, OSError where none come."""
        key, at, num_bytes, tokens_at, num_tokens, mask_at, mask_bytes, draw_set, version, wanted = span
        tokens = os.pread(self.fd, self.width * num_tokens, tokens_at)
        mask = os.pread(self.fd, mask_bytes, mask_at) if mask_bytes else b""
        payload = os.pread(self.fd, num_bytes, at)
        head = key + HEAD.pack(draw_set, version, len(tokens), mask_bytes)
        found = xxh3(payload, xxh3(mask, xxh3(tokens, xxh3(head))))  # `checksum`, without the call
        if found != wanted:
            raise CorruptRecord(f"record {key.hex()}: expected checksum {wanted:016x}, got {found:016x}")
        return tokens, mask, payload

    def records(self, spans: Spans, damaged: Callable[[int], object]) -> Iterator[Record]:
        """The undamaged records of spans, fastest in the file's order; `damaged` is told the rows of the others.

        Token ids of neighbours may be views of one array, of up to BLOCK_BYTES.
        """
        new_record = tuple.__new__  # half of what Record(…) takes
        for start in range(0, len(spans), SPANS_AT_A_TIME):
            for ranges, rows in _blocks(spans[start : start + SPANS_AT_A_TIME], start, self.width):
                try:
                    token_bytes, masks, payloads = map(self._read, ranges)
                except OSError:
                    yield from self._one_by_one(spans, [row[0] for row in rows], damaged)
                    continue
                stored: Any = np.frombuffer(token_bytes, TOKEN_DTYPES[self.width])
                tokens: Any = stored.astype(np.int32, copy=False)
                mask, loss_mask = b"", None
                for row, key, t0, t1, mask_ends, p0, p1, draw_set, version, seed, wanted in rows:
                    token_ids, payload = tokens[t0:t1], payloads[p0:p1]
                    if masks:
                        mask = masks[slice(*mask_ends)]
                        loss_mask = unpack_mask(mask, t1 - t0) if mask else None
                    if xxh3(payload, xxh3(mask, xxh3(stored[t0:t1], seed))) == wanted:  # `checksum`, without the calls
                        yield new_record(Record, (key, token_ids, loss_mask, payload, draw_set, version))
                    else:
                        damaged(row)

    def _one_by_one(self, spans: Spans, rows: list[int], damaged: Callable[[int], object]) -> Iterator[Record]:
        for row in rows:
            span = SPAN.unpack(spans[row].tobytes())
            try:
                yield unpack_record(span, *self.record(span))
            except (CorruptRecord, OSError):
                damaged(row)

    def _read(self, part: Range) -> bytes:
        """All of a range; OSError where the file ends before it does."""
        start, size = part
        content = os.pread(self.fd, size, start) if size else b""
        if len(content) != size:
            raise OSError(f"expected {size} bytes from {start} on, got {len(content)}")
        return content


def read_spans(files: Sequence[ShardFile], rows: Sequence[Row]) -> list[Span]:
    """As `span` of each file and row."""
    indexes = [file.index for file in files]
    if min(indexes) < 0:
        return list(map(ShardFile.span, files, rows))
    offsets = [INDEX_HEADER.size + SPAN.size * row for row in rows]  # type: ignore[operator]  # numbers: it is sealed
    try:
        return list(map(SPAN.unpack, map(os.pread, indexes, repeat(SPAN.size), offsets)))
    except struct.error as error:
        raise CorruptRecord("an index is cut off") from error


def payloads(keys: Sequence[bytes], located: Sequence[tuple[ShardFile, Span] | None]) -> Iterator[bytes | None]:
    """Each key's payload as it is read; None where nothing is located, or what lies there is damaged or another's."""
    pread, pack = os.pread, HEAD.pack
    for wanted_key, one in zip(keys, located, strict=True):
        payload = None
        if one is not None and one[1][0] == wanted_key:
            file, (key, at, num_bytes, tokens_at, num_tokens, mask_at, mask_bytes, draw_set, version, wanted) = one
            fd, token_bytes = file.fd, file.width * num_tokens
            try:
                seed = xxh3(
                    pread(fd, token_bytes, tokens_at), xxh3(key + pack(draw_set, version, token_bytes, mask_bytes))
                )
                seed = xxh3(pread(fd, mask_bytes, mask_at) if mask_bytes else b"", seed)
                payload = pread(fd, num_bytes, at)
                if xxh3(payload, seed) != wanted:  # `checksum`, without the calls
                    payload = None
            except OSError:
                payload = None
        yield payload


def _blocks(
    spans: Spans, first_row: int, width: int
) -> Iterator[tuple[tuple[Range, Range, Range], Iterator[tuple[Any, ...]]]]:
    """Cut spans into blocks: where a block's tokens, masks and payloads lie, and what to take out of them.

    A row is its number, key, the ends of its tokens, mask and payload within the block's, draw set, version, hash of
    its head, and checksum.
    """
    cuts = _cuts(spans, width)
    token_ranges, *token_ends = _within(spans, "tokens", cuts, width=width)
    mask_ranges, *mask_ends = _within(spans, "mask", cuts)
    payload_ranges, *payload_ends = _within(spans, "payload", cuts)
    masks = zip(*mask_ends, strict=True) if spans["mask_count"].any() else repeat((0, 0))
    rest = (spans[name].tolist() for name in ("draw_set", "teacher_version"))
    seeds, wanted = map(xxh3, heads_of(spans, width)), spans["checksum"].tolist()
    ends = (*token_ends, masks, *payload_ends)
    rows = zip(count(first_row), spans["key"].tolist(), *ends, *rest, seeds, wanted, strict=False)
    ranges = zip(token_ranges, mask_ranges, payload_ranges, strict=True)
    for (first, stop), block in zip(pairwise(cuts), ranges, strict=True):
        yield block, islice(rows, stop - first)


def _cuts(spans: Spans, width: int) -> list[int]:
    """First rows of the blocks, and the end: in a block tokens, masks and payloads each follow one another."""
    cut = np.zeros(len(spans) + 1, bool)
    size = np.zeros(len(spans), np.int64)
    for part, unit in (("tokens", width), ("mask", 1), ("payload", 1)):
        part_size = unit * spans[f"{part}_count"].astype(np.int64)
        cut[1:-1] |= (spans[f"{part}_start"] + part_size)[:-1] != spans[f"{part}_start"][1:]
        size += part_size
    cut[1:-1] |= np.diff(np.cumsum(size) // BLOCK_BYTES) > 0
    cut[:-1] |= size >= LARGE_BYTES
    cut[1:] |= size >= LARGE_BYTES
    cut[[0, -1]] = True
    cuts: list[int] = np.flatnonzero(cut).tolist()
    return cuts


def _within(spans: Spans, part: str, cuts: list[int], *, width: int = 1) -> tuple[list[Range], list[int], list[int]]:
    """Where each block's parts lie, and each record's first and last unit of `width` bytes within its block's."""
    starts = spans[f"{part}_start"].astype(np.int64)
    sizes = width * spans[f"{part}_count"].astype(np.int64)
    firsts, lasts = np.array(cuts[:-1]), np.array(cuts[1:]) - 1
    bases = starts[firsts]
    within = (starts - np.repeat(bases, np.diff(cuts))) // width
    block_sizes = starts[lasts] + sizes[lasts] - bases
    ranges = list(zip(bases.tolist(), block_sizes.tolist(), strict=True))
    return ranges, within.tolist(), (within + sizes // width).tolist()
