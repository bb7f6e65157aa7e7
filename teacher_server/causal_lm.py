"""A Hugging Face causal LM taken apart: its body once for a batch, its head chunk by chunk.

Both halves are the model's own `forward`: up to the end of its body, and from there on given hidden states in place of
the body's. So the head keeps whatever comes after the body (norms, projections, multipliers, soft caps), and the body
gets what the model prepares for it. Which module is the body is seen in a run of a few tokens, and the split is taken
only where it gives the model's own logits. B sequences, T tokens, H hidden, V vocabulary, N rows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from teacher_server.rope_lengths import LengthDependence

PROBE_TOKENS = (7, 3, 5)
"""Lengths of the sequences that the split is checked with."""

log = logging.getLogger(__name__)


class _BodyDone(Exception):  # no error: it leaves the model's forward, where nothing after the body is wanted
    def __init__(self, output: Any) -> None:
        self.output = output


class _StandIn(nn.Module):
    """Is called where a body was; whatever else is asked of it, the body answers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.__dict__["body"] = body  # not registered: its parameters are not this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["body"], name)


class _Stop(_StandIn):
    """Runs the body and goes no further."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _BodyDone(self.body(*args, **kwargs))


class _Given(_StandIn):
    """Gives the hidden states it is told to, in an output of the body's own kind."""

    hidden: Tensor | None = None
    like: Any = None

    def forward(self, *_args: object, **_kwargs: object) -> Any:
        if isinstance(self.like, Tensor):
            return self.hidden
        if isinstance(self.like, ModelOutput):
            output = copy.copy(self.like)
            output[next(iter(output))] = self.hidden
            return output
        return (self.hidden, *self.like[1:])


class SplitCausalLM:
    """`hidden` runs the body, `logits` the head; where a model cannot be split, the logits are the hidden states.

    pads_safely: whether sequences of unlike lengths may share a pass, as far as `by_length` puts them together.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device: torch.device = model.device
        self.by_length = LengthDependence(model)
        self._until_body: Any = None
        self._from_body: Any = None
        self._given: _Given | None = None
        self.is_split = self._find_split()
        name = type(model).__name__
        if not self.is_split:
            log.warning(
                "%s: head and body cannot be told apart: its logits are whole, [T, V], so one sequence a pass", name
            )
        self.pads_safely = _pads_safely(self)
        if not self.pads_safely:
            log.warning("%s: padding changes its results, only equal lengths share a pass", name)
        if self.by_length:
            log.info("%s: %s: what is positioned otherwise never shares a pass", name, self.by_length)

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[Tensor]) -> Tensor:
        """[B, T, H] of int64 token ids, padded on the right to the longest.

        No attention mask is needed for it: a causal model's real positions never see what is to their right
        (`pads_safely` has been checked), and without one the fast attention kernels apply.
        """
        ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(self.device, non_blocking=True)
        self.by_length.forget()
        if self._until_body is None:
            return self._model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
        try:
            self._until_body(input_ids=ids, use_cache=False)
        except _BodyDone as done:
            return _first(done.output)
        raise AssertionError("the body was not run")

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] of [N, H]."""
        if self._given is None:
            return hidden
        self._given.hidden = hidden[None]
        ids = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=self.device)
        try:
            return self._from_body(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
        finally:
            self._given.hidden = None

    def _find_split(self) -> bool:
        ids = _probe(PROBE_TOKENS[0], self)
        with torch.inference_mode():
            expected, calls = _outermost_calls(self._model, ids)
        for body, output in calls:
            self._given = _Given(body)
            self._given.like = _without_tensors(output)
            self._until_body = _with_module(self._model, body, _Stop(body))
            self._from_body = _with_module(self._model, body, self._given)
            if _agrees(self, ids, expected):
                return True
        self._until_body = self._from_body = self._given = None
        return False


def _outermost_calls(model: Any, ids: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Any]]]:
    """A run's logits [T, V], and the modules that could be the body, the largest first, each with its output.

    Those are called once by the model itself or by a module around its head, and give one vector a token.
    """
    head = model.get_output_embeddings()
    around = {id(module) for module in model.modules() if any(inner is head for inner in module.modules())}
    around = around - {id(head)} | {id(model)}
    depth, found = 0, dict[int, tuple[nn.Module, list[Any]]]()

    def enter(module: nn.Module, _args: Any) -> None:
        nonlocal depth
        depth += id(module) not in around

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal depth
        depth -= id(module) not in around
        if depth == 0 and id(module) not in around and module is not head:
            found.setdefault(id(module), (module, []))[1].append(output)

    handles = [hook for module in model.modules() for hook in _hooks(module, enter, leave)]
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    once = [(module, outputs[0]) for module, outputs in found.values() if len(outputs) == 1]
    calls = [(module, output) for module, output in once if _is_hidden(output, len(ids))]
    return logits, sorted(calls, key=lambda call: -sum(p.numel() for p in call[0].parameters()))


