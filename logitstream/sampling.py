"""Draws sparse targets from logits: systematic, multinomial, threshold (all unbiased), top_k, top_k_ghost, full.

Suffixes: R rows (positions), V vocabulary, P points of a row. Uniforms come from the host, keyed by what is drawn and
not by who draws it, so that replicas, retries and chunks of any size agree.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.errors import NonFiniteLogits
from logitstream.types import FULL_UNITS, PROBABILITY_UNITS, SparseTargets, TargetSpec, TokenSequence

MAX_COUNT = (1 << 31) - 1


def sample(
    logits: Tensor, spec: TargetSpec, sequence: TokenSequence, *, draw_set: int = 0, first_row: int = 0
) -> SparseTargets:
    """Targets of rows first_row.. of a sequence from their logits [R, V] (any float dtype, any device).

    Chunks concatenate to what one call gives. Rows outside the loss mask come out empty. Raises NonFiniteLogits.
    """
    num_rows = logits.shape[0]
    if first_row < 0 or first_row + num_rows > len(sequence):
        raise ValueError(f"rows {first_row} to {first_row + num_rows} of a sequence of {len(sequence)} tokens")
    uniforms = row_uniforms(spec, sequence, draw_set, first_row, num_rows)
    if sequence.loss_mask is None:
        return draw(logits, spec, uniforms, row_names=np.arange(first_row, first_row + num_rows))
    wanted = np.flatnonzero(sequence.loss_mask[first_row : first_row + num_rows])
    if len(wanted) < num_rows:
        logits = logits[torch.from_numpy(wanted).to(logits.device)]
    drawn = draw(logits, spec, uniforms[wanted], row_names=wanted + first_row)
    lengths = np.zeros(num_rows, np.int64)
    lengths[wanted] = np.diff(drawn.row_offsets)
    return _targets(spec, drawn.vocab_size, lengths, drawn.token_ids, drawn.counts)


def row_uniforms(
    spec: TargetSpec, sequence: TokenSequence, draw_set: int, first_row: int, num_rows: int
) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1) of rows first_row.., float64 [num_rows, uniforms_per_row(spec)].

    Philox4x64 keyed by (seed, draw set, sequence content), its counter by the row.
    """
    h = hashlib.blake2b(digest_size=16, person=b"ls-uniforms")
    h.update(spec.seed.to_bytes(8, "little") + draw_set.to_bytes(8, "little") + sequence.digest())
    per_row = uniforms_per_row(spec)
    blocks = -(-per_row // 4)
    key = np.frombuffer(h.digest(), dtype="<u8").astype(np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([first_row * blocks, 0, 0, 0], np.uint64))
    raw = generator.random_raw(num_rows * blocks * 4).reshape(num_rows, blocks * 4)[:, :per_row]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms_per_row(spec: TargetSpec) -> int:
    """How many uniforms one row's draw takes."""
    if spec.sampler == "multinomial":
        return spec.num_samples + (spec.proposal_temperature != 1.0)
    return {"systematic": 1, "threshold": 3}.get(spec.sampler, 0)


def draw(
    logits: Tensor,
    spec: TargetSpec,
    uniforms: npt.NDArray[np.float64],
    *,
    row_names: npt.NDArray[np.int64] | None = None,
) -> SparseTargets:
    """Targets of logits [R, V] from their uniforms [R, uniforms_per_row(spec)]; rows may be of many sequences
    (row_names only name them in NonFiniteLogits).
    """
    num_rows, vocab_size = logits.shape
    if uniforms.shape != (num_rows, uniforms_per_row(spec)):
        raise ValueError(f"expected uniforms of shape {(num_rows, uniforms_per_row(spec))}, got {uniforms.shape}")
    names = np.arange(num_rows) if row_names is None else row_names
    step = max(1, (1 << 21) // vocab_size)
    parts = [
        _DRAW[spec.sampler](
            _relative_probs(logits[i : i + step], spec, names[i : i + step]), spec, uniforms[i : i + step]
        )
        for i in range(0, num_rows, step)
    ] or [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    rows = np.concatenate([part[0] + i * step for i, part in enumerate(parts)])
    token_ids, counts = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    return _targets(spec, vocab_size, np.bincount(rows, minlength=num_rows), token_ids, counts)


Entries = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Row, id and count of each entry, by row and id."""


def _targets(
    spec: TargetSpec,
    vocab_size: int,
    lengths: npt.NDArray[np.int64],
    token_ids: npt.NDArray[np.integer],
    counts: npt.NDArray[np.integer],
) -> SparseTargets:
    return SparseTargets(
        vocab_size=vocab_size,
        units=units_of(spec),
        tail_units=tail_units_of(spec),
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        token_ids=token_ids.astype(np.int32),
        counts=counts.astype(np.int32),
    )


def units_of(spec: TargetSpec) -> int:
    """SparseTargets.units of what this spec draws."""
    if spec.sampler == "systematic" or (spec.sampler == "multinomial" and spec.proposal_temperature == 1.0):
        return spec.num_samples
    return PROBABILITY_UNITS if spec.sampler in ("multinomial", "threshold") else FULL_UNITS


def tail_units_of(spec: TargetSpec) -> int:
    """θ on the grid of PROBABILITY_UNITS for `threshold`, else 0."""
    return max(1, round(spec.threshold * PROBABILITY_UNITS)) if spec.sampler == "threshold" else 0


def _relative_probs(logits: Tensor, spec: TargetSpec, row_names: npt.NDArray[np.int64]) -> Tensor:
    """exp(logit - the row's largest), float32 [R, V]."""
    scaled = logits.float() if spec.temperature == 1.0 else logits.float() / spec.temperature
    peak = scaled.amax(dim=-1, keepdim=True)
    bad = (~torch.isfinite(peak[:, 0])).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteLogits(
            f"logits of row {row_names[bad[0]]} hold NaN, +inf or nothing finite ({len(bad)} such rows in this chunk)"
        )
    return torch.exp(scaled - peak)


def _locate(relative: Tensor, points: Tensor) -> Tensor:
    """The first id whose cumulative share reaches each point: int64 [R, P] of points [R, P] in (0, 1]."""
    cumulative = relative.cumsum(dim=-1, dtype=torch.float64)
    found = torch.searchsorted(cumulative, points * cumulative[:, -1:])
    return found.clamp_max(relative.shape[1] - 1)


def _systematic(relative: Tensor, spec: TargetSpec, uniforms: npt.NDArray[np.float64]) -> Entries:
    """counts = ⌊N·C_i + u⌋ - ⌊N·C_(i-1) + u⌋: how many of the points (j - u)/N, j = 1..N, id i's share holds."""
    points = (np.arange(1, spec.num_samples + 1) - uniforms) / spec.num_samples
    return _count(_locate(relative, _to(points, relative)).cpu().numpy())


def _multinomial(relative: Tensor, spec: TargetSpec, uniforms: npt.NDArray[np.float64]) -> Entries:
    """N independent draws (RS-KD); at τ ≠ 1 from q ∝ t^τ, with weights t_i·count_i/(N·q_i)."""
    num_samples, tau = spec.num_samples, spec.proposal_temperature
    points = np.sort(1.0 - uniforms[:, :num_samples], axis=1)
    if tau == 1.0:
        return _count(_locate(relative, _to(points, relative)).cpu().numpy())
    proposal = relative**tau
    rows, ids, counts = _count(_locate(proposal, _to(points, relative)).cpu().numpy())
    t = _at(relative, rows, ids) / _sums(relative)[rows]
    q = _at(proposal, rows, ids) / _sums(proposal)[rows]
    return _drop_zeros(rows, ids, _round_rows(rows, t * counts / (num_samples * q), uniforms[:, num_samples]))


def _threshold(relative: Tensor, spec: TargetSpec, uniforms: npt.NDArray[np.float64]) -> Entries:
    """t_i ≥ θ rounded to the grid, the rest as m equal points over the tail (constant-threshold Horvitz-Thompson).

    With T units left of 1, m = T/θ rounded stochastically (down where an id could be hit twice), or, for T < θ, one
    point with probability T/θ.
    """
    theta_units = tail_units_of(spec)
    total = _sums(relative)
    is_head = (
        relative.double() >= torch.from_numpy(total * (theta_units / PROBABILITY_UNITS)).to(relative.device)[:, None]
    )
    rows, ids = (x.cpu().numpy() for x in is_head.nonzero(as_tuple=True))
    units = _round_rows(rows, _at(relative, rows, ids) / total[rows], uniforms[:, 0])
    tail = relative.masked_fill(is_head, 0.0)
    left = PROBABILITY_UNITS - np.bincount(rows, weights=units, minlength=len(total)).astype(np.int64)
    tail_sum = _sums(tail)
    num_points = np.floor(left / theta_units + uniforms[:, 1]).astype(np.int64)
    could_repeat = num_points * tail.amax(dim=-1).double().cpu().numpy() > tail_sum
    num_points = np.where(could_repeat & (left >= theta_units), left // theta_units, num_points)
    num_points[tail_sum <= 0] = 0
    j = np.arange(1, num_points.max(initial=0) + 1)
    points = (j - uniforms[:, 2:]) / np.maximum(num_points, 1)[:, None]
    found = _locate(tail, _to(np.minimum(points, 1.0), relative)).cpu().numpy()
    used = j <= num_points[:, None]
    tail_rows, tail_ids, _ = _count(found, used)
    return _merge((rows, ids, units), (tail_rows, tail_ids, np.zeros_like(tail_ids)))


def _top_k(relative: Tensor, spec: TargetSpec, uniforms: npt.NDArray[np.float64]) -> Entries:
    """The k largest, scaled to sum to 1 unless the rest is the ghost bucket's."""
    values, indices = relative.topk(min(spec.top_k, relative.shape[1]), dim=-1)
    order = indices.argsort(dim=-1)
    ids, kept = indices.gather(1, order).cpu().numpy(), values.gather(1, order).double().cpu().numpy()
    total = kept.sum(axis=1) if spec.sampler == "top_k" else _sums(relative)
    rows = np.repeat(np.arange(len(ids)), ids.shape[1])
    units = _round_rows(rows, (kept / total[:, None]).ravel(), np.full(len(ids), 0.5), FULL_UNITS)
    return _drop_zeros(rows, ids.ravel(), units)


def _full(relative: Tensor, spec: TargetSpec, uniforms: npt.NDArray[np.float64]) -> Entries:
    num_rows, vocab_size = relative.shape
    probs = relative.double().cpu().numpy() / _sums(relative)[:, None]
    rows = np.repeat(np.arange(num_rows), vocab_size)
    units = _round_rows(rows, probs.ravel(), np.full(num_rows, 0.5), FULL_UNITS)
    return _drop_zeros(rows, np.tile(np.arange(vocab_size), num_rows), units)


_DRAW = {
    "systematic": _systematic,
    "multinomial": _multinomial,
    "threshold": _threshold,
    "top_k": _top_k,
    "top_k_ghost": _top_k,
    "full": _full,
}


def _to(points: npt.NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(points)).to(like.device)


def _sums(values: Tensor) -> npt.NDArray[np.float64]:
    """Row sums, float64 [R]."""
    return values.sum(dim=-1, dtype=torch.float64).cpu().numpy()


def _at(values: Tensor, rows: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    index = (torch.from_numpy(rows).to(values.device), torch.from_numpy(ids).to(values.device))
    return values[index].double().cpu().numpy()


def _count(found: npt.NDArray[np.int64], used: npt.NDArray[np.bool_] | None = None) -> Entries:
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
    rows: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64],
    v: npt.NDArray[np.float64],
    grid: int = PROBABILITY_UNITS,
) -> npt.NDArray[np.int64]:
    """Weights in whole units, ⌊G·W_i + v⌋ - ⌊G·W_(i-1) + v⌋ over each row's running sums W: each unbiased for uniform v."""
    lengths = np.bincount(rows, minlength=len(v))
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    running = np.cumsum(weights)
    before = np.concatenate([[0.0], running])[start]
    upper = np.floor((running - before) * grid + v[rows])
    lower = np.where(np.arange(len(rows)) == start, np.floor(v[rows]), np.concatenate([[0.0], upper[:-1]]))
    return np.minimum(upper - lower, MAX_COUNT).astype(np.int64)


def _drop_zeros(rows: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Entries:
    kept = counts > 0
    return rows[kept], ids[kept], counts[kept]


def _merge(head: Entries, tail: Entries) -> Entries:
    head = _drop_zeros(*head)
    rows, ids, counts = (np.concatenate(pair) for pair in zip(head, tail, strict=True))
    order = np.lexsort((ids, rows))
    return rows[order], ids[order], counts[order]
