"""However records are read (by key, by number, in order), they are the same, and damage is found."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from logitstream.cache import CacheReader, CacheWriter, Record
from logitstream.cache.index import read_index
from logitstream.cache.shard import Spans
from logitstream.cache.tools.rewrite import prune
from logitstream.errors import CacheError
from tests.unit.test_cache import assert_same, fingerprint, make_records, put_all

FINGERPRINT = fingerprint()


def write(directory: Path, records: list[Record], **options: int) -> CacheReader:
    with CacheWriter(directory, FINGERPRINT, **options) as writer:  # type: ignore[arg-type]
        put_all(writer, records)
    return CacheReader(directory, FINGERPRINT)


def shard_and_spans(reader: CacheReader) -> tuple[Path, Spans]:
    (shard,) = reader.shards
    return shard.path, read_index(shard.path, reader.manifest).spans


def flip(path: Path, needle: bytes) -> None:
    """Damage the first place where these bytes are."""
    content = bytearray(path.read_bytes())
    position = content.find(needle)
    assert position >= 0
    content[position] ^= 1
    path.write_bytes(content)


def test_keys_in_several_shards_and_an_open_one_are_found(tmp_path: Path) -> None:
    """Also keys that are asked for twice, are missing or lie there twice."""
    records = make_records(400, tokens=300)
    with CacheWriter(tmp_path, FINGERPRINT) as writer:
        put_all(writer, records[:40])
    reader = write(tmp_path, records, shard_bytes=40_000, batch_bytes=4_000)
    writer = CacheWriter(tmp_path, FINGERPRINT, writer_id="open")
    put_all(writer, more := make_records(20, seed=1))
    assert writer.flush()
    reader.refresh()
    rng = np.random.default_rng(0)
    expected = {record.key: record.payload for record in records + more} | {rng.bytes(16): None for _ in range(20)}
    keys = [list(expected)[i] for i in rng.integers(0, len(expected), 700)]
    assert [reader.get(key) for key in keys] == [expected[key] for key in keys]
    assert not reader.damaged
    writer.close()


def test_records_whose_keys_share_their_first_half_are_not_taken_for_one_another(tmp_path: Path) -> None:
    records = [r._replace(key=bytes(8) + bytes([i]) * 8) for i, r in enumerate(make_records(40))]
    reader = write(tmp_path, records)
    keys = [record.key for record in records] + [bytes(8) + b"another1"]
    assert [reader.get(key) for key in keys] == [r.payload for r in records] + [None]
    assert not reader.damaged


def test_a_damaged_copy_gives_way_to_a_whole_one_and_is_counted(tmp_path: Path) -> None:
    records = make_records(60, tokens=300)
    write(tmp_path, records[:30])
    (first,) = tmp_path.glob("*.arrow")
    reader = write(tmp_path, records[20:])
    flip(first, next(r.payload for r in records[20:30] if len(r.payload) > 20))
    flip(first, next(r.payload for r in records[:20] if len(r.payload) > 20))
    keys = [record.key for record in records]
    before = {name: count(name) for name in ("hits", "misses", "corrupt")}
    found = [reader.get(key) for key in keys]
    lost = next(r for r in records[:20] if len(r.payload) > 20)
    assert found == [None if record is lost else record.payload for record in records]
    assert {name: count(name) - value for name, value in before.items()} == {"hits": 59, "misses": 1, "corrupt": 2}
    assert Counter(record.key for record in reader.records()) == Counter(keys) - Counter([lost.key])


def count(name: str) -> float:
    return REGISTRY.get_sample_value(f"logitstream_cache_{name}_total") or 0.0


def make_large(sizes: Iterable[tuple[int, int]]) -> list[Record]:
    rng = np.random.default_rng(0)
    records = []
    for number, (num_tokens, num_bytes) in enumerate(sizes):
        mask = rng.random(num_tokens) < 0.5 if number % 4 == 1 else None
        ids = rng.integers(0, 1000, num_tokens, dtype=np.int32)
        records.append(Record(rng.bytes(16), ids, mask, rng.bytes(num_bytes), number, number % 3))
    return records


@pytest.mark.parametrize("batch_bytes", [1, 300_000, 3_000_000])
def test_records_of_any_size_come_in_order_whatever_the_batches(tmp_path: Path, batch_bytes: int) -> None:
    sizes = [(5, 10), (1, 0), (3000, 1 << 16), (7, 9), (10, 1 << 19), (200_000, 3)]
    records = make_large(sizes + [(500, 9000)] * 100)
    reader = write(tmp_path, records, batch_bytes=batch_bytes)
    for found, expected in zip(reader.records(), records, strict=True):
        assert_same(found, expected)


def check_all(reader: CacheReader, expected: dict[bytes, bytes], keys: list[bytes]) -> int:
    """No way of reading gives anything wrong, and all give the same; how many records are whole."""
    found = {record.key: record.payload for record in reader.records()}
    assert found.items() <= expected.items()
    assert [reader.get(key) for key in keys] == [found.get(key) for key in keys]
    return len(found)


def test_every_flipped_byte_and_every_cut_of_a_shard_is_noticed_by_all_ways_of_reading(tmp_path: Path) -> None:
    records = make_records(18, tokens=20)
    reader = write(tmp_path, records, batch_bytes=600)
    expected, keys = {record.key: record.payload for record in records}, [record.key for record in records]
    path, spans = shard_and_spans(reader)
    content = path.read_bytes()
    covered = np.zeros(len(content), bool)
    for part in ("tokens", "mask", "payload"):
        for start, size in zip(spans[f"{part}_start"].tolist(), spans[f"{part}_bytes"].tolist(), strict=True):
            covered[start : start + size] = True
    fd = os.open(path, os.O_RDWR)
    for position in range(0, len(content), 3):
        os.pwrite(fd, bytes([content[position] ^ 0x10]), position)
        assert check_all(reader, expected, keys) == len(records) - covered[position]
        os.pwrite(fd, content[position : position + 1], position)
    for size in range(len(content), 0, -41):
        os.ftruncate(fd, size)
        ends = spans["payload_start"].astype(int) + spans["payload_bytes"]
        assert check_all(reader, expected, keys) >= np.count_nonzero(ends < size) - np.count_nonzero(ends == 0)
    os.close(fd)


def test_a_cut_index_gives_missing_records(tmp_path: Path) -> None:
    records = make_records(40)
    reader = write(tmp_path, records)
    (index,) = tmp_path.glob("*.index")
    os.truncate(index, index.stat().st_size // 2)
    found = [reader.get(record.key) for record in records]
    assert all(payload in (None, record.payload) for payload, record in zip(found, records, strict=True))
    assert 0 < found.count(None) < len(records)


def test_an_open_shards_index_that_cannot_be_read_is_skipped_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in its place: reading it fails with EISDIR, as a failing disk does with EIO."""
    records = make_records(40)
    reader = write(tmp_path, records[:20])
    (tmp_path / "broken-0-0.arrow.open").touch()
    (tmp_path / "broken-0-0.index").mkdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            reader.refresh()
        again = CacheReader(tmp_path, FINGERPRINT)
    assert len([record for record in caplog.records if "broken-0-0" in record.message]) == 1
    for one in (reader, again):
        assert [one.get(r.key) for r in records] == [r.payload for r in records[:20]] + [None] * 20