def _hooks(module: nn.Module, enter: Any, leave: Any) -> tuple[Any, Any]:
    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _is_hidden(output: Any, num_tokens: int) -> bool:
    try:
        hidden = _first(output)
    except (TypeError, KeyError, IndexError):
        return False
    return isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == (1, num_tokens)


def _first(output: Any) -> Tensor:
    """The hidden states of a body's output."""
    return output if isinstance(output, Tensor) else output[0]


def _without_tensors(output: Any) -> Any:
    """The output's kind and fields, emptied."""
    if isinstance(output, Tensor):
        return output.new_zeros(0)
    if isinstance(output, ModelOutput):
        first = next(iter(output))
        emptied = type(output)(**dict.fromkeys(one.name for one in fields(cast(Any, output))))
        emptied[first] = _first(output)[:, :0]
        return emptied
    return (None,) * len(output)


def _with_module(model: Any, old: nn.Module, new: nn.Module) -> Any:
    """A copy of the model that shares every weight and in which another module is in the old one's place."""
    twin = copy.copy(model)
    twin._modules = {
        name: new if inner is old else _with_module(inner, old, new) if _contains(inner, old) else inner
        for name, inner in model._modules.items()
    }
    return twin


def _contains(module: nn.Module | None, inner: nn.Module) -> bool:
    return module is not None and any(one is inner for one in module.modules())


@torch.inference_mode()
def _agrees(split: SplitCausalLM, ids: Tensor, expected: Tensor) -> bool:
    """Whether head(body(x)) is model(x), also of rows in another order: the head must take each row alone."""
    order = torch.arange(len(ids) - 1, -1, -1, device=split.device)
    try:
        found = split.logits(split.hidden([ids])[0, order])[order]
    except Exception as error:  # any shape or attribute this model does not have
        log.info("split check: %s", error)
        return False
    return expected.shape == found.shape and _is_close(expected.float(), found.float(), dtype=split._model.dtype)


def _pads_safely(split: SplitCausalLM) -> bool:
    """Whether a sequence's hidden states stay the same beside a longer one."""
    sequences = [_probe(length, split) for length in PROBE_TOKENS]
    together = split.hidden(sequences)
    return all(
        _is_close(split.hidden([ids])[0].float(), together[row, : len(ids)].float(), dtype=split._model.dtype)
        for row, ids in enumerate(sequences)
    )


def _probe(length: int, split: SplitCausalLM) -> Tensor:
    vocab_size = int(split._model.get_input_embeddings().weight.shape[0])
    return (torch.arange(1, length + 1) * 31 % vocab_size).to(split.device)


def _is_close(expected: Tensor, found: Tensor, *, dtype: torch.dtype) -> bool:
    """Equal within what the dtype lets differ between batch shapes."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    scale = expected.abs().max().clamp(min=1e-6)
    return bool((expected - found).abs().max() <= tolerance * scale) and bool(torch.isfinite(found).all())
