"""SparseTargets <-> bytes; the same bytes go over the wire and onto the disk. The format is docs/targets-format.md."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from logitstream.errors import CodecError
from logitstream.id_model import NO_TABLES, IdModel, IdTables
from logitstream.range_coder import MAX_ENTRY_BYTES, OUT_OF_SPACE, Rows, decode_rows, encode_rows
from logitstream.samplers import FULL_UNITS
from logitstream.types import CODEC_VERSIONS, MAX_VOCAB_SIZE, SparseTargets, TargetSpec

__all__ = ["IdModel", "decode", "encode", "warm_up"]

MAX_ENTRIES_PER_BYTE = 64
"""Bounds what a payload of a given length can make its reader allocate; the writer pads with zeros to keep to it."""
MAX_ROWS = 1 << 20
"""Rows of a payload if the reader does not know their number; a row can take less than a thousandth of a bit."""

_HEADER, _CHECKSUM = struct.Struct("<BBxxIIIII"), struct.Struct("<I")
_HAS_MODEL, _SUMS_TO_UNITS = 1, 2
_MODEL_DIGEST_BYTES = 4


class _Header(NamedTuple):
    version: int
    flags: int
    vocab_size: int
    units: int
    tail_units: int
    num_rows: int
    num_entries: int


def encode(targets: SparseTargets, *, version: int = 2, id_model: IdModel | None = None) -> bytes:
    """Return the targets as bytes; ValueError if they are no valid CSR or the id model is of another vocabulary."""
    if version not in CODEC_VERSIONS:
        raise ValueError(f"unknown codec version {version}: expected one of {CODEC_VERSIONS}")
    targets.validate(shape_only=version == 2)  # the coder looks at each entry
    lengths = np.diff(targets.row_offsets)
    flags = 0
    if version == 1:
        content = b"".join(array.astype("<u4").tobytes() for array in (lengths, targets.token_ids, targets.counts))
    else:
        if id_model is not None and id_model.vocab_size != targets.vocab_size:
            raise ValueError(f"id model of {id_model.vocab_size} ids for targets over {targets.vocab_size}")
        flags = _HAS_MODEL * (id_model is not None) | _SUMS_TO_UNITS * _sums_to_units(targets)
        content = b"" if id_model is None else bytes.fromhex(id_model.digest)[:_MODEL_DIGEST_BYTES]
        content += _encode_rows(targets, lengths, targets.units if flags & _SUMS_TO_UNITS else -1, id_model)
    shape = (targets.vocab_size, targets.units, targets.tail_units, targets.num_rows, targets.num_entries)
    body = _HEADER.pack(version, flags, *shape) + content
    body = body.ljust(-(-targets.num_entries // MAX_ENTRIES_PER_BYTE), b"\0")
    return body + _CHECKSUM.pack(zlib.crc32(body))


def _sums_to_units(targets: SparseTargets) -> bool:
    """Return whether all counts are positive and those of each row that has any sum to `units`."""
    if not targets.num_entries or targets.counts.min() <= 0:
        return False
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets.counts, dtype=np.int64)])[targets.row_offsets]
    return bool(np.array_equal(np.diff(ends), np.where(np.diff(targets.row_offsets) > 0, targets.units, 0)))


def _encode_rows(
    targets: SparseTargets, lengths: npt.NDArray[np.int64], row_sum: int, id_model: IdModel | None
) -> bytes:
    tables = NO_TABLES if id_model is None else id_model.tables
    space = 4 * (targets.num_entries + targets.num_rows) + 2 * MAX_ENTRY_BYTES
    while True:
        out = np.empty(space, np.uint8)
        rows = lengths, targets.token_ids, targets.counts
        num_bytes = encode_rows(out, rows, row_sum, targets.vocab_size, tables)
        if num_bytes >= 0:
            return out[:num_bytes].tobytes()
        if num_bytes != OUT_OF_SPACE:
            targets.validate()
            raise AssertionError("the coder refuses valid targets")
        space *= 2


def decode(
    payload: bytes,
    *,
    spec: TargetSpec | None = None,
    vocab_size: int | None = None,
    id_model: IdModel | None = None,
    num_rows: int | None = None,
) -> SparseTargets:
    """Return the targets that were encoded, with `spec`; what the reader expects bounds memory and time.

    spec bounds the entries of a row, num_rows are the sequence's tokens; for None the format's own limit holds.
    CodecError if the bytes are damaged, need another id model or hold anything but what is expected.
    """
    header, content = _opened(payload)
    if vocab_size not in (None, header.vocab_size):
        raise CodecError(f"expected targets over {vocab_size} ids, got {header.vocab_size}")
    if num_rows not in (None, header.num_rows):
        raise CodecError(f"expected {num_rows} rows, got {header.num_rows}")
    if num_rows is None and header.num_rows > MAX_ROWS:
        raise CodecError(f"expected at most {MAX_ROWS} rows, got {header.num_rows}")
    most = header.vocab_size if spec is None else spec.max_entries(header.vocab_size)
    most = min(most, header.units) if header.flags & _SUMS_TO_UNITS else most
    if header.num_entries > min(header.num_rows * most, len(payload) * MAX_ENTRIES_PER_BYTE):
        told = f"{header.num_entries} entries in {len(payload)} bytes and {header.num_rows} rows of at most {most}"
        raise CodecError(told)
    rows = _plain_rows(header, content) if header.version == 1 else _coded_rows(header, content, id_model)
    lengths, token_ids, counts = rows
    if (longest := lengths.max(initial=0)) > most:
        raise CodecError(f"expected rows of at most {most} entries, got one of {longest}")
    targets = SparseTargets(
        vocab_size=header.vocab_size,
        units=header.units,
        tail_units=header.tail_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        token_ids=token_ids,
        counts=counts,
        spec=spec,
    )
    if header.version == 1:
        try:
            targets.validate()
        except ValueError as error:
            raise CodecError(f"not a valid CSR: {error}") from error
    return targets


def _opened(payload: bytes) -> tuple[_Header, memoryview]:
    """Return the header and what is between it and the checksum, not copied: strangers' payloads may be large."""
    if len(payload) < _HEADER.size + _CHECKSUM.size:
        raise CodecError(f"{len(payload)} bytes are too few for encoded targets")
    body = memoryview(payload)[: -_CHECKSUM.size]
    header = _Header(*_HEADER.unpack_from(body))
    if header.version not in CODEC_VERSIONS:
        raise CodecError(f"unknown codec version {header.version}: expected one of {CODEC_VERSIONS}")
    if _CHECKSUM.unpack(payload[-_CHECKSUM.size :])[0] != zlib.crc32(body):
        raise CodecError("the checksum does not match: damaged bytes")
    if header.flags > (0 if header.version == 1 else _HAS_MODEL | _SUMS_TO_UNITS):
        raise CodecError(f"unknown flags {header.flags} in the header of version {header.version}")
    fits = 1 <= header.vocab_size <= MAX_VOCAB_SIZE and 1 <= header.units <= FULL_UNITS
    if not fits or header.tail_units > header.units:
        raise CodecError(f"vocabulary, units or tail units out of bounds: {header}")
    return header, body[_HEADER.size :]


