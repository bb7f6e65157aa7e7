"""The samplers: one row of SAMPLERS each. Adding one touches this file and its test; everything else reads the table.

systematic, multinomial and threshold are unbiased: their weights average to the teacher's distribution. A draw turns
uniforms into entries, three int64 arrays [K] (row, id, count in units) ordered by row and id.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from logitstream.distribution import Distribution
    from logitstream.types import TargetSpec

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Entries = tuple[Int64s, Int64s, Int64s]

PROBABILITY_UNITS = 1 << 16
"""Grid of top_k's probabilities, and the most samples of a row."""
FULL_UNITS = 1 << 30
"""Grid of `full`, the finest of all: entries below 2^-30 round to nothing."""
STEPS_PER_SAMPLE = 4
"""Units that one sample stands for (1/N or θ) where weights are no multiples of it. Rounding to them adds about 1 % to
the noise; every halving costs a bit an entry."""
MAX_COUNT = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One way to draw sparse targets.

    name: the TargetSpec's `sampler`.
    size_field: the TargetSpec's field that sets how much a row keeps, which a budget chooses; empty: nothing does.
    size_steps: where not 0, the size is a share θ that a budget counts as the whole number size_steps / θ.
    other_fields: further fields that it uses.
    units: SparseTargets.units; tail_units: θ in units, where entries of count 0 share a row's tail.
    uniforms: how many uniforms a row's draw takes.
    entries: the most entries of a row, from the spec and the vocabulary's size.
    draw: entries from distributions of R rows and their uniforms [R, uniforms].
    has_ghost: the loss puts what a row leaves of 1 into a bucket of its own.
    on_gpu: the function of `kernels.draw` that draws it there; empty: none does.
    """

    name: str
    size_field: str
    size_steps: int = 0
    other_fields: tuple[str, ...] = ()
    units: Callable[[TargetSpec], int]
    tail_units: int = 0
    uniforms: Callable[[TargetSpec], int]
    entries: Callable[[TargetSpec, int], int]
    draw: Callable[[Distribution, TargetSpec, Float64s], Entries]
    is_unbiased: bool
    has_ghost: bool = False
    on_gpu: str = ""


def _systematic(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    """Look up (j - u)/N, j = 1..N, in the running sum C: id i's count is ⌊N·C_i + u⌋ - ⌊N·C_(i-1) + u⌋."""
    points = (np.arange(1, spec.num_samples + 1) - uniforms) / spec.num_samples
    return _count_equal(distribution.locate(points))


def _multinomial(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    """Draw N ids independently from q ∝ t^τ, with weights t_i·count_i/(N·q_i) (RS-KD, section 3)."""
    points = np.sort(1.0 - uniforms[:, : spec.num_samples], axis=1)
    if spec.proposal_temperature == 1.0:
        return _count_equal(distribution.locate(points))
    proposal = distribution.power(spec.proposal_temperature)
    rows, ids, counts = _count_equal(proposal.locate(points))
    weights = distribution.shares(rows, ids) / proposal.shares(rows, ids) * counts / spec.num_samples
    return _positive(rows, ids, _round_rows(rows, weights, uniforms[:, spec.num_samples], _multinomial_units(spec)))


def _multinomial_units(spec: TargetSpec) -> int:
    return spec.num_samples * (1 if spec.proposal_temperature == 1.0 else STEPS_PER_SAMPLE)


def _threshold(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    """Round t_i ≥ θ to whole units, draw the rest as equal points (constant-threshold Horvitz-Thompson)."""
    num_rows, units = len(uniforms), _threshold_units(spec)
    theta = STEPS_PER_SAMPLE / units
    # Two tail points can hit only an entry of θ/2 or more.
    rows, ids, shares = distribution.at_least(theta / 2)
    largest_tail = np.zeros(num_rows)
    np.maximum.at(largest_tail, rows, np.where(shares < theta, shares, 0.0))
    is_head = shares >= theta
    rows, ids, shares = rows[is_head], ids[is_head], shares[is_head]
    counts = _round_rows(rows, shares, uniforms[:, 0], units)
    left = units - np.bincount(rows, weights=counts, minlength=num_rows).astype(np.int64)
    total = distribution.total()
    tail = distribution.without(rows, ids)
    tail_share = tail.total() / total
    num_points = _tail_points(left, largest_tail, tail_share, uniforms[:, 1]) * (tail_share > 0)
    j = np.arange(1, num_points.max(initial=0) + 1)
    points = np.minimum((j - uniforms[:, 2:]) / np.maximum(num_points, 1)[:, None], 1.0)
    tail_rows, tail_ids, _ = _count_equal(tail.locate(points), j <= num_points[:, None])
    heads, tails = _positive(rows, ids, counts), (tail_rows, tail_ids, 0 * tail_ids)
    rows, ids, counts = (np.concatenate(pair) for pair in zip(heads, tails, strict=True))
    order = np.lexsort((ids, rows))
    return rows[order], ids[order], counts[order]


def _threshold_units(spec: TargetSpec) -> int:
    """Return the grid on which θ is STEPS_PER_SAMPLE units; it moves θ to the nearest STEPS_PER_SAMPLE / units."""
    return max(STEPS_PER_SAMPLE, round(STEPS_PER_SAMPLE / spec.threshold))


def _tail_points(left: Int64s, largest_tail: Float64s, tail_share: Float64s, uniforms: Float64s) -> Int64s:
    """Return how many points share the `left` units of each row's tail: left/θ, rounded stochastically.

    Below θ that is one point (which then weighs θ) with probability left/θ. From θ on any number m that does not depend
    on where the points fall is unbiased as long as no id is hit twice, which one tail entry could not express: the
    points lie tail_share/m apart, so m stays below tail_share/largest_tail, and is 1 where one id is the whole tail.
    """
    num_points = np.floor(left / STEPS_PER_SAMPLE + uniforms)
    most = np.ceil(tail_share / np.maximum(largest_tail, 1e-300)) - 1.0
    limited = np.minimum(num_points, np.maximum(most, 1.0))
    return np.where(left >= STEPS_PER_SAMPLE, limited, num_points).astype(np.int64)


def _top_k(distribution: Distribution, spec: TargetSpec, uniforms: Float64s, *, has_ghost: bool) -> Entries:
    """Keep the k largest, scaled to sum to 1 unless a ghost bucket takes the rest."""
    ids, kept = distribution.largest(spec.top_k)
    total = distribution.total() if has_ghost else kept.sum(axis=1)
    rows = np.repeat(np.arange(len(ids)), ids.shape[1])
    shares = (kept / total[:, None]).ravel()
    return _positive(rows, ids.ravel(), _round_rows(rows, shares, np.full(len(ids), 0.5), PROBABILITY_UNITS))


def _full(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    shares = distribution.values.double().cpu().numpy() / distribution.total()[:, None]
    rows, ids = (index.ravel() for index in np.indices(shares.shape))
    return _positive(rows, ids, _round_rows(rows, shares.ravel(), np.full(len(shares), 0.5), FULL_UNITS))


def _count_equal(found: Int64s, is_used: npt.NDArray[np.bool_] | None = None) -> Entries:
    """Return equal neighbours of the ids found [R, P] (sorted in each row) as one entry each with their number."""
    used = np.ones(found.shape, np.bool_) if is_used is None else is_used
    rows, ids = np.nonzero(used)[0], found[used]
    is_new = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(ids)), np.bool_), is_new]))
    return rows[starts], ids[starts], np.diff(starts, append=len(ids))


