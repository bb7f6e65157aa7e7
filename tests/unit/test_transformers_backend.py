"""Targets from batches against the model run on one sequence at a time, over several model families."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from logitstream.errors import NonFiniteLogits
from logitstream.samplers import SAMPLERS
from logitstream.sampling import sample
from logitstream.split_model import SplitModel
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from teacher_server.backend import ScoreRequest
from teacher_server.transformers_backend import TransformersBackend
from teacher_server.weights import weights_digest
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_teacher, tiny_model

INFO = TeacherInfo(
    model="tiny", weights_digest="00", tokenizer_digest="00", vocab_size=1, dtype="float32", max_sequence_tokens=64
)
FULL = TargetSpec(sampler="full")


def backend_of(model: Any, **options: Any) -> TransformersBackend:
    return TransformersBackend(model, INFO, **options)


def ragged(lengths: list[int], *, seed: int = 0, masked: bool = False) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return [
        TokenSequence(
            token_ids=rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
            loss_mask=rng.random(length) < 0.6 if masked else None,
        )
        for length in lengths
    ]


def reference_logits(model: Any, sequence: TokenSequence) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.from_numpy(sequence.token_ids).long()[None]).logits[0]
    return logits


def scored(backend: TransformersBackend, requests: list[ScoreRequest]) -> list[SparseTargets]:
    results = backend.score(requests)
    for result in results:
        assert isinstance(result, SparseTargets)
        result.validate()
    return [result for result in results if isinstance(result, SparseTargets)]


def dense(targets: SparseTargets) -> np.ndarray[Any, Any]:
    table = np.zeros((targets.num_rows, targets.vocab_size))
    table[targets.row_index(), targets.token_ids] = targets.weights()
    return table


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows_a_chunk", [3, 1000])
def test_probabilities_are_those_of_the_model_alone_whatever_the_batch_and_the_chunks(
    family: str, rows_a_chunk: int
) -> None:
    model = tiny_model(family)
    backend = backend_of(model, logits_chunk_bytes=rows_a_chunk * 4 * VOCAB_SIZE)
    assert backend.lm is not None
    assert backend.lm.is_split
    assert backend.pads_safely
    sequences = ragged([5, 40, 17, 1, 23, 40], masked=True)
    for one, targets in zip(
        sequences, scored(backend, [ScoreRequest(sequence=s, spec=FULL) for s in sequences]), strict=True
    ):
        expected = torch.softmax(reference_logits(model, one).double(), -1).numpy()
        expected[~one.loss_mask] = 0
        np.testing.assert_allclose(dense(targets), expected, atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_are_those_of_sample_on_the_whole_sequence(sampler: str) -> None:
    model = tiny_model("llama")
    spec = TargetSpec(sampler=sampler, num_samples=20, top_k=5)
    sequences = ragged([30, 12, 30, 7], masked=True) + ragged([9], seed=5)
    backend = backend_of(model, logits_chunk_bytes=11 * 4 * VOCAB_SIZE)
    requests = [ScoreRequest(sequence=s, spec=spec, draw_set=4) for s in sequences]
    different = total = 0
    for one, targets in zip(sequences, scored(backend, requests), strict=True):
        expected = sample(reference_logits(model, one), spec, one, draw_set=4)
        wanted = np.ones(len(one), bool) if one.loss_mask is None else one.loss_mask
        assert ((np.diff(targets.row_offsets) > 0) <= wanted).all()
        different += int((np.abs(dense(targets) - dense(expected)) > 1e-4).sum())
        total += expected.num_entries
    assert different <= 0.02 * total


def test_a_sequence_asked_for_many_times_is_run_once_and_each_asker_gets_its_own_draw() -> None:
    model = tiny_model("llama")
    rows = 0

    def count(_module: Any, args: Any, kwargs: Any) -> None:
        nonlocal rows
        rows += kwargs["input_ids"].shape[0]

    backend = backend_of(model)
    model.model.register_forward_pre_hook(count, with_kwargs=True)
    (one,) = ragged([20])
    masked = TokenSequence(token_ids=one.token_ids, loss_mask=np.arange(20) % 2 == 0)
    requests = [ScoreRequest(sequence=one, spec=TargetSpec(seed=1), draw_set=d) for d in range(50)]
    requests += [ScoreRequest(sequence=masked, spec=TargetSpec(sampler="top_k"))]
    results = scored(backend, requests)
    assert rows == 1
    assert len({result.token_ids.tobytes() for result in results}) == 51
    np.testing.assert_array_equal(np.diff(results[-1].row_offsets), np.where(np.arange(20) % 2 == 0, 12, 0))


def test_a_mask_that_wants_nothing_gives_empty_rows() -> None:
    sequence = TokenSequence(token_ids=np.array([1, 2, 3], np.int32), loss_mask=np.zeros(3, bool))
    (targets,) = scored(backend_of(tiny_model("llama")), [ScoreRequest(sequence=sequence, spec=TargetSpec())])
    assert targets.num_rows == 3
    assert targets.num_entries == 0


@pytest.mark.parametrize("num_wanted", [1, 100])
def test_a_draws_memory_depends_on_the_rows_wanted_and_not_on_what_they_ask_for(num_wanted: int) -> None:
    """65,536 uniforms a row: 50 MiB for a hundred rows, several times while they are made and sorted."""
    spec = TargetSpec(sampler="multinomial", num_samples=65_536)
    sequence = TokenSequence(
        token_ids=np.arange(100, dtype=np.int32) % 50, loss_mask=np.arange(100) >= 100 - num_wanted
    )
    backend = backend_of(tiny_model("llama"))
    tracemalloc.start()
    try:
        (targets,) = scored(backend, [ScoreRequest(sequence=sequence, spec=spec)])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.diff(targets.row_offsets) > 0, sequence.loss_mask)
    assert peak_bytes < (8 << 20 if num_wanted == 1 else 100 << 20)


def test_logits_that_are_not_finite_fail_their_own_sequence_alone() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[13] = float("nan")
    backend = TransformersBackend(model, INFO)
    good, bad = ragged([9]), TokenSequence(token_ids=np.array([1, 13, 2], np.int32))
    good[0].token_ids[:] = 5
    results = backend.score([ScoreRequest(sequence=s, spec=TargetSpec()) for s in (good[0], bad, good[0])])
    assert [type(result) for result in results] == [SparseTargets, NonFiniteLogits, SparseTargets]


class LooksAhead(LlamaForCausalLM):
    """Not causal, and its head is called twice: every logit depends on all tokens."""

    def forward(self, input_ids: torch.Tensor, **_options: Any) -> CausalLMOutputWithPast:
        hidden = self.model.embed_tokens(input_ids)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden) + 5 * self.lm_head(hidden.mean(1, keepdim=True)))


def test_a_model_that_cannot_be_split_or_padded_is_still_right(caplog: pytest.LogCaptureFixture) -> None:
    model = LooksAhead(tiny_model("llama").config).eval()
    backend = backend_of(model, logits_chunk_bytes=7 * 4 * VOCAB_SIZE)
    assert "calls its output layer 2 times: its logits are computed whole" in caplog.text
    assert "padding changes" in caplog.text
    sequences = ragged([5, 20, 5, 11])
    for one, targets in zip(
        sequences, scored(backend, [ScoreRequest(sequence=s, spec=FULL) for s in sequences]), strict=True
    ):
        expected = torch.softmax(reference_logits(model, one).double(), -1).numpy()
        np.testing.assert_allclose(dense(targets), expected, atol=2e-5)


def test_bfloat16_is_split_too() -> None:
    assert SplitModel(tiny_model("gemma2").to(torch.bfloat16)).is_split


def test_a_saved_model_is_loaded_with_its_digests_and_its_limits(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "a")
    info = TransformersBackend.load(str(folder), device="cpu").describe()
    assert (info.vocab_size, info.max_sequence_tokens, info.dtype) == (VOCAB_SIZE, 64, "float32")
    assert info.weights_digest == weights_digest(folder)
    again, other = save_tiny_teacher(tmp_path / "b"), save_tiny_teacher(tmp_path / "c", seed=1)
    assert weights_digest(again) == info.weights_digest != weights_digest(other)


def test_an_adapter_is_no_teacher_even_beside_full_weights(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "a")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ValueError, match=r"holds an adapter, .*Merge it"):
        TransformersBackend.load(str(folder), device="cpu")


def test_weights_that_are_written_over_on_disk_are_served_as_they_were_loaded(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "latest")
    backend = TransformersBackend.load(str(folder), device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    again = TransformersBackend.load(str(save_tiny_teacher(tmp_path / "again")), device="cpu")
    requests = [ScoreRequest(sequence=one, spec=FULL) for one in ragged([20, 9])]
    for one, other in zip(scored(backend, requests), scored(again, requests), strict=True):
        np.testing.assert_array_equal(dense(one), dense(other))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_ids_past_vocab_size_are_served_as_if_the_head_had_no_others(family: str) -> None:
    model = tiny_model(family)
    backend = backend_of(model, vocab_size=80, logits_chunk_bytes=7 * 4 * VOCAB_SIZE)
    assert backend.describe().vocab_size == 80
    (one,) = ragged([20])
    one.token_ids[:] %= 80
    full, drawn = scored(backend, [ScoreRequest(sequence=one, spec=spec) for spec in (FULL, TargetSpec())])
    expected = torch.softmax(reference_logits(model, one)[:, :80].double(), -1).numpy()
    np.testing.assert_allclose(dense(full), expected, atol=2e-5)
    assert drawn.vocab_size == 80
    with pytest.raises(ValueError, match="vocab_size must be at most 96, the rows of the teacher's head, got 97"):
        backend_of(model, vocab_size=97)


def test_no_id_of_the_tokenizer_is_cut_off(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "a")
    with pytest.raises(ValueError, match="vocab_size must be above 95, the tokenizer's largest id, got 95"):
        TransformersBackend.load(str(folder), device="cpu", vocab_size=95)
    assert TransformersBackend.load(str(folder), device="cpu", vocab_size=96).describe().vocab_size == 96


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, FileNotFoundError)):
        TransformersBackend.load(str(folder), device="cpu")
