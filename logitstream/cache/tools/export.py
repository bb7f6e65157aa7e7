"""Write a cache as Parquet files with decoded columns, which anybody reads without this package."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitstream import codec
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import KEY_BYTES, Record, shard_schema
from logitstream.cache.tools import watched
from logitstream.errors import CacheError, CacheMiss, CodecError, CorruptRecord
from logitstream.id_model import IdModel
from logitstream.types import SparseTargets, TargetSpec

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


@functools.lru_cache(maxsize=1)
def _id_model(content: bytes) -> IdModel:
    return IdModel.from_bytes(content)


def decode(reader: CacheReader, record: Record) -> SparseTargets:
    """Decode a record's payload within the bounds that the manifest sets; raises CodecError as `codec.decode`."""
    return codec.decode(
        record.payload,
        spec=TargetSpec.from_canonical(reader.fingerprint.spec),
        vocab_size=reader.fingerprint.vocab_size,
        id_model=_id_model(reader.id_model) if reader.id_model else None,
        num_rows=len(record.token_ids),
    )


def export(reader: CacheReader, output: Path, *, records_per_file: int = 100_000) -> tuple[list[Path], int]:
    """Write `output`/part-00000.parquet and so on, in the order of the keys.

    Returns the files and how many damaged records were left out. Row t of a sequence holds the entries row_offsets[t]
    to row_offsets[t + 1] and belongs to the prediction of token t + 1. The files' metadata holds the fingerprint and
    the provenance. Raises CacheError if the folder holds Parquet files already.
    """
    output.mkdir(parents=True, exist_ok=True)
    if any(output.glob("*.parquet")):
        raise CacheError(f"expected a folder without Parquet files, {output} holds some of an earlier export")
    schema = pa.schema(COLUMNS, metadata=shard_schema(reader.manifest).metadata)
    files: list[Path] = []
    written = 0
    for start in watched(range(0, len(reader), records_per_file), "exporting"):
        files.append(output / f"part-{len(files):05d}.parquet")
        end = min(start + records_per_file, len(reader))
        with pq.ParquetWriter(files[-1], schema, compression="zstd") as writer:
            for first in range(start, end, ROWS_PER_GROUP):
                rows = list(_decoded_rows(reader, first, min(first + ROWS_PER_GROUP, end)))
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                written += len(rows)
    return files, len(reader) - written


def _decoded_rows(reader: CacheReader, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Yield the columns of the records that are whole and can be decoded."""
    for i in range(first, last):
        with contextlib.suppress(CorruptRecord, CacheMiss, CodecError):
            record = reader.record(i)
            targets = decode(reader, record)
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
