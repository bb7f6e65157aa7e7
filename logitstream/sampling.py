"""Draws sparse targets from logits: systematic, multinomial, threshold (all unbiased), top_k, top_k_ghost, full.

Suffixes: R rows (positions), V vocabulary, P points of a row. Uniforms come from the host (uniforms.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.inverse_cdf import (
    Distribution,
    at_least,
    chunk_rows,
    locate,
    locate_in_logits,
    relative_probs,
    scratch,
    without,
)
from logitstream.types import FULL_UNITS, PROBABILITY_UNITS, SparseTargets, TargetSpec, TokenSequence
from logitstream.uniforms import draw_key, row_uniforms, uniforms_per_row

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

MAX_COUNT = (1 << 31) - 1
STEPS_PER_SAMPLE = 4
"""Units of what one sample stands for (1/N or θ), where weights are rounded."""
MAX_POINTS = 1 << 20
"""Points of the rows that are drawn at once; with uniforms, ids and counts each takes about 100 bytes for a while."""


def sample(
    logits: Tensor, spec: TargetSpec, sequence: TokenSequence, *, draw_set: int = 0, first_row: int = 0
) -> SparseTargets:
    """Targets of rows first_row.. of a sequence from their logits [R, V] (any float dtype, any device).

    Chunks concatenate to what one call gives. Rows outside the loss mask come out empty. Raises NonFiniteLogits.
    """
    num_rows = logits.shape[0]
    if first_row < 0 or first_row + num_rows > len(sequence):
        raise ValueError(f"rows {first_row} to {first_row + num_rows} of a sequence of {len(sequence)} tokens")
    rows = np.arange(first_row, first_row + num_rows)
    if sequence.loss_mask is not None:
        rows = rows[sequence.loss_mask[rows]]
    if len(rows) < num_rows:
        logits = logits[torch.from_numpy(rows - first_row).to(logits.device)]
    key, step = draw_key(spec, sequence, draw_set), rows_at_once(spec, logits.shape[1])
    parts = []
    for i in range(0, max(1, len(rows)), step):
        names = rows[i : i + step]
        parts.append(draw(logits[i : i + step], spec, row_uniforms(spec, key, names), row_names=names))
    return among_rows(SparseTargets.concatenate(parts), rows - first_row, num_rows)


def among_rows(drawn: SparseTargets, rows: Int64s, num_rows: int) -> SparseTargets:
    """The drawn rows as these of num_rows rows, the others empty."""
    lengths = np.zeros(num_rows, np.int64)
    lengths[rows] = np.diff(drawn.row_offsets)
    return replace(drawn, row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))


def rows_at_once(spec: TargetSpec, vocab_size: int) -> int:
    """How many rows to make uniforms for and draw at once, so that memory stays small whatever a spec asks for."""
    points = {
        "threshold": 2 * math.ceil(1 / spec.threshold),
        "top_k": min(spec.top_k, vocab_size),
        "top_k_ghost": min(spec.top_k, vocab_size),
        "full": vocab_size,
    }.get(spec.sampler, spec.num_samples)
    return max(1, MAX_POINTS // points)


def warm_up() -> None:
    """Compile what drawing on the CPU needs, so that it happens at start and not with the first request."""
    sequence = TokenSequence(token_ids=np.zeros(2, np.int32))
    for sampler in ("systematic", "threshold"):
        sample(torch.zeros(2, 2), TargetSpec(sampler=sampler), sequence)


def draw(
    logits: Tensor,
    spec: TargetSpec,
    uniforms: Float64s,
    *,
    row_names: Int64s | None = None,
) -> SparseTargets:
    """Targets of logits [R, V] from their uniforms [R, uniforms_per_row(spec)]; rows may be of many sequences
    (row_names only name them in NonFiniteLogits). Callers keep to `rows_at_once`, for their uniforms too.
    """
    num_rows, vocab_size = logits.shape
    if uniforms.shape != (num_rows, uniforms_per_row(spec)):
        raise ValueError(f"expected uniforms of shape {(num_rows, uniforms_per_row(spec))}, got {uniforms.shape}")
    names = np.arange(num_rows) if row_names is None else row_names
    if (points := _points(spec, uniforms)) is not None:
        entries = _count(locate_in_logits(logits, spec.temperature, names, points))
        return _targets(spec, vocab_size, num_rows, entries)
    buffer, step = scratch(logits), chunk_rows(logits)
    parts: list[Entries] = []
    for i in range(0, num_rows, step):
        distribution = relative_probs(logits[i : i + step], spec.temperature, names[i : i + step], buffer)
        rows, token_ids, counts = _DRAW[spec.sampler](distribution, spec, uniforms[i : i + step])
        parts.append((rows + i, token_ids, counts))
    return _targets(spec, vocab_size, num_rows, _concatenate(parts))


Entries = tuple[Int64s, Int64s, Int64s]
"""Row, id and count of each entry, by row and id."""


def _targets(spec: TargetSpec, vocab_size: int, num_rows: int, entries: Entries) -> SparseTargets:
    rows, token_ids, counts = entries
    return SparseTargets(
        vocab_size=vocab_size,
        units=units_of(spec),
        tail_units=tail_units_of(spec),
        row_offsets=np.searchsorted(rows, np.arange(num_rows + 1)),
        token_ids=token_ids.astype(np.int32),
        counts=counts.astype(np.int32),
    )


def units_of(spec: TargetSpec) -> int:
    """SparseTargets.units of what this spec draws.

    Weights that are no multiples of 1/N by nature lie on a grid so much finer than what is drawn that its rounding
    adds about 1 % to the noise, and no finer: every halving costs a bit an entry.
    """
    if spec.sampler == "systematic" or (spec.sampler == "multinomial" and spec.proposal_temperature == 1.0):
        return spec.num_samples
    if spec.sampler == "multinomial":
        return spec.num_samples * STEPS_PER_SAMPLE
    if spec.sampler == "threshold":
        return max(STEPS_PER_SAMPLE, round(STEPS_PER_SAMPLE / spec.threshold))
    return FULL_UNITS if spec.sampler == "full" else PROBABILITY_UNITS


def tail_units_of(spec: TargetSpec) -> int:
    """θ in units, for `threshold` (which so moves θ to the nearest STEPS_PER_SAMPLE / units), else 0."""
    return STEPS_PER_SAMPLE if spec.sampler == "threshold" else 0


def _points(spec: TargetSpec, uniforms: Float64s) -> Float64s | None:
    """Where the samplers that need no more look into each row's running sum C: float64 [R, N] in (0, 1], rising.

    systematic: (j - u)/N, j = 1..N, so that id i's count is ⌊N·C_i + u⌋ - ⌊N·C_(i-1) + u⌋; multinomial at τ = 1: N
    independent points (RS-KD, section 3).
    """
    if spec.sampler == "systematic":
        return (np.arange(1, spec.num_samples + 1) - uniforms) / spec.num_samples
    if spec.sampler == "multinomial" and spec.proposal_temperature == 1.0:
        return np.sort(1.0 - uniforms, axis=1)
    return None


def _tempered(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    """N independent draws from q ∝ t^τ, with weights t_i·count_i/(N·q_i) (RS-KD, section 3)."""
    points = np.sort(1.0 - uniforms[:, : spec.num_samples], axis=1)
    proposal = Distribution.of(distribution.values**spec.proposal_temperature)
    rows, ids, counts = _count(locate(proposal, points))
    weights = _shares(distribution, rows, ids) / _shares(proposal, rows, ids) * counts / spec.num_samples
    return _drop_zeros(rows, ids, _round_rows(rows, weights, uniforms[:, spec.num_samples], units_of(spec)))


def _threshold(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    """t_i ≥ θ rounded to whole units, the rest as equal points over the tail (constant-threshold Horvitz-Thompson)."""
    theta = tail_units_of(spec) / units_of(spec)
    num_rows, device = len(uniforms), distribution.values.device
    # Entries of θ/2 on are the only ones that two tail points can hit.
    rows, ids, shares = (x.cpu().numpy() for x in at_least(distribution, theta / 2))
    largest_tail = np.zeros(num_rows)
    np.maximum.at(largest_tail, rows, np.where(shares < theta, shares, 0.0))
    head = shares >= theta
    rows, ids, shares = rows[head], ids[head], shares[head]
    units = _round_rows(rows, shares, uniforms[:, 0], units_of(spec))
    left = units_of(spec) - np.bincount(rows, weights=units, minlength=num_rows).astype(np.int64)
    total = distribution.total()
    tail = without(distribution, torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device))
    tail_share: Float64s = (tail.total() / total).cpu().numpy()
    num_points = _tail_points(left, tail_units_of(spec), largest_tail, tail_share, uniforms[:, 1]) * (tail_share > 0)
    j = np.arange(1, num_points.max(initial=0) + 1)
    points = np.minimum((j - uniforms[:, 2:]) / np.maximum(num_points, 1)[:, None], 1.0)
    tail_rows, tail_ids, _ = _count(locate(tail, points), used=j <= num_points[:, None])
    return _by_row_and_id(_concatenate([_drop_zeros(rows, ids, units), (tail_rows, tail_ids, 0 * tail_ids)]))


def _tail_points(
    left: Int64s,
    theta_units: int,
    largest_tail: Float64s,
    tail_share: Float64s,
    uniforms: Float64s,
) -> Int64s:
    """How many points share the `left` units of each row's tail: left/θ, rounded stochastically.

    Below θ that is one point (which then weighs θ) with probability left/θ. From θ on any number m that does not depend
    on where the points fall is unbiased while no id can be hit twice, whose weight one tail entry could not tell: the
    points lie tail_share/m apart, so m stays below tail_share/largest_tail, and is 1 where one id is the whole tail.
    """
    num_points = np.floor(left / theta_units + uniforms)
    most = np.ceil(tail_share / np.maximum(largest_tail, 1e-300)) - 1.0
    return np.where(left >= theta_units, np.minimum(num_points, np.maximum(most, 1.0)), num_points).astype(np.int64)


def _top_k(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    """The k largest, scaled to sum to 1 unless the rest is the ghost bucket's."""
    values, indices = distribution.values.topk(min(spec.top_k, distribution.values.shape[1]), dim=-1)
    order = indices.argsort(dim=-1)
    ids, kept = indices.gather(1, order).cpu().numpy(), values.gather(1, order).double().cpu().numpy()
    total = kept.sum(axis=1) if spec.sampler == "top_k" else distribution.total().cpu().numpy()
    rows = np.repeat(np.arange(len(ids)), ids.shape[1])
    units = _round_rows(rows, (kept / total[:, None]).ravel(), np.full(len(ids), 0.5), units_of(spec))
    return _drop_zeros(rows, ids.ravel(), units)


