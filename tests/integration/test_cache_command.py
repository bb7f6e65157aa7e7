"""`logitstream cache`: info, verify, merge, export and prune, on whole and on damaged directories."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from logitstream import codec
from logitstream.__main__ import main
from logitstream.cache import CacheReader, CacheWriter, Record
from logitstream.id_model import IdModel
from logitstream.types import Fingerprint, SparseTargets, TargetSpec, TokenSequence, request_key

VOCAB_SIZE = 500
FINGERPRINT = Fingerprint(
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=VOCAB_SIZE,
    dtype="float32",
    id_model_digest="",
    spec=TargetSpec(num_samples=10, codec_version=1).canonical(),
)
PROVENANCE = {"teacher": "a test", "licence": "none"}


def targets(rng: np.random.Generator, num_rows: int) -> SparseTargets:
    """Rows of one to three entries whose weights sum to 1."""
    entries = rng.integers(1, 4, num_rows)
    ids = [np.sort(rng.choice(VOCAB_SIZE, count, replace=False)) for count in entries]
    counts = [np.array([10 - (count - 1), *[1] * (count - 1)]) for count in entries]
    return SparseTargets(
        vocab_size=VOCAB_SIZE,
        units=10,
        row_offsets=np.concatenate([[0], np.cumsum(entries)]).astype(np.int64),
        token_ids=np.concatenate(ids).astype(np.int32),
        counts=np.concatenate(counts).astype(np.int32),
    )


def make_records(count: int, *, seed: int = 0) -> list[tuple[Record, SparseTargets]]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        token_ids = rng.integers(0, VOCAB_SIZE, 16, dtype=np.int32)
        key = request_key(FINGERPRINT.digest, TokenSequence(token_ids=token_ids), number % 3)
        drawn = targets(rng, 16)
        made.append((Record(key, token_ids, None, codec.encode(drawn, version=1), number % 3), drawn))
    return made


def write(directory: Path, records: list[Record], *, close: bool = True, writer_id: str = "w") -> CacheWriter:
    writer = CacheWriter(
        directory, FINGERPRINT, provenance=PROVENANCE, shard_bytes=8_000, batch_bytes=2_000, writer_id=writer_id
    )
    for record in records:
        assert writer.put(*record[:5])
    assert writer.flush()
    if close:
        writer.close()
    return writer


@pytest.fixture
def records() -> list[Record]:
    return [record for record, _ in make_records(60)]


def test_info_counts_what_was_written(
    tmp_path: Path, records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, records[:50])
    write(tmp_path, records[40:], writer_id="other", close=False)
    assert main(["cache", "info", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["distinct_keys"], found["tokens"]) == (70, 60, 70 * 16)
    assert found["distinct_keys_by_draw_set"] == {
        str(draw): sum(r.draw_set == draw for r in records) for draw in range(3)
    }
    payload = sum(len(r.payload) for r in records[:50] + records[40:])
    assert found["payload_bytes_per_token"] == pytest.approx(payload / (70 * 16), abs=1e-3)
    manifest_bytes = (tmp_path / "manifest.json").stat().st_size
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir()) - manifest_bytes
    assert found["fingerprint_digest"] == FINGERPRINT.digest
    assert found["provenance"] == PROVENANCE


def test_verify_finds_every_flipped_byte(
    tmp_path: Path, records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    original = tmp_path / "original"
    write(original, records)
    assert main(["cache", "verify", str(original)]) == 0
    chance = random.Random(0)
    files = sorted(path.name for path in original.iterdir())
    for attempt in range(100):
        damaged = tmp_path / "damaged"
        shutil.copytree(original, damaged)
        path = damaged / chance.choice(files)
        content = bytearray(path.read_bytes())
        position = chance.randrange(len(content))
        content[position] ^= chance.randrange(1, 256)
        path.write_bytes(content)
        capsys.readouterr()
        assert main(["cache", "verify", str(damaged)]) == 1, (path.name, position)
        output = capsys.readouterr().out
        assert path.stem in output
        if path.name != "manifest.json":  # what verify finds whole is just what a run finds
            reader = CacheReader(damaged, FINGERPRINT)
            found = sum(reader.get(record.key) is not None for record in records)
            assert f"{found} whole records" in output, attempt
            assert found >= len(records) - 1
        shutil.rmtree(damaged)


def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [record for record, _ in make_records(5)])
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("abab", "acab", 1))
    for command in (["info"], ["export", "--output", str(tmp_path / "out")], ["prune", "--damaged"]):
        assert main(["cache", command[0], str(tmp_path), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert "manifest.json is damaged" in error
    assert main(["cache", "verify", str(tmp_path)]) == 1
    assert main(["cache", "info", str(tmp_path / "nothing")]) == 2


def test_merge_takes_each_key_once_and_whole_copies_before_damaged_ones(tmp_path: Path, records: list[Record]) -> None:
    write(tmp_path / "a", records[:40])
    write(tmp_path / "b", records[30:])
    (shard, *_) = sorted((tmp_path / "a").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    damaged = [record for record in records[:40] if content.find(record.payload) >= 0]
    for record in damaged:
        content[content.find(record.payload)] ^= 1
    shard.write_bytes(content)
    assert main(["cache", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")]) == 0
    reader = CacheReader(tmp_path / "out", FINGERPRINT)
    lost = {record.key for record in damaged} - {record.key for record in records[30:]}
    expected = {record.key: record.payload for record in records if record.key not in lost}
    assert {record.key: record.payload for record in reader.records()} == expected
    assert reader.num_records == len(reader) == len(expected)
    assert main(["cache", "verify", str(tmp_path / "out")]) == 0


def test_merge_refuses_another_fingerprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [record for record, _ in make_records(5)])
    spec = TargetSpec(num_samples=11, codec_version=1).canonical()
    other = replace(FINGERPRINT, spec=spec)
    CacheWriter(tmp_path / "b", other).close()
    assert main(["cache", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")]) == 2
    assert "spec: " in capsys.readouterr().err


def test_prune_drops_old_draw_sets(tmp_path: Path, records: list[Record]) -> None:
    write(tmp_path, records)
    reader = CacheReader(tmp_path)
    assert main(["cache", "prune", str(tmp_path), "--before_draw_set", "2"]) == 0
    reader.refresh()
    assert {record.key for record in reader.records()} == {record.key for record in records if record.draw_set >= 2}
    assert all(reader.get(record.key) == record.payload for record in records if record.draw_set >= 2)
    assert main(["cache", "verify", str(tmp_path)]) == 0


def test_prune_to_a_size_drops_the_oldest_shards_and_leaves_a_live_writers_alone(
    tmp_path: Path, records: list[Record]
) -> None:
    write(tmp_path, records)
    live = write(tmp_path, [record for record, _ in make_records(3, seed=9)], writer_id="live", close=False)
    before = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert main(["cache", "prune", str(tmp_path), "--max_bytes", "12K"]) == 0
    after = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".open")
    assert after <= 12_000 < before
    live.close()
    reader = CacheReader(tmp_path)
    assert all(record.key in reader for record, _ in make_records(3, seed=9))
    assert 3 < len(reader) < 63
    assert main(["cache", "verify", str(tmp_path)]) == 0


def test_prune_drops_damaged_records(tmp_path: Path, records: list[Record]) -> None:
    write(tmp_path, records)
    (shard, *_) = sorted(tmp_path.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[content.find(records[0].payload)] ^= 1
    shard.write_bytes(content)
    assert main(["cache", "verify", str(tmp_path)]) == 1
    assert main(["cache", "prune", str(tmp_path), "--damaged"]) == 0
    assert main(["cache", "verify", str(tmp_path)]) == 0
    assert len(CacheReader(tmp_path)) == 59


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_merge_heals_an_output_that_holds_a_damaged_copy(tmp_path: Path, records: list[Record]) -> None:
    for name in ("whole", "damaged"):
        write(tmp_path / name, records)
    for shard in (tmp_path / "damaged").glob("*.arrow"):
        for record in records[:7]:
            if (position := shard.read_bytes().find(record.payload)) >= 0:
                flip(shard, position)
    before = CacheReader(tmp_path / "damaged")
    assert [before.get(record.key) for record in records[:8]] == [None] * 7 + [records[7].payload]
    assert main(["cache", "merge", str(tmp_path / "whole"), "--output", str(tmp_path / "damaged")]) == 0
    after = CacheReader(tmp_path / "damaged")
    assert [after.get(record.key) for record in records] == [record.payload for record in records]
    assert after.num_records == len(records) + 7


@pytest.mark.parametrize(("pattern", "position"), [("*.index", 10), ("*.index", 200), ("*.arrow", 70), ("*.arrow", -3)])
def test_prune_makes_good_what_is_damaged_outside_of_records(
    tmp_path: Path, records: list[Record], pattern: str, position: int
) -> None:
    write(tmp_path, records)
    flip(sorted(tmp_path.glob(pattern))[0], position)
    assert main(["cache", "verify", str(tmp_path)]) == 1
    assert main(["cache", "prune", str(tmp_path), "--damaged"]) == 0
    assert main(["cache", "verify", str(tmp_path)]) == 0
    assert len(CacheReader(tmp_path)) == len(records)


def test_a_missing_shard_is_named_and_its_index_pruned(
    tmp_path: Path, records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "cache", records)
    (shard, *_) = sorted((tmp_path / "cache").glob("*.arrow"))
    shard.unlink()
    reader = CacheReader(tmp_path / "cache")
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 1
    lost = {record.key.hex() for record in records if reader.get(record.key) is None}
    assert lost
    assert f"{shard.name} holds {len(lost)} records, of which {len(lost)} are damaged" in capsys.readouterr().out
    assert main(["cache", "prune", str(tmp_path / "cache"), "--damaged"]) == 0
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
    assert len(CacheReader(tmp_path / "cache")) == len(records) - len(lost)


def test_a_writer_killed_between_a_shards_sidecars_and_its_name_leaves_nothing_damaged(
    tmp_path: Path, records: list[Record]
) -> None:
    write(tmp_path, records)
    for shard in list(tmp_path.glob("*.arrow")):
        shard.rename(f"{shard}.open")
    for command in (["verify"], ["prune", "--damaged"], ["verify"]):
        assert main(["cache", command[0], str(tmp_path), *command[1:]]) == 0
    assert len(CacheReader(tmp_path)) == len(records)


def test_another_fingerprints_shard_with_its_sidecars_is_found_and_never_read(
    tmp_path: Path, records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "mine", records[:30])
    with CacheWriter(tmp_path / "other", replace(FINGERPRINT, dtype="bfloat16")) as writer:
        for record in records:
            writer.put(*record[:5])
    for path in (tmp_path / "other").iterdir():
        if path.name != "manifest.json":
            shutil.copy(path, tmp_path / "mine")
    expected = {record.key: record.payload for record in records[:30]}
    reader = CacheReader(tmp_path / "mine")
    assert {record.key: record.payload for record in reader.records()} == expected
    assert main(["cache", "verify", str(tmp_path / "mine")]) == 1
    assert "no shard of this cache" in capsys.readouterr().out
    assert main(["cache", "info", str(tmp_path / "mine")]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 30
    assert main(["cache", "prune", str(tmp_path / "mine"), "--damaged", "--before_draw_set", "1"]) == 1
    kept = {record.key: record.payload for record in records[:30] if record.draw_set >= 1}
    assert {record.key: record.payload for record in CacheReader(tmp_path / "mine").records()} == kept


def test_a_shard_that_was_rewritten_stays_as_old_as_it_is(tmp_path: Path, records: list[Record]) -> None:
    for number in range(3):
        write(tmp_path, records[20 * number : 20 * number + 20], writer_id=f"my-writer{number}")
        time.sleep(0.002)
    assert main(["cache", "prune", str(tmp_path), "--before_draw_set", "1"]) == 0  # rewrites them all
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert main(["cache", "prune", str(tmp_path), "--max_bytes", str(total - 1)]) == 0
    kept, newer = {r.key for r in CacheReader(tmp_path).records()}, [r for r in records if r.draw_set >= 1]
    assert len(kept) < len(newer)
    assert kept == {record.key for record in newer[-len(kept) :]}  # my-writer0's first shard went


@pytest.mark.parametrize("option", [["--max_bytes", "-5"], ["--max_bytes", "1x"]])
def test_prune_refuses_bounds_that_are_none(tmp_path: Path, option: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cache", "prune", str(tmp_path), *option])


def test_what_killed_processes_had_begun_is_cleared_away_after_an_hour(tmp_path: Path) -> None:
    write(tmp_path, [])
    old, new = (tmp_path / f".w-1-2.arrow.{letters * 16}" for letters in ("ab", "cd"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 4000,) * 2)
    write(tmp_path, [])
    assert (old.exists(), new.exists()) == (False, True)


def test_records_that_cannot_be_decoded_are_left_out_like_damaged_ones(
    tmp_path: Path, records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = records[0]._replace(payload=b"no targets")
    write(tmp_path / "cache", [broken, *records[1:]])
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert main(["cache", "export", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]) == 0
    assert "59 records, 1 damaged left out" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "out").num_rows == 59


def test_a_cache_of_codec_2_is_exported_with_the_id_model_that_lies_in_it(tmp_path: Path) -> None:
    id_model = IdModel.from_expected_counts(np.ones(VOCAB_SIZE))
    spec = TargetSpec(num_samples=10, codec_version=2).canonical()
    digest = hashlib.sha256(id_model.to_bytes()).hexdigest()
    known = replace(FINGERPRINT, spec=spec, id_model_digest=digest)
    made = make_records(6)
    with CacheWriter(tmp_path / "cache", known, id_model=id_model.to_bytes()) as writer:
        for record, drawn in made:
            payload = codec.encode(drawn, version=2, id_model=id_model)
            writer.put(record.key, record.token_ids, None, payload, record.draw_set)
    assert main(["cache", "export", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]) == 0
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    for record, drawn in made:
        assert rows[record.key]["entry_token_ids"] == drawn.token_ids.tolist()
        np.testing.assert_allclose(rows[record.key]["entry_weights"], drawn.counts / 10, rtol=1e-6)
    (tmp_path / "cache" / "id_model.bin").write_bytes(b"\x01")
    assert main(["cache", "export", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]) == 2


def test_info_of_an_empty_cache_has_no_figures_a_token_and_of_one_record_those_counted_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the manifest nor the id model, which every cache holds once, counts as bytes a token."""
    id_model = IdModel.from_expected_counts(np.ones(VOCAB_SIZE)).to_bytes()
    known = replace(FINGERPRINT, id_model_digest=hashlib.sha256(id_model).hexdigest())
    CacheWriter(tmp_path, known, id_model=id_model).close()
    assert main(["cache", "info", str(tmp_path)]) == 0
    empty = json.loads(capsys.readouterr().out)
    assert (empty["records"], empty["tokens"], empty["bytes"]) == (0, 0, 0)
    assert [empty[f"{name}_per_token"] for name in ("bytes", "payload_bytes")] == [None, None]
    ((record, _),) = make_records(1)
    with CacheWriter(tmp_path, known, id_model=id_model) as writer:
        assert writer.put(*record[:5])
        assert writer.flush()
        for _ in ("open", "sealed"):
            assert main(["cache", "info", str(tmp_path)]) == 0
            found = json.loads(capsys.readouterr().out)
            shards = [path for path in tmp_path.iterdir() if path.name not in ("manifest.json", "id_model.bin")]
            assert (found["records"], found["tokens"]) == (1, 16)
            assert found["bytes_per_token"] == round(sum(path.stat().st_size for path in shards) / 16, 3)
            assert found["payload_bytes_per_token"] == round(len(record.payload) / 16, 3)
            writer.close()
