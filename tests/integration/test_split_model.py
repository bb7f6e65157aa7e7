"""Every causal family of transformers as a teacher: the model's own targets, never the logits of a whole sequence."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from logitstream.sampling import sample
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from teacher_server.backend import ScoreRequest
from teacher_server.transformers_backend import TransformersBackend
from tests.tiny_models import any_family, tiny_model

VOCAB_SIZE = 109
"""No other dimension of the models here, so that logits are known by it."""
CHUNK_ROWS = 6
INFO = TeacherInfo(
    model="tiny", weights_digest="00", tokenizer_digest="00", vocab_size=1, dtype="float32", max_sequence_tokens=64
)
FULL = TargetSpec(sampler="full")
BUILT_BY_HAND = {
    "gemma3": "a multimodal wrapper around the text model",
    "gemma4": "a multimodal wrapper, soft caps",
    "opt": "a body inside the body, project_out",
    "mamba": "no attention",
    "mamba2": "no attention",
    "falcon_h1": "lm_head_multiplier",
    "llama4_text": "chunked attention",
    "rwkv": "no attention",
    "cohere2": "logit_scale",
    "bart": "the decoder alone",
}
WHOLE = {"prophetnet"}
"""Its n-gram streams lie in one tensor between body and head."""


@pytest.fixture(autouse=True, scope="module")
def one_quiet_thread() -> Iterator[None]:
    """Models this small only lose by being shared out, and transformers warns of many an odd configuration."""
    num_threads, level = torch.get_num_threads(), logging.getLogger("transformers").level
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    yield
    torch.set_num_threads(num_threads)
    logging.getLogger("transformers").setLevel(level)


class MostLogits(TorchDispatchMode):
    """The most rows over the vocabulary that any operation gives; [hidden, vocabulary] is the head's weight."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.rows = 0
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in tree_iter(output):
            is_over_ids = isinstance(one, torch.Tensor) and one.ndim > 0 and one.shape[-1] == VOCAB_SIZE
            if is_over_ids and one.untyped_storage().data_ptr() not in self.weights:
                self.rows = max(self.rows, one.numel() // VOCAB_SIZE)
        return output


def ragged(lengths: list[int]) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [TokenSequence(token_ids=rng.integers(3, VOCAB_SIZE, n).astype(np.int32)) for n in lengths]


def dense(targets: Any) -> np.ndarray[Any, Any]:
    assert isinstance(targets, SparseTargets)
    table = np.zeros((targets.num_rows, targets.vocab_size))
    table[targets.row_index(), targets.token_ids] = targets.weights()
    return table


def scored_and_rows(model: Any, sequences: list[TokenSequence]) -> tuple[TransformersBackend, list[Any], int]:
    backend = TransformersBackend(model, INFO, logits_chunk_bytes=CHUNK_ROWS * 4 * VOCAB_SIZE)
    with MostLogits(model) as most:
        results = backend.score([ScoreRequest(sequence=one, spec=FULL) for one in sequences])
    return backend, results, most.rows


def assert_drawn_from_the_models_own_logits(model: Any, sequences: list[TokenSequence], results: list[Any]) -> None:
    for one, targets in zip(sequences, results, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(one.token_ids).long()[None], use_cache=False).logits[0]
        np.testing.assert_allclose(dense(targets), dense(sample(logits, FULL, one)), atol=2e-5)


@pytest.mark.parametrize("family", BUILT_BY_HAND)
def test_the_families_named_in_the_docs_are_split(family: str) -> None:
    model = any_family(family, vocab_size=VOCAB_SIZE)
    sequences = ragged([40, 33, 17])
    backend, results, rows = scored_and_rows(model, sequences)
    assert backend.lm is not None
    assert backend.lm.is_split
    assert rows <= CHUNK_ROWS
    assert_drawn_from_the_models_own_logits(model, sequences, results)


def test_every_family_that_can_be_made_small_gives_its_own_targets_in_bounded_memory() -> None:
    """Families whose small configuration is refused, needs another package or is not small are passed over."""
    split, whole = set(), set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = any_family(family, vocab_size=VOCAB_SIZE)
                if sum(parameter.numel() for parameter in model.parameters()) > 1_000_000:
                    continue
                model(input_ids=torch.arange(3, 12)[None], use_cache=False)
        except Exception:  # of any kind, by family
            continue
        sequences = ragged([40, 33])
        backend, results, rows = scored_and_rows(model, sequences)
        assert backend.lm is not None
        (split if backend.lm.is_split else whole).add(family)
        assert rows <= (CHUNK_ROWS if backend.lm.is_split else 2 * 40), family
        assert_drawn_from_the_models_own_logits(model, sequences, results)
    assert whole <= WHOLE
    assert len(split) > 120


def test_a_head_that_mixes_rows_is_not_split_off_and_its_sequences_go_one_a_pass(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama")
    model.lm_head = RunningSum(model.lm_head)
    backend = TransformersBackend(model, INFO, logits_chunk_bytes=CHUNK_ROWS * 4 * 96)
    assert backend.lm is not None
    assert not backend.lm.is_split
    assert "its logits are computed whole, [T, V], one sequence a pass" in caplog.text
    assert [len(members) for members in backend.passes([9, 9, 5])] == [1, 1, 1]
    sequences = ragged([9, 9, 5])
    for one in sequences:
        one.token_ids[:] %= 96
    results = backend.score([ScoreRequest(sequence=one, spec=FULL) for one in sequences])
    assert_drawn_from_the_models_own_logits(model, sequences, results)


class RunningSum(torch.nn.Module):
    """A head whose logits add up along the sequence."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.head.weight
        return weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden).cumsum(1) / 4
        return logits
