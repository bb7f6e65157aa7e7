"""Write a cache as Parquet files with decoded columns, which anybody reads without this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitstream import codec
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import KEY_BYTES, shard_schema
from logitstream.cache.tools import watched
from logitstream.errors import CacheMiss, CodecError, CorruptRecord
from logitstream.id_model import IdModel
from logitstream.types import TargetSpec

ROWS_PER_GROUP = 256

COLUMNS = [
    pa.field("key", pa.binary(KEY_BYTES)),
    pa.field("token_ids", pa.list_(pa.int32())),
    pa.field("loss_mask", pa.list_(pa.bool_())),
    pa.field("draw_set", pa.uint64()),
    pa.field("teacher_version", pa.uint64()),
    pa.field("row_offsets", pa.list_(pa.int64())),
    pa.field("entry_token_ids", pa.list_(pa.int32())),
    pa.field("entry_weights", pa.list_(pa.float32())),
    pa.field("payload", pa.binary()),
]


def export(reader: CacheReader, output: Path) -> int:
    """Write a Parquet file with a row a sequence, in the order of the keys; return how many were left out as damaged.

    Row t of a sequence holds the entries row_offsets[t] to row_offsets[t + 1] and belongs to the prediction of token
    t + 1. The file's metadata holds the fingerprint and the provenance. Raises FileExistsError if there is the file.
    """
    schema = pa.schema(COLUMNS, metadata=shard_schema(reader.manifest).metadata)
    written = 0
    with output.open("xb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for first in watched(range(0, len(reader), ROWS_PER_GROUP), "exporting"):
            rows = list(_decoded_rows(reader, first, min(first + ROWS_PER_GROUP, len(reader))))
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            written += len(rows)
    return len(reader) - written


def _decoded_rows(reader: CacheReader, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Yield the columns of the records that are whole and can be decoded."""
    known = reader.fingerprint
    id_model = IdModel.from_bytes(reader.id_model) if reader.id_model else None
    options: Any = {"spec": TargetSpec.from_canonical(known.spec), "vocab_size": known.vocab_size, "id_model": id_model}
    for i in range(first, last):
        with contextlib.suppress(CorruptRecord, CacheMiss, CodecError):
            record = reader.record(i)
            targets = codec.decode(record.payload, num_rows=len(record.token_ids), **options)
            yield {
                "key": record.key,
                "token_ids": record.token_ids,
                "loss_mask": np.ones(len(record.token_ids), bool) if record.loss_mask is None else record.loss_mask,
                "draw_set": record.draw_set,
                "teacher_version": record.teacher_version,
                "row_offsets": targets.row_offsets,
                "entry_token_ids": targets.token_ids,
                "entry_weights": targets.weights(),
                "payload": record.payload,
            }
