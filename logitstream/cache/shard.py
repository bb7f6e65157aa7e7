"""The format of a shard: an Arrow IPC stream of records, each with its own checksum.

A shard holds the schema message, whole record-batch messages and, once sealed, the end-of-stream marker, so any Arrow
reader opens it. Reading a record needs no Arrow: its span says where its bytes lie. The checksum covers all of the
record's content, so a wrong span or a flipped byte anywhere is noticed before the record is used.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import FORMAT, Manifest
from logitstream.errors import CorruptRecord
from logitstream.types import pack_mask, unpack_mask

OPEN_SUFFIX = ".open"
KEY_BYTES = 16
MAX_SHARD_BYTES = 1 << 31
"""Spans are 32-bit offsets."""
SMALL_VOCABULARY = 1 << 16
"""Token ids of vocabularies up to this size take 2 bytes, those of larger ones 4."""
CONTINUATION = b"\xff\xff\xff\xff"
END_OF_STREAM = CONTINUATION + bytes(4)
ARROW_ERRORS = (pa.ArrowException, OSError, EOFError, MemoryError)

HEAD = struct.Struct("<QQII")
SPAN = struct.Struct("<16s6I3Q")
SPAN_DTYPE = np.dtype(
    [("key", "V16")]
    + [(f"{part}_{name}", "<u4") for part in ("payload", "tokens", "mask") for name in ("start", "bytes")]
    + [("draw_set", "<u8"), ("teacher_version", "<u8"), ("checksum", "<u8")]
)
Spans = npt.NDArray[np.void]


class Record(NamedTuple):
    """One sequence: key, int32 token ids [T], bool mask [T] (None: all rows), encoded targets, and which draw it is."""

    key: bytes
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_] | None
    payload: bytes
    draw_set: int
    teacher_version: int = 0


class Span(NamedTuple):
    """The places of a record's parts in its shard, and the rest of its content."""

    key: bytes
    payload_start: int
    payload_bytes: int
    tokens_start: int
    tokens_bytes: int
    mask_start: int
    mask_bytes: int
    draw_set: int
    teacher_version: int
    checksum: int


class Parts(NamedTuple):
    """The bytes of a record as they are stored."""

    tokens: bytes
    mask: bytes
    payload: bytes


class Message(NamedTuple):
    """A whole message in a shard: a record batch, or the schema, which has no spans."""

    start: int
    content: pa.Buffer
    spans: Spans


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= SMALL_VOCABULARY else "<i4")


