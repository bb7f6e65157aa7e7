"""How many samples a budget in bytes or noise buys, measured on a user's own text before a run.

The answer is one number for the whole run (N, θ or k), so that the bytes go to the positions with the most entropy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from logitstream.codec import IdModel, decode
from logitstream.sampling import STEPS_PER_SAMPLE
from logitstream.types import MAX_VOCAB_SIZE, PROBABILITY_UNITS, SparseTargets, TargetSpec, TokenSequence

Draw = Callable[[Sequence[TokenSequence], TargetSpec, int], Sequence[bytes]]
"""(sequences, spec, draw set) -> their encoded targets, in order: a teacher, however it is reached."""

CLOSE_ENOUGH = 0.01
"""Also the least that twice the samples must bring: where the text takes no more bytes, more samples buy nothing."""
MAX_MEASUREMENTS = 12
TYPICAL_EXPONENT = 0.75
"""bytes ~ N^0.75 and 1/noise ~ N^1.5 on English text: only where to look next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of a spec on calibration text. noise: E Σ_i (t̂_i - t_i)² per position, or None where it was not asked for."""

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
    """Bytes and entries per wanted row; noise from two independent draw sets, as E |t̂ - t̂'|² / 2.

    id_model, vocab_size: the teacher's, to decode with.
    """
    decode_one = functools.partial(decode, spec=spec, vocab_size=vocab_size, id_model=id_model)

    def decoded(payloads: Sequence[bytes]) -> list[SparseTargets]:
        return [decode_one(payload, num_rows=len(s)) for payload, s in zip(payloads, sequences, strict=True)]

    payloads = draw(sequences, spec, 0)
    targets = decoded(payloads)
    num_tokens = max(1, _num_wanted(sequences))
    noise = None
    if with_noise:
        others = decoded(draw(sequences, spec, 1))
        noise = sum(map(_squared_distance, targets, others)) / 2 / num_tokens
    return Measured(
        bytes_per_token=sum(map(len, payloads)) / num_tokens,
        entries_per_token=sum(part.num_entries for part in targets) / num_tokens,
        noise=noise,
    )


def _num_wanted(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(s) if s.loss_mask is None else int(s.loss_mask.sum()) for s in sequences)


def _squared_distance(a: SparseTargets, b: SparseTargets) -> float:
    keys = np.concatenate([x.row_index() * x.vocab_size + x.token_ids for x in (a, b)])
    signed = np.concatenate([a.weights(), -b.weights()]).astype(np.float64)
    _, where = np.unique(keys, return_inverse=True)
    return float(np.square(np.bincount(where, weights=signed)).sum())


def choose_for_bytes(
    draw: Draw,
    sequences: Sequence[TokenSequence],
    spec: TargetSpec,
    bytes_per_token: float,
    *,
    id_model: IdModel | None = None,
    vocab_size: int | None = None,
) -> Choice:
    """The most samples (the largest k) whose encoded targets take at most so many bytes a token on these sequences."""
    measured_as = functools.partial(measure, draw, sequences, id_model=id_model, vocab_size=vocab_size)

    def size_of(index: int) -> float:
        return measured_as(_with_index(spec, index), with_noise=False).bytes_per_token

    index = _nearest(size_of, bytes_per_token, _index_of(spec), _index_range(spec), TYPICAL_EXPONENT, from_below=True)
    if index is None:
        raise ValueError(f"{bytes_per_token:g} bytes a token are too few for any {spec.sampler} targets of this text")
    chosen = _with_index(spec, index)
    with_noise = spec.sampler in ("systematic", "multinomial", "threshold")
    measured = measured_as(chosen, with_noise=with_noise)
    return _choice(chosen, measured, f"at most {bytes_per_token:g} bytes a token", sequences)


def choose_for_noise(
    draw: Draw,
    sequences: Sequence[TokenSequence],
    spec: TargetSpec,
    noise: float,
    *,
    id_model: IdModel | None = None,
    vocab_size: int | None = None,
) -> Choice:
    """The fewest samples whose targets are within this MSE per position of the teacher's distribution."""
    if spec.sampler not in ("systematic", "multinomial", "threshold"):
        raise ValueError(f"a noise budget needs an unbiased sampler, not {spec.sampler}")
    measured_as = functools.partial(measure, draw, sequences, id_model=id_model, vocab_size=vocab_size)

    def precision_of(index: int) -> float:
        measured = measured_as(_with_index(spec, index), with_noise=True)
        return 1.0 / max(measured.noise or 0.0, 1e-12)

    index = _nearest(
        precision_of, 1.0 / noise, _index_of(spec), _index_range(spec), 2 * TYPICAL_EXPONENT, from_below=False
    )
    if index is None:
        raise ValueError(f"no {spec.sampler} targets come within a noise of {noise:g}")
    chosen = _with_index(spec, index)
    measured = measured_as(chosen, with_noise=True)
    return _choice(chosen, measured, f"noise of at most {noise:g}", sequences)


