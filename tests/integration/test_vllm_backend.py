"""The vLLM teacher on a CPU: the same targets as the transformers backend, whatever the engine does with a prompt.

Run with `make test-vllm`. Engines start in 10 to 20 seconds, so tests share them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from logitstream import codec
from logitstream.errors import CodecError, InvalidSequence, InvalidSpec, NonFiniteLogits, RequestError
from logitstream.sampling import sample
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from teacher_server.backend import EncodedTargets, ScoreRequest, ScoreResult
from teacher_server.transformers_backend import TransformersBackend
from teacher_server.vllm_draws import KEY, REQUEST, PromptDraws, hook

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.exceptions import EngineDeadError

    from teacher_server.vllm_backend import EXIT_ENGINE_DEAD, OUR_OPTIONS, VllmBackend, engine_args

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

CHUNK = 64
LONGEST = 200
DIGEST = "0" * 64
SPEC = TargetSpec(num_samples=50, seed=11)


for name, value in (("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("VLLM_LOGGING_LEVEL", "WARNING")):
    os.environ.setdefault(name, value)  # vLLM reads its environment at the start of each engine, in several processes


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four heads; its head is scaled up so that rows differ in entropy."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=500,
            hidden_size=128,  # heads of 32, the smallest that vLLM's CPU attention knows
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=False,
        )
    )
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(folder)
    return folder


def start(
    folder: Path, *, engine_options: dict[str, Any] | None = None, exit: Any = os._exit, **settings: Any
) -> VllmBackend:
    restarts = settings.pop("engine_restarts", 3)
    args = engine_args(str(folder), options={"kv_cache_memory_bytes": 256 << 20} | (engine_options or {}), **settings)
    return VllmBackend(args, weights_digest=DIGEST, tokenizer_digest=DIGEST, engine_restarts=restarts, exit=exit)


def reference(folder: Path, *, vocab_size: int = 0) -> TransformersBackend:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    info = TeacherInfo(
        model=str(folder),
        weights_digest=DIGEST,
        tokenizer_digest=DIGEST,
        vocab_size=model.config.vocab_size,
        dtype="float32",
        max_sequence_tokens=model.config.max_position_embeddings,
    )
    return TransformersBackend(model, info, vocab_size=vocab_size)


def requests_of(token_ids: list[npt.NDArray[np.int32]], *, spec: TargetSpec = SPEC, **more: Any) -> list[ScoreRequest]:
    return [ScoreRequest(sequence=TokenSequence(token_ids=ids, **more), spec=spec) for ids in token_ids]


def random_ids(lengths: list[int], *, vocab_size: int = 500, seed: int = 0) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


def targets_of(results: Sequence[ScoreResult]) -> list[SparseTargets]:
    return [decoded(result) for result in results]


def decoded(result: ScoreResult) -> SparseTargets:
    assert not isinstance(result, RequestError), result
    targets = codec.decode(result.payload) if isinstance(result, EncodedTargets) else result
    targets.validate()
    return targets


def agreement(found: list[SparseTargets], expected: list[SparseTargets]) -> float:
    """Share of the expected draws, each id as often as it was drawn, that `found` has in the same row."""
    same = total = 0
    for mine, theirs in zip(found, expected, strict=True):
        counts = dict(zip(zip(mine.row_index(), mine.token_ids, strict=True), mine.counts, strict=True))
        for key, count in zip(zip(theirs.row_index(), theirs.token_ids, strict=True), theirs.counts, strict=True):
            same += min(int(count), int(counts.get(key, 0)))
        total += int(theirs.counts.sum())
    return same / total


def assert_one_row_each(results: Sequence[ScoreResult], requests: list[ScoreRequest]) -> None:
    for target, request in zip(targets_of(results), requests, strict=True):
        drawn = np.bincount(target.row_index(), weights=target.counts, minlength=target.num_rows)
        np.testing.assert_array_equal(drawn, np.full(len(request.sequence), request.spec.num_samples))


# Which rows come out, with a tiny model -------------------------------------------------------------------------------

ODD_LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, LONGEST - 1, LONGEST, 1]
SCHEDULES: dict[str, dict[str, Any]] = {
    "whole": {"enable_chunked_prefill": False, "max_num_batched_tokens": 256, "max_num_seqs": 8},
    "chunked": {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK, "max_num_seqs": 8},
    "preempting": {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 256,
        "long_prefill_token_threshold": 32,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 16,
        "block_size": 32,
        "scheduler_reserve_full_isl": False,
        "disable_log_stats": False,
    },
}


@pytest.fixture(scope="module", params=list(SCHEDULES))
def tiny(request: pytest.FixtureRequest, tiny_dir: Path) -> Iterator[tuple[str, VllmBackend, TransformersBackend]]:
    backend = start(tiny_dir, dtype="float32", engine_options=SCHEDULES[request.param])
    yield request.param, backend, reference(tiny_dir)
    backend.close()


Tiny = tuple[str, VllmBackend, TransformersBackend]


def test_every_position_has_one_row_however_the_engine_cuts_prompts(tiny: Tiny) -> None:
    schedule, backend, plain = tiny
    assert backend.describe().max_sequence_tokens == LONGEST
    for lengths in (ODD_LENGTHS, [int(n) for n in np.random.default_rng(3).integers(1, LONGEST + 1, 64)], [1] * 64):
        requests = requests_of(random_ids(lengths, seed=len(lengths)))
        results = backend.score(requests)
        assert_one_row_each(results, requests)
        assert agreement(targets_of(results), targets_of(plain.score(requests))) > 0.995
    if schedule == "preempting":
        assert num_preemptions() > 0, "the schedule was to preempt requests, or this test shows nothing"


def num_preemptions() -> float:
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(metric.value for metric in get_metrics_snapshot() if metric.name == "vllm:num_preemptions")


def test_repeated_and_shared_prefixes_are_drawn_in_full(tiny: Tiny) -> None:
    _, backend, _ = tiny
    (ids,) = random_ids([150], seed=9)
    once = targets_of(backend.score(requests_of([ids])))[0]
    again = requests_of([ids, ids[:100], np.concatenate([ids[:120], ids[:30]])])
    results = backend.score(again)
    assert_one_row_each(results, again)
    assert agreement(targets_of(results)[:1], [once]) > 0.999


def test_masked_rows_are_empty_and_the_others_as_they_were(tiny: Tiny) -> None:
    _, backend, plain = tiny
    (ids,) = random_ids([130], seed=5)
    mask = np.random.default_rng(5).random(130) < 0.4
    requests = requests_of([ids], loss_mask=mask) + requests_of([ids], loss_mask=np.zeros(130, np.bool_))
    found, nothing = targets_of(backend.score(requests))
    np.testing.assert_array_equal(np.diff(found.row_offsets) > 0, mask)
    assert agreement([found], targets_of(plain.score(requests[:1]))) > 0.995
    assert (nothing.num_rows, nothing.num_entries) == (130, 0)


def test_samplers_can_be_mixed_in_one_batch(tiny: Tiny) -> None:
    _, backend, plain = tiny
    (ids,) = random_ids([70], seed=6)
    specs = [SPEC, TargetSpec(sampler="threshold"), TargetSpec(sampler="top_k"), TargetSpec(sampler="multinomial")]
    requests = [request for spec in specs for request in requests_of([ids], spec=spec)]
    pairs = zip(targets_of(backend.score(requests)), targets_of(plain.score(requests)), strict=True)
    for found, expected in pairs:
        assert (found.units, found.tail_units) == (expected.units, expected.tail_units)
        rows = zip(found.row_index(), found.token_ids, strict=True)
        other = zip(expected.row_index(), expected.token_ids, strict=True)
        assert len(set(rows) & set(other)) > 0.99 * expected.num_entries


def test_targets_are_encoded_with_the_id_model_and_within_the_size_of_a_message(tiny: Tiny) -> None:
    _, backend, _ = tiny
    (ids,) = random_ids([100], seed=8)
    requests = requests_of([ids])
    (before,) = backend.score(requests)
    assert isinstance(before, EncodedTargets)
    id_model = codec.IdModel.from_expected_counts(
        np.bincount(codec.decode(before.payload).token_ids, minlength=500).astype(np.float64)
    )
    try:
        backend.configure_encoding(id_model.to_bytes(), 1 << 20)
        (after,) = backend.score(requests)
        assert isinstance(after, EncodedTargets)
        assert agreement([codec.decode(after.payload, id_model=id_model)], [codec.decode(before.payload)]) > 0.995
        with pytest.raises(CodecError):
            codec.decode(after.payload)
        backend.configure_encoding(b"", len(before.payload) // 2)
        (refused,) = backend.score(requests)
        assert isinstance(refused, InvalidSpec)
    finally:
        backend.configure_encoding(b"", 1 << 20)


def test_what_vllm_refuses_fails_alone(tiny: Tiny) -> None:
    _, backend, _ = tiny
    good, too_long, other = requests_of(random_ids([5, LONGEST + 1, 7]))
    ids = np.arange(4, dtype=np.int32)
    unknown, masked = requests_of([ids + 497]), requests_of([ids], loss_mask=np.ones(9, np.bool_))
    first, *refused, last = backend.score([good, too_long, *unknown, *masked, other])
    assert [type(one) for one in refused] == [InvalidSequence] * 3
    assert [word in str(one) for word, one in zip(("expected 1 to", "500", "loss_mask"), refused, strict=True)] == [
        True
    ] * 3
    assert_one_row_each([first, last], [good, other])


def test_a_sequence_that_turns_the_model_s_numbers_into_nan_fails_alone_and_leaves_nothing_behind(
    tiny_dir: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    model.model.embed_tokens.weight.data[7] = torch.nan
    model.save_pretrained(tmp_path)
    spoilt, *ids = (np.where(one == 7, 8, one).astype(np.int32) for one in random_ids([120, 5, 31, 70, 40]))
    spoilt[20] = 7
    requests = requests_of(ids)
    expected = targets_of(reference(tiny_dir).score(requests))
    backend = start(tmp_path, dtype="float32", engine_options={"max_num_batched_tokens": 64})
    try:
        assert agreement(targets_of(backend.score(requests)), expected) > 0.995
        for wanted_rows in (np.arange(120) == 0, np.arange(120) > 0):  # NaN from row 20 on: not projected, projected
            first, *others = backend.score(requests_of([spoilt], loss_mask=wanted_rows) + requests)
            assert wanted_rows[0] or isinstance(first, NonFiniteLogits)
            assert agreement(targets_of(others), expected) > 0.995
            for request, wanted in zip(requests, expected, strict=True):
                assert agreement(targets_of(backend.score([request])), [wanted]) > 0.98
    finally:
        backend.close()


def test_two_ranks_share_the_vocabulary_and_draw_each_row_once(tiny_dir: Path) -> None:
    backend = start(tiny_dir, dtype="float32", engine_options={"tensor_parallel_size": 2, "max_num_batched_tokens": 96})
    try:
        requests = requests_of(random_ids([1, 95, 96, 97, LONGEST], seed=2))
        results = backend.score(requests)
        assert_one_row_each(results, requests)
        assert agreement(targets_of(results), targets_of(reference(tiny_dir).score(requests))) > 0.995
    finally:
        backend.close()


def test_ids_past_vocab_size_are_served_as_if_the_head_had_no_others(tiny_dir: Path) -> None:
    backend = start(tiny_dir, dtype="float32", vocab_size=400)
    try:
        assert backend.describe().vocab_size == 400
        requests = requests_of(random_ids([150, 3], vocab_size=400))
        results = backend.score(requests)
        assert_one_row_each(results, requests)
        assert agreement(targets_of(results), targets_of(reference(tiny_dir, vocab_size=400).score(requests))) > 0.995
    finally:
        backend.close()


def test_a_dead_engine_is_noticed_started_again_and_in_the_end_left_to_the_supervisor(tiny_dir: Path) -> None:
    exits: list[int] = []
    backend = start(tiny_dir, dtype="float32", engine_restarts=1, exit=exits.append)
    try:
        requests = requests_of(random_ids([20, 30]))
        before = targets_of(backend.score(requests))
        assert backend.healthy()
        kill_engine()
        wait_for(lambda: not backend.healthy(), seconds=60)
        wait_for(backend.healthy, seconds=240)
        assert agreement(targets_of(backend.score(requests)), before) > 0.999
        assert exits == []
        kill_engine()
        wait_for(lambda: bool(exits), seconds=60)
        assert set(exits) == {EXIT_ENGINE_DEAD}
        assert not backend.healthy()
    finally:
        backend.close()


def test_a_batch_whose_targets_are_asked_for_when_the_engine_dies_fails_and_the_next_one_does_not(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM answers between two steps, so with two batches a call is nearly always waiting."""
    backend = start(tiny_dir, dtype="float32")
    requests = requests_of(random_ids([20, 30]))
    try:
        before = targets_of(backend.score(requests))
        ask = backend.engine.collective_rpc

        async def ask_a_dying_engine(*args: Any, **kwargs: Any) -> Any:
            for process in engine_processes():
                process.suspend()
            threading.Timer(0.5, kill_engine).start()
            return await ask(*args, **kwargs)

        monkeypatch.setattr(backend.engine, "collective_rpc", ask_a_dying_engine)
        with ThreadPoolExecutor(1) as thread:
            assert isinstance(thread.submit(backend.score, requests).exception(timeout=240), EngineDeadError)
        assert agreement(targets_of(backend.score(requests)), before) > 0.999
    finally:
        backend.close()