def test_a_sealed_shard_that_cannot_be_read_gives_missing_records(tmp_path: Path) -> None:
    records = make_records(60)
    write(tmp_path, records[:20])
    (broken,) = tmp_path.glob("*.arrow")
    reader = write(tmp_path, records[20:])
    broken.rename(tmp_path / "away")
    broken.mkdir()
    keys = [record.key for record in records]
    expected = [None] * 20 + [record.payload for record in records[20:]]
    assert [reader.get(key) for key in keys] == expected
    assert {record.key for record in reader.records()} == set(keys[20:])
    assert reader.damaged == set(keys[:20])


def read_all(reader: CacheReader, records: list[Record], way: str) -> dict[bytes, bytes | None]:
    """Each key's payload, as one way of reading gives it."""
    keys = [record.key for record in records]
    if way == "get":
        return {key: reader.get(key) for key in keys}
    if way == "record":
        return {key: reader.get_record(key).payload for key in keys}
    if way == "by number":
        return {record.key: record.payload for record in map(reader.record, range(len(reader)))}
    found = list(reader.records())
    assert len({record.key for record in found}) == len(found)
    return {record.key: record.payload for record in found}


def seal(writer: CacheWriter, directory: Path) -> None:
    writer.close()


def recover(writer: CacheWriter, directory: Path) -> None:
    """As the next run does for a writer that was killed in the middle of a write."""
    (path,) = directory.glob("*.open")
    writer.abandon()
    with path.open("ab") as file:
        file.write(b"torn")
    CacheWriter(directory, FINGERPRINT).close()


