"""Shards that were cut off, shared, forked over, pruned or damaged while somebody reads them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstream.cache import CacheReader, CacheWriter, Record
from logitstream.cache.index import HALVES, Snapshot, sorted_keys
from logitstream.cache.tools.rewrite import prune
from logitstream.cache.tools.verify import verify
from logitstream.errors import CacheError, FingerprintMismatch
from tests.unit.test_cache import fingerprint, make_records, put_all

FINGERPRINT = fingerprint()
RECORDS = make_records(24)


def flush_in_threes(directory: Path, records: list[Record] = RECORDS) -> tuple[CacheWriter, Path, list[int]]:
    """A writer that is still open, its shard, and the shard's size after each flush."""
    writer = CacheWriter(directory, FINGERPRINT)
    sizes = []
    for start in range(0, len(records), 3):
        put_all(writer, records[start : start + 3])
        assert writer.flush()
        (path,) = directory.glob("*.open")
        sizes.append(path.stat().st_size)
    return writer, path, sizes


@pytest.fixture(scope="module")
def open_shard() -> tuple[dict[str, bytes], str, list[int]]:
    """The files of a cache with an open shard, the shard's name, and its size after each flush."""
    with tempfile.TemporaryDirectory() as folder:
        writer, path, sizes = flush_in_threes(Path(folder))
        found = {one.name: one.read_bytes() for one in Path(folder).iterdir()}, path.name, sizes
        writer.close()
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_shard_cut_off_at_any_byte_keeps_every_whole_batch(
    data: st.DataObject, open_shard: tuple[dict[str, bytes], str, list[int]]
) -> None:
    """The index may be whole, or cut off at any byte as well."""
    files, name, sizes = open_shard
    index = name.replace(".arrow.open", ".index")
    cut = data.draw(st.integers(0, len(files[name])))
    index_cut = data.draw(st.integers(0, len(files[index])) | st.just(len(files[index])))
    tail = data.draw(st.binary(max_size=40))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for file, content in files.items():
            (directory / file).write_bytes(content)
        (directory / name).write_bytes(files[name][:cut] + tail)
        (directory / index).write_bytes(files[index][:index_cut])
        kept = {r.key for r in RECORDS[: 3 * sum(size <= cut for size in sizes)]}
        before = CacheReader(directory, FINGERPRINT)
        _check(before, kept if index_cut == len(files[index]) else set(), kept)
        CacheWriter(directory, FINGERPRINT).close()
        if cut >= sizes[0]:
            assert not list(directory.glob("*.open"))
        _check(CacheReader(directory, FINGERPRINT), kept, kept)
        before.refresh()
        _check(before, kept, kept)


def _check(reader: CacheReader, found_at_least: set[bytes], kept: set[bytes]) -> None:
    """The records are there; of a batch that the tail makes look whole, those that are undamaged may be."""
    found = {r.key: r.payload for r in reader.records()}
    assert found_at_least <= found.keys()
    assert len(found) <= len(kept) + 3
    assert found.items() <= {r.key: r.payload for r in RECORDS}.items()


def test_a_torn_tail_is_cut_off_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer, path, sizes = flush_in_threes(tmp_path)
    os.truncate(path, sizes[-1] - 5)
    writer.abandon()
    CacheWriter(tmp_path, FINGERPRINT).close()
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"cut off a torn tail of {sizes[-1] - 5 - sizes[-2]} bytes" in message


def test_a_live_writers_shard_is_left_alone(tmp_path: Path) -> None:
    writer, path, _ = flush_in_threes(tmp_path, RECORDS[:6])
    CacheWriter(tmp_path, FINGERPRINT).close()
    assert path.exists()
    put_all(writer, RECORDS[6:])
    writer.close()
    assert len(CacheReader(tmp_path)) == len(RECORDS)


def test_batches_before_damage_in_an_open_shard_are_kept(tmp_path: Path) -> None:
    writer, path, sizes = flush_in_threes(tmp_path)
    writer.abandon()
    content = bytearray(path.read_bytes())
    content[sizes[3] : sizes[3] + 40] = bytes(40)
    path.write_bytes(content)
    CacheWriter(tmp_path, FINGERPRINT).close()
    expected = {r.key: r.payload for r in RECORDS[:12]}
    assert {r.key: r.payload for r in CacheReader(tmp_path).records()} == expected
    assert not verify(tmp_path)[0]


