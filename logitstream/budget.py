"""The search for the sampler's size (N, θ or k) that a budget in bytes or noise buys, measured on a run's own text.

The answer is one number for the whole run, so that the bytes go to the positions with the most entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from logitstream.codec import decode
from logitstream.types import SPEC_RANGES, SparseTargets, TargetSpec, TokenSequence

Draw = Callable[[Sequence[TokenSequence], TargetSpec, int], Sequence[bytes]]
"""(sequences, spec, draw set) -> their encoded targets, in order: a teacher, however it is reached."""
CLOSE_ENOUGH = 0.01
MAX_MEASUREMENTS = 20


class Measured(NamedTuple):
    """A spec on calibration text. noise: E Σ_i (t̂_i - t_i)² per position, or None if it was not measured."""

    bytes_per_token: float
    entries_per_token: float
    noise: float | None = None


class Choice(NamedTuple):
    """The spec that meets a budget, and a sentence on what was chosen and measured."""

    spec: TargetSpec
    measured: Measured
    sentence: str


def measure(
    draw: Draw, sequences: Sequence[TokenSequence], spec: TargetSpec, *, with_noise: bool, **decoding: Any
) -> Measured:
    """Return bytes and entries per wanted row; noise from two independent draw sets, as E |t̂ - t̂'|² / 2.

    decoding: the teacher's id_model and vocab_size for `codec.decode`.
    """

    def drawn(draw_set: int) -> tuple[list[SparseTargets], int]:
        payloads = draw(sequences, spec, draw_set)
        pairs = zip(payloads, map(len, sequences), strict=True)
        targets = [decode(payload, spec=spec, num_rows=number, **decoding) for payload, number in pairs]
        return targets, sum(map(len, payloads))

    targets, num_bytes = drawn(0)
    num_rows = max(1, sum(sequence.num_wanted for sequence in sequences))
    noise = sum(map(_squared_distance, targets, drawn(1)[0])) / 2 / num_rows if with_noise else None
    return Measured(num_bytes / num_rows, sum(part.num_entries for part in targets) / num_rows, noise)


def _squared_distance(a: SparseTargets, b: SparseTargets) -> float:
    keys = np.concatenate([x.row_index() * x.vocab_size + x.token_ids for x in (a, b)])
    signed = np.concatenate([a.weights(), -b.weights()]).astype(np.float64)
    _, where = np.unique(keys, return_inverse=True)
    return float(np.square(np.bincount(where, weights=signed)).sum())


def choose(
    draw: Draw,
    sequences: Sequence[TokenSequence],
    spec: TargetSpec,
    *,
    bytes_per_token: float = 0.0,
    noise: float = 0.0,
    **decoding: Any,
) -> Choice:
    """Return the spec of the size that meets one of the two budgets on these sequences; ValueError if none does.

    bytes_per_token: the largest size whose encoded targets take at most this; noise: the smallest whose MSE per
    position is at most this; decoding: the teacher's id_model and vocab_size.
    """
    field = spec.kind.size_field
    if not field:
        raise ValueError(f"{spec.sampler} targets have no size to choose: use another sampler")
    if noise and not spec.kind.is_unbiased:
        raise ValueError(f"a noise budget needs an unbiased sampler, not {spec.sampler}")

    def measured(size: int, *, with_noise: bool) -> tuple[TargetSpec, Measured]:
        changes: dict[str, Any] = {field: spec.kind.size_steps / size if spec.kind.size_steps else size}
        sized = replace(spec, **changes)
        return sized, measure(draw, sequences, sized, with_noise=with_noise, **decoding)

    def share_of_budget(size: int) -> float:
        found = measured(size, with_noise=not bytes_per_token)[1]
        return found.bytes_per_token / bytes_per_token if bytes_per_token else noise / max(found.noise or 0.0, 1e-12)

    size = _search(share_of_budget, spec, from_below=bool(bytes_per_token))
    budget = f"at most {bytes_per_token:g} bytes a token" if bytes_per_token else f"noise of at most {noise:g}"
    if size is None:
        raise ValueError(f"{budget}: no {field} of {spec.sampler} targets meets this on this text")
    chosen, found = measured(size, with_noise=spec.kind.is_unbiased)
    with_noise = "" if found.noise is None else f", noise {found.noise:.3g} a position"
    sentence = (
        f"{budget}: chose {spec.sampler} with {field} = {getattr(chosen, field):.6g}, measured "
        f"{found.bytes_per_token:.2f} bytes and {found.entries_per_token:.2f} entries a token{with_noise} "
        f"on {len(sequences)} sequences of {sum(map(len, sequences))} tokens"
    )
    return Choice(chosen, found, sentence)


def _search(share_of_budget: Callable[[int], float], spec: TargetSpec, *, from_below: bool) -> int | None:
    """Return the size whose (rising) share of the budget is next to 1: at most 1 from below, else at least 1.

    Doubles or halves the spec's own size until a size lies on either side, then bisects. Stops at neighbours, within
    CLOSE_ENOUGH, or where a doubling changes nothing.
    """
    steps = spec.kind.size_steps

    def size_of(value: float) -> int:
        return max(steps, round(steps / value)) if steps else int(value)

    lowest, highest = sorted(size_of(bound) for bound in SPEC_RANGES[spec.kind.size_field][1:])
    size, below, above, share_below = size_of(getattr(spec, spec.kind.size_field)), lowest - 1, highest + 1, 0.0
    for _ in range(MAX_MEASUREMENTS):
        share = share_of_budget(size)
        if below >= lowest and above > highest and share <= min(1.0, share_below * (1 + CLOSE_ENOUGH)):
            break
        if share <= 1:
            below, share_below = size, share
        if share >= 1:
            above = size
        is_close = 1 - CLOSE_ENOUGH <= share <= 1 if from_below else 1 <= share <= 1 + CLOSE_ENOUGH
        if is_close or above - below <= 1:
            break
        low, high = max(below, size // 2), min(above, 2 * size)
        following = low if below < lowest else high if above > highest else round(math.sqrt(below * above))
        size = min(max(following, below + 1), above - 1)
    size = below if from_below else above
    return size if lowest <= size <= highest else None
