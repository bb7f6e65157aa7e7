"""Every position gets exactly one row, however vLLM cuts, mixes, repeats or masks the prompts that it computes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import permutations
from random import Random
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from logitstream import codec
from logitstream.errors import InvalidSpec, NonFiniteLogits, RequestError, ScoringFailed
from logitstream.sampling import sample
from logitstream.types import SparseTargets, TargetSpec, TokenSequence
from teacher_server.backend import EncodedTargets, ScoreRequest
from teacher_server.vllm_draws import (
    KEY,
    REQUEST,
    PromptChunk,
    PromptDraws,
    check_version,
    hook,
)
from tests.fake_gpu import FakeGpu

VOCAB, HIDDEN = 37, 5
HEAD = torch.randn(HIDDEN, VOCAB, generator=torch.Generator().manual_seed(0)).mul(256).round() / 256
"""In steps in which the products below are exact: a processor may add up those of few rows in another order."""
SPEC = TargetSpec(num_samples=9, seed=4)


def hidden_of(request: ScoreRequest) -> Tensor:
    """A stand-in for the model: hidden states that depend on token and position alone."""
    token_ids = torch.from_numpy(request.sequence.token_ids.astype(np.int64))
    grid = (token_ids[:, None] * 31 + torch.arange(len(token_ids))[:, None] * 17 + torch.arange(HIDDEN) * 7) % 23
    return grid.float() / 4


def expected(request: ScoreRequest) -> SparseTargets:
    return sample(hidden_of(request) @ HEAD, request.spec, request.sequence, draw_set=request.draw_set)


def assert_equal(found: SparseTargets | RequestError, request: ScoreRequest) -> None:
    assert isinstance(found, SparseTargets), found
    right = expected(request)
    assert (found.vocab_size, found.units, found.tail_units) == (right.vocab_size, right.units, right.tail_units)
    np.testing.assert_array_equal(found.row_offsets, right.row_offsets)
    np.testing.assert_array_equal(found.token_ids, right.token_ids)
    np.testing.assert_array_equal(found.counts, right.counts)


def make_request(num_tokens: int, *, seed: int = 0, spec: TargetSpec = SPEC, masked: bool = False) -> ScoreRequest:
    rng = np.random.default_rng(seed)
    sequence = TokenSequence(
        token_ids=rng.integers(0, VOCAB, num_tokens).astype(np.int32),
        loss_mask=rng.random(num_tokens) < 0.5 if masked else None,
    )
    return ScoreRequest(sequence=sequence, spec=spec, draw_set=seed % 3)


def make_draws(requests: Sequence[ScoreRequest], *, chunk_rows: int = 4, head: Tensor = HEAD) -> PromptDraws:
    draws = PromptDraws(lambda hidden: hidden @ head, vocab_size=VOCAB, max_rows=chunk_rows)
    for number, request in enumerate(requests):
        draws.add(str(number), pickle.dumps(request))
    return draws


def step(
    draws: PromptDraws,
    requests: Sequence[ScoreRequest],
    pieces: Sequence[tuple[int, int, int]],
    random: Random | None = None,
) -> None:
    """One engine step: (request, first row, rows) of each piece, their hidden states one after another.

    random: names the pieces in an order of its own, as an engine does whose batch has had gaps filled.
    """
    chunks, parts, offset = [], [], 0
    for number, first_row, num_rows in pieces:
        chunks.append(PromptChunk(key=str(number), first_row=first_row, num_rows=num_rows, offset=offset))
        parts.append(hidden_of(requests[number])[first_row : first_row + num_rows])
        offset += num_rows
    if random is not None:
        random.shuffle(chunks)
    draws.step(torch.cat(parts), chunks)


def taken(draws: PromptDraws, requests: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
    return [decoded(pickle.loads(result)) for result in draws.take([str(number) for number in range(len(requests))])]


def decoded(result: EncodedTargets | RequestError) -> SparseTargets | RequestError:
    if isinstance(result, RequestError):
        return result
    targets = codec.decode(result.payload)
    assert (result.num_rows, result.num_entries) == (targets.num_rows, targets.num_entries)
    return targets


specs = st.sampled_from([SPEC, TargetSpec(sampler="threshold", threshold=0.05), TargetSpec(sampler="top_k", top_k=3)])
shapes = st.tuples(st.integers(1, 12), specs, st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(shapes, min_size=1, max_size=5), st.integers(1, 7), st.integers(1, 9), st.randoms(use_true_random=False)
)
def test_any_schedule_with_preemptions_gives_each_row_once(
    shapes: list[tuple[int, TargetSpec, bool]], chunk_rows: int, budget: int, random: Any
) -> None:
    requests = [make_request(n, seed=i, spec=spec, masked=m) for i, (n, spec, m) in enumerate(shapes)]
    draws = make_draws(requests, chunk_rows=chunk_rows)
    done = [0] * len(requests)
    preemptions = 3
    while any(done[i] < len(request.sequence) for i, request in enumerate(requests)):
        room, pieces = budget, []
        for i, request in enumerate(requests):
            left = len(request.sequence) - done[i]
            if left and preemptions and done[i] and random.random() < 0.3:
                preemptions -= 1
                done[i] = 0
            elif left and room:
                num_rows = random.randint(1, min(left, room))
                pieces.append((i, done[i], num_rows))
                done[i] += num_rows
                room -= num_rows
        if pieces:
            step(draws, requests, pieces, random)
    for found, request in zip(taken(draws, requests), requests, strict=True):
        assert_equal(found, request)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_chunks_may_be_named_in_another_order_than_their_rows(order: tuple[int, ...]) -> None:
    requests = [make_request(n, seed=n) for n in (3, 4, 2, 5)]
    draws = make_draws(requests, chunk_rows=100)
    hidden = torch.cat([hidden_of(request) for request in requests])
    offsets = np.cumsum([0, *(len(request.sequence) for request in requests)])
    draws.step(
        hidden,
        [
            PromptChunk(key=str(i), first_row=0, num_rows=len(requests[i].sequence), offset=int(offsets[i]))
            for i in order
        ],
    )
    for found, request in zip(taken(draws, requests), requests, strict=True):
        assert_equal(found, request)


def test_logits_never_hold_more_rows_than_the_chunk() -> None:
    sizes: list[int] = []

    def project(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return hidden @ HEAD

    requests = [make_request(10), make_request(7, masked=True), make_request(1)]
    draws = PromptDraws(project, vocab_size=VOCAB, max_rows=4)
    for number, request in enumerate(requests):
        draws.add(str(number), pickle.dumps(request))
    step(draws, requests, [(0, 0, 10), (1, 0, 7), (2, 0, 1)])
    mask = requests[1].sequence.loss_mask
    assert mask is not None
    assert max(sizes) == 4
    assert sum(sizes) == 10 + int(mask.sum()) + 1, "masked rows must not be projected, others once"


def test_one_sequence_with_bad_logits_fails_alone() -> None:
    requests = [make_request(3, seed=1), make_request(3, seed=2), make_request(3, seed=3)]
    draws = make_draws(requests, chunk_rows=100)
    hidden = torch.cat([hidden_of(request) for request in requests])
    hidden[4] = float("nan")
    draws.step(hidden, [PromptChunk(key=str(i), first_row=0, num_rows=3, offset=3 * i) for i in range(3)])
    found = taken(draws, requests)
    assert_equal(found[0], requests[0])
    assert isinstance(found[1], NonFiniteLogits)
    assert "row 1" in str(found[1])
    assert_equal(found[2], requests[2])


def test_skipped_and_missing_rows_are_errors_and_never_gaps() -> None:
    requests = [make_request(6), make_request(6), make_request(6)]
    draws = make_draws(requests)
    step(draws, requests, [(0, 4, 2), (1, 0, 3)])
    skipped, missing, unseen = taken(draws, requests)
    assert isinstance(skipped, ScoringFailed)
    assert "skipped rows 0 to 4" in str(skipped)
    assert isinstance(missing, ScoringFailed)
    assert "3 of 6 rows" in str(missing)
    assert isinstance(unseen, ScoringFailed)


def test_a_rank_that_does_not_draw_projects_as_often_as_the_one_that_does() -> None:
    calls: dict[bool, list[int]] = {True: [], False: []}
    request = make_request(11)
    for is_drawing, sizes in calls.items():

        def project(hidden: Tensor, sizes: list[int] = sizes, is_drawing: bool = is_drawing) -> Tensor | None:
            sizes.append(len(hidden))
            return hidden @ HEAD if is_drawing else None

        draws = PromptDraws(project, vocab_size=VOCAB, max_rows=4, is_drawing=is_drawing)
        draws.add("0", pickle.dumps(request))
        step(draws, [request], [(0, 0, 11)])
        assert len(draws.take(["0"])) == is_drawing
    assert calls[True] == calls[False] != []


def test_bad_logits_do_not_change_what_is_projected() -> None:
    """Only the drawing rank sees them; ranks that project different rows would mix halves of two rows."""
    calls: dict[bool, list[int]] = {True: [], False: []}
    requests = [make_request(8), make_request(8, seed=1)]
    head = HEAD.clone()
    found: list[SparseTargets | RequestError] = []
    for is_drawing, sizes in calls.items():

        def project(hidden: Tensor, sizes: list[int] = sizes, is_drawing: bool = is_drawing) -> Tensor | None:
            sizes.append(len(hidden))
            logits = hidden @ head
            logits[0] = torch.nan if len(sizes) == 1 else logits[0]
            return logits if is_drawing else None

        draws = PromptDraws(project, vocab_size=VOCAB, max_rows=8, is_drawing=is_drawing)
        for number, request in enumerate(requests):
            draws.add(str(number), pickle.dumps(request))
        for first_row in (0, 4, 2, 6):  # the third starts earlier, as after a preemption
            step(draws, requests, [(number, first_row, min(4, 8 - first_row)) for number in (0, 1)])
        found = taken(draws, requests) if is_drawing else found
    assert calls[True] == calls[False] == [8, 8, 8, 4]
    assert isinstance(found[0], NonFiniteLogits)
    assert_equal(found[1], requests[1])


@pytest.mark.parametrize("is_alone", [True, False])
def test_an_exception_fails_the_requests_of_its_step_and_the_engine_goes_on(is_alone: bool) -> None:
    calls: list[int] = []

    def project(hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden @ HEAD

    requests = [make_request(11), make_request(6, seed=1)]
    draws = PromptDraws(project, vocab_size=VOCAB, max_rows=4, is_alone=is_alone)
    for number, request in enumerate(requests):
        draws.add(str(number), pickle.dumps(request))
    step(draws, requests, [(0, 0, 9)])
    assert calls == ([4, 4] if is_alone else [4, 4, 4, 1])  # other ranks wait in the projections that are left
    step(draws, requests, [(0, 9, 2), (1, 0, 6)])
    failed, found = taken(draws, requests)
    assert isinstance(failed, ScoringFailed)
    assert "OutOfMemoryError" in str(failed)
    assert_equal(found, requests[1])


def test_a_gpu_launches_the_draws_of_a_step_and_a_thread_waits_for_them() -> None:
    pytest.importorskip("triton")
    gpu = FakeGpu(torch.device("cpu"))
    requests = [make_request(11), make_request(6, seed=1, masked=True)]
    draws = PromptDraws(lambda hidden: hidden @ HEAD, vocab_size=VOCAB, max_rows=4, gpu=gpu)
    for number, request in enumerate(requests):
        draws.add(str(number), pickle.dumps(request))
    step(draws, requests, [(0, 0, 7)])
    step(draws, requests, [(0, 3, 5), (1, 0, 6)])  # starts earlier, as after a preemption
    step(draws, requests, [(0, 8, 3)])
    for found, request in zip(taken(draws, requests), requests, strict=True):
        assert_equal(found, request)
    assert gpu.fetches == 3


def test_uniforms_are_made_for_wanted_rows_alone() -> None:
    """The first and the last of 200 rows, 65,536 samples each: all rows' uniforms would take 100 MiB."""
    mask = np.arange(200) % 199 == 0
    sequence = TokenSequence(token_ids=np.arange(200, dtype=np.int32) % VOCAB, loss_mask=mask)
    request = ScoreRequest(sequence=sequence, spec=TargetSpec(sampler="multinomial", num_samples=65_536))
    draws = make_draws([request], chunk_rows=100)
    tracemalloc.start()
    try:
        step(draws, [request], [(0, 0, 200)])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_equal(taken(draws, [request])[0], request)
    assert peak_bytes < 16 << 20