def test_a_shard_of_a_dead_writer_without_its_index_is_recovered_from_itself(tmp_path: Path) -> None:
    writer, _, _ = flush_in_threes(tmp_path)
    writer.abandon()
    (index,) = tmp_path.glob("*.index")
    content = index.read_bytes()
    for damaged in (b"", content[:50], content[: len(content) // 2], bytes(100) + content[100:]):
        copy = tmp_path / f"copy{len(damaged)}"
        shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy*"))
        (copy / index.name).write_bytes(damaged)
        CacheWriter(copy, FINGERPRINT).close()
        assert {r.key: r.payload for r in CacheReader(copy).records()} == {r.key: r.payload for r in RECORDS}
        assert not verify(copy)[0]


def test_first_writers_at_the_same_moment_agree_on_one_manifest(tmp_path: Path) -> None:
    outcomes: list[object] = []
    barrier = threading.Barrier(8)

    def begin(number: int) -> None:
        barrier.wait()
        try:
            CacheWriter(tmp_path, fingerprint(vocab_size=1000 + number % 2)).close()
            outcomes.append(number % 2)
        except FingerprintMismatch as error:
            outcomes.append(error)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = CacheReader(tmp_path).fingerprint.vocab_size - 1000
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [winner] * 4
    assert len(outcomes) == 8


def test_the_id_model_lies_beside_the_shards_and_is_checked(tmp_path: Path) -> None:
    id_model = b"\x01some model"
    known = fingerprint(id_model_digest=hashlib.sha256(id_model).hexdigest())
    with pytest.raises(ValueError, match="expected the teacher's id model"):
        CacheWriter(tmp_path, known)
    with pytest.raises(ValueError, match="as the fingerprint names it"):
        CacheWriter(tmp_path, known, id_model=b"another")
    CacheWriter(tmp_path, known, id_model=id_model).close()
    CacheWriter(tmp_path, known).close()  # it is there by now
    assert CacheReader(tmp_path).id_model == id_model
    (tmp_path / "id_model.bin").write_bytes(b"\x01some Model")
    with pytest.raises(CacheError, match=r"id_model\.bin is damaged: expected SHA-256"):
        CacheReader(tmp_path)


def test_a_damaged_missing_or_foreign_id_model_is_made_good_by_a_writer_that_has_it(tmp_path: Path) -> None:
    models = [b"\x01one model", b"\x01another one"]
    known = [fingerprint(id_model_digest=hashlib.sha256(model).hexdigest()) for model in models]
    CacheWriter(tmp_path, known[0], id_model=models[0]).close()
    path = tmp_path / "id_model.bin"
    for damage in (lambda: path.write_bytes(models[1]), lambda: path.write_bytes(b"\x01"), path.unlink):
        damage()
        CacheWriter(tmp_path, known[0], id_model=models[0]).close()
        assert CacheReader(tmp_path).id_model == models[0]
    before = path.stat()
    with pytest.raises(FingerprintMismatch):  # and no right one is written over
        CacheWriter(tmp_path, known[1], id_model=models[1])
    CacheWriter(tmp_path, known[0], id_model=models[0]).close()
    assert (path.stat().st_ino, path.read_bytes()) == (before.st_ino, models[0])


def test_first_writers_with_other_id_models_leave_the_winners_in_place(tmp_path: Path) -> None:
    """Twenty folders, each begun by four threads with an id model each."""
    models = [b"\x01" + bytes([n]) * 1000 for n in range(4)]
    known = [fingerprint(id_model_digest=hashlib.sha256(model).hexdigest()) for model in models]
    for attempt in range(20):
        barrier = threading.Barrier(4)

        def begin(number: int, folder: Path, barrier: threading.Barrier) -> None:
            barrier.wait()
            with contextlib.suppress(FingerprintMismatch):
                CacheWriter(folder, known[number], id_model=models[number]).close()

        folder = tmp_path / str(attempt)
        threads = [threading.Thread(target=begin, args=(n, folder, barrier)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reader = CacheReader(folder)
        assert reader.id_model == models[known.index(reader.fingerprint)]


def test_a_file_cut_off_while_it_is_read_gives_missing_records_not_a_crash(tmp_path: Path) -> None:
    records = make_records(400, tokens=2500)
    with CacheWriter(tmp_path, FINGERPRINT, batch_bytes=2_000) as writer:
        put_all(writer, records)
    (path,) = tmp_path.glob("*.arrow")
    reader = CacheReader(tmp_path)
    iterator = reader.records()
    found = [next(iterator)]
    os.truncate(path, path.stat().st_size // 3)
    found.extend(iterator)
    assert 1 < len(found) < len(records)
    expected = {r.key: r.payload for r in records}
    assert all(expected[r.key] == r.payload for r in found)
    answers = [reader.get(r.key) for r in records]
    assert all(answer in (None, r.payload) for answer, r in zip(answers, records, strict=True))
    assert None in answers
    with pytest.raises(CacheError, match="every copy"):
        reader.get_record(next(r.key for r, answer in zip(records, answers, strict=True) if answer is None))


def test_a_missing_or_foreign_index_is_made_good_by_the_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        with CacheWriter(tmp_path, FINGERPRINT) as writer:
            put_all(writer, RECORDS[12 * number : 12 * number + 12])
    first, second = sorted(tmp_path.glob("*.index"))
    shutil.copy(second, first)
    second.unlink()
    reader = CacheReader(tmp_path)
    assert {r.key: r.payload for r in reader.records()} == {r.key: r.payload for r in RECORDS}
    assert [reader.get(r.key) for r in RECORDS] == [r.payload for r in RECORDS]
    assert len([r for r in caplog.records if "found by a scan" in r.getMessage()]) == 2


def test_a_shard_of_another_cache_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CacheWriter(tmp_path / "other", replace(FINGERPRINT, vocab_size=7)) as writer:
        put_all(writer, RECORDS)
    CacheWriter(tmp_path / "mine", FINGERPRINT).close()
    (shard,) = (tmp_path / "other").glob("*.arrow")
    shutil.copy(shard, tmp_path / "mine")
    assert len(CacheReader(tmp_path / "mine")) == 0
    assert "no shard of this cache" in caplog.text


def test_readers_go_on_while_shards_are_written_sealed_and_pruned(tmp_path: Path) -> None:
    records = make_records(300)
    expected = {r.key: r.payload for r in records}
    kept = {r.key for r in records if r.draw_set == 1}
    reader = CacheReaderInThreads(tmp_path, expected)
    with CacheWriter(tmp_path, FINGERPRINT, shard_bytes=4_000, batch_bytes=500) as writer:
        for number, one in enumerate(records):
            put_all(writer, [one])
            if number % 50 == 49:
                writer.flush()
                reader.refresh()
                reader.flushed.update(kept & {r.key for r in records[: number + 1]})
            if number == 150:
                prune(tmp_path, before_draw_set=1)
    reader.finish()
    assert reader.wrong == []
    assert reader.lost == []
    assert reader.found > 0


class CacheReaderInThreads:
    """Two threads that ask for random keys until they are told to finish.

    flushed: keys that nobody prunes, and that a refresh has found: they are there from then on.
    """

    def __init__(self, directory: Path, expected: dict[bytes, bytes]) -> None:
        CacheWriter(directory, FINGERPRINT).close()
        self.wrong: list[bytes] = []
        self.lost: list[bytes] = []
        self.flushed: set[bytes] = set()
        self.found = 0
        self._reader = CacheReader(directory, FINGERPRINT)
        self.refresh = self._reader.refresh
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed, expected)) for seed in range(2)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int, expected: dict[bytes, bytes]) -> None:
        rng, keys = np.random.default_rng(seed), list(expected)
        while not self._done.is_set() or not self.found:
            some = [keys[i] for i in rng.integers(len(keys), size=rng.integers(1, 40))]
            there = self.flushed.intersection(some)
            for key, payload in zip(some, map(self._reader.get, some), strict=True):
                if payload is not None:
                    self.found += 1
                    if payload != expected[key]:
                        self.wrong.append(key)
                elif key in there:
                    self.lost.append(key)

    def finish(self) -> None:
        self.refresh()
        self._done.set()
        for thread in self._threads:
            thread.join()
        assert not self._reader.damaged


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_keys_that_share_their_first_half_are_told_apart(data: st.DataObject) -> None:
    halves = st.sampled_from([bytes(8), b"\xff" * 8, b"12345678"])
    key_lists = st.lists(st.tuples(halves, halves).map(b"".join), max_size=12)
    found, all_keys = sorted_keys([]), []
    for _ in range(3):
        keys = data.draw(key_lists)
        more = [(*HALVES.unpack(key), len(all_keys) + i, 0) for i, key in enumerate(keys)]
        found = sorted_keys([found, np.array(more, np.uint64).reshape(-1, 4).T])
        all_keys += keys
    for key in {*all_keys, b"12345678" + bytes(8)}:
        assert Snapshot(keys=found).places(key) == [i for i, other in enumerate(all_keys) if other == key]
    assert [HALVES.pack(*halves) for halves in found[:2].T.tolist()] == sorted(all_keys)
    distinct = Snapshot(keys=found).distinct()
    assert [HALVES.pack(*halves) for halves in distinct[:2].T.tolist()] == sorted(set(all_keys))
