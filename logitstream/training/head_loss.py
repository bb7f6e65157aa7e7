"""A student whose loss is computed in its output layer, so that it never holds the logits of a whole batch.

The model's own forward runs with two parts replaced: the output layer computes the loss from its input and returns
empty logits, and the cross-entropy returns zero, so that what is left of the model's own loss is what it adds to that
(a mixture of experts: its router's loss). The loss is computed inside the output layer's forward, called from the
model's, because that is where the hooks of DDP and FSDP2 fire and where FSDP2 has gathered the layer's weight.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from logitstream.fused_loss import FusedLoss, fused_linear_sparse_kl
from logitstream.loss import Diagnostics
from logitstream.split_model import TOLERANCE, Head, NotSeparableError, find_head, run_probe

logger = logging.getLogger(__name__)


class StudentLoss(NamedTuple):
    """The loss to train on is loss + own_loss.

    loss: the distillation loss, divided by the items of the whole step; diagnostics: sums for the logs.
    own_loss: what the model adds to its cross-entropy for this batch (a router's loss), 0 if nothing.
    """

    loss: Tensor
    diagnostics: Diagnostics
    own_loss: Tensor


class HeadLoss:
    """The arguments of `fused_linear_sparse_kl` for one batch; from_logits: the model is to make its logits.

    Not a dict or dataclass: FSDP2 casts and moves the tensors that it finds in a module's arguments, and torch.compile
    would compile anew for each batch's.
    """

    def __init__(self, *, from_logits: bool = False, **arguments: Any) -> None:
        self.from_logits = from_logits
        self.arguments = arguments

    def of_head(self, hidden: Tensor, layer: nn.Linear, head: Head) -> FusedLoss:
        """Return the loss for the output layer's input."""
        scaled = hidden if head.logit_scale == 1 else hidden * head.logit_scale
        options = {"bias": layer.bias, "logit_softcap": head.logit_softcap}
        fused: FusedLoss = fused_linear_sparse_kl(scaled, layer.weight, **options, **self.arguments)
        return fused

    def of_logits(self, logits: Tensor) -> FusedLoss:
        """Return the loss for logits [B, T, V]; of more than T rows (a learned prompt before them) the last T count."""
        num_rows = self.arguments["labels"].shape[-1]
        fused: FusedLoss = fused_linear_sparse_kl(logits[:, -num_rows:], None, **self.arguments)
        return fused


@dataclass(slots=True)
class _Plan:
    head: Head | None = None
    """None: the loss needs logits."""
    calls_loss_function: bool = False


def install_fused_loss(model: nn.Module) -> bool:
    """Let model(…, head_loss=HeadLoss(…)) return a StudentLoss, and return True if that needs no logits.

    A model whose loss needs its logits gets one warning that says why.
    """
    base, was_training = unwrap_peft_model(model), model.training  # type: ignore[no-untyped-call]
    plan = _Plan()
    _replace_forward(base, plan)
    model.eval()
    try:
        with torch.no_grad():
            _make_plan(model, base, plan)
    except NotSeparableError as error:
        plan.head = None
        logger.warning("the student's loss is computed from full logits, slower and with more memory: %s", error)
    finally:
        model.train(was_training)
        reshard(model)
    return plan.head is not None


def _replace_forward(model: nn.Module, plan: _Plan) -> None:
    bound: Any = model.forward
    own = bound.__func__ if getattr(bound, "__self__", None) is model else lambda _, *args, **kw: bound(*args, **kw)

    def forward(self: nn.Module, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any) -> Any:
        if head_loss is None:
            return own(self, *args, **kwargs)
        view: Any = object.__new__(type(self))  # the same module with another head and another cross-entropy
        vars(view).update(vars(self))
        if isinstance(self, PreTrainedModel):
            kwargs["use_cache"] = False
        if plan.calls_loss_function:
            tokens = kwargs.get("input_ids")
            kwargs["labels"] = kwargs["inputs_embeds"][..., 0].long() if tokens is None else tokens
            vars(view)["_loss_function"] = _no_cross_entropy
        layer = None
        if plan.head is not None and not head_loss.from_logits:
            layer = _LossLayer(self.get_submodule(plan.head.layer), head_loss)
            vars(view)[plan.head.layer.split(".")[0]] = layer  # the layer, or an adapter's wrapper around it
        outputs = own(view, *args, **kwargs)
        loss, diagnostics = head_loss.of_logits(outputs.logits) if layer is None else layer.result()
        return StudentLoss(loss, diagnostics, outputs.loss if plan.calls_loss_function else torch.zeros_like(loss))

    # A compiler takes the model's own forward as if it were called by itself, up to the head and from there on.
    forward = torch.compiler.disable(forward, recursive=False)  # type: ignore[no-untyped-call]
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # bound, so that a deep copy gets one of its own


class _LossLayer:
    """Stands in for the output layer within one forward: computes the loss and returns empty logits [B, T, 1]."""

    def __init__(self, layer: nn.Module, head_loss: HeadLoss) -> None:
        self.layer = layer
        self.head_loss = head_loss
        self.results: list[FusedLoss] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, hidden: Tensor) -> Tensor:
        self.results.append(self.layer(hidden, head_loss=self.head_loss))
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def result(self) -> FusedLoss:
        if len(self.results) != 1:
            raise NotSeparableError(f"expected one call of the student's output layer, got {len(self.results)}")
        return self.results[0]


def _no_cross_entropy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return logits.new_zeros((), dtype=torch.float32)


def _make_plan(model: nn.Module, base: nn.Module, plan: _Plan) -> None:
    """Fill the plan from a probe and prove it by a second one; raise NotSeparableError if it does not hold."""
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        raise NotSeparableError(f"{name} is not a transformers model")
    layer = _output_layer(base)
    seen = run_probe(model, base, layer, labels=True)
    plan.calls_loss_function = seen.calls_loss_function
    if getattr(base.config.get_text_config(), "output_router_logits", False) and not plan.calls_loss_function:
        logger.warning("%s's router loss cannot be told from its cross-entropy: it is not trained on", name)
    if hasattr(layer, "_hf_hook"):
        raise NotSeparableError(f"{name} is spread over devices")
    head = plan.head = find_head(base, layer, seen)

    def forward(self: nn.Linear, hidden: Tensor, head_loss: HeadLoss | None = None) -> Any:
        return nn.Linear.forward(self, hidden) if head_loss is None else head_loss.of_head(hidden, self, head)

    found = base.get_submodule(head.layer)
    found.forward = MethodType(forward, found)
    loss = HeadLoss(targets=None, labels=seen.token_ids.roll(-1, 1), ce_weight=1.0)
    try:
        got: Tensor = model(input_ids=seen.token_ids, head_loss=loss).loss
    except Exception as error:  # any: a forward may do anything with its logits
        raise NotSeparableError(f"{name} needs its logits: {error}") from error
    expected = loss.of_logits(seen.logits).loss
    if (got - expected).abs() > TOLERANCE[seen.logits.dtype] * expected.abs().clamp(min=1):
        raise NotSeparableError(f"{name} has another loss than its output layer")


def _output_layer(base: PreTrainedModel) -> nn.Module | None:
    """Return the output layer, or the copy of it that an adapter trains; None unless that is a plain linear layer."""
    layer: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    copies = getattr(layer, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and len(layer.active_adapters) == 1:
        layer = copies[layer.active_adapters[0]]
    is_plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return layer if is_plain else None


def reshard(model: nn.Module) -> None:
    """Scatter what FSDP2 left gathered after a forward without a backward; a later step would find it stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
