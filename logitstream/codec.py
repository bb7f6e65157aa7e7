"""SparseTargets <-> bytes; the same bytes go over the wire and onto the disk. The format is docs/targets-format.md."""

from __future__ import annotations

import struct
import zlib

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

_HEADER = struct.Struct("<BBxxIIIII")
"""Version, flags, vocab_size, units, tail_units, rows, entries."""
_CHECKSUM = struct.Struct("<I")
_HAS_MODEL, _SUMS_TO_UNITS = 1, 2
_MODEL_DIGEST_BYTES = 4


def encode(targets: SparseTargets, *, version: int = 2, id_model: IdModel | None = None) -> bytes:
    """Return the targets as bytes; ValueError if they are no valid CSR or the id model is of another vocabulary."""
    if version not in CODEC_VERSIONS:
        raise ValueError(f"unknown codec version {version}: expected one of {CODEC_VERSIONS}")
    targets.validate(shape_only=True)
    lengths = np.diff(targets.row_offsets)
    flags, digest = 0, b""
    if version == 1:
        targets.validate()
        content = b"".join(array.astype("<u4").tobytes() for array in (lengths, targets.token_ids, targets.counts))
    else:
        if id_model is not None:
            if id_model.vocab_size != targets.vocab_size:
                raise ValueError(f"id model of {id_model.vocab_size} ids for targets over {targets.vocab_size}")
            flags, digest = _HAS_MODEL, _short_digest(id_model)
        flags |= _SUMS_TO_UNITS * _sums_to_units(targets, lengths)
        content = _encode_rows(targets, lengths, bool(flags & _SUMS_TO_UNITS), id_model)
    shape = (targets.vocab_size, targets.units, targets.tail_units, targets.num_rows, targets.num_entries)
    body = _HEADER.pack(version, flags, *shape) + digest + content
    body = body.ljust(-(-targets.num_entries // MAX_ENTRIES_PER_BYTE), b"\0")
    return body + _CHECKSUM.pack(zlib.crc32(body))


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
    body = _checked(payload)
    version, flags, found_vocab_size, units, tail_units, found_rows, num_entries = _HEADER.unpack_from(body)
    row_sum = units if flags & _SUMS_TO_UNITS else -1
    if flags & ~(_HAS_MODEL | _SUMS_TO_UNITS) or (version == 1 and flags):
        raise CodecError(f"unknown flags {flags} in the header of version {version}")
    if vocab_size not in (None, found_vocab_size):
        raise CodecError(f"expected targets over {vocab_size} ids, got {found_vocab_size}")
    if num_rows not in (None, found_rows):
        raise CodecError(f"expected {num_rows} rows, got {found_rows}")
    _check_size(found_vocab_size, units, tail_units, found_rows if num_rows is None else 0)
    most = found_vocab_size if spec is None else spec.max_entries(found_vocab_size)
    most = min(most, units) if row_sum >= 0 else most
    if num_entries > found_rows * most or num_entries > len(body) * MAX_ENTRIES_PER_BYTE:
        raise CodecError(f"{num_entries} entries in {len(body)} bytes and {found_rows} rows of at most {most}")
    content = body[_HEADER.size :]
    if version == 1:
        lengths, token_ids, counts = _plain_rows(content, found_rows, num_entries)
    else:
        if flags & _HAS_MODEL:
            _check_model(bytes(content[:_MODEL_DIGEST_BYTES]), found_vocab_size, id_model)
            content = content[_MODEL_DIGEST_BYTES:]
        tables = id_model.tables if id_model is not None and flags & _HAS_MODEL else NO_TABLES
        lengths, token_ids, counts = _coded_rows(content, found_rows, num_entries, row_sum, found_vocab_size, tables)
    if (longest := lengths.max(initial=0)) > most:
        raise CodecError(f"expected rows of at most {most} entries, got one of {longest}")
    targets = SparseTargets(
        vocab_size=found_vocab_size,
        units=units,
        tail_units=tail_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        token_ids=token_ids,
        counts=counts,
        spec=spec,
    )
    return _valid(targets) if version == 1 else targets


def warm_up() -> None:
    """Compile what encode and decode need, at start and not in the first step.

    RuntimeError if the code does not give the bytes it must: numba's cache on disk may be another version's.
    """
    example = SparseTargets(
        vocab_size=1000,
        units=5,
        row_offsets=np.array([0, 2, 2, 3], np.int64),
        token_ids=np.array([3, 17, 999], np.int32),
        counts=np.array([4, 1, 5], np.int32),
    )
    payload = encode(example)
    if payload != EXAMPLE or not np.array_equal(decode(payload).counts, example.counts):
        raise RuntimeError(f"codec version 2 gives {payload.hex()}, expected {EXAMPLE.hex()}: clear numba's cache")


EXAMPLE = bytes.fromhex("02020000e803000005000000000000000300000003000000 c03c276da42e 6a577505")
"""The example of docs/targets-format.md."""


def _sums_to_units(targets: SparseTargets, lengths: npt.NDArray[np.int64]) -> bool:
    """Return whether all counts are positive and those of each row that has any sum to `units`."""
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets.counts, dtype=np.int64)])[targets.row_offsets]
    return (
        targets.num_entries > 0
        and targets.counts.min() > 0
        and bool(np.array_equal(np.diff(ends), np.where(lengths > 0, targets.units, 0)))
    )


