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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.manifest import FORMAT, Manifest
from logitstream.errors import CorruptRecord
from logitstream.types import unpack_mask

OPEN_SUFFIX = ".open"
KEY_BYTES = 16
MAX_SHARD_BYTES = 1 << 31
"""Spans are 32-bit offsets."""
END_OF_STREAM = b"\xff\xff\xff\xff" + bytes(4)
ARROW_ERRORS = (pa.ArrowException, OSError, EOFError, MemoryError, ValueError, TypeError)

HEAD = struct.Struct("<QQII")
SPAN = struct.Struct("<16s6I3Q")
SPAN_DTYPE = np.dtype(
    [("key", "V16")]
    + [(f"{part}_{name}", "<u4") for part in ("payload", "tokens", "mask") for name in ("start", "bytes")]
    + [("draw_set", "<u8"), ("teacher_version", "<u8"), ("checksum", "<u8")]
)
Spans = npt.NDArray[np.void]
NO_SPANS: Spans = np.zeros(0, SPAN_DTYPE)


class Record(NamedTuple):
    """One sequence: key, int32 token ids [T], bool mask [T] (None: all rows), encoded targets, and which draw it is."""

    key: bytes
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_] | None
    payload: bytes
    draw_set: int
    teacher_version: int = 0


class Stored(NamedTuple):
    """A record as its bytes lie in its shard."""

    key: bytes
    tokens: bytes
    mask: bytes
    payload: bytes
    draw_set: int
    teacher_version: int

    def checksum(self) -> int:
        """Hash the record: XXH3 (64 bits) of the payload, seeded by that of the mask, of the tokens and of the head.

        The head is the key and `<QQII`: draw set, teacher version, bytes of the tokens and of the mask.
        """
        head = self.key + HEAD.pack(self.draw_set, self.teacher_version, len(self.tokens), len(self.mask))
        return int(xxh3(self.payload, xxh3(self.mask, xxh3(self.tokens, xxh3(head)))))

    def record(self, dtype: np.dtype[Any]) -> Record:
        token_ids = np.frombuffer(self.tokens, dtype).astype(np.int32, copy=False)
        mask = unpack_mask(self.mask, len(token_ids))
        return Record(self.key, token_ids, mask, self.payload, self.draw_set, self.teacher_version)


def read_stored(fd: int, span: bytes) -> Stored:
    """Read a record from its shard; CorruptRecord if it does not match its checksum, OSError if it cannot be read.

    Shards are read with pread, never mapped: a page that a failing disk or a truncated file cannot fill would kill the
    process with SIGBUS.
    """
    key, payload, payload_bytes, tokens, tokens_bytes, mask, mask_bytes, draw_set, version, checksum = SPAN.unpack(span)
    mask_content = os.pread(fd, mask_bytes, mask) if mask_bytes else b""
    tokens_content, payload_content = os.pread(fd, tokens_bytes, tokens), os.pread(fd, payload_bytes, payload)
    stored = Stored(key, tokens_content, mask_content, payload_content, draw_set, version)
    if (found := stored.checksum()) != checksum:
        raise CorruptRecord(f"record {key.hex()}: expected checksum {checksum:016x}, got {found:016x}")
    return stored


def open_shard_file(path: Path) -> int:
    """Open a shard, given by its sealed name, for reading, whether it is sealed by now or still open."""
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY)
    with suppress(FileNotFoundError):
        return os.open(f"{path}{OPEN_SUFFIX}", os.O_RDONLY)
    return os.open(path, os.O_RDONLY)  # sealed in between


def age(path: Path) -> tuple[str, str]:
    """Return a sort key of shards: the time at which each was begun, which its name tells, and the name."""
    parts = path.name.rsplit("-", 2)
    return parts[1] if len(parts) == 3 else "", path.name


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def bound_of_bytes(num_records: int, content_bytes: int) -> int:
    """Return a bound of the bytes of a shard and its index by its records' tokens, masks and payloads."""
    return content_bytes + content_bytes // 64 + 160 * num_records + 8192


def shard_schema(manifest: Manifest) -> pa.Schema:
    """Return the schema of every shard of a cache; its metadata names the fingerprint and the provenance."""
    named = {
        "format": FORMAT,
        "fingerprint": asdict(manifest.fingerprint),
        "fingerprint_digest": manifest.fingerprint.digest,
        "provenance": manifest.provenance,
    }
    types = {
        "key": pa.binary(KEY_BYTES),
        "token_ids": pa.list_(pa.from_numpy_dtype(token_dtype(manifest.fingerprint.vocab_size))),
        "loss_mask": pa.binary(),
        "payload": pa.binary(),
        "draw_set": pa.uint64(),
        "teacher_version": pa.uint64(),
        "checksum": pa.uint64(),
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    return pa.schema(fields, {"logitstream": json.dumps(named, sort_keys=True)})


def encode_batch(records: Sequence[Stored], schema: pa.Schema) -> pa.Buffer:
    """Return one record-batch message."""
    token_type = schema.field("token_ids").type.value_type
    tokens = np.frombuffer(b"".join(record.tokens for record in records), token_type.to_pandas_dtype())
    offsets = np.cumsum([0, *(len(record.tokens) for record in records)]) // tokens.itemsize
    keys, _, masks, payloads, draw_sets, versions = zip(*records, strict=True)
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(tokens))
    columns = keys, masks, payloads, draw_sets, versions, [record.checksum() for record in records]
    types = [schema.field(name).type for name in schema.names if name != "token_ids"]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    return pa.RecordBatch.from_arrays([arrays[0], lists, *arrays[1:]], schema=schema).serialize()


def spans_of(message: pa.Buffer, start: int, schema: pa.Schema) -> Spans:
    """Return the spans of a record-batch message that lies at `start` in its shard; ARROW_ERRORS if it is broken."""
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    spans = np.zeros(batch.num_rows, SPAN_DTYPE)
    token_bytes = schema.field("token_ids").type.value_type.bit_width // 8
    columns = {"payload": ("payload", 1), "tokens": ("token_ids", token_bytes), "mask": ("loss_mask", 1)}
    for part, (column, unit) in columns.items():
        buffers = batch.column(column).buffers()
        offsets = unit * np.frombuffer(buffers[1], "<i4", batch.num_rows + 1).astype(np.int64)
        spans[f"{part}_bytes"] = np.diff(offsets)
        if buffers[-1] is not None:  # it is where a column holds no byte
            spans[f"{part}_start"] = start + buffers[-1].address - message.address + offsets[:-1]
    for column in ("key", "draw_set", "teacher_version", "checksum"):
        spans[column] = np.frombuffer(batch.column(column).buffers()[1], SPAN_DTYPE[column], batch.num_rows)
    return spans


def scan(path: Path, schema: pa.Schema) -> Iterator[tuple[int, pa.Buffer, Spans]]:
    """Yield the place, content and spans of the schema and each batch, up to the first that cannot be read.

    Yields nothing if the file has another schema.
    """
    start = 0
    with pa.OSFile(str(path)) as file:
        while True:
            try:
                file.seek(start)
                pa.ipc.read_message(file)
                stop = int(file.tell())
                file.seek(start)
                content = file.read_buffer(stop - start)
                if start == 0 and not pa.ipc.read_schema(content).equals(schema, check_metadata=True):
                    return
                spans = spans_of(content, start, schema) if start else NO_SPANS
            except ARROW_ERRORS:  # the end too
                return
            yield start, content, spans
            start = stop