def _plain_rows(header: _Header, content: memoryview) -> Rows:
    if len(content) != 4 * header.num_rows + 8 * header.num_entries:
        raise CodecError(f"{header.num_rows} rows and {header.num_entries} entries do not fit {len(content)} bytes")
    numbers = np.frombuffer(content, "<u4")
    lengths, token_ids, counts = np.split(numbers, [header.num_rows, header.num_rows + header.num_entries])
    if numbers.max(initial=0) > np.iinfo(np.int32).max:
        raise CodecError("a length, token id or count exceeds 31 bits")
    return lengths.astype(np.int64), token_ids.astype(np.int32), counts.astype(np.int32)


def _coded_rows(header: _Header, content: memoryview, id_model: IdModel | None) -> Rows:
    tables = NO_TABLES
    if header.flags & _HAS_MODEL:
        tables = _tables(content[:_MODEL_DIGEST_BYTES].hex(), header.vocab_size, id_model)
        content = content[_MODEL_DIGEST_BYTES:]
    num_rows, num_entries = header.num_rows, header.num_entries
    rows = np.zeros(num_rows, np.int64), np.zeros(num_entries, np.int32), np.zeros(num_entries, np.int32)
    padded = np.zeros(len(content) + 8, np.uint8)
    padded[: len(content)] = content
    row_sum = header.units if header.flags & _SUMS_TO_UNITS else -1
    if decode_rows(padded, rows, row_sum, header.vocab_size, tables):
        raise CodecError(f"the bytes hold no {num_rows} rows of {num_entries} entries in all")
    return rows


def _tables(digest: str, vocab_size: int, id_model: IdModel | None) -> IdTables:
    """Return the tables of the id model of this digest and vocabulary; CodecError if it is not the one at hand."""
    if id_model is None or not id_model.digest.startswith(digest) or vocab_size != id_model.vocab_size:
        at_hand = "none" if id_model is None else f"{id_model.digest} of {id_model.vocab_size} ids"
        raise CodecError(f"the targets need the id model {digest} of {vocab_size} ids, at hand is {at_hand}")
    return id_model.tables


EXAMPLE = bytes.fromhex("02020000e803000005000000000000000300000003000000 c03c276da42e 6a577505")
"""The example of docs/targets-format.md."""


def warm_up() -> None:
    """Compile what encode and decode need, at start and not in the first step.

    RuntimeError if the code does not give the bytes it must: numba's cache on disk may be another version's.
    """
    payload = encode(decode(EXAMPLE))
    if payload != EXAMPLE:
        raise RuntimeError(f"codec version 2 gives {payload.hex()}, expected {EXAMPLE.hex()}: clear numba's cache")