def _full(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    num_rows, num_ids = distribution.values.shape
    probs = distribution.values.double().cpu().numpy() / distribution.total().cpu().numpy()[:, None]
    rows = np.repeat(np.arange(num_rows), num_ids)
    units = _round_rows(rows, probs.ravel(), np.full(num_rows, 0.5), units_of(spec))
    return _drop_zeros(rows, np.tile(np.arange(num_ids), num_rows), units)


_DRAW = {
    "multinomial": _tempered,
    "threshold": _threshold,
    "top_k": _top_k,
    "top_k_ghost": _top_k,
    "full": _full,
}


def _shares(distribution: Distribution, rows: Int64s, ids: Int64s) -> Float64s:
    device = distribution.values.device
    values = distribution.values[torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)].double()
    shares: Float64s = values.cpu().numpy() / distribution.total().cpu().numpy()[rows]
    return shares


def _count(found: Int64s, used: npt.NDArray[np.bool_] | None = None) -> Entries:
    """Equal neighbours of found [R, P] (sorted in each row) as one entry each with their number."""
    is_first = np.ones(found.shape, np.bool_)
    is_first[:, 1:] = found[:, 1:] != found[:, :-1]
    if used is not None:
        is_first &= used
    rows, columns = np.nonzero(is_first)
    last = np.full(len(rows), found.shape[1], np.int64) if used is None else used.sum(axis=1)[rows]
    ends = np.append(columns[1:], 0)
    same_row = np.append(rows[1:] == rows[:-1], False) if len(rows) else np.zeros(0, np.bool_)
    ends = np.where(same_row, ends[: len(rows)], last)
    return rows, found[rows, columns], ends - columns


