"""Records come back as they were put: round trips, several writers, readers meanwhile, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitstream.cache import CacheReader, CacheWriter, Record
from logitstream.cache.manifest import create_manifest, parse, render
from logitstream.cache.tools.verify import verify
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TokenSequence, request_key


def fingerprint(**changes: object) -> Fingerprint:
    values: dict[str, object] = {
        "weights_digest": "ab" * 32,
        "tokenizer_digest": "cd" * 32,
        "vocab_size": 1000,
        "dtype": "float32",
        "id_model_digest": "",
        "spec": TargetSpec().canonical(),
    }
    return Fingerprint(**(values | changes))  # type: ignore[arg-type]


def make_records(count: int, *, seed: int = 0, tokens: int = 32, digest: str = fingerprint().digest) -> list[Record]:
    """Records of random tokens, masks and payloads, some of them empty."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        ids = rng.integers(0, 1000, rng.integers(1, tokens + 1), dtype=np.int32)
        mask = rng.random(len(ids)) < 0.5 if number % 3 == 0 else None
        sequence = TokenSequence(token_ids=ids, loss_mask=mask)
        key = request_key(digest, sequence, number % 2)
        records.append(Record(key, ids, mask, rng.bytes(int(rng.integers(0, 200))), number % 2, number % 5))
    return records


def put_all(writer: CacheWriter, records: list[Record]) -> None:
    for record in records:
        assert writer.put(*record[:5], teacher_version=record.teacher_version)


def assert_same(found: Record, expected: Record) -> None:
    assert (found.key, found.payload, found.draw_set, found.teacher_version) == (
        expected.key,
        expected.payload,
        expected.draw_set,
        expected.teacher_version,
    )
    assert np.array_equal(found.token_ids, expected.token_ids)
    everything = np.ones(len(expected.token_ids), bool)
    mine = everything if found.loss_mask is None else found.loss_mask
    assert np.array_equal(mine, everything if expected.loss_mask is None else expected.loss_mask)


def test_a_cache_that_nobody_could_open_again_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must match"):
        create_manifest(tmp_path / "cache", fingerprint(dtype="BF16 (mixed)"), provenance={})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("batch_bytes", [1, 500, 10_000])
def test_every_record_comes_back_as_it_was_put(tmp_path: Path, batch_bytes: int) -> None:
    records = make_records(100)
    with CacheWriter(tmp_path, fingerprint(), batch_bytes=batch_bytes, shard_bytes=20_000) as writer:
        put_all(writer, records)
    reader = CacheReader(tmp_path, fingerprint())
    assert len(reader) == len(records)
    assert len(list(tmp_path.glob("*.arrow"))) > 1
    for record in records:
        assert reader.get(record.key) == record.payload
        assert_same(reader.get_record(record.key), record)
    assert reader.get(bytes(16)) is None


def test_what_was_flushed_is_read_while_the_writer_goes_on(tmp_path: Path) -> None:
    first, second = make_records(10), make_records(10, seed=1)
    writer = CacheWriter(tmp_path, fingerprint())
    reader = CacheReader(tmp_path)
    put_all(writer, first)
    assert writer.flush()
    reader.refresh()
    put_all(writer, second)
    assert [reader.get(record.key) for record in first] == [record.payload for record in first]
    assert reader.get(second[0].key) is None
    writer.close()
    reader.refresh()
    assert len(reader) == 20
    assert [reader.get(record.key) for record in second] == [record.payload for record in second]


