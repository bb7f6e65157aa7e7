"""SparseTargets <-> bytes; the same bytes go over the wire and onto the disk. The format is docs/targets-format.md."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.errors import CodecError
from logitstream.id_model import IdModel, IdTables, uniform_tables
from logitstream.range_coder import MAX_ENTRY_BYTES, decode_block, encode_block, row_kind
from logitstream.samplers import FULL_UNITS
from logitstream.types import CODEC_VERSIONS, MAX_VOCAB_SIZE, SparseTargets, TargetSpec

__all__ = ["IdModel", "decode", "decode_rows", "encode", "varint", "warm_up"]

BLOCK_ROWS = 256
"""Rows of a version 2 block, which decodes alone."""
MAX_ENTRIES_PER_BYTE = 64
"""Bounds what a payload of a given length can make its reader allocate; the writer pads with zeros to keep to it."""
MAX_ROWS = 1 << 20
"""Of a payload whose number of rows the reader does not know; two bytes can stand for a whole block of empty rows."""

_PLAIN_HEADER = struct.Struct("<BxxxIIIII")  # version, vocab_size, units, tail_units, rows, entries
_CHECKSUM = struct.Struct("<I")
_HAS_MODEL, _SUMS_TO_UNITS = 1, 2
_MODEL_DIGEST_BYTES = 4
_EXAMPLE = bytes.fromhex("0202e80705000303 05c01e8fed61 9867775c")
"""That of docs/targets-format.md."""


def encode(targets: SparseTargets, *, version: int = 2, id_model: IdModel | None = None) -> bytes:
    """The targets as bytes; ValueError where they are no valid CSR or the id model is of another vocabulary."""
    sums_to_units = _checked_rows(targets)
    if version not in CODEC_VERSIONS:
        raise ValueError(f"unknown codec version {version}: expected one of {CODEC_VERSIONS}")
    body = _encode_plain(targets) if version == 1 else _encode_coded(targets, id_model, sums_to_units)
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode(
    payload: bytes,
    *,
    spec: TargetSpec | None = None,
    vocab_size: int | None = None,
    id_model: IdModel | None = None,
    num_rows: int | None = None,
) -> SparseTargets:
    """What was encoded, with `spec`; memory and time are bounded by what the reader says that it expects.

    spec: how the targets were drawn, which bounds the entries of a row; vocab_size: of the teacher; num_rows: tokens of
    the sequence. Where one is None the format's own limit holds (64 entries a byte, 2^24 ids, MAX_ROWS). CodecError
    where the bytes are damaged, of an unknown version, need another id model or hold anything but what is expected.
    """
    expected = _Expected(spec, vocab_size, num_rows)
    body = _checked(payload)
    if body[0] == 1:
        return _decode_plain(body, expected)
    header = _parse_header(body, id_model, expected)
    return _decode_blocks(body, header, 0, len(header.block_entries), id_model, expected)


def decode_rows(
    payload: bytes,
    start: int,
    stop: int,
    *,
    spec: TargetSpec | None = None,
    vocab_size: int | None = None,
    id_model: IdModel | None = None,
    num_rows: int | None = None,
) -> SparseTargets:
    """Rows start to stop, as in `decode`; version 2 decodes no more than the blocks that hold them."""
    expected = _Expected(spec, vocab_size, num_rows)
    body = _checked(payload)
    if body[0] == 1:
        targets = _decode_plain(body, expected)
        _check_rows(start, stop, targets.num_rows)
        return targets.slice_rows(start, stop)
    header = _parse_header(body, id_model, expected)
    _check_rows(start, stop, header.num_rows)
    first, last = start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)
    targets = _decode_blocks(body, header, min(first, last), last, id_model, expected)
    return targets.slice_rows(start - first * BLOCK_ROWS, stop - first * BLOCK_ROWS)


@dataclass(frozen=True, slots=True)
class _Expected:
    """What the reader knows of a payload before it looks inside; None: nothing."""

    spec: TargetSpec | None
    vocab_size: int | None
    num_rows: int | None

    def check_shape(self, vocab_size: int, num_rows: int) -> None:
        if self.vocab_size is not None and vocab_size != self.vocab_size:
            raise CodecError(f"expected targets over {self.vocab_size} ids, got {vocab_size}")
        if self.num_rows is not None and num_rows != self.num_rows:
            raise CodecError(f"expected {self.num_rows} rows, got {num_rows}")
        if self.num_rows is None and num_rows > MAX_ROWS:
            raise CodecError(f"expected at most {MAX_ROWS} rows, got {num_rows}")

    def most_entries(self, vocab_size: int) -> int:
        """Of a row."""
        return vocab_size if self.spec is None else self.spec.max_entries(vocab_size)

    def check_lengths(self, lengths: npt.NDArray[np.integer[Any]], vocab_size: int) -> None:
        """lengths [R]: entries of each row."""
        longest, most = lengths.max(initial=0), self.most_entries(vocab_size)
        if longest > most:
            raise CodecError(f"expected rows of at most {most} entries, got one of {longest}")


def _check_rows(start: int, stop: int, num_rows: int) -> None:
    if not 0 <= start <= stop <= num_rows:
        raise ValueError(f"expected rows within the {num_rows} that were encoded, got {start} to {stop}")


def warm_up() -> None:
    """Compile what encode and decode need, so that it happens at start and not in the first step.

    RuntimeError where the code does not give the bytes it must: numba's cache on disk may be another version's.
    """
    example = SparseTargets(
        vocab_size=1000,
        units=5,
        row_offsets=np.array([0, 2, 2, 3], np.int64),
        token_ids=np.array([3, 17, 999], np.int32),
        counts=np.array([4, 1, 5], np.int32),
    )
    payload = encode(example)
    if payload != _EXAMPLE or not np.array_equal(decode(payload).counts, example.counts):
        raise RuntimeError(f"codec version 2 gives {payload.hex()}, expected {_EXAMPLE.hex()}: clear numba's cache")


def _checked(payload: bytes) -> bytes:
    if len(payload) < 1 + _CHECKSUM.size:
        raise CodecError(f"{len(payload)} bytes are too few for encoded targets")
    body = payload[: -_CHECKSUM.size]
    if body[0] not in CODEC_VERSIONS:
        raise CodecError(f"unknown codec version {body[0]}: expected one of {CODEC_VERSIONS}")
    if _CHECKSUM.unpack(payload[-_CHECKSUM.size :])[0] != zlib.crc32(body):
        raise CodecError("the checksum does not match: damaged bytes")
    return body


def _encode_plain(targets: SparseTargets) -> bytes:
    header = _PLAIN_HEADER.pack(
        1, targets.vocab_size, targets.units, targets.tail_units, targets.num_rows, targets.num_entries
    )
    lengths = np.diff(targets.row_offsets)
    return header + b"".join(a.astype("<u4").tobytes() for a in (lengths, targets.token_ids, targets.counts))


def _decode_plain(body: bytes, expected: _Expected) -> SparseTargets:
    if len(body) < _PLAIN_HEADER.size:
        raise CodecError(f"{len(body)} bytes are too few for the header of version 1")
    _, vocab_size, units, tail_units, num_rows, num_entries = _PLAIN_HEADER.unpack_from(body)
    if len(body) != _PLAIN_HEADER.size + 4 * num_rows + 8 * num_entries:
        raise CodecError(f"{num_rows} rows and {num_entries} entries do not fit {len(body)} bytes")
    expected.check_shape(vocab_size, num_rows)
    values = np.frombuffer(body, "<u4", offset=_PLAIN_HEADER.size)
    lengths, token_ids, counts = np.split(values, [num_rows, num_rows + num_entries])
    expected.check_lengths(lengths, vocab_size)
    if num_entries and max(token_ids.max(), counts.max()) > np.iinfo(np.int32).max:
        raise CodecError("a token id or count exceeds 31 bits")
    targets = SparseTargets(
        vocab_size=vocab_size,
        units=units,
        tail_units=tail_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        token_ids=token_ids.astype(np.int32),
        counts=counts.astype(np.int32),
        spec=expected.spec,
    )
    try:
        targets.validate()
    except ValueError as error:
        raise CodecError(f"not a valid CSR: {error}") from error
    return targets


def _tables(vocab_size: int, id_model: IdModel | None) -> IdTables:
    return uniform_tables(vocab_size) if id_model is None else id_model.tables


def _encode_coded(targets: SparseTargets, id_model: IdModel | None, sums_to_units: bool) -> bytes:
    if id_model is not None and id_model.vocab_size != targets.vocab_size:
        raise ValueError(f"id model of {id_model.vocab_size} ids for targets over {targets.vocab_size}")
    tables = _tables(targets.vocab_size, id_model)
    blocks = [
        _encode_rows(targets, start, min(start + BLOCK_ROWS, targets.num_rows), sums_to_units, tables)
        for start in range(0, targets.num_rows, BLOCK_ROWS)
    ]
    shape = [targets.vocab_size, targets.units, targets.tail_units, targets.num_rows]
    header = bytes([2, _HAS_MODEL * (id_model is not None) | _SUMS_TO_UNITS * sums_to_units])
    if id_model is not None:
        header += bytes.fromhex(id_model.digest)[:_MODEL_DIGEST_BYTES]
    header += b"".join(map(varint, shape))
    header += b"".join(varint(num_entries) + varint(len(block)) for num_entries, block in blocks)
    body = header + b"".join(block for _, block in blocks)
    return body.ljust(-(-targets.num_entries // MAX_ENTRIES_PER_BYTE), b"\0")


def _checked_rows(targets: SparseTargets) -> bool:
    """Whether each row's counts are positive and sum to `units`, so that the last need not be told; ValueError as
    `validate` has it, which says what is wrong where the faster look here finds something.
    """
    arrays = targets.row_offsets, targets.token_ids, targets.counts
    kind = -1
    if 1 <= targets.vocab_size <= MAX_VOCAB_SIZE and 1 <= targets.units <= FULL_UNITS:
        kind = row_kind(*arrays, targets.vocab_size, targets.units)
    if kind < 0 or not 0 <= targets.tail_units <= targets.units:
        targets.validate()
    return kind == 1


def _encode_rows(
    targets: SparseTargets, start: int, stop: int, sums_to_units: bool, tables: IdTables
) -> tuple[int, bytes]:
    first, last = int(targets.row_offsets[start]), int(targets.row_offsets[stop])
    out = np.empty((last - first + stop - start + 1) * MAX_ENTRY_BYTES, np.uint8)
    num_bytes = encode_block(
        out,
        np.diff(targets.row_offsets[start : stop + 1]),
        targets.token_ids[first:last],
        targets.counts[first:last],
        targets.units if sums_to_units else -1,
        tables,
    )
    return last - first, out[:num_bytes].tobytes()


@dataclass(frozen=True, slots=True)
class _Header:
    """Of version 2. Block i codes block_entries[i] entries in bytes block_ends[i] to block_ends[i + 1] of the body."""

    vocab_size: int
    units: int
    tail_units: int
    num_rows: int
    sums_to_units: bool
    block_entries: list[int]
    block_ends: list[int]


def _parse_header(body: bytes, id_model: IdModel | None, expected: _Expected) -> _Header:
    flags = body[1] if len(body) > 1 else -1
    if not 0 <= flags <= (_HAS_MODEL | _SUMS_TO_UNITS):
        raise CodecError(f"unknown flags {flags} in the header of version 2")
    position = 2
    if flags & _HAS_MODEL:
        position += _MODEL_DIGEST_BYTES
        _check_model(body[2:position], id_model)
    (vocab_size, units, tail_units, num_rows), position = _read_varints(body, position, 4)
    if not (1 <= vocab_size <= MAX_VOCAB_SIZE and 1 <= units <= FULL_UNITS and tail_units <= units):
        raise CodecError(f"vocabulary of {vocab_size}, {units} units or {tail_units} tail units out of bounds")
    if flags & _HAS_MODEL and id_model is not None and vocab_size != id_model.vocab_size:
        raise CodecError(f"targets over {vocab_size} ids coded with a model of {id_model.vocab_size}")
    expected.check_shape(vocab_size, num_rows)
    index, position = _read_varints(body, position, 2 * -(-num_rows // BLOCK_ROWS))
    ends = list(accumulate(index[1::2], initial=position))
    num_entries = sum(index[::2])
    if len(body) != max(ends[-1], -(-num_entries // MAX_ENTRIES_PER_BYTE)):
        raise CodecError(f"{num_rows} rows and {num_entries} entries in {ends[-1]} bytes do not fit {len(body)} bytes")
    sums_to_units = bool(flags & _SUMS_TO_UNITS)
    most = expected.most_entries(vocab_size)
    most = min(most, units) if sums_to_units else most
    for number, promised in enumerate(index[::2]):  # before anything is allocated
        rows = min(BLOCK_ROWS, num_rows - number * BLOCK_ROWS)
        if promised > rows * most:
            raise CodecError(f"{promised} entries in block {number} of {rows} rows, of which none can have over {most}")
    return _Header(vocab_size, units, tail_units, num_rows, sums_to_units, index[::2], ends)


def _check_model(digest: bytes, id_model: IdModel | None) -> None:
    if id_model is None:
        raise CodecError(f"the targets need the id model {digest.hex()}: none is at hand")
    if bytes.fromhex(id_model.digest)[:_MODEL_DIGEST_BYTES] != digest:
        raise CodecError(f"the targets need the id model {digest.hex()}, at hand is {id_model.digest}")


def _decode_blocks(
    body: bytes, header: _Header, first: int, last: int, id_model: IdModel | None, expected: _Expected
) -> SparseTargets:
    """Blocks first to last."""
    tables = _tables(header.vocab_size, id_model if body[1] & _HAS_MODEL else None)
    num_rows = max(0, min(last * BLOCK_ROWS, header.num_rows) - first * BLOCK_ROWS)
    num_entries = sum(header.block_entries[first:last])
    lengths = np.zeros(num_rows, np.int64)
    token_ids, counts = np.empty(num_entries, np.int32), np.empty(num_entries, np.int32)
    data, entry = np.frombuffer(body, np.uint8), 0
    for i in range(first, last):
        row, stop = (i - first) * BLOCK_ROWS, entry + header.block_entries[i]
        is_whole = decode_block(
            data[header.block_ends[i] : header.block_ends[i + 1]],
            lengths[row : row + BLOCK_ROWS],
            token_ids[entry:stop],
            counts[entry:stop],
            header.units if header.sums_to_units else -1,
            tables,
        )
        if not is_whole:
            raise CodecError(f"block {i} of {len(header.block_entries)} holds no rows of {stop - entry} entries in all")
        entry = stop
    expected.check_lengths(lengths, header.vocab_size)
    return SparseTargets(
        vocab_size=header.vocab_size,
        units=header.units,
        tail_units=header.tail_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        token_ids=token_ids,
        counts=counts,
        spec=expected.spec,
    )


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _read_varints(body: bytes, position: int, number: int) -> tuple[list[int], int]:
    if number > len(body) - position:
        raise CodecError(f"{number} numbers expected at byte {position} of {len(body)}")
    values = []
    for _ in range(number):
        value, shift = 0, 0
        while True:
            if position >= len(body) or shift > 28:
                raise CodecError(f"no number at byte {position} of {len(body)}")
            value |= (body[position] & 127) << shift
            shift += 7
            position += 1
            if body[position - 1] < 128:
                break
        values.append(value)
    return values, position
