"""`datasets`, pandas and DuckDB read a shard and its Parquet export without this package's code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xxhash

from logitstream.__main__ import main
from tests.integration.test_cache_command import FINGERPRINT, make_records, write

MADE = make_records(60)
EXPECTED = {record.key: (record, drawn) for record, drawn in MADE}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path / "cache", [record for record, _ in MADE])
    return tmp_path / "cache"


def shard_rows(directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(directory.glob("*.arrow")):
        yield from datasets.Dataset.from_file(str(path))


def test_datasets_opens_shards_as_they_are(directory: Path) -> None:
    rows = list(shard_rows(directory))
    assert len(rows) == len(MADE)
    for row in rows:
        record, _ = EXPECTED[row["key"]]
        assert row["token_ids"] == record.token_ids.tolist()
        assert (row["payload"], row["draw_set"]) == (record.payload, record.draw_set)


def test_datasets_opens_an_open_shard_too(tmp_path: Path) -> None:
    writer = write(tmp_path, [record for record, _ in MADE[:5]], close=False)
    (path,) = tmp_path.glob("*.open")
    assert datasets.Dataset.from_file(str(path))["key"][:] == [record.key for record, _ in MADE[:5]]
    writer.close()


def test_a_records_checksum_is_as_documented(directory: Path) -> None:
    for row in shard_rows(directory):
        tokens = np.array(row["token_ids"], "<u2").tobytes()
        numbers = int(row["draw_set"]).to_bytes(8, "little") + int(row["teacher_version"]).to_bytes(8, "little")
        lengths = len(tokens).to_bytes(4, "little") + len(row["loss_mask"]).to_bytes(4, "little")
        value = 0
        for part in (row["key"] + numbers + lengths, tokens, row["loss_mask"], row["payload"]):
            value = xxhash.xxh3_64_intdigest(part, value)
        assert row["checksum"] == value


def test_pandas_and_duckdb_read_a_shard(directory: Path) -> None:
    (path, *_) = sorted(directory.glob("*.arrow"))
    with pa.memory_map(str(path)) as source:
        shard = pa.ipc.open_stream(source).read_all()
    frame = shard.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    for key, payload in zip(frame["key"], frame["payload"], strict=True):
        assert EXPECTED[key][0].payload == payload
    found = duckdb.sql("select count(*), sum(octet_length(payload)) from shard").fetchall()
    assert found == [(len(frame), sum(map(len, frame["payload"])))]
    assert FINGERPRINT.weights_digest.encode() in shard.schema.metadata[b"logitstream"]


def test_pandas_and_duckdb_read_the_targets_from_parquet(directory: Path, tmp_path: Path) -> None:
    assert main(["cache", "export", str(directory), "--output", str(tmp_path / "out.parquet")]) == 0
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert len(frame) == len(MADE)
    for _, row in frame.iterrows():
        record, drawn = EXPECTED[row["key"]]
        assert row["token_ids"].tolist() == record.token_ids.tolist()
        assert row["row_offsets"].tolist() == drawn.row_offsets.tolist()
        assert row["entry_token_ids"].tolist() == drawn.token_ids.tolist()
        np.testing.assert_allclose(row["entry_weights"], drawn.counts / drawn.units, rtol=1e-6)
        assert row["loss_mask"].all()
    ((total, count),) = duckdb.sql(
        f"select sum(list_sum(entry_weights)), count(*) from read_parquet('{tmp_path / 'out.parquet'}')"
    ).fetchall()
    assert count == len(MADE)
    assert total == pytest.approx(16 * len(MADE), rel=1e-5)  # every row's weights sum to 1
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert len(loaded) == len(MADE)
