"""A store that is out of reach or holds other bytes than the staging folder, through the whole student and command."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from prometheus_client import REGISTRY

from logitstream.__main__ import main
from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.remote import staging_folder
from logitstream.client.local_client import LocalTeacherClient
from logitstream.data.corpus import collate
from logitstream.training.target_cache import open_target_cache
from logitstream.training.target_stream import TargetStream
from student_worker.run_plan import held_fingerprint
from tests.integration.crashing_writer import FINGERPRINT, record
from tests.integration.test_cache_training import INFO, SPEC, make_sequences, score

RECORDS = [record(0, number) for number in range(20)]


class Unreachable(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store that nobody answers at; as botocore's, its error is no OSError."""

    protocol = "unreachable"

    class ConnectionFailed(Exception):
        pass

    def info(self, path: str, **_: Any) -> Any:
        raise self.ConnectionFailed(f"nobody answers for {path}")

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        return self.info(path)

    def exists(self, path: str, **_: Any) -> Any:
        return self.info(path)


class Bucket(LocalFileSystem):  # type: ignore[misc]
    """A folder that is taken for a store."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("bucket://")


fsspec.register_implementation("unreachable", Unreachable, clobber=True)
fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture(autouse=True)
def staging(tmp_path: Path) -> Iterator[Path]:
    before = os.environ.get("LOGITSTREAM_STAGING")
    os.environ["LOGITSTREAM_STAGING"] = str(tmp_path / "staging")
    yield tmp_path / "staging"
    os.environ.pop("LOGITSTREAM_STAGING")
    if before is not None:
        os.environ["LOGITSTREAM_STAGING"] = before


@pytest.mark.parametrize("mode", ["online", "cache_then_online"])
def test_a_store_out_of_reach_leaves_a_student_to_its_teacher(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    url = "unreachable://bucket/cache"
    batches = [collate([{"input_ids": ids}]) for ids in make_sequences(3)["input_ids"]]
    client = LocalTeacherClient(score, info=INFO, spec=SPEC)
    errors = REGISTRY.get_sample_value("logitstream_cache_write_errors_total") or 0.0
    cache = open_target_cache(url, client, SPEC, online=mode == "online")
    assert len(list(TargetStream(batches, client, cache=cache, mode=mode, draw_set=0))) == 3
    assert not cache.writable
    cache.close()
    client.close()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"cache {url}: nothing more is written, the run goes on without it" in warning
    assert "nobody answers" in warning
    assert REGISTRY.get_sample_value("logitstream_cache_write_errors_total") == errors + 1


def test_a_budget_is_chosen_without_a_store_that_is_out_of_reach() -> None:
    assert held_fingerprint("unreachable://bucket/cache", alone=False) is None


@pytest.fixture
def bucket(tmp_path: Path) -> tuple[str, Path]:
    """A store with a cache of one shard, which is staged as well: its URL, and the shard there."""
    url = f"bucket://{tmp_path}/store"
    (tmp_path / "store").mkdir()
    with CacheWriter(url, FINGERPRINT) as writer:
        for one in RECORDS:
            assert writer.put(*one[:5])
    (shard,) = (tmp_path / "store").glob("*.arrow")
    return url, shard


def flip(path: Path, needle: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(needle)] ^= 1
    path.write_bytes(content)


def test_export_takes_the_stores_shard_where_the_staged_one_is_damaged(
    bucket: tuple[str, Path], tmp_path: Path
) -> None:
    url, shard = bucket
    flip(staging_folder(url) / shard.name, RECORDS[2].payload)
    assert main(["cache", "merge", url, "--output", str(tmp_path / "merged")]) == 0
    assert len(CacheReader(tmp_path / "merged")) == len(RECORDS)


def test_a_staged_shard_that_is_cut_off_is_fetched_again(bucket: tuple[str, Path]) -> None:
    url, shard = bucket
    for name in (shard.name, shard.with_suffix(".index").name):
        os.truncate(staging_folder(url) / name, 700)
        with CacheReader(url, FINGERPRINT) as reader:
            assert [reader.get(one.key) for one in RECORDS] == [one.payload for one in RECORDS]
            assert not reader.damaged


def payloads(reader: CacheReader, way: str) -> list[bytes | None]:
    keys = [one.key for one in RECORDS]
    if way == "get":
        return [reader.get(key) for key in keys]
    found = {one.key: one.payload for one in reader.records()}
    return [found.get(key) for key in keys]


@pytest.mark.parametrize("way", ["get", "records"])
def test_a_damaged_staged_shard_gives_way_to_the_stores(bucket: tuple[str, Path], way: str) -> None:
    url, shard = bucket
    staged = staging_folder(url) / shard.name
    for number in (2, 9):
        flip(staged, RECORDS[number].payload)
    with CacheReader(url, FINGERPRINT) as reader:
        assert payloads(reader, way) == payloads(reader, way) == [one.payload for one in RECORDS]
        assert not reader.damaged
    assert staged.read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("way", ["get", "records"])
def test_a_record_that_is_damaged_in_the_store_too_passes_for_missing(bucket: tuple[str, Path], way: str) -> None:
    url, shard = bucket
    for path in (shard, staging_folder(url) / shard.name):
        flip(path, RECORDS[2].payload)
    flip(staging_folder(url) / shard.name, RECORDS[9].payload)
    expected = [None if number == 2 else one.payload for number, one in enumerate(RECORDS)]
    with CacheReader(url, FINGERPRINT) as reader:
        assert payloads(reader, way) == payloads(reader, way) == expected
        assert reader.damaged == {RECORDS[2].key}


def test_a_damaged_shard_that_is_not_uploaded_yet_is_left_alone(bucket: tuple[str, Path]) -> None:
    url, shard = bucket
    for path in (shard, shard.with_suffix(".index")):
        path.unlink()
    staged = staging_folder(url) / shard.name
    flip(staged, RECORDS[2].payload)
    with CacheReader(url, FINGERPRINT) as reader:
        assert [number for number, payload in enumerate(payloads(reader, "get")) if payload is None] == [2]
    assert staged.exists()


def test_a_damaged_staged_manifest_or_id_model_gives_way_to_the_stores(tmp_path: Path) -> None:
    url, id_model = f"bucket://{tmp_path}/store", b"\x01a model"
    (tmp_path / "store").mkdir()
    known = replace(FINGERPRINT, id_model_digest=hashlib.sha256(id_model).hexdigest())
    CacheWriter(url, known, id_model=id_model).close()
    for name in ("manifest.json", "id_model.bin"):
        staged = staging_folder(url) / name
        flip(staged, b"model")
        with CacheReader(url, known) as reader:
            assert reader.id_model == id_model
        assert staged.read_bytes() == (tmp_path / "store" / name).read_bytes()
