"""A causal language model as body and head, so that its loss can be computed without its logits.

The loss is computed inside the head's forward, called from the model's: that is where DDP's and FSDP2's hooks fire, and
where FSDP2 has gathered the head's weight.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from logitstream.fused_loss import FusedLoss

logger = logging.getLogger(__name__)

PROBE_SHAPE = (2, 5)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of a probe's logits, relative to the largest one: rounding, far below what a missing operation would change."""

HeadLoss = Callable[..., FusedLoss]
"""loss(hidden, weight, bias=…, logit_softcap=…): `fused_linear_sparse_kl` with everything else bound.

A callable, for FSDP2 casts and moves the tensors that it finds in a module's arguments.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """logits = softcap(logit_scale · head(body(tokens))); head is a plain linear layer."""

    body: nn.Module
    head: nn.Linear
    logit_scale: float = 1.0
    logit_softcap: float | None = None


class NotSeparableError(Exception):
    """Why a model's loss cannot be computed from its body and head."""


def install_fused_loss(model: nn.Module) -> bool:
    """Let model(…, head_loss=loss) return the FusedLoss of its head; whether that could be done.

    A model that cannot be split keeps its forward, and one warning says why.
    """
    try:
        split = split_model(model)
    except NotSeparableError as error:
        logger.warning("the student's loss is computed from full logits, slower and with more memory: %s", error)
        return False
    body_name = next(name for name, module in model.named_modules() if module is split.body)
    head_name = next(name for name, module in model.named_modules() if module is split.head)
    model_forward = getattr(model.forward, "__func__", None) or type(model).forward

    def forward(self: nn.Module, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any) -> Any:
        if head_loss is None:
            return model_forward(self, *args, **kwargs)
        hidden = self.get_submodule(body_name)(*args, use_cache=False, **kwargs)[0]
        scaled = hidden if split.logit_scale == 1 else hidden * split.logit_scale
        return self.get_submodule(head_name)(scaled, head_loss=head_loss)

    def forward_head(self: nn.Linear, hidden: Tensor, head_loss: HeadLoss | None = None) -> Any:
        if head_loss is None:
            return nn.Linear.forward(self, hidden)
        return head_loss(hidden, self.weight, bias=self.bias, logit_softcap=split.logit_softcap)

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # bound, so that a deep copy gets one of its own
    split.head.forward = MethodType(forward_head, split.head)  # type: ignore[method-assign]
    return True


def split_model(model: nn.Module) -> SplitModel:
    """Body, head, scale and soft-cap, verified on a few random tokens; raises NotSeparableError."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise NotSeparableError(f"{name} is no transformers model")
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise NotSeparableError(f"{name} has no plain linear head")
    if hasattr(head, "_hf_hook"):
        raise NotSeparableError(f"{name} is spread over devices")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise NotSeparableError(f"{name}'s own loss has a term for its router")
    bodies = [model.get_decoder(), model.base_model]  # type: ignore[no-untyped-call]
    body, seen, logits = _probe(model, bodies, head, config.vocab_size)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = _logit_scale(seen["head_output"], logits, softcap)
    if seen["head_input"].shape != seen["hidden"].shape or not torch.equal(seen["head_input"], seen["hidden"]):
        raise NotSeparableError(f"{name} changes its body's output before the head")
    if scale is None:
        raise NotSeparableError(f"{name}'s logits are not its head's output, scaled or soft-capped")
    own = {id(parameter) for part in (body, head) for parameter in part.parameters()}
    if any(id(parameter) not in own for parameter in model.parameters()):
        raise NotSeparableError(f"{name} has parameters outside its body and head")
    return SplitModel(body=body, head=head, logit_scale=scale, logit_softcap=softcap)


@torch.no_grad()
def _probe(
    model: nn.Module, bodies: Sequence[nn.Module], head: nn.Module, vocab_size: int
) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The body that a forward pass calls, its output (hidden), head_input, head_output, and the pass's logits."""
    called: list[nn.Module] = []
    seen: dict[str, Tensor] = {}

    def see_body(module: nn.Module, args: Any, output: Any) -> None:
        called.append(module)
        seen["hidden"] = output[0]

    def see_head(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.update(head_input=args[0], head_output=output)

    hooks = [part.register_forward_hook(see_body) for part in dict.fromkeys(bodies) if part is not model]
    hooks.append(head.register_forward_hook(see_head))
    device = next(model.parameters()).device
    token_ids = torch.randint(vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
        reshard(model)
    if seen.keys() != {"hidden", "head_input", "head_output"}:
        raise NotSeparableError(f"{type(model).__name__} does not call its body and head")
    return called[-1], seen, logits


def reshard(model: nn.Module) -> None:
    """Scatter what FSDP2 left gathered after a forward without a backward; a later step would find it stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _logit_scale(head_output: Tensor, logits: Tensor, softcap: float | None) -> float | None:
    """The factor that makes logits of the head's output, before the soft-cap; None where no factor does."""
    if logits.shape != head_output.shape:
        return None
    tolerance = TOLERANCE[head_output.dtype]
    got, plain = logits.double(), head_output.double()
    uncapped = got if softcap is None else torch.atanh(got / softcap) * softcap
    scale = float((uncapped * plain).sum() / plain.square().sum())
    scale = 1.0 if abs(scale - 1) < tolerance else scale
    expected = plain * scale if softcap is None else torch.tanh(plain * scale / softcap) * softcap
    return scale if bool((expected - got).abs().max() <= tolerance * got.abs().max()) else None