def seal_and_prune(writer: CacheWriter, directory: Path) -> None:
    writer.close()
    prune(directory, before_draw_set=1)


def rewrite_shards(directory: Path) -> None:
    """Have all shards written anew: the last 8 bytes of each are damaged."""
    for path in directory.glob("*.arrow"):
        damaged = directory / ".damaged"
        damaged.write_bytes(path.read_bytes()[:-1] + b"x")
        damaged.replace(path)
    prune(directory, damaged=True)


def write_and_prune_twice(writer: CacheWriter, directory: Path) -> None:
    """Everything is rewritten, and rewritten again after a first look."""
    seal_and_prune(writer, directory)
    rewrite_shards(directory)


@pytest.mark.parametrize("way", ["get", "record", "by number", "records"])
@pytest.mark.parametrize("change", [seal, recover, seal_and_prune, write_and_prune_twice])
@pytest.mark.parametrize("looked", [False, True])
def test_what_was_flushed_is_found_by_every_way_of_reading_whatever_becomes_of_its_shard(
    tmp_path: Path, way: str, change: Callable[[CacheWriter, Path], None], looked: bool
) -> None:
    """A reader that looked before and is not refreshed; `looked`: it has shards open."""
    records = [record for record in make_records(80, tokens=200) if record.draw_set == 1]
    dropped = [record for record in make_records(80, tokens=200) if record.draw_set == 0][:5]
    with CacheWriter(tmp_path, FINGERPRINT, writer_id="before") as writer:
        put_all(writer, records[:10] + (dropped if "prune" in change.__name__ and way != "by number" else []))
    writer = CacheWriter(tmp_path, FINGERPRINT, writer_id="now")
    for part in (records[10:25], records[25:]):
        put_all(writer, part)
        assert writer.flush()
    reader = CacheReader(tmp_path, FINGERPRINT)
    numbered = [reader.key(i) for i in range(len(reader))]
    if looked:
        read_all(reader, records, way)
    change(writer, tmp_path)
    expected = {record.key: record.payload for record in records}
    for _ in range(2):
        found = read_all(reader, records, way)
        assert {key: found[key] for key in expected} == expected
    assert not reader.damaged
    assert [reader.key(i) for i in range(len(reader))] == numbered
    writer.close()


def test_a_shard_that_is_pruned_again_and_again_is_found_every_time(tmp_path: Path) -> None:
    records = make_records(30)
    reader = write(tmp_path, records)
    for _ in range(3):
        rewrite_shards(tmp_path)
        reader.close()  # as if other shards had crowded this one's file out
        assert [reader.get(r.key) for r in records] == [r.payload for r in records]
        reader.close()
        assert {r.key: r.payload for r in reader.records()} == {r.key: r.payload for r in records}


def test_readers_that_refresh_while_everything_is_rewritten_find_all_of_it(tmp_path: Path) -> None:
    """One process rewrites forty shards again and again; each refresh, and each new reader, finds every record."""
    records = make_records(200, tokens=10)
    for part in range(40):
        with CacheWriter(tmp_path, FINGERPRINT) as writer:
            put_all(writer, records[5 * part : 5 * part + 5])
    reader, keys = CacheReader(tmp_path, FINGERPRINT), [record.key for record in records]
    process = multiprocessing.get_context("spawn").Process(target=rewrite_all, args=(tmp_path, 3))
    process.start()
    rounds = 0
    while process.is_alive() or rounds < 3:
        rounds += 1
        assert [reader.get(key) for key in keys] == [record.payload for record in records]
        reader.refresh()
        assert [reader.key(i) for i in range(len(reader))] == sorted(keys)
        assert len(CacheReader(tmp_path, FINGERPRINT)) == len(records)
    process.join()
    assert process.exitcode == 0
    assert not reader.damaged


def rewrite_all(directory: Path, rounds: int) -> None:
    for _ in range(rounds):
        rewrite_shards(directory)


def test_what_was_pruned_away_is_missing_not_damaged(tmp_path: Path) -> None:
    records = make_records(30)
    reader = write(tmp_path, records)
    prune(tmp_path, before_draw_set=1)
    expected = [record.payload if record.draw_set else None for record in records]
    assert [reader.get(record.key) for record in records] == expected
    assert {record.key for record in reader.records()} == {record.key for record in records if record.draw_set}
    assert not reader.damaged