SERVER = """if __name__ == "__main__":
    import sys, time
    from teacher_server.vllm_backend import VllmBackend, engine_args
    args = engine_args(sys.argv[1], dtype="float32", options={"kv_cache_memory_bytes": 256 << 20})
    VllmBackend(args, weights_digest="", tokenizer_digest="")
    print("up", flush=True)
    time.sleep(600)
"""


def test_the_engine_ends_with_a_server_that_is_killed(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py"), str(tiny_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        while server.stdout.readline().strip() != "up":
            assert server.poll() is None
        engine = [process for process in engine_processes(server.pid) if "VLLM" in " ".join(process.cmdline())]
        server.kill()
    assert len(engine) >= 2  # its core, its worker
    _, left = psutil.wait_procs(engine, timeout=20)
    assert left == []


def engine_processes(server: int | None = None) -> Iterator[psutil.Process]:
    for process in psutil.Process(server).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the process before it
            if "resource_tracker" not in " ".join(process.cmdline()):
                yield process


def kill_engine() -> None:
    """Kill the engine's processes as the system does when memory runs out."""
    for process in engine_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# Draws of the real teacher --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_ids(teacher_dir: Path, text_path: Path) -> list[npt.NDArray[np.int32]]:
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    ids = np.asarray(tokenizer(text_path.read_text()[:20_000])["input_ids"], np.int32)
    return [ids[start : start + 128] for start in range(0, 8 * 400, 400)]


@pytest.fixture(scope="module")
def plain_teacher(teacher_dir: Path) -> TransformersBackend:
    return TransformersBackend.load(str(teacher_dir), dtype="float32")


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Iterator[VllmBackend]:
    backend = start(teacher_dir, dtype="float32", max_sequence_tokens=256)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def bfloat16_teacher(teacher_dir: Path) -> Iterator[VllmBackend]:
    backend = start(teacher_dir, dtype="bfloat16", max_sequence_tokens=256)
    yield backend
    backend.close()


def test_float32_draws_what_the_transformers_backend_draws(
    teacher: VllmBackend, plain_teacher: TransformersBackend, text_ids: list[npt.NDArray[np.int32]]
) -> None:
    requests = requests_of(text_ids)
    share = agreement(targets_of(teacher.score(requests)), targets_of(plain_teacher.score(requests)))
    print(f"float32: {share:.2%} of draws are the transformers backend's")
    assert share >= 0.995


def test_bfloat16_differs_by_its_rounding_and_by_how_much_is_reported(
    bfloat16_teacher: VllmBackend, plain_teacher: TransformersBackend, text_ids: list[npt.NDArray[np.int32]]
) -> None:
    requests = requests_of(text_ids)
    share = agreement(targets_of(bfloat16_teacher.score(requests)), targets_of(plain_teacher.score(requests)))
    print(f"bfloat16: {share:.2%} of draws are those of the transformers backend in float32")
    assert share > 0.6


SAMPLERS = [TargetSpec(num_samples=20, seed=1), TargetSpec(sampler="multinomial", num_samples=20, seed=2)]


@pytest.mark.parametrize("spec", SAMPLERS, ids=lambda spec: spec.sampler)
def test_float32_targets_are_unbiased_against_the_transformers_backends_distribution(
    teacher: VllmBackend,
    plain_teacher: TransformersBackend,
    text_ids: list[npt.NDArray[np.int32]],
    spec: TargetSpec,
) -> None:
    ids = text_ids[0][:24]
    (full,) = targets_of(plain_teacher.score(requests_of([ids], spec=TargetSpec(sampler="full"))))
    check_unbiased(teacher, plain_teacher, ids, spec, full)


@pytest.mark.parametrize("spec", SAMPLERS, ids=lambda spec: spec.sampler)
def test_bfloat16_targets_are_unbiased_against_its_own_distribution(
    bfloat16_teacher: VllmBackend, text_ids: list[npt.NDArray[np.int32]], spec: TargetSpec
) -> None:
    ids = text_ids[0][:24]
    (full,) = targets_of(bfloat16_teacher.score(requests_of([ids], spec=TargetSpec(sampler="full"))))
    check_unbiased(bfloat16_teacher, None, ids, spec, full)


def check_unbiased(
    backend: VllmBackend,
    other: TransformersBackend | None,
    ids: npt.NDArray[np.int32],
    spec: TargetSpec,
    full: SparseTargets,
    num_draw_sets: int = 120,
) -> None:
    """z-tests of mean weights against probabilities, for both backends where there are two.

    Per (row, id) with an expected count of at least 5 over all draw sets, z has variance 1 (multinomial's variance
    bounds systematic's); the largest |z| of K entries passes 6 with probability K * 2e-9 < 1e-5. The mean over rows of
    the weight that falls on the less likely half of the mass is tested too, at 5 standard errors (6e-7).
    """
    sequence = TokenSequence(token_ids=ids)
    requests = [ScoreRequest(sequence=sequence, spec=spec, draw_set=i) for i in range(num_draw_sets)]
    probs = dense(full)
    num_points = spec.num_samples * num_draw_sets
    for scored in (backend, other):
        if scored is None:
            continue
        mean = sum(dense(target) for target in targets_of(scored.score(requests))) / num_draw_sets
        often = probs * num_points >= 5
        z = (mean - probs)[often] / np.sqrt(probs[often] * (1 - probs[often]) / num_points + 1e-18)
        assert often.sum() > 100
        assert np.abs(z).max() < 6
        order = np.argsort(-probs, axis=1)
        tail = np.take_along_axis(probs, order, axis=1).cumsum(axis=1) > 0.5
        tail_probs = (np.take_along_axis(probs, order, axis=1) * tail).sum(axis=1)
        tail_mean = (np.take_along_axis(np.asarray(mean), order, axis=1) * tail).sum(axis=1)
        error = np.sqrt((tail_probs * (1 - tail_probs)).sum() / num_points)
        assert abs((tail_mean - tail_probs).sum()) < 5 * error


def dense(targets: SparseTargets) -> npt.NDArray[np.float64]:
    weights = np.zeros((targets.num_rows, targets.vocab_size))
    weights[targets.row_index(), targets.token_ids] = targets.weights()
    return weights


# Refusals at the start ------------------------------------------------------------------------------------------------


def test_the_second_runners_own_class_takes_the_hook() -> None:
    """Model runner V2 needs Triton and so never runs here; its prompt-logprob worker does."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    head = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    draws = PromptDraws(lambda hidden: hidden @ head, vocab_size=100, max_rows=4)
    worker = PromptLogprobsWorker(4, torch.device("cpu"))
    hook(SimpleNamespace(prompt_logprobs_worker=worker), draws)
    (request,) = requests_of(random_ids([9], vocab_size=100))
    extra = {KEY: "0", REQUEST: pickle.dumps(request)}
    worker.add_request("a", 2, SamplingParams(max_tokens=1, extra_args=extra))
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    for first_row, num_rows in ((0, 5), (5, 4)):
        batch = SimpleNamespace(
            req_ids=["a"],
            idx_mapping_np=np.array([2]),
            num_computed_prefill_tokens_np=np.array([first_row]),
            num_scheduled_tokens=np.array([num_rows]),
            query_start_loc_np=np.array([0, num_rows]),
        )
        rows = hidden[first_row : first_row + num_rows]
        assert worker.compute_prompt_logprobs(None, rows, batch, None, None, np.full(4, 9)) == {}
    worker.remove_request("a")
    found = targets_of([pickle.loads(result) for result in draws.take(["0"])])
    assert agreement(found, [sample(hidden @ head, SPEC, request.sequence)]) == 1


def test_options_reach_vllm_by_their_own_names_and_mistakes_are_named(tiny_dir: Path) -> None:
    def args(**options: Any) -> Any:
        return engine_args(str(tiny_dir), dtype="float32", max_sequence_tokens=50, options=options)

    found = args(max_num_seqs=3, skip_tokenizer_init=True)
    assert (found.max_num_seqs, found.max_model_len, found.enable_prefix_caching) == (3, 51, False)
    with pytest.raises(ValueError, match="did you mean 'max_num_seqs'"):
        args(max_num_seq=3)
    with pytest.raises(ValueError, match="a cached position has no logits"):
        args(enable_prefix_caching=True)
    assert set(OUR_OPTIONS) <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in OUR_OPTIONS:
        with pytest.raises(ValueError, match=f"engine option '{name}' cannot be set"):
            args(**{name: None})


def test_more_ids_than_the_head_has_are_refused(tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at most 500, the rows of the teacher's head, got 501"):
        start(tiny_dir, vocab_size=501)


def test_a_sequence_length_past_the_context_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match=f"at most {LONGEST}"):
        start(tiny_dir, max_sequence_tokens=LONGEST + 1)
