"""The loss inside the model's forward, for families that scale, soft-cap, tie or bias their logits, and fallbacks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logitstream.loss import sparse_kl
from logitstream.training.head_loss import HeadLoss, StudentLoss, install_fused_loss
from tests.sparse_rows import random_targets

VOCAB_SIZE = 97
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "phi": {},
}


def model_of(family: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    sizes = {} if family == "gpt2" else SIZES
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **sizes | {"vocab_size": VOCAB_SIZE} | special | options)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.get_output_embeddings().weight.data.mul_(8)  # logits that a forgotten scale or cap would change visibly
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str) -> None:
    model = model_of(family, FAMILIES[family])
    rng = np.random.default_rng(0)
    token_ids = torch.from_numpy(rng.integers(0, VOCAB_SIZE, (2, 6)))
    targets = random_targets(rng, num_rows=12, vocab_size=VOCAB_SIZE - 3, max_entries=7)
    parameters = dict(model.named_parameters())
    expected = sparse_kl(model(input_ids=token_ids).logits, targets)
    gradients = torch.autograd.grad(expected, list(parameters.values()))

    assert install_fused_loss(model)
    got = model(input_ids=token_ids, head_loss=HeadLoss(targets=targets))
    assert isinstance(got, StudentLoss)
    torch.testing.assert_close(got.loss, expected, rtol=1e-6, atol=1e-9)
    ours = torch.autograd.grad(got.loss, list(parameters.values()))
    for name, mine, theirs in zip(parameters, ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8, msg=name)


def test_a_forward_without_head_loss_returns_logits() -> None:
    model = model_of("gemma2", FAMILIES["gemma2"])
    token_ids = torch.arange(6)[None]
    expected = model(input_ids=token_ids).logits
    install_fused_loss(model)
    torch.testing.assert_close(model(input_ids=token_ids).logits, expected)


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    model = model_of("llama", {})
    install_fused_loss(model)
    copied = copy.deepcopy(model)
    rng = np.random.default_rng(0)
    token_ids = torch.from_numpy(rng.integers(0, VOCAB_SIZE, (1, 6)))
    loss = HeadLoss(targets=random_targets(rng, num_rows=6, vocab_size=90, max_entries=4))
    before = copied(input_ids=token_ids, head_loss=loss).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(input_ids=token_ids, head_loss=loss).loss, before)
    assert copied(input_ids=token_ids).logits.any()


class _ShiftedLogits(torch.nn.Module):
    """A head's output that something else is added to."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.inner = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output


def test_a_model_with_other_logits_keeps_its_forward_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama", {})
    model.forward = _ShiftedLogits(model.forward).forward
    assert not install_fused_loss(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not its output layer" in caplog.text


def test_a_foreign_model_takes_its_logits(caplog: pytest.LogCaptureFixture) -> None:
    assert not install_fused_loss(torch.nn.Linear(3, 3))
    assert "not a transformers model" in caplog.text
