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

from logitstream.cpu_kernels import draw_at_points, draw_by_threshold
from logitstream.entries import MAX_COUNT, Entries, by_row_and_id, concatenate, count_equal, drop_zeros, round_rows
from logitstream.inverse_cdf import (
    Distribution,
    at_least,
    chunk_rows,
    locate,
    locate_in_logits,
    over_rows,
    relative_probs,
    scratch,
    without,
)
from logitstream.types import FULL_UNITS, PROBABILITY_UNITS, SparseTargets, TargetSpec, TokenSequence
from logitstream.uniforms import draw_key, row_uniforms, uniforms_per_row

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

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


def warm_up(dtype: torch.dtype = torch.float32) -> None:
    """Compile what drawing on the CPU from logits of this kind needs, at start and not with the first request."""
    logits, sequence = torch.zeros(2, 2, dtype=dtype), TokenSequence(token_ids=np.zeros(2, np.int32))
    for sampler in ("systematic", "threshold", "top_k"):
        sample(logits, TargetSpec(sampler=sampler), sequence)
    sample(logits, TargetSpec(sampler="multinomial", proposal_temperature=0.5), sequence)


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
    num_rows = logits.shape[0]
    if uniforms.shape != (num_rows, uniforms_per_row(spec)):
        raise ValueError(f"expected uniforms of shape {(num_rows, uniforms_per_row(spec))}, got {uniforms.shape}")
    names = np.arange(num_rows) if row_names is None else row_names
    if logits.device.type == "cpu" and (drawn := _draw_compiled(logits, spec, uniforms, names)) is not None:
        return drawn
    return draw_plain(logits, spec, uniforms, names)


def _draw_compiled(logits: Tensor, spec: TargetSpec, uniforms: Float64s, row_names: Int64s) -> SparseTargets | None:
    """As `draw_plain`, from the same uniforms; None where the sampler has no kernel."""
    num_rows, vocab_size = logits.shape
    units, theta_units = units_of(spec), tail_units_of(spec)
    points = _points(spec, uniforms)
    if points is None and spec.sampler != "threshold":
        return None
    # `threshold` has as many heads as θ goes into 1, and one tail point more.
    most = spec.num_samples if points is not None else 2 * math.ceil(units / theta_units) + 2
    lengths, (ids, counts) = np.zeros(num_rows, np.int64), np.empty((2, num_rows, most), np.int32)
    if points is not None:
        over_rows(draw_at_points, logits, spec.temperature, row_names, (points, lengths, ids, counts))
    else:
        numbers = (units, theta_units, MAX_COUNT)
        over_rows(draw_by_threshold, logits, spec.temperature, row_names, (uniforms, lengths, ids, counts), *numbers)
    used = np.arange(most) < lengths[:, None]
    return SparseTargets(
        vocab_size=vocab_size,
        units=units,
        tail_units=theta_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        token_ids=ids[used],
        counts=counts[used],
        spec=spec,
    )


def draw_plain(logits: Tensor, spec: TargetSpec, uniforms: Float64s, row_names: Int64s) -> SparseTargets:
    """As `draw`, on any device: the specification."""
    num_rows, vocab_size = logits.shape
    if (points := _points(spec, uniforms)) is not None:
        entries = count_equal(locate_in_logits(logits, spec.temperature, row_names, points))
        return _targets(spec, vocab_size, num_rows, entries)
    buffer, step = scratch(logits), chunk_rows(logits)
    parts: list[Entries] = []
    for i in range(0, num_rows, step):
        distribution = relative_probs(logits[i : i + step], spec.temperature, row_names[i : i + step], buffer)
        rows, token_ids, counts = _DRAW[spec.sampler](distribution, spec, uniforms[i : i + step])
        parts.append((rows + i, token_ids, counts))
    return _targets(spec, vocab_size, num_rows, concatenate(parts))


def _targets(spec: TargetSpec, vocab_size: int, num_rows: int, entries: Entries) -> SparseTargets:
    rows, token_ids, counts = entries
    return SparseTargets(
        vocab_size=vocab_size,
        units=units_of(spec),
        tail_units=tail_units_of(spec),
        row_offsets=np.searchsorted(rows, np.arange(num_rows + 1)),
        token_ids=token_ids.astype(np.int32),
        counts=counts.astype(np.int32),
        spec=spec,
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
    relative = distribution.values / distribution.values.amax(dim=-1, keepdim=True)
    proposal = Distribution.of(relative**spec.proposal_temperature)
    rows, ids, counts = count_equal(locate(proposal, points))
    weights = _shares(distribution, rows, ids) / _shares(proposal, rows, ids) * counts / spec.num_samples
    return drop_zeros(rows, ids, round_rows(rows, weights, uniforms[:, spec.num_samples], units_of(spec)))


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
    units = round_rows(rows, shares, uniforms[:, 0], units_of(spec))
    left = units_of(spec) - np.bincount(rows, weights=units, minlength=num_rows).astype(np.int64)
    total = distribution.total()
    tail = without(distribution, torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device))
    tail_share: Float64s = (tail.total() / total).cpu().numpy()
    num_points = _tail_points(left, tail_units_of(spec), largest_tail, tail_share, uniforms[:, 1]) * (tail_share > 0)
    j = np.arange(1, num_points.max(initial=0) + 1)
    points = np.minimum((j - uniforms[:, 2:]) / np.maximum(num_points, 1)[:, None], 1.0)
    tail_rows, tail_ids, _ = count_equal(locate(tail, points), used=j <= num_points[:, None])
    return by_row_and_id(concatenate([drop_zeros(rows, ids, units), (tail_rows, tail_ids, 0 * tail_ids)]))


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
    units = round_rows(rows, (kept / total[:, None]).ravel(), np.full(len(ids), 0.5), units_of(spec))
    return drop_zeros(rows, ids.ravel(), units)


def _full(distribution: Distribution, spec: TargetSpec, uniforms: Float64s) -> Entries:
    num_rows, num_ids = distribution.values.shape
    probs = distribution.values.double().cpu().numpy() / distribution.total().cpu().numpy()[:, None]
    rows = np.repeat(np.arange(num_rows), num_ids)
    units = round_rows(rows, probs.ravel(), np.full(num_rows, 0.5), units_of(spec))
    return drop_zeros(rows, np.tile(np.arange(num_ids), num_rows), units)


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
