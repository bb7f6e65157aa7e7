"""A Hugging Face causal LM taken apart: its body once for a batch, its head chunk by chunk.

The head keeps whatever the model's own `forward` does after the body (soft caps, logit scales, norms), because it is
that `forward`, run on hidden states in place of the body. B sequences, T tokens, H hidden, V vocabulary, N rows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

PROBE_TOKENS = (7, 3, 5)
"""Lengths of the sequences that the split is checked with."""

log = logging.getLogger(__name__)


@dataclass
class _BodyOutput(ModelOutput):
    """Every field that a causal LM's `forward` may look for in its body's output."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    router_logits: Any = None


class _HiddenStates(nn.Module):
    """Stands where the body was and gives the hidden states it is told to."""

    hidden: Tensor | None = None

    def forward(self, *_args: object, **_kwargs: object) -> _BodyOutput:
        return _BodyOutput(last_hidden_state=self.hidden)


class SplitCausalLM:
    """`hidden` runs the body, `logits` the head; where a model cannot be split, the logits are the hidden states."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device: torch.device = model.device
        self._stub = _HiddenStates()
        self._head = _with_body(model, self._stub)
        self.is_split = self._head is not None and _agrees(self)
        if not self.is_split:
            self._head = None
            log.warning("%s: head and body cannot be told apart, whole logits are made", type(model).__name__)
        self.pads_safely = _pads_safely(self)
        if not self.pads_safely:
            log.warning("%s: padding changes its results, only equal lengths share a pass", type(model).__name__)

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[Tensor]) -> Tensor:
        """[B, T, H] of int64 token ids, padded on the right to the longest.

        No attention mask is needed for it: a causal model's real positions never see what is to their right
        (`pads_safely` has been checked), and without one the fast attention kernels apply.
        """
        ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(self.device, non_blocking=True)
        if self._head is None:
            return self._model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
        return self._model.base_model(input_ids=ids, use_cache=False)[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] of [N, H]."""
        if self._head is None:
            return hidden
        self._stub.hidden = hidden[None]
        ids = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=self.device)
        try:
            return self._head(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
        finally:
            self._stub.hidden = None


def _with_body(model: Any, body: nn.Module) -> Any:
    """A shallow copy of the model, sharing every weight, whose body is another; None where it has no body."""
    name = model.base_model_prefix
    if not name or name not in model._modules:
        return None
    twin = copy.copy(model)
    twin._modules = dict(model._modules) | {name: body}
    return twin


@torch.inference_mode()
def _agrees(split: SplitCausalLM) -> bool:
    """Whether head(body(x)) is model(x)."""
    ids = _probe(PROBE_TOKENS[0], split)
    expected = split._model(input_ids=ids[None], use_cache=False).logits[0].float()
    try:
        found = split.logits(split.hidden([ids])[0]).float()
    except Exception as error:  # any shape or attribute this model does not have
        log.info("split check: %s", error)
        return False
    return expected.shape == found.shape and _is_close(expected, found, dtype=split._model.dtype)


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
