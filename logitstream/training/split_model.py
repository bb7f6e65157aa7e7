"""A causal language model whose loss is computed in its head, so that it needs no logits.

The model's own forward runs, but for two of its parts: the head computes the loss of its input and returns empty
logits, and the cross-entropy is left out, so that what remains of the model's own loss is what it adds to that (a
mixture of experts its router's loss). The loss is computed inside the head's forward, called from the model's: that is
where DDP's and FSDP2's hooks fire, and where FSDP2 has gathered the head's weight.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from logitstream.fused_loss import FusedLoss
from logitstream.training.head_loss import HeadLoss, StudentLoss

logger = logging.getLogger(__name__)

PROBE_SHAPE = (2, 5)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of a probe's logits, relative to the largest one: rounding, far below what a missing operation would change."""


class NotSeparableError(Exception):
    """Why a model's loss cannot be computed in its head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """logits = softcap(logit_scale · layer), where layer is the linear layer of that name in the model."""

    name: str
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def attribute(self) -> str:
        """The model's attribute that its forward calls: the layer, or an adapter's wrapper around it."""
        return self.name.split(".")[0]


@dataclass(slots=True, kw_only=True)
class Plan:
    """How a model's loss is computed.

    head: None where from logits. has_loss_function: whether its own loss can be had without the cross-entropy.
    """

    head: Head | None = None
    has_loss_function: bool = False


def install_fused_loss(model: nn.Module) -> bool:
    """Let model(…, head_loss=HeadLoss(…)) return a StudentLoss; whether it is computed without logits.

    Where it cannot be, one warning says why.
    """
    base = unwrap_peft_model(model)  # type: ignore[no-untyped-call]
    plan = Plan()
    _install_in_model(base, plan)
    try:
        if not isinstance(base, PreTrainedModel):
            raise NotSeparableError(f"{type(base).__name__} is no transformers model")
        with _evaluating(model):
            _plan(model, base, plan)
    except NotSeparableError as error:
        plan.head = None
        logger.warning("the student's loss is computed from full logits, slower and with more memory: %s", error)
    return plan.head is not None


def _install_in_model(model: nn.Module, plan: Plan) -> None:
    bound: Any = model.forward
    own = bound.__func__ if getattr(bound, "__self__", None) is model else lambda _, *args, **kw: bound(*args, **kw)

    def forward(self: nn.Module, *args: Any, head_loss: HeadLoss | None = None, **kwargs: Any) -> Any:
        if head_loss is None:
            return own(self, *args, **kwargs)
        view: Any = object.__new__(type(self))  # the same module, but for its head and its cross-entropy
        vars(view).update(vars(self))
        if isinstance(self, PreTrainedModel):
            kwargs["use_cache"] = False
        if plan.has_loss_function:
            tokens = kwargs.get("input_ids")
            kwargs["labels"] = kwargs["inputs_embeds"][..., 0].long() if tokens is None else tokens
            vars(view)["_loss_function"] = _no_cross_entropy
        head = None
        if plan.head is not None and not head_loss.from_logits:
            head = _HeadInForward(self.get_submodule(plan.head.name), head_loss)
            vars(view)[plan.head.attribute] = head
        outputs = own(view, *args, **kwargs)
        loss, diagnostics = head_loss.of_logits(outputs.logits) if head is None else head.result()
        return StudentLoss(loss, diagnostics, outputs.loss if plan.has_loss_function else torch.zeros_like(loss))

    # A compiler takes the model's own forward as if it were called by itself, up to the head and from there on.
    forward = torch.compiler.disable(forward, recursive=False)  # type: ignore[no-untyped-call]
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # bound, so that a deep copy gets one of its own


class _HeadInForward:
    """Stands where the model's forward expects its head: computes the loss, and returns empty logits [B, T, 1]."""

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
            raise NotSeparableError(f"expected one call of the student's head, got {len(self.results)}")
        return self.results[0]


def _no_cross_entropy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return logits.new_zeros((), dtype=torch.float32)


def _install_in_layer(layer: nn.Module, head: Head) -> None:
    def forward(self: nn.Linear, hidden: Tensor, head_loss: HeadLoss | None = None) -> Any:
        if head_loss is None:
            return nn.Linear.forward(self, hidden)
        scaled = hidden if head.logit_scale == 1 else hidden * head.logit_scale
        return head_loss.of_head(scaled, self, head.logit_softcap)

    layer.forward = MethodType(forward, layer)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        reshard(model)


