"""The server's own cache: hits need no scoring, damage and a full disk need no attention."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import sys
import threading
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from logitstream import metrics
from logitstream.cache import CacheReader
from logitstream.cache.manifest import tree_bytes
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo
from teacher_server.backend import ScoreRequest
from teacher_server.encoding import encoder
from teacher_server.scheduler import Scheduler
from teacher_server.server import TeacherServer
from teacher_server.stored_targets import MAX_OPEN, MAX_WAITING, REFRESH_SECONDS, CacheFolder, StoredTargets
from tests.fakes import FakeBackend
from tests.hanging_disk import freezing_disk, hanging_file
from tests.serving import SPEC, WireClient, sequence, serving


def request(first: int, draw_set: int = 0) -> ScoreRequest:
    return ScoreRequest(sequence=sequence(first, 1, 2), spec=SPEC, draw_set=draw_set)


async def score(
    directory: Path,
    backend: FakeBackend,
    requests: list[ScoreRequest],
    max_bytes: int = 0,
    kind: type[CacheFolder] = CacheFolder,
) -> list[bytes]:
    """The answers of a server that begins and ends with these requests."""
    stored = StoredTargets(kind(str(directory), max_bytes=max_bytes))
    scheduler = Scheduler(backend, encoder(b"", 1 << 20), max_batch_tokens=100, stored=stored)
    running = asyncio.ensure_future(scheduler.run())
    await scheduler.open_stored(SPEC)
    answers = await asyncio.gather(*(scheduler.submit(one, client_id="x") for one in requests))
    running.cancel()
    await scheduler.close()
    return [answer.payload for answer in answers]


def num_scored(backend: FakeBackend) -> int:
    return sum(map(len, backend.batches))


async def test_what_was_scored_is_not_scored_again_by_this_or_another_server(tmp_path: Path) -> None:
    requests = [request(number, draw_set) for number in range(5) for draw_set in (0, 1)]
    first, second = FakeBackend(), FakeBackend()
    payloads = await score(tmp_path, first, requests)
    before = metrics.TEACHER_CACHE_HITS._value.get()
    again = await score(tmp_path, second, [*requests, request(9)])
    assert again[:10] == payloads
    assert (num_scored(first), num_scored(second)) == (10, 1)
    assert metrics.TEACHER_CACHE_HITS._value.get() == before + 10


async def test_a_student_reads_the_servers_cache(tmp_path: Path) -> None:
    backend = FakeBackend()
    (payload,) = await score(tmp_path, backend, [request(1)])
    fingerprint = Fingerprint.of(backend.describe(), SPEC)
    reader = CacheReader(tmp_path / fingerprint.digest[:16], fingerprint)
    assert [record.payload for record in reader.records()] == [payload]
    assert reader.record(0).token_ids.tolist() == [1, 1, 2]


async def test_other_weights_are_scored_anew(tmp_path: Path) -> None:
    await score(tmp_path, FakeBackend(), [request(1)])
    other = FakeBackend(weights_digest="0b" * 32)
    await score(tmp_path, other, [request(1)])
    assert num_scored(other) == 1
    assert len(list(tmp_path.iterdir())) == 2


async def test_a_damaged_record_is_scored_anew_and_kept(tmp_path: Path) -> None:
    (payload,) = await score(tmp_path, FakeBackend(), [request(1)])
    (shard,) = tmp_path.glob("*/*.arrow")
    content = bytearray(shard.read_bytes())
    content[content.find(payload)] ^= 1
    shard.write_bytes(content)
    for expected in (1, 0):
        backend = FakeBackend()
        assert await score(tmp_path, backend, [request(1)]) == [payload]
        assert num_scored(backend) == expected


async def test_a_cache_that_cannot_be_written_or_read_changes_no_answer(tmp_path: Path) -> None:
    plain = await score(tmp_path / "good", FakeBackend(), [request(1), request(2)])
    (tmp_path / "file").write_bytes(b"")
    assert await score(tmp_path / "file", FakeBackend(), [request(1), request(2)]) == plain
    assert await score(tmp_path / "small", FakeBackend(), [request(1), request(2)], max_bytes=10) == plain
    for manifest in (tmp_path / "good").glob("*/manifest.json"):
        manifest.write_bytes(b"{}")
    assert await score(tmp_path / "good", FakeBackend(), [request(1), request(2)]) == plain


class FailingTargets(CacheFolder):
    """Says what is stored, and fails at reading it in a way that no cache foresees."""

    def get(self, request: ScoreRequest, info: TeacherInfo) -> bytes | None:
        raise OSError("Input/output error")


async def test_a_disk_that_fails_in_an_unforeseen_way_leaves_nobody_without_an_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    payloads = await score(tmp_path, FakeBackend(), [request(1), request(2)])
    backend = FakeBackend()
    async with asyncio.timeout(20):
        assert await score(tmp_path, backend, [request(1), request(2)], kind=FailingTargets) == payloads
    assert num_scored(backend) == 2
    too_long = tmp_path / ("x" * 300)  # the disk refuses even to say whether it is there
    async with asyncio.timeout(20):
        assert await score(too_long, FakeBackend(), [request(1), request(2)]) == payloads
    assert "Input/output error" in caplog.text
    assert "File name too long" in caplog.text


def test_a_folder_of_another_fingerprint_is_passed_over_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = FakeBackend().describe()
    first, other = seeded(1), seeded(2)
    stored = CacheFolder(str(tmp_path))
    stored.put([(first, b"payload")], info)
    stored.close()
    (folder,) = tmp_path.iterdir()
    shutil.copytree(folder, tmp_path / Fingerprint.of(info, other.spec).digest[:16])
    stored = CacheFolder(str(tmp_path))
    stored.refresh()  # as a server does at its start
    for _ in range(3):
        stored.open(other.spec, info)
        stored.put([(other, b"payload")], info)
        assert stored.get(other, info) is None
    stored.open(first.spec, info)
    assert stored.get(first, info) == b"payload"
    stored.close()
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is not used: " in said
    assert "seed" in said


async def test_requests_that_join_while_the_disk_is_read_share_the_answer(tmp_path: Path) -> None:
    await score(tmp_path, FakeBackend(), [request(1)])
    backend = FakeBackend()
    payloads = await score(tmp_path, backend, [request(1)] * 3)
    assert payloads[0] == payloads[1] == payloads[2]
    assert num_scored(backend) == 0


async def test_a_server_with_a_cache_answers_a_second_call_from_it(tmp_path: Path) -> None:
    backend = FakeBackend()
    sequences = [sequence(number, 5, 6) for number in range(4)]
    async with serving(backend, cache=str(tmp_path)) as server:
        targets = []
        for _ in range(2):
            async with WireClient(server.address) as client:
                targets.append([result.targets for result in await client.score(*sequences)])
            assert server.scheduler is not None
            await server.scheduler.stored.ask(
                server.scheduler.stored.folder.refresh
            )  # as the server does once a second
        assert targets[0] == targets[1]
        assert num_scored(backend) == 4


def test_few_caches_are_open_and_a_closed_one_is_opened_again(tmp_path: Path) -> None:
    info = FakeBackend().describe()
    stored = CacheFolder(str(tmp_path))
    requests = [replace(request(1), spec=replace(SPEC, seed=seed)) for seed in range(MAX_OPEN + 4)]
    for one in requests:
        stored.put([(one, b"payload")], info)
    stored.refresh()
    assert len(list(tmp_path.iterdir())) == len(requests)
    assert len(list(tmp_path.glob("*/*.arrow.open"))) == MAX_OPEN
    assert [stored.holds(one, info) for one in requests] == [False] * 4 + [True] * MAX_OPEN
    stored.open(requests[0].spec, info)
    assert stored.get(requests[0], info) == b"payload"
    stored.close()


def seeded(seed: int, first: int = 1, num_tokens: int = 3) -> ScoreRequest:
    return ScoreRequest(sequence=sequence(*range(first, first + num_tokens)), spec=replace(SPEC, seed=seed), draw_set=0)


def test_each_cache_keeps_to_the_bound_and_uses_it(tmp_path: Path) -> None:
    max_bytes, now, info = 400_000, 0.0, FakeBackend().describe()
    stored = CacheFolder(str(tmp_path), max_bytes=max_bytes, clock=lambda: now)
    rng = random.Random(1)
    for number in range(1400):
        one = seeded(number % 2, first=number, num_tokens=1 + number % 50)
        stored.open(one.spec, info)
        stored.put([(one, rng.randbytes(rng.randrange(1, 2000)))], info)
        if number % 20 == 0:
            stored.refresh()
    stored.refresh()
    for cache in tmp_path.iterdir():
        assert 0.8 * max_bytes < tree_bytes(cache) <= max_bytes
    labels = {sample.labels["cache"] for sample in next(iter(metrics.CACHE_DISK_FREE.collect())).samples}
    assert {label for label in labels if str(tmp_path) in label} == {str(tmp_path)}
    for cache in tmp_path.iterdir():  # as people clear a folder
        shutil.rmtree(cache)
    now += 61
    stored.refresh()
    stored.put([(seeded(0), b"payload")], info)
    stored.refresh()
    assert stored.holds(seeded(0), info)
    stored.close()


def test_a_cache_that_could_not_be_used_is_tried_again_a_minute_later(tmp_path: Path) -> None:
    now, info, one = 0.0, FakeBackend().describe(), seeded(1)
    stored = CacheFolder(str(tmp_path), clock=lambda: now)
    stored.put([(one, b"payload")], info)
    stored.close()
    (manifest,) = tmp_path.glob("*/manifest.json")
    content = manifest.read_bytes()
    manifest.write_bytes(b"")
    stored = CacheFolder(str(tmp_path), clock=lambda: now)
    stored.refresh()
    stored.open(one.spec, info)
    manifest.write_bytes(content)
    for seconds, holds in ((0, False), (59, False), (2, True)):
        now += seconds
        stored.refresh()
        stored.open(one.spec, info)
        assert stored.holds(one, info) == holds
    stored.close()


EVENTS: list[tuple[str, object]] = []
IS_LISTENING = [False]


def listen(event: str, arguments: tuple[object, ...]) -> None:
    if IS_LISTENING[0] and event in ("open", "os.listdir", "os.scandir"):
        EVENTS.append((event, arguments[0]))


def test_opening_a_specs_cache_looks_at_no_other(tmp_path: Path) -> None:
    info = FakeBackend().describe()
    stored = CacheFolder(str(tmp_path), max_bytes=1 << 30)
    for seed in range(2 * MAX_OPEN):
        stored.put([(seeded(seed), b"payload")], info)
    stored.refresh()
    sys.addaudithook(listen)  # for good, and silent from here on
    IS_LISTENING[0] = True
    for seed in (1, 1000):  # one that is stored, and closed by now, and a new one
        digest = Fingerprint.of(info, seeded(seed).spec).digest
        EVENTS.clear()
        stored.open(seeded(seed).spec, info)
        stored.put([(seeded(seed, first=2), b"payload")], info)
        looked_at = {str(place) for _, place in EVENTS if str(place).startswith(str(tmp_path))}
        strangers = {place for place in looked_at if digest[:16] not in place}
        assert looked_at - strangers
        assert (
            len({place.removeprefix(str(tmp_path)).split("/")[1] for place in strangers}) <= 1
        )  # one is closed for it
    IS_LISTENING[0] = False
    stored.close()


async def test_calls_are_answered_while_the_disk_hangs(tmp_path: Path) -> None:
    backend = FakeBackend()
    sequences = [sequence(number, 5, 6) for number in range(40)]
    async with serving(backend, cache=str(tmp_path)) as server, WireClient(server.address) as early:
        scheduler = server.scheduler
        assert scheduler is not None
        expected = [result.targets for result in await early.score(*sequences)]
        await scheduler.stored.ask(scheduler.stored.folder.refresh)
        disk_is_free = threading.Event()
        scheduler.stored.disk.submit(partial(disk_is_free.wait, 60))
        try:
            async with asyncio.timeout(10), WireClient(server.address) as late:
                assert [one.targets for one in await late.score(*sequences)] == expected  # stored, and scored again
            async with asyncio.timeout(4.5):  # less than the disk is waited for once
                for seed in range(10):
                    async with WireClient(server.address) as client:
                        await client.score(*sequences, spec=replace(SPEC, seed=seed))
            assert await health(server.address) == health_pb2.HealthCheckResponse.SERVING
        finally:
            disk_is_free.set()
        num_scored_before = num_scored(backend)
        while scheduler.stored.disk.hangs:
            await asyncio.sleep(0.01)
        await scheduler.stored.ask(scheduler.stored.folder.refresh)
        async with WireClient(server.address) as client:  # what waited for the disk is on it now
            await client.score(*sequences)
        assert num_scored(backend) == num_scored_before


async def test_what_the_disk_does_not_take_in_time_is_answered_and_counted(tmp_path: Path) -> None:
    stored = StoredTargets(CacheFolder(str(tmp_path)), patience_seconds=30.0)
    disk_is_free, backend = threading.Event(), FakeBackend()
    scheduler = Scheduler(backend, encoder(b"", 1 << 20), max_batch_tokens=100, stored=stored)
    running = asyncio.ensure_future(scheduler.run())
    stored.disk.submit(partial(disk_is_free.wait, 20))
    before = metrics.value("logitstream_teacher_cache_unkept_total")
    assert before is not None
    for number in range(MAX_WAITING + 50):
        assert (await scheduler.submit(request(number), client_id="x")).payload
    unkept = (metrics.value("logitstream_teacher_cache_unkept_total") or 0) - before
    disk_is_free.set()
    running.cancel()
    await scheduler.close()
    reader = CacheReader(next(tmp_path.iterdir()))
    assert (len(reader), unkept) == (MAX_WAITING, 50)


async def test_a_disk_that_hangs_is_waited_for_once_and_used_again_when_it_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = StoredTargets(CacheFolder(str(tmp_path)), patience_seconds=0.3)
    answers, info = threading.Event(), FakeBackend().describe()
    stored.keep([(request(1), b"payload")], info)
    await stored.ask(stored.folder.refresh)
    assert await stored.ask(stored.folder.get, request(1), info) == b"payload"
    stored.disk.submit(answers.wait)
    await asyncio.sleep(0.2)  # the thread is at it by now
    assert await asyncio.gather(*(stored.ask(stored.folder.get, request(1), info) for _ in range(20))) == [None] * 20
    assert not stored.holds(request(1), info)
    start = time.monotonic()
    for _ in range(1000):
        assert await stored.ask(stored.folder.get, request(1), info) is None
    assert time.monotonic() - start < 100 * 0.3  # each of them would have waited
    answers.set()
    while stored.disk.hangs:
        await asyncio.sleep(0.01)
    assert stored.holds(request(1), info)
    assert await stored.ask(stored.folder.get, request(1), info) == b"payload"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the cache's disk has not answered for 0.3 s: the server goes on without its cache until it does",
        "the cache's disk answers again",
    ]
    await stored.close()


@pytest.mark.parametrize("way", ["frozen", "unreadable"])
async def test_a_file_system_that_hangs_takes_no_call_off_line(way: str, tmp_path: Path) -> None:
    """frozen: writes wait for ever; unreadable: what opens the manifest of one of the caches does."""
    specs = [replace(SPEC, seed=seed) for seed in range(4)]
    sequences = [sequence(number, 5, 6) for number in range(40)]
    with ExitStack() as stack:
        disk = stack.enter_context(freezing_disk(tmp_path)) if way == "frozen" else None
        folder = tmp_path / "caches" if disk is None else disk.folder / "caches"

        async def answered(server: TeacherServer, spec: TargetSpec) -> list[bytes]:
            async with asyncio.timeout(10), WireClient(server.address) as client:
                return [one.targets for one in await client.score(*sequences, spec=spec)]

        async with serving(FakeBackend(), cache=str(folder)) as server:
            expected = [await answered(server, spec) for spec in specs]
        backend = FakeBackend()
        async with serving(backend, cache=str(folder)) as server:
            if disk is None:
                digest = Fingerprint.of(backend.describe(), specs[0]).digest
                frozen = stack.enter_context(ExitStack())
                frozen.enter_context(hanging_file(folder / digest[:16] / "manifest.json"))
            else:
                disk.freeze()
                frozen = stack.enter_context(ExitStack())
                frozen.callback(disk.thaw)
                assert len(await answered(server, replace(SPEC, seed=99))) == 40  # which is to be written
            assert [await answered(server, spec) for spec in specs] == expected
            assert server.scheduler is not None
            async with asyncio.timeout(10):
                while not server.scheduler.stored.disk.hangs:
                    await asyncio.sleep(0.05)
            assert await asyncio.gather(*(answered(server, spec) for spec in specs)) == expected
            assert await health(server.address) == health_pb2.HealthCheckResponse.SERVING
            frozen.close()
            while server.scheduler.stored.disk.hangs:
                await asyncio.sleep(0.05)
            before = num_scored(backend)
            assert [await answered(server, spec) for spec in specs[1:]] == expected[1:]
            assert num_scored(backend) == before  # all of it from the disk again


async def test_a_slow_disk_holds_up_neither_health_nor_the_bound_on_calls(tmp_path: Path) -> None:
    backend = FakeBackend()
    async with serving(backend, cache=str(tmp_path), max_in_flight_tokens=1024) as server:
        assert server.scheduler is not None
        disk_is_free = threading.Event()
        server.scheduler.stored.disk.submit(partial(disk_is_free.wait, 20))
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(WireClient(server.address)) for _ in range(6)]
            calls = [asyncio.ensure_future(client.score(sequence(1, 2))) for client in clients]
            await asyncio.sleep(REFRESH_SECONDS * 1.1)  # refreshing waits for the disk by now
            backend.closed = True
            async with asyncio.timeout(5):
                while await health(server.address) != health_pb2.HealthCheckResponse.NOT_SERVING:
                    await asyncio.sleep(0.05)
            backend.closed = False
            disk_is_free.set()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 2


async def health(address: str) -> int:
    async with aio.insecure_channel(address) as channel:
        return int((await HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)).status)