def _round_rows(rows: Int64s, weights: Float64s, v: Float64s, grid: int) -> Int64s:
    """Return weights in units, ⌊G·W_i + v⌋ - ⌊G·W_(i-1) + v⌋ over a row's running sums W: unbiased for uniform v."""
    lengths = np.bincount(rows, minlength=len(v))
    places = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[rows]
    by_row = np.zeros((len(v), 1 + lengths.max(initial=0)))  # a matrix, so that no row's sums depend on another's
    by_row[rows, 1 + places] = weights
    running = np.cumsum(by_row, axis=1) * grid + v[:, None]
    units: Int64s = np.minimum(np.diff(np.floor(running), axis=1)[rows, places], MAX_COUNT).astype(np.int64)
    return units


def _positive(rows: Int64s, ids: Int64s, counts: Int64s) -> Entries:
    kept = counts > 0
    return rows[kept], ids[kept], counts[kept]


_ROWS = (
    Sampler(
        name="systematic",
        size_field="num_samples",
        units=lambda spec: spec.num_samples,
        uniforms=lambda spec: 1,
        entries=lambda spec, vocab_size: spec.num_samples,
        draw=_systematic,
        on_gpu="draw_systematic",
        is_unbiased=True,
    ),
    Sampler(
        name="multinomial",
        size_field="num_samples",
        other_fields=("proposal_temperature",),
        units=_multinomial_units,
        uniforms=lambda spec: spec.num_samples + (spec.proposal_temperature != 1.0),
        entries=lambda spec, vocab_size: spec.num_samples,
        draw=_multinomial,
        on_gpu="draw_multinomial",
        is_unbiased=True,
    ),
    Sampler(
        name="threshold",
        size_field="threshold",
        size_steps=STEPS_PER_SAMPLE,
        units=_threshold_units,
        tail_units=STEPS_PER_SAMPLE,
        uniforms=lambda spec: 3,
        entries=lambda spec, vocab_size: 2 * math.ceil(1 / spec.threshold) + 1,
        draw=_threshold,
        on_gpu="draw_threshold",
        is_unbiased=True,
    ),
    Sampler(
        name="top_k",
        size_field="top_k",
        units=lambda spec: PROBABILITY_UNITS,
        uniforms=lambda spec: 0,
        entries=lambda spec, vocab_size: min(spec.top_k, vocab_size),
        draw=partial(_top_k, has_ghost=False),
        on_gpu="draw_top_k",
        is_unbiased=False,
    ),
    Sampler(
        name="top_k_ghost",
        size_field="top_k",
        units=lambda spec: PROBABILITY_UNITS,
        uniforms=lambda spec: 0,
        entries=lambda spec, vocab_size: min(spec.top_k, vocab_size),
        draw=partial(_top_k, has_ghost=True),
        on_gpu="draw_top_k",
        is_unbiased=False,
        has_ghost=True,
    ),
    Sampler(
        name="full",
        size_field="",
        units=lambda spec: FULL_UNITS,
        uniforms=lambda spec: 0,
        entries=lambda spec, vocab_size: vocab_size,
        draw=_full,
        is_unbiased=False,
    ),
)
SAMPLERS = {sampler.name: sampler for sampler in _ROWS}
