"""A causal language model as body and head, so that its loss can be computed without its logits.

The loss is computed inside the model's own forward, where DDP's hooks fire and FSDP2 has gathered the head's weight.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from logitstream.fused_loss import FusedLoss, fused_linear_sparse_kl

logger = logging.getLogger(__name__)

PROBE_TOKENS = 5
RELATIVE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """logits = softcap(logit_scale · head(body(tokens))); head is a plain linear layer."""

    body: nn.Module
    head: nn.Linear
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def loss(self, inputs: dict[str, Any], arguments: dict[str, Any]) -> FusedLoss:
        """The fused loss of the body's last hidden states; arguments: those of `fused_linear_sparse_kl`."""
        hidden = self.body(**inputs, use_cache=False)[0]
        return fused_linear_sparse_kl(
            hidden if self.logit_scale == 1 else hidden * self.logit_scale,
            self.head.weight,
            bias=self.head.bias,
            logit_softcap=self.logit_softcap,
            **arguments,
        )


def install_fused_loss(model: nn.Module) -> bool:
    """Let model(..., loss_arguments={...}) return a FusedLoss; whether that could be done.

    A model that cannot be split keeps its forward, and one warning says why.
    """
    try:
        split = split_model(model)
    except NotSeparableError as error:
        logger.warning("the student's loss is computed from full logits, slower and with more memory: %s", error)
        return False
    original: Callable[..., Any] = model.forward

    def forward(self: nn.Module, *args: Any, loss_arguments: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if loss_arguments is None:
            return original(*args, **kwargs)
        return split.loss(kwargs, loss_arguments)

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    return True


class NotSeparableError(Exception):
    """Why a model's loss cannot be computed from its body and head."""


def split_model(model: nn.Module) -> SplitModel:
    """Body, head, scale and soft-cap, verified on a few random tokens; raises NotSeparableError."""
    if not isinstance(model, PreTrainedModel):
        raise NotSeparableError(f"{type(model).__name__} is no transformers model")
    body, head = model.base_model, model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if body is model or type(head) is not nn.Linear:
        raise NotSeparableError(f"{type(model).__name__} has no body and plain linear head")
    own = {id(parameter) for part in (body, head) for parameter in part.parameters()}
    if any(id(parameter) not in own for parameter in model.parameters()):
        raise NotSeparableError(f"{type(model).__name__} has parameters outside its body and head")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise NotSeparableError("its router's own loss is asked for")
    softcap = getattr(config, "final_logit_softcapping", None)
    split = SplitModel(body=body, head=head, logit_softcap=softcap)
    return _with_scale(model, split, config.vocab_size)


@torch.no_grad()
def _with_scale(model: PreTrainedModel, split: SplitModel, vocab_size: int) -> SplitModel:
    """The split with the logit scale that a probe shows; raises NotSeparableError where none explains the logits."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocab_size, (2, PROBE_TOKENS), generator=generator).to(split.head.weight.device)
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        logits = model(input_ids=token_ids, use_cache=False).logits
        plain = split.head(split.body(input_ids=token_ids, use_cache=False)[0])
    finally:
        model.train(was_training)
    if logits.shape != plain.shape:
        raise NotSeparableError(f"logits of shape {tuple(logits.shape)}, but the head gives {tuple(plain.shape)}")
    tolerance = RELATIVE_TOLERANCE[plain.dtype]
    logits, plain = logits.double(), plain.double()
    cap = split.logit_softcap
    uncapped = logits if cap is None else torch.atanh(logits / cap) * cap
    scale = float((uncapped * plain).sum() / plain.square().sum())
    scale = round(scale) if abs(scale - round(scale)) < tolerance else scale
    explained = plain * scale if cap is None else torch.tanh(plain * scale / cap) * cap
    if not (explained - logits).abs().max() <= tolerance * logits.abs().max():
        raise NotSeparableError(f"{type(model).__name__}'s logits are not its head's output, scaled or soft-capped")
    return SplitModel(body=split.body, head=split.head, logit_scale=scale, logit_softcap=cap)