def test_targets_larger_than_a_message_are_refused_where_they_are_encoded() -> None:
    requests = [make_request(30), make_request(1)]
    draws = make_draws(requests)
    draws.configure_encoding(b"", 60)
    step(draws, requests, [(0, 0, 30), (1, 0, 1)])
    refused, found = taken(draws, requests)
    assert isinstance(refused, InvalidSpec)
    assert "a message holds 60" in str(refused)
    assert_equal(found, requests[1])


def test_a_spec_of_many_samples_is_drawn_a_few_rows_at_a_time() -> None:
    """Two numbers of 8 bytes for each of 65,536 points: 120 MiB for 120 rows at once."""
    request = make_request(120, spec=TargetSpec(num_samples=65_536))
    draws = make_draws([request], chunk_rows=120)
    tracemalloc.start()
    try:
        step(draws, [request], [(0, 0, 120)])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_equal(taken(draws, [request])[0], request)
    assert peak_bytes < 48 << 20


def test_an_all_masked_sequence_has_empty_rows() -> None:
    sequence = TokenSequence(token_ids=np.arange(4, dtype=np.int32), loss_mask=np.zeros(4, np.bool_))
    requests = [ScoreRequest(sequence=sequence, spec=SPEC)]
    draws = make_draws(requests)
    step(draws, requests, [(0, 0, 4)])
    (found,) = taken(draws, requests)
    assert isinstance(found, SparseTargets)
    assert (found.num_rows, found.num_entries, found.units) == (4, 0, SPEC.num_samples)