def _choice(spec: TargetSpec, measured: Measured, budget: str, sequences: Sequence[TokenSequence]) -> Choice:
    name = {"threshold": "threshold", "top_k": "top_k", "top_k_ghost": "top_k"}.get(spec.sampler, "num_samples")
    noise = "" if measured.noise is None else f", noise {measured.noise:.3g} a position"
    sentence = (
        f"{budget}: chose {spec.sampler} with {name} = {getattr(spec, name):.6g}, measured "
        f"{measured.bytes_per_token:.2f} bytes and {measured.entries_per_token:.2f} entries a token{noise} "
        f"on {len(sequences)} sequences of {sum(map(len, sequences))} tokens"
    )
    return Choice(spec=spec, measured=measured, sentence=sentence)


def _with_index(spec: TargetSpec, index: int) -> TargetSpec:
    """The spec whose whole-numbered size is `index`: N, k, or the steps that θ divides 1 into."""
    if spec.sampler == "threshold":
        return replace(spec, threshold=STEPS_PER_SAMPLE / index)
    if spec.sampler in ("top_k", "top_k_ghost"):
        return replace(spec, top_k=index)
    return replace(spec, num_samples=index)


def _index_of(spec: TargetSpec) -> int:
    if spec.sampler == "threshold":
        return max(STEPS_PER_SAMPLE, round(STEPS_PER_SAMPLE / spec.threshold))
    return spec.top_k if spec.sampler in ("top_k", "top_k_ghost") else spec.num_samples


def _index_range(spec: TargetSpec) -> tuple[int, int]:
    if spec.sampler == "full":
        raise ValueError("full targets have no size to choose")
    if spec.sampler == "threshold":
        return STEPS_PER_SAMPLE, STEPS_PER_SAMPLE * PROBABILITY_UNITS
    return 1, (MAX_VOCAB_SIZE if spec.sampler.startswith("top_k") else PROBABILITY_UNITS)


def _nearest(
    value_of: Callable[[int], float],
    target: float,
    start: int,
    bounds: tuple[int, int],
    exponent: float,
    *,
    from_below: bool,
) -> int | None:
    """The nearest index found whose (rising) value is at most the target or, not from below, at least it.

    Steps along a power law through the two ends known; ends at neighbours, or within CLOSE_ENOUGH on the right side.
    """
    below: tuple[int, float] | None = None
    above: tuple[int, float] | None = None
    index = min(max(start, bounds[0]), bounds[1])
    for _ in range(MAX_MEASUREMENTS):
        value = value_of(index)
        if below and index >= 2 * below[0] and value <= min(target, below[1] * (1 + CLOSE_ENOUGH)):
            break
        if value <= target:
            below = (index, value)
        if value >= target:
            above = (index, value)
        is_close = abs(value / target - 1) <= CLOSE_ENOUGH and (value <= target if from_below else value >= target)
        if is_close or (below and above and above[0] - below[0] <= 1):
            break
        index = _next_index(below, above, target, bounds, exponent)
        if index in (below and below[0], above and above[0]):
            break
    found = below if from_below else above
    return found and found[0]


def _next_index(
    below: tuple[int, float] | None,
    above: tuple[int, float] | None,
    target: float,
    bounds: tuple[int, int],
    exponent: float,
) -> int:
    if below and above:
        span = math.log(above[0] / below[0])
        share = math.log(target / below[1]) / max(math.log(above[1] / below[1]), 1e-9)
        guess = below[0] * math.exp(span * min(max(share, 0.05), 0.95))
        return min(max(round(guess), below[0] + 1), above[0] - 1)
    index, value = below or above or (1, target)
    step = math.exp(math.log(target / max(value, 1e-9)) / exponent)
    guess = index * min(max(step * (1.1 if below else 0.9), 1 / 16), 16.0)
    low, high = (index + 1, bounds[1]) if below else (bounds[0], index - 1)
    return min(max(round(guess), min(low, bounds[1])), max(high, bounds[0]))
