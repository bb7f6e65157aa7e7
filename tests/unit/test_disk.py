"""The disk's thread: who waits for it waits a bounded time, and what waits for it is bounded."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from logitstream import metrics
from teacher_server.disk import Disk

PATIENCE = 0.3


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_disk_that_hangs_is_waited_for_once_and_used_again_when_it_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, answers, called = Disk(patience_seconds=PATIENCE), threading.Event(), list[int]()
    before = metrics.value("logitstream_cache_hangs_total")
    assert before is not None
    assert await disk.ask(int, "7") == 7
    waiting = asyncio.ensure_future(disk.ask(answers.wait))
    await asyncio.sleep(0)
    queued = [asyncio.ensure_future(disk.ask(called.append, number)) for number in range(20)]
    assert await waiting is None
    assert await asyncio.gather(*queued) == [None] * 20
    assert disk.hangs
    start = time.monotonic()
    for number in range(1000):
        assert await disk.ask(called.append, number) is None
    assert time.monotonic() - start < 100 * PATIENCE  # each of them would have waited
    answers.set()
    while disk.hangs:
        await asyncio.sleep(0.01)
    assert await disk.ask(int, "8") == 8
    assert called == []  # what nobody waited for any more was never done
    assert metrics.value("logitstream_cache_hangs_total") == before + 1
    assert warnings(caplog) == [
        "the cache's disk has not answered for 0.3 s: the server goes on without its cache until it does",
        "the cache's disk answers again",
    ]
    disk.shutdown()


async def test_what_waits_to_be_written_is_bounded_and_written_once_the_disk_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, answers, written = Disk(patience_seconds=PATIENCE, max_waiting_bytes=100), threading.Event(), list[int]()
    assert disk.offer(1000, answers.wait, 20)  # more than the bound, where nothing else waits
    assert not disk.offer(1, written.append, -1)
    answers.set()
    assert await disk.ask(int, "1") == 1
    answers.clear()
    blocked = disk.submit(answers.wait, 20)
    taken = [disk.offer(30, written.append, number) for number in range(1000)]
    assert taken == [True] * 3 + [False] * 997
    answers.set()
    await blocked
    assert await disk.ask(int, "1") == 1
    assert written == [0, 1, 2]
    assert disk.offer(100, written.append, 3)
    await disk.submit(int)
    assert written == [0, 1, 2, 3]
    assert (
        warnings(caplog)
        == [
            "the cache's disk does not keep up: what is scored meanwhile is not kept",
            "the cache's disk keeps up again",
        ]
        * 2
    )
    disk.shutdown()


async def test_what_fails_on_the_disk_is_logged_once_and_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk(patience_seconds=PATIENCE)
    for _ in range(3):
        assert await disk.ask(int, "x") is None
    assert disk.offer(1, int, "y")
    await disk.submit(int)
    await asyncio.sleep(0)
    failures = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert warnings(caplog) == ["the cache failed"] * 2
    assert [str(one)[-3:] for one in failures] == ["'x'", "'y'"]
    assert await disk.ask(int, "7") == 7
    disk.shutdown()