def _encode_rows(
    targets: SparseTargets, lengths: npt.NDArray[np.int64], sums_to_units: bool, id_model: IdModel | None
) -> bytes:
    tables = NO_TABLES if id_model is None else id_model.tables
    space = 4 * (targets.num_entries + targets.num_rows) + 2 * MAX_ENTRY_BYTES
    while True:
        out = np.empty(space, np.uint8)
        rows = lengths, targets.token_ids, targets.counts
        num_bytes = encode_rows(out, rows, targets.units if sums_to_units else -1, targets.vocab_size, tables)
        if num_bytes >= 0:
            return out[:num_bytes].tobytes()
        if num_bytes != OUT_OF_SPACE:
            targets.validate()
            raise AssertionError("the coder refuses valid targets")
        space *= 2


def _check_size(vocab_size: int, units: int, tail_units: int, num_rows: int) -> None:
    if num_rows > MAX_ROWS:
        raise CodecError(f"expected at most {MAX_ROWS} rows, got {num_rows}")
    if not (1 <= vocab_size <= MAX_VOCAB_SIZE and 1 <= units <= FULL_UNITS and tail_units <= units):
        raise CodecError(f"vocabulary of {vocab_size}, {units} units or {tail_units} tail units out of bounds")


def _coded_rows(
    content: memoryview, num_rows: int, num_entries: int, row_sum: int, vocab_size: int, tables: IdTables
) -> Rows:
    rows = np.zeros(num_rows, np.int64), np.zeros(num_entries, np.int32), np.zeros(num_entries, np.int32)
    padded = np.zeros(len(content) + 8, np.uint8)
    padded[: len(content)] = content
    if decode_rows(padded, rows, row_sum, vocab_size, tables):
        raise CodecError(f"the bytes hold no {num_rows} rows of {num_entries} entries in all")
    return rows


def _plain_rows(content: memoryview, num_rows: int, num_entries: int) -> Rows:
    if len(content) != 4 * num_rows + 8 * num_entries:
        raise CodecError(f"{num_rows} rows and {num_entries} entries do not fit {len(content)} bytes")
    lengths, token_ids, counts = np.split(np.frombuffer(content, "<u4"), [num_rows, num_rows + num_entries])
    if num_entries and max(token_ids.max(), counts.max()) > np.iinfo(np.int32).max:
        raise CodecError("a token id or count exceeds 31 bits")
    return lengths.astype(np.int64), token_ids.astype(np.int32), counts.astype(np.int32)


def _valid(targets: SparseTargets) -> SparseTargets:
    try:
        targets.validate()
    except ValueError as error:
        raise CodecError(f"not a valid CSR: {error}") from error
    return targets


def _checked(payload: bytes) -> memoryview:
    """Return the payload without its checksum, not copied: strangers' payloads may be large."""
    if len(payload) < _HEADER.size + _CHECKSUM.size:
        raise CodecError(f"{len(payload)} bytes are too few for encoded targets")
    body = memoryview(payload)[: -_CHECKSUM.size]
    if body[0] not in CODEC_VERSIONS:
        raise CodecError(f"unknown codec version {body[0]}: expected one of {CODEC_VERSIONS}")
    if _CHECKSUM.unpack(payload[-_CHECKSUM.size :])[0] != zlib.crc32(body):
        raise CodecError("the checksum does not match: damaged bytes")
    return body


def _short_digest(id_model: IdModel) -> bytes:
    return bytes.fromhex(id_model.digest)[:_MODEL_DIGEST_BYTES]


def _check_model(digest: bytes, vocab_size: int, id_model: IdModel | None) -> None:
    if id_model is None:
        raise CodecError(f"the targets need the id model {digest.hex()}: none is at hand")
    if _short_digest(id_model) != digest:
        raise CodecError(f"the targets need the id model {digest.hex()}, at hand is {id_model.digest}")
    if vocab_size != id_model.vocab_size:
        raise CodecError(f"targets over {vocab_size} ids coded with a model of {id_model.vocab_size}")