def columns_schema(dtype: np.dtype[Any]) -> pa.Schema:
    """Return the columns of a shard whose token ids are of this type."""
    types = {
        "key": pa.binary(KEY_BYTES),
        "token_ids": pa.list_(pa.from_numpy_dtype(dtype)),
        "loss_mask": pa.binary(),
        "payload": pa.binary(),
        "draw_set": pa.uint64(),
        "teacher_version": pa.uint64(),
        "checksum": pa.uint64(),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def shard_schema(manifest: Manifest) -> pa.Schema:
    """Return the schema of every shard of a cache; its metadata names the fingerprint and the provenance."""
    named = {
        "format": FORMAT,
        "fingerprint": asdict(manifest.fingerprint),
        "fingerprint_digest": manifest.fingerprint.digest,
        "provenance": manifest.provenance,
    }
    schema = columns_schema(token_dtype(manifest.fingerprint.vocab_size))
    return schema.with_metadata({"logitstream": json.dumps(named, sort_keys=True)})


def read_head(path: Path) -> tuple[pa.Schema | None, int]:
    """Return the schema at the head of a file and where it ends; None and 0 if none can be read there."""
    try:
        with pa.OSFile(str(path)) as file:
            return pa.ipc.read_schema(file), int(file.tell())
    except ARROW_ERRORS:
        return None, 0


def head_bytes(path: Path, schema: pa.Schema) -> int:
    """Return the size of a shard's schema message; 0 if it does not hold exactly this schema."""
    found, end = read_head(path)
    return end if found is not None and found.equals(schema, check_metadata=True) else 0


def checksum(key: bytes, parts: Parts, draw_set: int, teacher_version: int) -> int:
    """Hash a record: XXH3 (64 bits) of the payload, seeded by that of the mask, of the tokens and of the head.

    The head is the key and `<QQII`: draw set, teacher version, bytes of the tokens and of the mask.
    """
    head = key + HEAD.pack(draw_set, teacher_version, len(parts.tokens), len(parts.mask))
    return int(xxh3(parts.payload, xxh3(parts.mask, xxh3(parts.tokens, xxh3(head)))))


def read_parts(fd: int, span: Span) -> Parts:
    """Read a record from its shard; CorruptRecord if it does not match its checksum, OSError if it cannot be read.

    Shards are read with pread, never mapped: a page that a failing disk or a truncated file cannot fill would kill the
    process with SIGBUS.
    """
    mask = os.pread(fd, span.mask_bytes, span.mask_start) if span.mask_bytes else b""
    tokens = os.pread(fd, span.tokens_bytes, span.tokens_start)
    parts = Parts(tokens, mask, os.pread(fd, span.payload_bytes, span.payload_start))
    found = checksum(span.key, parts, span.draw_set, span.teacher_version)
    if found != span.checksum:
        raise CorruptRecord(f"record {span.key.hex()}: expected checksum {span.checksum:016x}, got {found:016x}")
    return parts


def unpack_record(span: Span, parts: Parts, dtype: np.dtype[Any]) -> Record:
    token_ids = np.frombuffer(parts.tokens, dtype).astype(np.int32, copy=False)
    mask = unpack_mask(parts.mask, len(token_ids))
    return Record(span.key, token_ids, mask, parts.payload, span.draw_set, span.teacher_version)


def encode_batch(records: Sequence[Record], schema: pa.Schema) -> pa.Buffer:
    """Return one record-batch message."""
    dtype = schema.field("token_ids").type.value_type.to_pandas_dtype()
    parts = [
        Parts(np.asarray(record.token_ids, dtype).tobytes(), pack_mask(record.loss_mask), record.payload)
        for record in records
    ]
    tokens = np.frombuffer(b"".join(part.tokens for part in parts), dtype)
    offsets = np.cumsum([0, *(len(record.token_ids) for record in records)], dtype=np.int32)
    checksums = [
        checksum(record.key, part, record.draw_set, record.teacher_version)
        for record, part in zip(records, parts, strict=True)
    ]
    columns = [
        pa.array([record.key for record in records], pa.binary(KEY_BYTES)),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
        pa.array([part.mask for part in parts], pa.binary()),
        pa.array([part.payload for part in parts], pa.binary()),
        pa.array([record.draw_set for record in records], pa.uint64()),
        pa.array([record.teacher_version for record in records], pa.uint64()),
        pa.array(checksums, pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema).serialize()


def spans_of(message: pa.Buffer, start: int, schema: pa.Schema) -> Spans:
    """Return the spans of a record-batch message that lies at `start` in its shard; CorruptRecord if it is broken."""
    try:
        batch = pa.ipc.read_record_batch(message, schema)
    except ARROW_ERRORS as error:
        raise CorruptRecord(f"record batch at byte {start} cannot be read: {error}") from error
    spans = np.zeros(batch.num_rows, SPAN_DTYPE)
    token_bytes = schema.field("token_ids").type.value_type.bit_width // 8
    for part, column in (("payload", "payload"), ("tokens", "token_ids"), ("mask", "loss_mask")):
        buffers, unit = batch.column(column).buffers(), token_bytes if part == "tokens" else 1
        offsets = unit * _numbers(buffers[1], "<i4", batch.num_rows + 1).astype(np.int64)
        data, sizes = buffers[-1], np.diff(offsets)
        available = data.size if data is not None else 0
        if len(sizes) and (offsets[0] < 0 or sizes.min() < 0 or offsets[-1] > available):
            raise CorruptRecord(f"record batch at byte {start}: offsets of {column} leave their column")
        spans[f"{part}_start"] = (start + data.address - message.address if available else 0) + offsets[:-1]
        spans[f"{part}_bytes"] = sizes
    for column in ("draw_set", "teacher_version", "checksum"):
        spans[column] = _numbers(batch.column(column).buffers()[1], "<u8", batch.num_rows)
    spans["key"] = _numbers(batch.column("key").buffers()[1], "V16", batch.num_rows)
    return spans


def _numbers(buffer: pa.Buffer | None, dtype: str, count: int) -> npt.NDArray[Any]:
    if buffer is None or buffer.size < count * np.dtype(dtype).itemsize:
        raise CorruptRecord(f"a column's buffer is shorter than its {count} values")
    return np.frombuffer(buffer, dtype, count)


def scan(path: Path, schema: pa.Schema, start: int = 0) -> Iterator[Message]:
    """Yield the record batches from byte `start` on, up to the first that cannot be read."""
    with pa.OSFile(str(path)) as file:
        while True:
            file.seek(start)
            try:
                message = pa.ipc.read_message(file)
                stop = int(file.tell())
                file.seek(start)
                content = file.read_buffer(stop - start)
                if message.type == "record batch":
                    yield Message(start, content, spans_of(content, start, schema))
            except (*ARROW_ERRORS, CorruptRecord):  # the end too
                return
            start = stop