def test_a_reader_keeps_to_what_another_one_saw(tmp_path: Path) -> None:
    """An open shard grows, is sealed, and others are written: length and order stay."""
    records = make_records(90)
    with CacheWriter(tmp_path, FINGERPRINT) as sealed:
        put_all(sealed, records[:20])
    writer = CacheWriter(tmp_path, FINGERPRINT, writer_id="open")
    put_all(writer, records[10:40])  # ten of them a second time
    writer.flush()
    first = CacheReader(tmp_path, FINGERPRINT)
    view = json.loads(json.dumps(first.view()))
    keys = sorted(record.key for record in records[:40])
    for stage in range(3):
        if stage == 1:
            put_all(writer, records[30:60])
            writer.flush()
        if stage == 2:
            writer.close()
            write(tmp_path, records[50:])
        later = CacheReader(tmp_path, FINGERPRINT)
        assert len(later) == [40, 60, 90][stage]
        later.keep_to(view)
        for reader in (later, pickle.loads(pickle.dumps(later))):
            assert [reader.key(i) for i in range(len(reader))] == keys
            assert [reader.record(i).key for i in range(len(reader))] == keys
            by_key = {record.key: record.draw_set for record in records}
            assert reader.draw_sets().tolist() == [by_key[key] for key in keys]
            assert reader.view() == view
            reader.refresh()
            assert len(reader) == 40
    assert all(later.get(record.key) == record.payload for record in records)


def test_a_reader_keeps_to_the_same_keys_wherever_they_lie_but_not_to_fewer(tmp_path: Path) -> None:
    records = make_records(40)
    view = write(tmp_path, records).view()
    rewrite_shards(tmp_path)
    reader = CacheReader(tmp_path, FINGERPRINT)
    reader.keep_to(view)
    assert len(reader) == 40
    prune(tmp_path, before_draw_set=1)
    with pytest.raises(CacheError, match="does not hold the sequences any more"):
        CacheReader(tmp_path, FINGERPRINT).keep_to(view)


def test_a_record_of_an_open_shard_costs_a_reader_no_more_than_a_hundred_bytes(tmp_path: Path) -> None:
    """Found at once, or in twenty refreshes; beside the fixed cost of an empty reader."""
    records = [Record(i.to_bytes(16, "big"), np.zeros(1, np.int32), None, b"x", i) for i in range(1, 8_001)]
    writer = CacheWriter(tmp_path, FINGERPRINT, batch_bytes=3_000)
    put_all(writer, records[:10])
    assert writer.flush()
    kinds = []
    tracemalloc.start()
    for refreshes in (20, 1):
        before = memory()
        reader = CacheReader(tmp_path, FINGERPRINT)
        for start in range(10, len(records) if refreshes > 1 else 0, len(records) // refreshes):
            put_all(writer, records[start : start + len(records) // refreshes])
            assert writer.flush()
            reader.refresh()
        if refreshes > 1:  # the writer's own spans are not the reader's
            written = memory()
            del reader
            kinds.append(written - memory())
        else:
            kinds.append(memory() - before)
            assert [reader.get(record.key) for record in records[::97]] == [b"x"] * len(records[::97])
            assert reader.num_records == len(records)
    tracemalloc.stop()
    writer.close()
    assert max(kinds) / len(records) < 100, kinds


def memory() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_open_shards_that_grow_in_turns_keep_their_records_apart(tmp_path: Path) -> None:
    """Counts, draw sets and views of two writers whose batches alternate."""
    records = make_records(60)
    writers = [CacheWriter(tmp_path, FINGERPRINT, writer_id=name) for name in ("a", "b")]
    reader = CacheReader(tmp_path, FINGERPRINT)
    for start in range(0, 60, 10):
        put_all(writers[start // 10 % 2], records[start : start + 10])
        for writer in writers:
            assert writer.flush()
        reader.refresh()
        if start == 20:
            view = reader.view()
    assert len(reader.view()["records"]) == 2
    assert list(reader.draw_sets()) == [{r.key: r.draw_set for r in records}[reader.key(i)] for i in range(60)]
    reader.keep_to(view)
    assert {reader.key(i) for i in range(len(reader))} == {record.key for record in records[:30]}
    for writer in writers:
        writer.close()
    reader.refresh()
    assert {reader.key(i) for i in range(len(reader))} == {record.key for record in records[:30]}
    assert {record.key: record.payload for record in reader.records()} == {r.key: r.payload for r in records}
