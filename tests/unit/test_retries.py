"""Whatever the backend does, every sequence gets an answer and only those at fault get an error."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstream.errors import RequestError, ScoringFailed
from logitstream.types import SparseTargets
from teacher_server.backend import ScoreRequest
from teacher_server.retries import BackendBroken, BatchScorer
from tests.fakes import FakeBackend
from tests.serving import SPEC, sequence

POISON = 13


def requests(token_ids: Sequence[int]) -> list[ScoreRequest]:
    return [ScoreRequest(sequence=sequence(token_id, 1, 2), spec=SPEC) for token_id in token_ids]


def poisoned(batch: Sequence[ScoreRequest]) -> None:
    if any(request.sequence.token_ids[0] == POISON for request in batch):
        raise ValueError("secret path /models/teacher")


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_only_poisoned_sequences_fail_and_each_after_bounded_tries(bad: list[bool]) -> None:
    backend = FakeBackend(fault=poisoned)
    results = BatchScorer(1000).score(backend, requests([POISON if is_bad else 1 for is_bad in bad]))
    assert [isinstance(result, ScoringFailed) for result in results] == bad
    for index, is_bad in enumerate(bad):
        if is_bad:
            assert "secret" not in str(results[index])
    tries = sum(any(request.sequence.token_ids[0] == POISON for request in batch) for batch in backend.batches)
    assert tries <= sum(bad) * (len(bad).bit_length() + 2)


@pytest.mark.parametrize("limit", [3, 10, 50])
def test_a_batch_that_does_not_fit_is_split_until_it_does_and_later_ones_are_smaller(limit: int) -> None:
    def full(batch: Sequence[ScoreRequest]) -> None:
        if sum(len(request.sequence) for request in batch) > limit:
            raise MemoryError("no room")

    scorer = BatchScorer(48)
    results = scorer.score(FakeBackend(fault=full), requests([1] * 16))
    assert all(isinstance(result, SparseTargets) for result in results)
    assert scorer.batch_tokens == (48 if limit == 50 else 24)
    for _ in range(100):
        scorer.score(FakeBackend(), requests([1]))
    assert scorer.batch_tokens == 48


def test_a_failed_batch_holds_no_memory_while_its_halves_are_tried() -> None:
    held: list[weakref.ref[np.ndarray]] = []
    still_held: list[int] = []

    def full(batch: Sequence[ScoreRequest]) -> None:
        still_held.append(sum(one() is not None for one in held))
        tensor = np.empty(len(batch))
        held.append(weakref.ref(tensor))
        try:
            if len(tensor) > 1:
                raise MemoryError("no room")
        except MemoryError as error:
            raise MemoryError("CUDA out of memory") from error

    assert len(BatchScorer(1000).score(FakeBackend(fault=full), requests([1] * 8))) == 8
    assert len(still_held) > 15
    assert not any(still_held)


def test_torch_out_of_memory_is_recognised_without_torch() -> None:
    class OutOfMemoryError(RuntimeError):
        """Named like torch's."""

    def full(batch: Sequence[ScoreRequest]) -> None:
        raise OutOfMemoryError("CUDA out of memory")

    backend = FakeBackend(fault=full)
    (result,) = BatchScorer(1000).score(backend, requests([1]))
    assert isinstance(result, ScoringFailed)
    assert "memory" in str(result)
    assert len(backend.batches) == 2


def test_a_backend_that_loses_a_result_is_not_believed() -> None:
    class Loses(FakeBackend):
        def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
            return super().score(batch)[:-1] if len(batch) > 1 else super().score(batch)

    results = BatchScorer(1000).score(Loses(), requests([1, 2, 3]))
    assert all(isinstance(result, SparseTargets) for result in results)


def test_whoever_broke_an_engine_that_others_used_too_fails_alone() -> None:
    poisons_inside: list[bool] = []
    failures: list[int] = []

    class Engine(FakeBackend):
        """Dies of the poison, and with it whatever else is in it."""

        def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
            if any(request.sequence.token_ids[0] == POISON for request in batch):
                poisons_inside.append(True)
                time.sleep(0.006)
                poisons_inside.pop()
                raise RuntimeError("the engine is dead")
            time.sleep(0.002)
            if poisons_inside:
                failures.append(len(batch))
                raise RuntimeError("the engine is dead")
            return super().score(batch)

    backend, scorer = Engine(), BatchScorer(1000, batches_at_once=3)

    def run(token_ids: Sequence[int]) -> list[bool]:
        return [isinstance(result, ScoringFailed) for result in scorer.score(backend, requests(token_ids))]

    with ThreadPoolExecutor(3) as threads:
        for _ in range(20):
            assert list(threads.map(run, ([1, POISON, 2], [3, 4], [5]))) == [[False, True, False], [False] * 2, [False]]
    assert failures, "no batch failed beside the poison: this test shows nothing"


def test_a_backend_is_broken_when_it_fails_on_what_it_could_do() -> None:
    scorer = BatchScorer(1000)
    scorer.score(FakeBackend(), requests([1]))
    (result,) = scorer.score(FakeBackend(fault=poisoned), requests([POISON]))
    assert isinstance(result, ScoringFailed)

    def broken(batch: Sequence[ScoreRequest]) -> None:
        raise RuntimeError("the device is lost")

    with pytest.raises(BackendBroken):
        scorer.score(FakeBackend(fault=broken), requests([2]))
