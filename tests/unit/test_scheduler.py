"""Batches across clients, sharing, cancellation, bounds, swaps of weights: with a fake backend, without a network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from logitstream.errors import RequestError, ScoringFailed, ServerDraining
from logitstream.types import SparseTargets, credit_tokens
from teacher_server.backend import ScoreRequest, TeacherBackend
from teacher_server.encoding import encoder
from teacher_server.retries import BackendBroken
from teacher_server.scheduler import Scheduler
from tests.fakes import FAKE_DIGEST, FakeBackend
from tests.serving import SPEC, sequence


class GatedBackend(FakeBackend):
    """Scores nothing while its gate is shut, so that a test decides what has arrived before a batch is formed."""

    def __init__(self, *, batches_at_once: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.batches_at_once = batches_at_once
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.sizes_entered: list[int] = []

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        self.sizes_entered.append(len(batch))
        self.entered.set()
        assert self.gate.wait(20)
        return super().score(batch)


@asynccontextmanager
async def scheduling(backend: TeacherBackend, **settings: Any) -> AsyncIterator[Scheduler]:
    options = {"max_batch_tokens": 100} | settings
    scheduler = Scheduler(backend, encoder(b"", 1 << 20), **options)
    running = asyncio.ensure_future(scheduler.run())
    try:
        yield scheduler
    finally:
        running.cancel()
        await scheduler.close()


async def hold(scheduler: Scheduler, backend: GatedBackend) -> asyncio.Future[Any]:
    """Keep the backend busy with one request until its gate opens."""
    future = scheduler.submit(request(999), client_id="holder")
    await asyncio.to_thread(backend.entered.wait, 10)
    return future


def request(first: int, length: int = 10, draw_set: int = 0) -> ScoreRequest:
    return ScoreRequest(sequence=sequence(first, *range(1, length)), spec=SPEC, draw_set=draw_set)


async def test_waiting_requests_of_all_clients_fill_batches_up_to_the_token_budget() -> None:
    backend = GatedBackend()
    async with scheduling(backend) as scheduler:
        first = await hold(scheduler, backend)
        futures = [scheduler.submit(request(number), client_id=f"client {number % 3}") for number in range(25)]
        backend.gate.set()
        await asyncio.gather(first, *futures)
        assert [len(batch) for batch in backend.batches] == [1, 10, 10, 5]


async def test_a_backend_that_takes_two_batches_has_the_next_one_before_the_first_is_done() -> None:
    backend, other = GatedBackend(batches_at_once=2), GatedBackend(batches_at_once=2, weights_digest="22" * 32)
    other.gate.set()
    async with scheduling(backend) as scheduler:
        futures = [scheduler.submit(request(number), client_id="x") for number in range(40)]
        while len(backend.sizes_entered) < 2:
            await asyncio.sleep(0.01)
        replacing = asyncio.ensure_future(scheduler.replace_backend(other))
        await asyncio.sleep(0.05)
        assert (backend.sizes_entered, backend.batches, other.sizes_entered) == ([10, 10], [], [])
        backend.gate.set()
        scored = await asyncio.gather(*futures)
        await replacing
    assert (backend.sizes_entered, other.sizes_entered) == ([10, 10], [10, 10])
    assert [one.weights_digest for one in scored] == [FAKE_DIGEST] * 20 + ["22" * 32] * 20
    assert backend.closed


async def test_a_backend_that_breaks_with_two_batches_in_it_ends_the_server() -> None:
    broken = threading.Event()

    def fault(batch: Sequence[ScoreRequest]) -> None:
        if broken.is_set():
            raise RuntimeError("cudaErrorIllegalAddress")

    backend = GatedBackend(batches_at_once=2, fault=fault)
    backend.gate.set()
    scheduler = Scheduler(backend, encoder(b"", 1 << 20), max_batch_tokens=100)
    running = asyncio.ensure_future(scheduler.run())
    await scheduler.submit(request(1), client_id="x")
    broken.set()
    backend.sizes_entered.clear()
    futures = [scheduler.submit(request(number), client_id="x") for number in range(2, 42)]
    with pytest.raises(BackendBroken):
        await asyncio.wait_for(running, 20)
    await scheduler.close()
    assert not scheduler.is_stuck
    # One batch of ten was halved down to ten sequences, each tried twice (29 times in all), the other was tried once;
    # and then what had been scored before.
    assert sorted(backend.sizes_entered, reverse=True)[:3] == [10, 10, 5]
    assert len(backend.sizes_entered) <= 29 + 1 + 1
    for error in await asyncio.gather(*futures, return_exceptions=True):
        assert isinstance(error, ServerDraining | asyncio.CancelledError)


async def test_one_sequence_over_the_budget_is_still_scored() -> None:
    backend = FakeBackend()
    async with scheduling(backend) as scheduler:
        await scheduler.submit(request(1, length=500), client_id="x")
        assert [len(batch) for batch in backend.batches] == [1]


async def test_a_flood_does_not_delay_a_small_client_by_more_than_its_turn() -> None:
    backend = GatedBackend()
    async with scheduling(backend) as scheduler:
        futures = [await hold(scheduler, backend)]
        futures += [scheduler.submit(request(number), client_id="greedy") for number in range(200)]
        small = [scheduler.submit(request(500 + number), client_id="small") for number in range(5)]
        backend.gate.set()
        await asyncio.gather(*small)
        scored = [one.sequence.token_ids[0] for batch in backend.batches[:2] for one in batch]
        assert {500, 501, 502, 503, 504} <= {int(number) for number in scored}
        for future in futures:
            future.cancel()


async def test_what_is_needed_soonest_goes_first() -> None:
    backend = GatedBackend()
    async with scheduling(backend) as scheduler:
        futures = [await hold(scheduler, backend)]
        futures += [scheduler.submit(request(number), client_id="x", priority=100 - number) for number in range(30)]
        backend.gate.set()
        await asyncio.gather(*futures)
        order = [int(one.sequence.token_ids[0]) for batch in backend.batches[1:] for one in batch]
        assert order == sorted(range(30), reverse=True)


async def test_identical_requests_in_flight_are_scored_once_waiting_or_running() -> None:
    backend = GatedBackend()
    async with scheduling(backend) as scheduler:
        running = await hold(scheduler, backend)
        futures = [scheduler.submit(request(7), client_id=f"client {number}") for number in range(5)]
        late = scheduler.submit(request(999), client_id="someone else")
        other_draw = scheduler.submit(request(7, draw_set=1), client_id="x")
        backend.gate.set()
        answers = await asyncio.gather(running, late, *futures, other_draw)
        assert answers[0].payload == answers[1].payload
        assert len({answer.payload for answer in answers[2:7]}) == 1
        assert answers[7].payload != answers[2].payload
        assert sum(len(batch) for batch in backend.batches) == 3


async def test_what_nobody_waits_for_is_not_scored() -> None:
    backend = GatedBackend()
    async with scheduling(backend) as scheduler:
        first = await hold(scheduler, backend)
        futures = [scheduler.submit(request(number), client_id="x") for number in range(20)]
        shared = scheduler.submit(request(3), client_id="y")
        for future in futures:
            future.cancel()
        await asyncio.sleep(0)
        assert scheduler.num_unfinished == 2
        backend.gate.set()
        await asyncio.gather(first, shared)
        assert [len(batch) for batch in backend.batches] == [1, 1]
    assert scheduler.num_unfinished == 0


def poison_13(batch: Sequence[ScoreRequest]) -> None:
    if any(one.sequence.token_ids[0] == 13 for one in batch):
        raise RuntimeError("boom")


async def test_a_poisoned_sequence_fails_alone() -> None:
    backend = GatedBackend(fault=poison_13)
    async with scheduling(backend) as scheduler:
        first = await hold(scheduler, backend)
        futures = [scheduler.submit(request(number), client_id="x") for number in range(10, 18)]
        backend.gate.set()
        answers = await asyncio.gather(first, *futures, return_exceptions=True)
        assert [isinstance(answer, ScoringFailed) for answer in answers] == [False] + [n == 13 for n in range(10, 18)]


async def test_after_a_batch_that_did_not_fit_batches_are_smaller() -> None:
    def limited(batch: Sequence[ScoreRequest]) -> None:
        if sum(len(one.sequence) for one in batch) > 50:
            raise MemoryError

    backend = GatedBackend(fault=limited)
    async with scheduling(backend) as scheduler:
        futures = [await hold(scheduler, backend)]
        futures += [scheduler.submit(request(number), client_id="x") for number in range(30)]
        backend.gate.set()
        await asyncio.gather(*futures)
        assert [len(batch) for batch in backend.batches] == [1, 10, 5, 5, 5, 5, 5, 5]


async def test_batches_grow_again_once_there_is_room() -> None:
    is_full = True

    def limited(batch: Sequence[ScoreRequest]) -> None:
        if is_full and sum(len(one.sequence) for one in batch) > 50:
            raise MemoryError

    backend = GatedBackend(fault=limited)
    async with scheduling(backend) as scheduler:
        futures = [await hold(scheduler, backend)]
        futures += [scheduler.submit(request(number), client_id="x") for number in range(10)]
        backend.gate.set()
        await asyncio.gather(*futures)
        is_full = False
        await asyncio.gather(*[scheduler.submit(request(1000 + number), client_id="x") for number in range(600)])
        sizes = [len(batch) for batch in backend.batches[4:]]
        assert sizes == sorted(sizes[:-1]) + sizes[-1:]
        assert (sizes[0], max(sizes)) == (5, 10)


async def test_a_backend_that_fails_on_everything_ends_the_server_and_blames_no_sequence() -> None:
    broken = threading.Event()

    def maybe(batch: Sequence[ScoreRequest]) -> None:
        if broken.is_set():
            raise RuntimeError("device-side assert")

    scheduler = Scheduler(FakeBackend(fault=maybe), encoder(b"", 1 << 20), max_batch_tokens=100)
    running = asyncio.ensure_future(scheduler.run())
    await scheduler.submit(request(1), client_id="x")
    broken.set()
    with pytest.raises(ServerDraining):
        await scheduler.submit(request(2), client_id="x")
    with pytest.raises(BackendBroken):
        await running
    await scheduler.close()


async def test_new_weights_serve_from_the_next_batch_and_the_running_one_finishes_on_the_old() -> None:
    old, new = GatedBackend(weights_digest="aa" * 32), FakeBackend(weights_digest="bb" * 32)
    async with scheduling(old) as scheduler:
        running = await hold(scheduler, old)
        waiting = scheduler.submit(request(1), client_id="x")
        replacing = asyncio.ensure_future(scheduler.replace_backend(new))
        await asyncio.sleep(0)
        old.gate.set()
        answers = await asyncio.gather(running, waiting)
        await replacing
        assert [(one.teacher_version, one.weights_digest[:2]) for one in answers] == [(0, "aa"), (1, "bb")]
        assert old.closed
        assert scheduler.info.teacher_version == 1


async def test_weights_of_another_vocabulary_are_not_swapped_in() -> None:
    async with scheduling(FakeBackend(vocab_size=1000)) as scheduler:
        with pytest.raises(ValueError, match="vocab_size of the new weights is 900, expected 1000"):
            await scheduler.replace_backend(FakeBackend(vocab_size=900))


async def test_a_draining_scheduler_finishes_what_it_took_and_refuses_more() -> None:
    backend = GatedBackend()
    async with scheduling(backend) as scheduler:
        future = await hold(scheduler, backend)
        scheduler.is_draining = True
        with pytest.raises(ServerDraining):
            scheduler.submit(request(1), client_id="x")
        backend.gate.set()
        await future


async def test_targets_that_cannot_be_encoded_fail_alone() -> None:
    def encode(targets: SparseTargets, _spec: object) -> bytes:
        if targets.num_rows == 11:
            raise OverflowError("inner detail")
        return b"ok"

    scheduler = Scheduler(FakeBackend(), encode, max_batch_tokens=100)
    running = asyncio.ensure_future(scheduler.run())
    bad = scheduler.submit(request(1, length=11), client_id="x")
    good = scheduler.submit(request(1, length=12), client_id="x")
    assert (await good).payload == b"ok"
    with pytest.raises(ScoringFailed, match="could not be encoded"):
        await bad
    running.cancel()
    await scheduler.close()


@pytest.mark.parametrize(("sampler", "expected"), [("systematic", 10), ("top_k", 10), ("full", 10 * 1_000_000 // 1024)])
def test_cost_counts_entries_where_they_are_the_larger_burden(sampler: str, expected: int) -> None:
    spec = type(SPEC)(sampler=sampler)
    assert credit_tokens(sequence(*range(10)), spec, 1_000_000) == expected