def _plan(model: nn.Module, base: PreTrainedModel, plan: Plan) -> None:
    """Fill the plan by a few random tokens' forward passes; raises NotSeparableError."""
    config, name = base.config.get_text_config(), type(base).__name__
    layer_name = _output_layer(base)
    seen = _probe(model, base, layer_name)
    plan.has_loss_function = seen.calls_loss_function
    if getattr(config, "output_router_logits", False) and not plan.has_loss_function:
        logger.warning("%s's router loss cannot be told from its cross-entropy: it is not trained on", name)
    if layer_name is None:
        raise NotSeparableError(f"{name} has no plain linear head")
    if hasattr(base.get_submodule(layer_name), "_hf_hook"):
        raise NotSeparableError(f"{name} is spread over devices")
    if seen.head_output is None:
        raise NotSeparableError(f"{name} does not call its head")
    if seen.logits.shape[:2] != PROBE_SHAPE:
        raise NotSeparableError(f"{name} has {list(seen.logits.shape[:2])} rows for {list(PROBE_SHAPE)} tokens")
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = _logit_scale(seen.head_output, seen.logits, softcap)
    if scale is None:
        raise NotSeparableError(f"{name}'s logits are not its head's output, scaled or soft-capped")
    plan.head = Head(name=layer_name, logit_scale=scale, logit_softcap=softcap)
    _install_in_layer(base.get_submodule(layer_name), plan.head)
    _check(model, seen)


def _output_layer(base: PreTrainedModel) -> str | None:
    """The name of the output layer, or of the copy of it that an adapter trains; None where that is no linear layer."""
    layer: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    copies = getattr(layer, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and len(layer.active_adapters) == 1:
        layer = copies[layer.active_adapters[0]]
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return None
    name: str = next(name for name, module in base.named_modules() if module is layer)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One forward pass. head_output: of the attribute that holds the output layer, None where it was not called."""

    token_ids: Tensor
    logits: Tensor
    head_output: Tensor | None
    calls_loss_function: bool


def _probe(model: nn.Module, base: PreTrainedModel, layer_name: str | None) -> Seen:
    """With labels where the model takes them, so that it shows whether it calls its `loss_function`."""
    called: list[bool] = []
    outputs: list[Tensor] = []

    def see_loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.append(True)
        return _no_cross_entropy(logits)

    def see_head(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    head = None if layer_name is None else base.get_submodule(layer_name.split(".")[0])
    hook = None if head is None else head.register_forward_hook(see_head)
    vocab_size = base.config.get_text_config().vocab_size
    token_ids = torch.randint(vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    token_ids = token_ids.to(next(model.parameters()).device)
    mine = vars(base).get("_loss_function")
    base.loss_function = see_loss
    labels = {"labels": token_ids} if "labels" in inspect.signature(type(base).forward).parameters else {}
    try:
        logits = model(input_ids=token_ids, use_cache=False, **labels).logits
    finally:
        if hook is not None:
            hook.remove()
        vars(base).pop("_loss_function", None)
        if mine is not None:
            base.loss_function = mine
    head_output = outputs[0] if len(outputs) == 1 else None
    return Seen(token_ids=token_ids, logits=logits, head_output=head_output, calls_loss_function=bool(called))


def _check(model: nn.Module, seen: Seen) -> None:
    """NotSeparableError where the loss without logits is not the one of the logits."""
    labels = seen.token_ids.roll(-1, 1)
    loss = HeadLoss(targets=None, labels=labels, ce_weight=1.0)
    try:
        got: Tensor = model(input_ids=seen.token_ids, head_loss=loss).loss
    except Exception as error:  # any: what a forward does with empty logits is its own affair
        raise NotSeparableError(f"{type(model).__name__} needs its logits: {error}") from error
    expected = loss.of_logits(seen.logits).loss
    if (got - expected).abs() > TOLERANCE[seen.logits.dtype] * expected.abs().clamp(min=1):
        raise NotSeparableError(f"{type(model).__name__} computes its logits otherwise")


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