def _round_rows(
    rows: Int64s,
    weights: Float64s,
    v: Float64s,
    grid: int,
) -> Int64s:
    """Weights in whole units, ⌊G·W_i + v⌋ - ⌊G·W_(i-1) + v⌋ over a row's running sums W: unbiased for uniform v."""
    lengths = np.bincount(rows, minlength=len(v))
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    running = np.cumsum(weights)
    before = np.concatenate([[0.0], running])[start]
    upper = np.floor((running - before) * grid + v[rows])
    lower = np.where(np.arange(len(rows)) == start, np.floor(v[rows]), np.concatenate([[0.0], upper[:-1]]))
    units: Int64s = np.minimum(upper - lower, MAX_COUNT).astype(np.int64)
    return units


def _drop_zeros(rows: Int64s, ids: Int64s, counts: Int64s) -> Entries:
    kept = counts > 0
    return rows[kept], ids[kept], counts[kept]


def _concatenate(parts: list[Entries]) -> Entries:
    empty = np.zeros(0, np.int64)
    rows, ids, counts = (np.concatenate(arrays) for arrays in zip(*parts, (empty,) * 3, strict=True))
    return rows, ids, counts


def _by_row_and_id(entries: Entries) -> Entries:
    rows, ids, counts = entries
    order = np.lexsort((ids, rows))
    return rows[order], ids[order], counts[order]