# The hooks, against runners shaped like vLLM's.


def sampling_params(key: str, request: ScoreRequest) -> Any:
    return SimpleNamespace(extra_args={KEY: key, REQUEST: pickle.dumps(request)})


def test_the_hook_of_the_first_runner_draws_and_calls_the_original() -> None:
    requests = [make_request(5, seed=1), make_request(3, seed=2)]
    draws = make_draws([])
    runner = SimpleNamespace(
        requests={
            "a": SimpleNamespace(sampling_params=sampling_params("0", requests[0]), num_computed_tokens=0),
            "b": SimpleNamespace(sampling_params=sampling_params("1", requests[1]), num_computed_tokens=0),
            "warm-up": SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None), num_computed_tokens=0),
        },
        input_batch=SimpleNamespace(req_id_to_index={"b": 0, "warm-up": 1, "a": 2}),
        query_start_loc=SimpleNamespace(np=np.array([0, 3, 5, 9])),
        model=SimpleNamespace(compute_logits=None),
        _get_prompt_logprobs_dict=lambda hidden_states, num_scheduled_tokens: {"original": None},
    )
    hook(runner, draws)
    first = torch.cat([hidden_of(requests[1]), torch.zeros(2, HIDDEN), hidden_of(requests[0])[:4]])
    assert runner._get_prompt_logprobs_dict(first, {"a": 4, "b": 3, "warm-up": 2}) == {"original": None}
    runner.requests["a"].num_computed_tokens = 4
    runner.input_batch.req_id_to_index = {"a": 0}
    runner._get_prompt_logprobs_dict(hidden_of(requests[0])[4:], {"a": 1})
    for found, request in zip(taken(draws, requests), requests, strict=True):
        assert_equal(found, request)


