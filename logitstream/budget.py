"""The search for the sampler's size (N, θ or k) that a budget in bytes or noise buys, measured on a run's own text.

The answer is one number for the whole run, so that the bytes go to the positions with the most entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logitstream.codec import decode
from logitstream.id_model import IdModel
from logitstream.types import SPEC_RANGES, SparseTargets, TargetSpec, TokenSequence

Draw = Callable[[Sequence[TokenSequence], TargetSpec, int], Sequence[bytes]]
"""(sequences, spec, draw set) -> their encoded targets, in order: a teacher, however it is reached."""

CLOSE_ENOUGH = 0.01
"""Also the least that twice the samples must bring: where the text takes no more bytes, more samples buy nothing."""
MAX_MEASUREMENTS = 12
BYTES_EXPONENT, PRECISION_EXPONENT = 0.75, 1.5
"""bytes ~ N^0.75 and 1/noise ~ N^1.5 on English text: only where to look next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A spec on calibration text. noise: E Σ_i (t̂_i - t_i)² per position, or None if it was not measured."""

    bytes_per_token: float
    entries_per_token: float
    noise: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The spec that meets a budget, and a sentence on what was chosen and measured."""

    spec: TargetSpec
    measured: Measured
    sentence: str


def measure(
    draw: Draw,
    sequences: Sequence[TokenSequence],
    spec: TargetSpec,
    *,
    with_noise: bool,
    id_model: IdModel | None = None,
    vocab_size: int | None = None,
) -> Measured:
    """Return bytes and entries per wanted row; noise from two independent draw sets, as E |t̂ - t̂'|² / 2.

    id_model, vocab_size: the teacher's, to decode with.
    """

    def decoded(payloads: Sequence[bytes]) -> list[SparseTargets]:
        return [
            decode(payload, spec=spec, vocab_size=vocab_size, id_model=id_model, num_rows=len(sequence))
            for payload, sequence in zip(payloads, sequences, strict=True)
        ]

    payloads = draw(sequences, spec, 0)
    targets = decoded(payloads)
    num_tokens = max(1, sum(sequence.num_wanted for sequence in sequences))
    noise = None
    if with_noise:
        noise = sum(map(_squared_distance, targets, decoded(draw(sequences, spec, 1)))) / 2 / num_tokens
    return Measured(
        bytes_per_token=sum(map(len, payloads)) / num_tokens,
        entries_per_token=sum(part.num_entries for part in targets) / num_tokens,
        noise=noise,
    )


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
    id_model: IdModel | None = None,
    vocab_size: int | None = None,
) -> Choice:
    """Return the spec of the size that meets one of the two budgets on these sequences; ValueError if none does.

    bytes_per_token: the largest size whose encoded targets take at most this; noise: the smallest whose MSE per
    position is at most this.
    """
    sampler = spec.kind
    if not sampler.size_field:
        raise ValueError(f"{spec.sampler} targets have no size to choose: use another sampler")
    if noise and not sampler.is_unbiased:
        raise ValueError(f"a noise budget needs an unbiased sampler, not {spec.sampler}")

    def measured(tried: TargetSpec, with_noise: bool) -> Measured:
        return measure(draw, sequences, tried, with_noise=with_noise, id_model=id_model, vocab_size=vocab_size)

    def size_in_bytes(size: int) -> float:
        return measured(_sized(spec, size), False).bytes_per_token

    def precision(size: int) -> float:
        return 1.0 / max(measured(_sized(spec, size), True).noise or 0.0, 1e-12)

    if bytes_per_token:
        budget = f"at most {bytes_per_token:g} bytes a token"
        size = _search(size_in_bytes, bytes_per_token, spec, BYTES_EXPONENT, from_below=True)
        refusal = f"{bytes_per_token:g} bytes a token are too few for any {spec.sampler} targets of this text"
    else:
        budget = f"noise of at most {noise:g}"
        size = _search(precision, 1.0 / noise, spec, PRECISION_EXPONENT, from_below=False)
        refusal = f"no {spec.sampler} targets come within a noise of {noise:g}"
    if size is None:
        raise ValueError(refusal)
    chosen = _sized(spec, size)
    result = measured(chosen, sampler.is_unbiased)
    return Choice(spec=chosen, measured=result, sentence=f"{budget}: {_sentence(chosen, result, sequences)}")


def _sentence(spec: TargetSpec, measured: Measured, sequences: Sequence[TokenSequence]) -> str:
    field = spec.kind.size_field
    noise = "" if measured.noise is None else f", noise {measured.noise:.3g} a position"
    return (
        f"chose {spec.sampler} with {field} = {getattr(spec, field):.6g}, measured "
        f"{measured.bytes_per_token:.2f} bytes and {measured.entries_per_token:.2f} entries a token{noise} "
        f"on {len(sequences)} sequences of {sum(map(len, sequences))} tokens"
    )


def _sized(spec: TargetSpec, size: int) -> TargetSpec:
    steps = spec.kind.size_steps
    fields: dict[str, Any] = {spec.kind.size_field: steps / size if steps else size}
    return replace(spec, **fields)


def _size_of(spec: TargetSpec, value: float) -> int:
    steps = spec.kind.size_steps
    return max(steps, round(steps / value)) if steps else int(value)


def _search(
    value_of: Callable[[int], float], target: float, spec: TargetSpec, exponent: float, *, from_below: bool
) -> int | None:
    """Return the size whose (rising) value is closest to target without exceeding it (from_below) or falling short.

    Starts at the spec's size and follows a power law through the two ends known. Stops at neighbours, or within
    CLOSE_ENOUGH on the right side.
    """
    field = spec.kind.size_field
    lowest, highest = sorted(_size_of(spec, bound) for bound in SPEC_RANGES[field])
    size = _size_of(spec, getattr(spec, field))
    below, above = (lowest - 1, 0.0), (highest + 1, math.inf)
    for _ in range(MAX_MEASUREMENTS):
        value = value_of(size)
        is_known = below[1] > 0
        if is_known and size >= 2 * below[0] and value <= min(target, below[1] * (1 + CLOSE_ENOUGH)):
            break
        below = (size, value) if value <= target else below
        above = (size, value) if value >= target else above
        is_close = abs(value / target - 1) <= CLOSE_ENOUGH and (value <= target if from_below else value >= target)
        if is_close or above[0] - below[0] <= 1:
            break
        if below[1] > 0 and above[1] < math.inf:
            share = math.log(target / below[1]) / max(math.log(above[1] / below[1]), 1e-9)
            guess = below[0] * (above[0] / below[0]) ** min(max(share, 0.05), 0.95)
        else:
            step = (target / max(value, 1e-9)) ** (1 / exponent) * (1.1 if value <= target else 0.9)
            guess = size * min(max(step, 1 / 16), 16.0)
        size = min(max(round(guess), below[0] + 1), above[0] - 1)
    size, value = below if from_below else above
    return size if 0 < value < math.inf else None
