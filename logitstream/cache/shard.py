"""One shard: an Arrow IPC stream of records, each with its own checksum, and where each record's bytes lie in the file.

A shard holds the schema message, whole record-batch messages and, once sealed, the end-of-stream marker, so any Arrow
reader opens it. Our own reading needs no Arrow: a span names the byte ranges of one record, and the checksum covers all
of the record's content, so a wrong span or a flipped byte anywhere is found before the record is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.errors import CorruptRecord

KEY_BYTES = 16
FIRST_FORMAT = "logitstream-cache/1"
"""Of caches whose token ids take 4 bytes, however small the vocabulary."""
TOKEN_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<i4")}
"""By the bytes that a token id takes on disk."""
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
CONTINUATION = b"\xff\xff\xff\xff"
MAX_SHARD_BYTES = 1 << 31
"""Spans are 32-bit offsets."""
SEARCHED_BYTES = 1 << 20
"""How much is read at a time where messages are looked for."""
BLOCK_BYTES = 4096
"""What a disk fails to read at a time."""

SCHEMAS = {
    width: pa.schema(
        [
            pa.field("key", pa.binary(KEY_BYTES), nullable=False),
            pa.field("token_ids", pa.list_(pa.from_numpy_dtype(dtype)), nullable=False),
            pa.field("loss_mask", pa.binary(), nullable=False),
            pa.field("payload", pa.binary(), nullable=False),
            pa.field("draw_set", pa.uint64(), nullable=False),
            pa.field("teacher_version", pa.uint64(), nullable=False),
            pa.field("checksum", pa.uint64(), nullable=False),
        ]
    )
    for width, dtype in TOKEN_DTYPES.items()
}
"""By the bytes of a token id."""

HEAD = struct.Struct("<QQII")
"""After the key: draw set; teacher version; token bytes; mask bytes."""
HEAD_DTYPE = np.dtype(
    [("key", "V16"), ("draw_set", "<u8"), ("teacher_version", "<u8"), ("token_bytes", "<u4"), ("mask_bytes", "<u4")]
)
SPAN = struct.Struct("<16s6I3Q")
"""key; start and number of payload bytes, of tokens, of mask bytes; draw set; teacher version; checksum."""
SPAN_DTYPE = np.dtype(
    [("key", "V16")]
    + [(f"{name}_{part}", "<u4") for name in ("payload", "tokens", "mask") for part in ("start", "count")]
    + [("draw_set", "<u8"), ("teacher_version", "<u8"), ("checksum", "<u8")]
)
Spans = npt.NDArray[np.void]


def token_width(manifest: dict[str, Any]) -> int:
    """Bytes of a token id in a cache: 2 where the vocabulary allows it."""
    small: bool = manifest["fingerprint"]["vocab_size"] <= 1 << 16 and manifest["format"] != FIRST_FORMAT
    return 2 if small else 4


def shard_schema(manifest: dict[str, Any]) -> pa.Schema:
    """The schema of every shard of a cache; its metadata names the fingerprint and the provenance."""
    named = {name: manifest[name] for name in ("format", "fingerprint", "fingerprint_digest", "provenance")}
    return SCHEMAS[token_width(manifest)].with_metadata({"logitstream": json.dumps(named, sort_keys=True)})


def read_schema(path: Path, manifest: dict[str, Any]) -> int:
    """Size of the schema message at the head of a shard of this cache, or 0 where it is no such schema."""
    with pa.OSFile(str(path)) as file:
        try:
            schema = pa.ipc.read_schema(file)
        except (pa.ArrowException, OSError, EOFError, MemoryError):
            return 0
        return int(file.tell()) if schema.equals(shard_schema(manifest), check_metadata=True) else 0


class Record(NamedTuple):
    """One sequence: its key, int32 token ids [T], bool mask [T] (None: all rows), encoded targets, which draw."""

    key: bytes
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_] | None
    payload: bytes
    draw_set: int
    teacher_version: int = 0


def pack_mask(loss_mask: npt.NDArray[np.bool_] | None) -> bytes:
    """One bit a token, least significant first; empty where every row is wanted."""
    return b"" if loss_mask is None or loss_mask.all() else np.packbits(loss_mask, bitorder="little").tobytes()


def checksum(key: bytes, tokens: bytes, mask: bytes, payload: bytes, draw_set: int, teacher_version: int) -> int:
    """XXH3 (64 bits) of the payload, whose seed is the mask's, whose seed is the tokens', whose seed is the head's.

    The head is the key and `<QQII` of draw set, teacher version and the tokens' and the mask's lengths in bytes.
    """
    head = key + HEAD.pack(draw_set, teacher_version, len(tokens), len(mask))
    return int(xxh3(payload, xxh3(mask, xxh3(tokens, xxh3(head)))))


def encode_batch(records: Sequence[Record], schema: pa.Schema) -> pa.Buffer:
    """One record-batch message."""
    dtype = schema.field("token_ids").type.value_type.to_pandas_dtype()
    tokens = [np.ascontiguousarray(record.token_ids, dtype=dtype) for record in records]
    masks = [pack_mask(record.loss_mask) for record in records]
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
    checksums = [
        checksum(r.key, ids.tobytes(), mask, r.payload, r.draw_set, r.teacher_version)
        for r, ids, mask in zip(records, tokens, masks, strict=True)
    ]
    columns = [
        pa.array([record.key for record in records], pa.binary(KEY_BYTES)),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(tokens))),
        pa.array(masks, pa.binary()),
        pa.array([record.payload for record in records], pa.binary()),
        pa.array([record.draw_set for record in records], pa.uint64()),
        pa.array([record.teacher_version for record in records], pa.uint64()),
        pa.array(checksums, pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema).serialize()


def spans_of(message: pa.Buffer, start: int, width: int) -> Spans:
    """The spans of a record-batch message that lies at `start` in its shard; CorruptRecord if it is broken.

    width: bytes of a token id.
    """
    try:
        batch = pa.ipc.read_record_batch(message, SCHEMAS[width])
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise CorruptRecord(f"record batch at byte {start} cannot be read: {error}") from error
    spans = np.zeros(batch.num_rows, SPAN_DTYPE)
    base = message.address - start
    for name, column, size in (("payload", "payload", 1), ("tokens", "token_ids", width), ("mask", "loss_mask", 1)):
        buffers = batch.column(column).buffers()
        offsets = _numbers(buffers[1], "<i4", batch.num_rows + 1).astype(np.int64)
        counts = np.diff(offsets)
        data = buffers[-1]
        available = data.size // size if data is not None else 0
        if len(counts) and (offsets[0] < 0 or counts.min() < 0 or offsets[-1] > available):
            raise CorruptRecord(f"record batch at byte {start}: offsets of {column} leave their column")
        spans[f"{name}_start"] = (data.address - base if available else 0) + offsets[:-1] * size
        spans[f"{name}_count"] = counts
    for column in ("draw_set", "teacher_version", "checksum"):
        spans[column] = _numbers(batch.column(column).buffers()[1], "<u8", batch.num_rows)
    spans["key"] = _numbers(batch.column("key").buffers()[1], "V16", batch.num_rows)
    return spans


def _numbers(buffer: pa.Buffer | None, dtype: str, count: int) -> npt.NDArray[Any]:
    if buffer is None or buffer.size < count * np.dtype(dtype).itemsize:
        raise CorruptRecord(f"a column's buffer is shorter than its {count} values")
    return np.frombuffer(buffer, dtype, count)


class Message(NamedTuple):
    """A whole record-batch message within a shard."""

    start: int
    size: int
    spans: Spans


def scan(path: Path, width: int, start: int = 0) -> Iterator[Message]:
    """The readable record batches from byte `start` on, whatever lies between or after them; width: of a token id."""
    with pa.OSFile(str(path)) as file:
        end = file.size()
        while start < end:
            file.seek(start)
            try:
                message = pa.ipc.read_message(file)
            except (pa.ArrowException, OSError, EOFError, MemoryError):
                message = None
            if message is None or file.tell() <= start:
                start = _next_message(path, start + 8)
                continue
            stop = file.tell()
            if message.type == "record batch":
                file.seek(start)
                with contextlib.suppress(CorruptRecord):
                    yield Message(start, stop - start, spans_of(file.read_buffer(stop - start), start, width))
            start = stop


def scanned_spans(path: Path, width: int) -> Spans:
    """The spans of all readable record batches of a shard; width: of a token id."""
    return np.concatenate([np.zeros(0, SPAN_DTYPE), *(message.spans for message in scan(path, width))])


def _next_message(path: Path, start: int) -> int:
    """Where the next message may begin (messages are aligned to 8 bytes), or the end of the file."""
    with path.open("rb", buffering=0) as file:
        size, step = os.fstat(file.fileno()).st_size, SEARCHED_BYTES
        while start < size:
            try:
                chunk = os.pread(file.fileno(), step, start)
            except OSError:  # a bad block: what lies around it in smaller steps, without it
                start, step = (start, BLOCK_BYTES) if step > BLOCK_BYTES else (_after_block(start), SEARCHED_BYTES)
                continue
            if not chunk:
                break
            found = chunk.find(CONTINUATION)
            while found >= 0:
                if found % 8 == 0 and chunk[found : found + 8] != END_OF_STREAM:
                    return start + found
                found = chunk.find(CONTINUATION, found + 1)
            start += len(chunk)
    return max(start, size)


def _after_block(position: int) -> int:
    return (position // BLOCK_BYTES + 1) * BLOCK_BYTES


def unpack_record(span: tuple[Any, ...], tokens: bytes, mask: bytes, payload: bytes) -> Record:
    """The record of a span and its parts."""
    width = len(tokens) // span[4] if span[4] else 4
    token_ids = np.frombuffer(tokens, TOKEN_DTYPES[width]).astype(np.int32, copy=False)
    loss_mask = unpack_mask(mask, len(token_ids)) if mask else None
    return Record._make((span[0], token_ids, loss_mask, payload, span[7], span[8]))  # faster than Record(…)


def unpack_mask(mask: bytes, num_tokens: int) -> npt.NDArray[np.bool_]:
    """The inverse of `pack_mask` where it is not empty."""
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=num_tokens, bitorder="little").astype(bool)


def heads_of(spans: Spans, width: int) -> list[bytes]:
    """What `checksum` hashes first, of each span; width: bytes of a token id."""
    heads = np.empty(len(spans), HEAD_DTYPE)
    for name in ("key", "draw_set", "teacher_version"):
        heads[name] = spans[name]
    heads["token_bytes"], heads["mask_bytes"] = width * spans["tokens_count"], spans["mask_count"]
    packed: list[bytes] = heads.view(f"V{HEAD_DTYPE.itemsize}").tolist()
    return packed