def test_the_hook_of_the_second_runner_draws_and_calls_the_original() -> None:
    request = make_request(5, seed=1)
    draws = make_draws([])
    seen: list[str] = []
    worker = SimpleNamespace(
        add_request=lambda req_id, req_idx, sampling_params: seen.append(f"add {req_id}"),
        remove_request=lambda req_id: seen.append(f"remove {req_id}"),
        compute_prompt_logprobs=lambda logits_fn, hidden_states, input_batch, *rest: {"original": rest},
    )
    hook(SimpleNamespace(prompt_logprobs_worker=worker), draws)
    worker.add_request("a", 0, sampling_params("0", request))
    for first_row, num_rows in ((0, 2), (2, 2), (0, 3), (3, 2)):  # started again after a preemption
        batch = SimpleNamespace(
            req_ids=["warm-up", "a"],
            num_computed_prefill_tokens_np=np.array([0, first_row]),
            num_scheduled_tokens=np.array([1, num_rows]),
            query_start_loc_np=np.array([0, 1, 1 + num_rows]),
        )
        hidden = torch.cat([torch.zeros(1, HIDDEN), hidden_of(request)[first_row : first_row + num_rows]])
        assert worker.compute_prompt_logprobs(None, hidden, batch, 7) == {"original": (7,)}
    worker.remove_request("a")
    assert seen == ["add a", "remove a"]
    assert_equal(taken(draws, [request])[0], request)


def test_another_vllm_is_refused_by_name() -> None:
    check_version("0.32.0")
    check_version("0.33.1+cu130")
    for found in ("0.31.2", "0.34.0", "0.3.3", "1.32.0"):
        with pytest.raises(RuntimeError, match=f"works with vLLM 0.32 and 0.33, found {found}"):
            check_version(found)


def test_without_vllm_the_backend_says_what_it_needs() -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(RuntimeError, match="needs vLLM"):
        import_module("teacher_server.vllm_backend")


def test_the_servers_main_module_leaves_numba_to_its_functions() -> None:
    """vLLM's spawned workers import it again, and vLLM 0.32's CPU worker cannot start once numba is imported."""
    check = "import sys, teacher_server.__main__; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=120, check=False).returncode == 0
