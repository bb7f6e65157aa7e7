"""A target depends only on its own sequence, even if positions depend on the longest sequence of a pass."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from teacher_server.backend import ScoreRequest
from teacher_server.rope_lengths import LengthDependence
from teacher_server.transformers_backend import TransformersBackend
from tests.tiny_models import COMMON, VOCAB_SIZE, tiny_model

BORDER = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": BORDER,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + 4 * i for i in range(8)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {"max_position_embeddings": 96, "original_max_position_embeddings": BORDER, "rope_parameters": LONGROPE},
    ),
    "longrope with experts": (
        "phimoe",
        {
            "max_position_embeddings": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5},
        },
    ),
    "dynamic": ("llama", {"max_position_embeddings": BORDER, "rope_parameters": DYNAMIC}),
    "dynamic in some layers": (
        "gemma3_text",
        {
            "max_position_embeddings": BORDER,
            "head_dim": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT},
        },
    ),
}
INFO = TeacherInfo(
    model="tiny", weights_digest="00", tokenizer_digest="00", vocab_size=1, dtype="float32", max_sequence_tokens=96
)


def model_of(name: str) -> Any:
    family, options = MODELS[name]
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **COMMON | {"vocab_size": VOCAB_SIZE, "initializer_range": 0.6} | options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def probs_of_a_fresh_model(model: Any, sequence: TokenSequence) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        logits = copy.deepcopy(model)(input_ids=torch.from_numpy(sequence.token_ids)[None].long(), use_cache=False)
    probs: np.ndarray[Any, Any] = logits.logits[0].double().softmax(-1).numpy()
    return probs


def dense(targets: Any) -> np.ndarray[Any, Any]:
    assert isinstance(targets, SparseTargets)
    table = np.zeros((targets.num_rows, targets.vocab_size))
    table[targets.row_index(), targets.token_ids] = targets.weights()
    return table


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_has_the_targets_of_itself_alone_whatever_is_beside_or_was_before_it(name: str) -> None:
    """Cover both sides of the border and the border itself, short after long, in batches and alone."""
    model, rng = model_of(name), np.random.default_rng(0)
    fresh = copy.deepcopy(model)
    backend = TransformersBackend(model, INFO)
    lengths = [BORDER - 9, BORDER + 9, BORDER, BORDER + 1, BORDER - 1, BORDER + 9, 2 * BORDER, 5]
    sequences = [TokenSequence(token_ids=rng.integers(3, VOCAB_SIZE, n).astype(np.int32)) for n in lengths]
    requests = [ScoreRequest(sequence=one, spec=TargetSpec(sampler="full")) for one in sequences]
    expected = [probs_of_a_fresh_model(fresh, one) for one in sequences]
    for found in (backend.score(requests), [backend.score([one])[0] for one in requests]):
        for one, probs in zip(found, expected, strict=True):
            np.testing.assert_allclose(dense(one), probs, atol=1e-4)
    shared = [sorted(lengths[index] for index in members) for members in backend.passes(lengths)]
    assert any(len(members) > 2 for members in shared)
    assert not any(min(members) <= BORDER < max(members) for members in shared)


def test_the_border_matters_to_these_models() -> None:
    """Show that the test above can fail: beside a longer sequence the angles move the results."""
    for name in MODELS:
        model = model_of(name)
        ids = torch.arange(3, 3 + 2 * BORDER)[None] % VOCAB_SIZE
        with torch.inference_mode():
            alone = copy.deepcopy(model)(input_ids=ids[:, :BORDER], use_cache=False).logits[0]
            beside = model(input_ids=ids, use_cache=False).logits[0, :BORDER]
        assert (alone.softmax(-1) - beside.softmax(-1)).abs().max() > 1e-3


def test_an_unknown_kind_of_positions_shares_a_pass_with_its_own_length_alone() -> None:
    model = tiny_model("llama")
    assert not LengthDependence(model)
    assert LengthDependence(model).group(3) == LengthDependence(model).group(60)
    model.model.rotary_emb.rope_type = "spiral"
    by_length = LengthDependence(model)
    assert by_length.group(3) == by_length.group(64) != by_length.group(65) != by_length.group(66)
