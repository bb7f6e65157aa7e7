"""Mixtures of experts: what is trained on is what the model's own forward with labels adds for its router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logitstream.data.loss_mask import next_token_labels, supervised_mask
from logitstream.training.head_loss import HeadLoss, StudentLoss, install_fused_loss

VOCAB_SIZE = 61
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": EXPERTS | {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 12},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1, "head_dim": 8},
    "olmoe": EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "flex_olmo": EXPERTS,
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 32,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    },
}


def moe_student(family: str, *, coefficient: float = 0.7, wanted: bool = True) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB_SIZE}
    router = {"output_router_logits": wanted}
    sizes = {} if family == "dbrx" else SIZES
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes | special | router | FAMILIES[family]), dtype=torch.float32
    )
    model.get_output_embeddings().weight.data.mul_(8)
    setattr(model, "aux_loss_coef" if family == "jetmoe" else "router_aux_loss_coef", coefficient)
    return model.train()


def padded_batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, VOCAB_SIZE, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_model_with_labels(family: str, from_logits: bool) -> None:
    model, batch = moe_student(family), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    whole = model(**batch, labels=labels).loss
    expected = gradients_of(model, whole)
    added = whole.item() - moe_student(family, coefficient=0.0)(**batch, labels=labels).loss.item()
    assert abs(added) > 0.1  # the router's share

    assert install_fused_loss(model)
    loss = HeadLoss(
        from_logits=from_logits,
        targets=None,
        labels=next_token_labels(batch),
        loss_mask=supervised_mask(batch),
        ce_weight=1.0,
    )
    got: StudentLoss = model(**batch, head_loss=loss)
    assert got.own_loss.item() == pytest.approx(added, rel=1e-4)
    assert got.loss.item() + got.own_loss.item() == pytest.approx(whole.item(), rel=1e-5)
    ours = gradients_of(model, got.loss + got.own_loss)
    assert ours.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(ours[name], theirs, rtol=2e-4, atol=1e-6, msg=name)


def test_a_router_loss_that_the_model_does_not_ask_for_is_none() -> None:
    model, batch = moe_student("mixtral", wanted=False), padded_batch()
    assert install_fused_loss(model)
    loss = HeadLoss(targets=None, labels=next_token_labels(batch), loss_mask=supervised_mask(batch), ce_weight=1.0)
    assert model(**batch, head_loss=loss).own_loss.item() == 0


def test_the_models_own_forward_with_labels_is_unchanged() -> None:
    model, batch = moe_student("mixtral"), padded_batch()
    before = model(**batch, labels=batch["input_ids"])
    install_fused_loss(model)
    after = model(**batch, labels=batch["input_ids"])
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)
