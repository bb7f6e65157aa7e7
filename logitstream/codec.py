"""SparseTargets <-> bytes; the same bytes go over the wire and onto the disk. The format is docs/targets-format.md."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from logitstream.errors import CodecError
from logitstream.id_model import IdModel
from logitstream.types import FULL_UNITS, MAX_VOCAB_SIZE, SparseTargets

__all__ = ["IdModel", "decode", "decode_rows", "encode", "warm_up"]

_PLAIN_HEADER = struct.Struct("<BxxxIIIII")  # version, vocab_size, units, tail_units, rows, entries
_CHECKSUM = struct.Struct("<I")


def encode(targets: SparseTargets, *, version: int = 2, id_model: IdModel | None = None) -> bytes:
    """The targets as bytes; ValueError where they are no valid CSR."""
    targets.validate()
    header = _PLAIN_HEADER.pack(
        1, targets.vocab_size, targets.units, targets.tail_units, targets.num_rows, targets.num_entries
    )
    lengths = np.diff(targets.row_offsets).astype("<u4")
    body = (
        header + lengths.tobytes() + targets.token_ids.astype("<u4").tobytes() + targets.counts.astype("<u4").tobytes()
    )
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode(payload: bytes, *, id_model: IdModel | None = None) -> SparseTargets:
    """What was encoded; CodecError where the bytes are damaged, of an unknown version or need another id model."""
    if len(payload) < _PLAIN_HEADER.size + _CHECKSUM.size:
        raise CodecError(f"{len(payload)} bytes are too few for encoded targets")
    body = payload[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(payload[-_CHECKSUM.size :])[0] != zlib.crc32(body):
        raise CodecError("the checksum does not match: damaged bytes")
    version, vocab_size, units, tail_units, num_rows, num_entries = _PLAIN_HEADER.unpack_from(body)
    if version != 1:
        raise CodecError(f"unknown codec version {version}")
    if len(body) != _PLAIN_HEADER.size + 4 * num_rows + 8 * num_entries:
        raise CodecError(f"{num_rows} rows and {num_entries} entries do not fit {len(payload)} bytes")
    if vocab_size > MAX_VOCAB_SIZE or units > FULL_UNITS:
        raise CodecError(f"vocabulary of {vocab_size} or {units} units out of bounds")
    values = np.frombuffer(body, "<u4", offset=_PLAIN_HEADER.size).astype(np.int64)
    lengths, token_ids, counts = np.split(values, [num_rows, num_rows + num_entries])
    targets = SparseTargets(
        vocab_size=vocab_size,
        units=units,
        tail_units=tail_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        token_ids=token_ids.astype(np.int32),
        counts=counts.astype(np.int32),
    )
    try:
        targets.validate()
    except ValueError as error:
        raise CodecError(f"not a valid CSR: {error}") from error
    return targets


def decode_rows(payload: bytes, start: int, stop: int, *, id_model: IdModel | None = None) -> SparseTargets:
    """Rows start to stop of the encoded targets, without decoding the others where the version allows it."""
    return decode(payload, id_model=id_model).slice_rows(start, stop)


def warm_up() -> None:
    """Compile what encode and decode need, so that it happens at start and not in the first step."""
