"""Rotary positions that depend on the longest sequence of a pass: which lengths may share one, and a fresh state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

FIXED_TYPES = frozenset({"default", "linear", "yarn", "llama3", "proportional", "mrope"})
"""rope_types whose angles depend only on the position; any other is assumed to depend on the pass."""


class LengthDependence:
    """The parts of a model that depend on the longest sequence of a pass; false if there are none.

    `longrope` has two sets of angles, one up to `original_max_position_embeddings`; `dynamic` (NTK) has other angles
    for every length beyond `max_position_embeddings`, and keeps those of the longest sequence it has seen.
    """

    def __init__(self, model: nn.Module) -> None:
        rotaries = [(module, kinds) for module in model.modules() if (kinds := list(_length_dependent(module)))]
        self._rules = sorted({rule for _, kinds in rotaries for rule in kinds})
        self._fresh = [(module, _state(module)) for module, _ in rotaries]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def __str__(self) -> str:
        return ", ".join(f"{kind} positions beyond {limit} tokens" for kind, limit in self._rules)

    def group(self, length: int) -> tuple[int, ...]:
        """Return a key that is the same for lengths that may share a pass."""
        return tuple(0 if length <= limit else 1 if kind == "longrope" else length for kind, limit in self._rules)

    @torch.inference_mode(False)  # or buffers could not be written in place outside of it
    def forget(self) -> None:
        """Restore the modules' initial state: an earlier pass must not move a later one's positions."""
        for module, (values, buffers, names) in self._fresh:
            for name in module.__dict__.keys() - names:
                del module.__dict__[name]
            module.__dict__.update(values)
            for name, buffer in buffers.items():
                module._buffers[name] = buffer.clone()


def _length_dependent(module: Any) -> Iterator[tuple[str, int]]:
    """Yield the rope_type of each kind of layer that depends on a length, and the length up to which it does not."""
    types = getattr(module, "rope_type", None)
    for layer_type, kind in types.items() if isinstance(types, dict) else [(None, types)]:
        if isinstance(kind, str) and kind not in FIXED_TYPES:
            parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
            parameters = parameters.get(layer_type, {}) if layer_type is not None else parameters
            limits = parameters.get("original_max_position_embeddings"), getattr(module, "original_max_seq_len", None)
            yield kind, min((int(limit) for limit in limits if limit), default=0)


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """Return a module's numbers, copies of its buffers, and the names of all its attributes."""
    values = {name: value for name, value in module.__dict__.items() if isinstance(value, int | float)}
    buffers = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
    return values, buffers, set(module.__dict__)
