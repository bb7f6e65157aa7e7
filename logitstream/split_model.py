"""A causal language model cut at its output layer: logits = softcap(scale · layer(hidden)), proven by a probe.

Everything before the output layer is the model's own forward; `Head` is everything after it. A teacher computes hidden
states once for a batch and logits for a few rows at a time (`SplitModel`); a student computes its loss from hidden
states (`training.head_loss`). B sequences, T tokens, H hidden size, V vocabulary, N rows.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBE_SHAPE = (2, 5)
PROBE_LENGTHS = (7, 3, 5)
"""Lengths of the sequences that show whether padding changes a model's results."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error of a probe's logits: allows rounding, catches a missing operation."""
PADDING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Largest error of hidden states: the rounding of a whole model, whose kernels differ between batch shapes."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names under which configurations bound their logits."""

logger = logging.getLogger(__name__)


class NotSeparableError(Exception):
    """Says why a model cannot be cut at its output layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The operations after a model's hidden states; layer is the output layer's name in the model."""

    layer: str
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logits(self, output: Tensor) -> Tensor:
        """Return the logits for an output of the layer."""
        scaled = output if self.logit_scale == 1 else output * self.logit_scale
        cap = self.logit_softcap
        return scaled if cap is None else torch.tanh(scaled / cap) * cap


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One forward pass over a few random tokens; calls holds each input and output of the output layer."""

    token_ids: Tensor
    logits: Tensor
    calls: list[tuple[Tensor, Tensor]]
    calls_loss_function: bool


def run_probe(model: nn.Module, base: Any, layer: nn.Module | None, *, labels: bool = False) -> Probe:
    """Run a model on a few tokens, which are its labels too if wanted; base is the model without adapters."""
    calls: list[tuple[Tensor, Tensor]] = []
    losses: list[bool] = []

    def see_layer(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((args[0], output))

    def see_loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        losses.append(True)
        return logits.new_zeros((), dtype=torch.float32)

    vocab_size = base.config.get_text_config().vocab_size
    token_ids = torch.randint(vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    token_ids = token_ids.to(next(model.parameters()).device)
    takes_labels = labels and "labels" in inspect.signature(type(base).forward).parameters
    hook = None if layer is None else layer.register_forward_hook(see_layer)
    own = vars(base).get("_loss_function")
    base.loss_function = see_loss
    try:
        told = {"labels": token_ids} if takes_labels else {}
        logits = model(input_ids=token_ids, use_cache=False, **told).logits
    finally:
        if hook is not None:
            hook.remove()
        vars(base).pop("_loss_function", None)
        if own is not None:
            base.loss_function = own
    return Probe(token_ids=token_ids, logits=logits, calls=calls, calls_loss_function=bool(losses))


def find_head(base: Any, layer: nn.Module | None, seen: Probe) -> Head:
    """Return what a probe shows to come after the hidden states; raise NotSeparableError if that cannot be told."""
    name, shape = type(base).__name__, list(seen.logits.shape[:2])
    if layer is None:
        raise NotSeparableError(f"{name} has no plain output layer")
    if len(seen.calls) != 1:
        raise NotSeparableError(f"{name} calls its output layer {len(seen.calls)} times")
    if shape != list(PROBE_SHAPE):
        raise NotSeparableError(f"{name} has {shape} rows for {list(PROBE_SHAPE)} tokens")
    output, config = seen.calls[0][1], base.config.get_text_config()
    softcap = next((cap for cap in (getattr(config, one, None) for one in SOFTCAPS) if cap), None)
    layer_name = next(one for one, module in base.named_modules() if module is layer)
    for cap in dict.fromkeys((softcap, None)):
        for scale in (1.0, _fitted_scale(output, seen.logits, cap)):
            head = Head(layer=layer_name, logit_scale=scale, logit_softcap=cap)
            if seen.logits.shape == output.shape and is_close(seen.logits, head.logits(output)):
                return head
    raise NotSeparableError(f"{name}'s logits are not its output layer's, scaled or soft-capped")


def _fitted_scale(output: Tensor, logits: Tensor, softcap: float | None) -> float:
    """Return the factor that comes closest to turning the layer's output into logits."""
    if output.shape != logits.shape:
        return 1.0
    plain, target = output.double(), logits.double()
    uncapped = target if softcap is None else torch.atanh((target / softcap).clamp(-0.999, 0.999)) * softcap
    return float((uncapped * plain).sum() / plain.square().sum())


def is_close(expected: Tensor, found: Tensor, tolerance: dict[torch.dtype, float] = TOLERANCE) -> bool:
    """Compare two results of the same computation relative to the largest value."""
    error = (expected.double() - found.double()).abs().max()
    return bool(error <= tolerance[expected.dtype] * expected.abs().max()) and bool(torch.isfinite(found).all())


class _HeadReachedError(Exception):
    """Leaves a model's forward before its output layer."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class SplitModel:
    """A model's hidden states and, separately, their logits; if it cannot be split, its logits are both."""

    @torch.inference_mode()
    def __init__(self, model: Any) -> None:
        self._model = model
        self._layer: nn.Module = model.get_output_embeddings()
        self._head: Head | None = None
        try:
            seen = run_probe(model, model, self._layer)
            self._head = find_head(model, self._layer, seen)
            self._check_rows(*seen.calls[0])
        except NotSeparableError as error:
            self._head = None
            logger.warning("%s: its logits are computed whole, [T, V], one sequence a pass", error)

    @property
    def is_split(self) -> bool:
        return self._head is not None

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, **options: Any) -> Tensor:
        """Return [B, T, H] for int64 [B, T], padded on the right; options: more arguments of the model's forward.

        Needs no attention mask: a causal model's real positions never see what is to their right (`pads_safely` checks
        that), and without a mask the fast attention kernels apply.
        """

        def leave(module: nn.Module, args: Any) -> None:
            raise _HeadReachedError(args[0])

        if self._head is None:
            return self._model(input_ids=token_ids, use_cache=False, **options).logits  # type: ignore[no-any-return]
        hook = self._layer.register_forward_pre_hook(leave)
        try:
            self._model(input_ids=token_ids, use_cache=False, **options)
        except _HeadReachedError as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the output layer was not called")

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return [N, V] for [N, H]."""
        return hidden if self._head is None else self._head.logits(self._layer(hidden))

    def pads_safely(self) -> bool:
        """Tell if a sequence's hidden states stay the same beside a longer sequence."""
        num_ids = int(self._model.get_input_embeddings().weight.shape[0])
        ids = [(torch.arange(1, length + 1) * 31 % num_ids).to(self._model.device) for length in PROBE_LENGTHS]
        together = self.hidden(nn.utils.rnn.pad_sequence(ids, batch_first=True))
        return all(
            is_close(self.hidden(one[None])[0], together[row, : len(one)], PADDING_TOLERANCE)
            for row, one in enumerate(ids)
        )

    def _check_rows(self, hidden: Tensor, output: Tensor) -> None:
        """Raise NotSeparableError if the layer gives a row other logits when other rows surround it."""
        assert self._head is not None
        order = torch.arange(hidden.shape[0] * hidden.shape[1] - 1, -1, -1, device=hidden.device)
        found = self._layer(hidden.flatten(0, 1)[order])[order]
        if not is_close(output.flatten(0, 1), found):
            raise NotSeparableError(f"{type(self._model).__name__}'s output layer mixes rows")