@pytest.mark.parametrize(("vocab_size", "stored"), [(1000, pa.uint16()), (65_536, pa.uint16()), (65_537, pa.int32())])
def test_token_ids_take_two_bytes_where_the_vocabulary_allows_it(
    tmp_path: Path, vocab_size: int, stored: pa.DataType
) -> None:
    """Every way of reading returns int32."""
    known = fingerprint(vocab_size=vocab_size)
    rng = np.random.default_rng(0)
    records = make_records(40, digest=known.digest)
    records.append(Record(rng.bytes(16), np.array([0, vocab_size - 1], np.int32), None, b"payload", 0))
    records.append(Record(rng.bytes(16), np.zeros(0, np.int32), None, b"nothing", 0))
    for part in (records[:20], records[20:]):
        with CacheWriter(tmp_path, known, batch_bytes=500) as writer:
            put_all(writer, part)
    for path in tmp_path.glob("*.arrow"):
        with pa.OSFile(str(path)) as file:
            assert pa.ipc.open_stream(file).schema.field("token_ids").type == pa.list_(stored)
    open_writer = CacheWriter(tmp_path, known)
    put_all(open_writer, more := make_records(5, seed=1, digest=known.digest))
    assert open_writer.flush()
    reader = CacheReader(tmp_path, known)
    for record in records + more:
        assert_same(reader.get_record(record.key), record)
        assert reader.get_record(record.key).token_ids.dtype == np.int32
    found = {record.key: record for record in reader.records()}
    for record in records + more:
        assert_same(found[record.key], record)
        assert found[record.key].token_ids.dtype == np.int32
    open_writer.close()
    for index in tmp_path.glob("*.index"):
        index.unlink()  # the records are found again in the shards themselves
    assert {r.key: r.payload for r in CacheReader(tmp_path).records()} == {r.key: r.payload for r in records + more}
    assert verify(tmp_path)[1] == len(records) + len(more)


@pytest.mark.parametrize("ids", [[70_000], [-1], [3, 65_536]])
def test_token_ids_that_are_none_of_the_vocabulary_are_refused_not_cut(tmp_path: Path, ids: list[int]) -> None:
    with CacheWriter(tmp_path, fingerprint()) as writer, pytest.raises(ValueError, match="vocabulary of 1000, got"):
        writer.put(bytes(16), np.array(ids, np.int32), None, b"", 0)


def test_a_format_of_later_is_refused(tmp_path: Path) -> None:
    create_manifest(tmp_path, fingerprint(), provenance={})
    path = tmp_path / "manifest.json"
    path.write_bytes(render(parse(path.read_bytes(), path) | {"format": "logitstream-cache/4"}))
    with pytest.raises(CacheError, match="expected format 'logitstream-cache/3', got"):
        CacheReader(tmp_path)


def test_the_order_of_records_is_the_same_however_they_were_written(tmp_path: Path) -> None:
    records = make_records(60)
    orders = []
    for writers in (1, 2, 4):
        folder = tmp_path / str(writers)
        open_writers = [CacheWriter(folder, fingerprint(), writer_id=f"rank{rank}") for rank in range(writers)]
        for number, record in enumerate(records[:: -1 if writers == 2 else 1]):
            put_all(open_writers[number % writers], [record])
        put_all(open_writers[0], records[:5])
        for writer in open_writers:
            writer.close()
        reader = CacheReader(folder)
        orders.append([reader.record(i).key for i in range(len(reader))])
    assert orders[0] == orders[1] == orders[2] == sorted(record.key for record in records)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights_digest", "00" * 32),
        ("tokenizer_digest", "00" * 32),
        ("dtype", "bfloat16"),
        ("vocab_size", 2000),
    ],
)
def test_another_fingerprint_is_refused_and_both_are_spelled_out(tmp_path: Path, name: str, value: object) -> None:
    CacheWriter(tmp_path, fingerprint()).close()
    other = fingerprint(**{name: value})
    for opened in (CacheReader, CacheWriter):
        with pytest.raises(FingerprintMismatch, match=name) as caught:
            opened(tmp_path, other)
        assert f"{value!r} against {getattr(fingerprint(), name)!r}" in str(caught.value)


@pytest.mark.parametrize("spec", [TargetSpec(num_samples=12), TargetSpec(seed=1), TargetSpec(sampler="threshold")])
def test_another_sampler_is_refused(tmp_path: Path, spec: TargetSpec) -> None:
    CacheWriter(tmp_path, fingerprint()).close()
    for opened in (CacheReader, CacheWriter):
        with pytest.raises(FingerprintMismatch, match=r"spec: \{.*\} against \{.*\}"):
            opened(tmp_path, fingerprint(spec=spec.canonical()))


def test_a_folder_without_a_manifest_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"expected manifest\.json"):
        CacheReader(tmp_path)
