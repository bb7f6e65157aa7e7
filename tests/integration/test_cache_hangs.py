"""A disk that does not answer holds up no run that has a teacher, and ends one that has none with a clear error."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitstream import metrics
from logitstream.cache import CacheReader
from logitstream.cache.disk import DiskThread
from logitstream.data.batches import split_batch
from logitstream.data.corpus import CacheDataset
from logitstream.data.documents import Batch
from logitstream.errors import DiskHangs
from logitstream.training.target_cache import TargetCache, open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.types import Fingerprint
from tests.hanging_disk import FreezingDisk, freezing_disk, hanging_file
from tests.unit.test_target_stream import INFO, SPEC, HandTeacher, assert_same, expected, make_batches, wait_until

PATIENCE = 0.5


def disk() -> DiskThread:
    return DiskThread("the disk", then="so be it", patience_seconds=PATIENCE)


def open_cache(directory: Path, *, write: bool = True) -> TargetCache:
    known = Fingerprint.of(INFO, SPEC) if write else None
    return TargetCache(directory, known, write=write, disk=disk())


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[FreezingDisk]:
    with freezing_disk(tmp_path) as made:
        yield made


def test_a_disk_that_hangs_is_asked_no_more_until_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    thread, answers, asked = disk(), threading.Event(), []
    before = metrics.CACHE_HANGS._value.get()

    def ask(answer: int) -> int:
        asked.append(answer)
        answers.wait()
        return answer

    for answer in range(3):
        with pytest.raises(DiskHangs, match="the disk"):
            thread.call(lambda answer=answer: ask(answer))  # type: ignore[misc]
    assert (asked, thread.hangs) == ([0], True)
    answers.set()
    wait_until(lambda: not thread.hangs)
    assert thread.call(lambda: ask(3)) == 3
    assert asked == [0, 3]
    assert metrics.CACHE_HANGS._value.get() == before + 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["the disk has not answered for 0.5 s: so be it", "the disk answers again"]
    thread.close()


def test_what_takes_long_but_gets_on_does_not_hang() -> None:
    def work() -> str:
        until = time.monotonic() + 4 * PATIENCE
        while time.monotonic() < until:
            sum(range(1000))
        return "done"

    assert disk().call(work) == "done"


def test_errors_of_the_disk_are_raised_where_it_is_asked() -> None:
    def fail() -> None:
        raise TimeoutError("of the operation itself")

    with pytest.raises(TimeoutError, match="of the operation itself"):
        disk().call(fail)


def test_a_process_ends_although_its_disk_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    program = (
        "import sys; from logitstream.cache.disk import DiskThread; from logitstream.errors import DiskHangs\n"
        "disk = DiskThread('the disk', then='so be it', patience_seconds=0.2)\n"
        "try: disk.call(lambda: open(sys.argv[1]))\n"
        "except DiskHangs: print('went on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "pipe")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "went on\n"


def test_a_forked_process_asks_the_disk_in_a_thread_of_its_own() -> None:
    thread = disk()
    assert thread.call(os.getpid) == os.getpid()
    child = os.fork()
    if child == 0:
        os._exit(0 if thread.call(os.getpid) == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0


def fill(directory: Path, count: int) -> None:
    """A cache of so many batches, sealed."""
    cache = open_target_cache(directory, HandTeacher(), SPEC, online=True)
    list(TargetStream(make_batches(count), HandTeacher(), cache=cache, draw_set=0))
    cache.close()


def test_the_teacher_is_asked_for_what_a_hanging_disk_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, 8)
    cache, teacher = open_cache(tmp_path), HandTeacher()
    batches = make_batches(12)
    stream = TargetStream(batches, teacher, cache=cache, mode="cache_then_online", draw_set=0)
    (shard,) = tmp_path.glob("*.arrow")
    with hanging_file(shard):
        for got, source in zip(stream, batches, strict=True):
            assert_same(got["targets"], expected(source))
    assert len(teacher.asked) == 24
    assert stream.stats.cached_sequences == 0
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in said if "has not answered" in line] == ["the disk has not answered for 0.5 s: so be it"]
    cache.close()
    for _ in range(100):  # once it answers it is used again
        again = open_cache(tmp_path)
        stream = TargetStream(batches, teacher, cache=again, mode="cache_then_online", draw_set=0)
        assert len(list(stream)) == 12
        again.close()
        if stream.stats.cached_sequences == 24:
            break
    assert stream.stats.cached_sequences == 24


def test_a_run_from_the_cache_alone_says_that_it_cannot_go_on(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    cache = open_cache(tmp_path, write=False)
    (shard,) = tmp_path.glob("*.arrow")
    stream = TargetStream(make_batches(4), None, cache=cache, mode="cache", draw_set=0)
    with hanging_file(shard), pytest.raises(DiskHangs, match=r"the disk has not answered for 0\.5 s: so be it"):
        list(stream)
    cache.close()


def test_a_corpus_on_a_hanging_disk_is_an_error_not_a_standstill(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    corpus = CacheDataset(CacheReader(tmp_path))
    corpus._disk = disk()
    (shard,) = tmp_path.glob("*.arrow")
    with hanging_file(shard), pytest.raises(DiskHangs):
        corpus[0]
    wait_until(lambda: not corpus._disk.hangs)
    assert len(corpus[0]["input_ids"]) == 6


def test_a_frozen_file_system_holds_up_neither_training_nor_its_end(
    frozen: FreezingDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """Frozen in the middle of a run: what comes is trained on, what is not on disk is counted."""
    directory, batches, teacher = frozen.folder / "cache", make_batches(40), HandTeacher()
    cache = open_cache(directory)
    stream = TargetStream(batches, teacher, cache=cache, draw_set=0, prefetch_batches=2)
    iterator = iter(stream)
    got = [next(iterator) for _ in range(5)]
    cache.refresh()
    frozen.freeze()
    got.extend(iterator)
    for batch, source in zip(got, batches, strict=True):
        assert_same(batch["targets"], expected(source))
    assert not cache.writable
    cache.close()
    assert "the last targets are not on the disk, which did not answer" in caplog.text
    frozen.thaw()


def expected_keys(cache: TargetCache, batch: Batch) -> list[bytes]:
    return [cache.key(sequence, 0) for _, sequence in split_batch(batch)]


def test_a_cache_on_a_frozen_file_system_opens_once_it_answers(frozen: FreezingDisk) -> None:
    batches = make_batches(6)
    frozen.freeze()
    cache = open_cache(frozen.folder / "cache")
    stream = TargetStream(batches, HandTeacher(), cache=cache, draw_set=0)
    assert [len(batch["targets"].row_offsets) for batch in stream] == [13] * 6
    assert not cache.writable
    frozen.thaw()
    wait_until(lambda: cache.writable)
    list(stream)
    cache.refresh()
    assert all(key in cache for batch in batches for key in expected_keys(cache, batch))
    cache.close()
