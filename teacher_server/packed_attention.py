"""Sequences of any lengths in one pass without padding: torch's own varlen attention as a transformers attention.

A model that passes the bounds of packed sequences on to its attention, and whose attention is no more than a softmax of
scaled products in a window, takes it; `pack` tries and compares.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from logitstream.split_model import PADDING_TOLERANCE, PROBE_LENGTHS, SplitModel, is_close

NAME = "logitstream_packed"
REFUSED = ("softcap", "s_aux", "position_bias")
"""Terms that some models' attention adds, and this one does not."""

log = logging.getLogger(__name__)


def pack(model: Any, lm: SplitModel, send: Callable[[Any], Tensor]) -> bool:
    """Give a model the packed attention if it then computes what it computes alone; else leave it as it is."""
    num_ids = int(model.get_input_embeddings().weight.shape[0])
    sequences = [np.arange(1, length + 1) * 31 % num_ids for length in PROBE_LENGTHS]
    before = model.config._attn_implementation
    alone = torch.cat([lm.hidden(torch.from_numpy(one)[None].to(model.device))[0] for one in sequences])
    try:
        AttentionInterface.register(NAME, attention)
        model.set_attn_implementation(NAME)
        if is_close(alone, lm.hidden(**packed(sequences, send))[0], PADDING_TOLERANCE):
            return True
        reason = "its results change"
    except Exception as error:  # whatever a model of a kind not seen before makes of it
        reason = f"{type(error).__name__}: {error}"
    log.warning("%s: its sequences are padded, as packing fails: %s", type(model).__name__, reason)
    model.set_attn_implementation(before)
    return False


def packed(sequences: Sequence[Any], send: Callable[[Any], Tensor]) -> dict[str, Any]:
    """Return a model's arguments for a pass over sequences of token ids (arrays), one after the other.

    send: takes an array to the device. Positions come with it, so that nothing looks for the bounds on the device.
    """
    lengths = [len(one) for one in sequences]
    positions = np.concatenate([np.arange(length) for length in lengths])
    ids, position_ids = send(np.stack([np.concatenate(sequences).astype(np.int64), positions]))
    ends = send(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return {
        "token_ids": ids[None],
        "position_ids": position_ids[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return [1, tokens, heads, size] of packed sequences, [1, heads, tokens, size] each, causal within each."""
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError("its attention has a mask of its own")
    if named := [name for name in REFUSED if options.get(name) is not None]:
        raise ValueError(f"its attention has {', '.join(named)}")
    ends, longest = options["cu_seq_lens_q"], options["max_length_q"]
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    attend = _on_cpu if query.device.type == "cpu" else _varlen
    return attend(q, k, v, ends, longest, scaling, sliding_window)[None], None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Call torch's kernel, whose options differ between versions; [tokens, heads, size]."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError("its attention has a window, which this version of torch does not pack")
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        q = q * (scaling * q.shape[-1] ** 0.5)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Attend sequence by sequence: the specification."""
    bounds, parts = ends.tolist(), []
    for first, stop in pairwise(bounds):
        q_one, k_one, v_one = (whole[first:stop].transpose(0, 1)[None] for whole in (q, k, v))
        place = torch.arange(stop - first)
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < (window or longest))
        out = scaled_dot_product_attention(q_one, k_one, v_one, seen, scale=scaling, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
