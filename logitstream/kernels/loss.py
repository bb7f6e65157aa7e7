"""The loss kernel: a chunk of student logits becomes its own loss gradient in one read and one write.

`chunk_gradient.logits_to_gradient_` is the specification. With e = 2^((z − reference)·log2 e/τ), p = e / Σe and
A = kd·S + ce, a row's gradient is (e − (kd·t̂ + ce·onehot)·Σe/A)·A/Σe. So e can be written before Σe is known, and the
factor A/Σe goes to the [C, H] side of the products: bf16 keeps e's relative precision whatever the reference is. The
reference comes from the row's first tile, its kept ids and its label. A tile that lies far above it (never in
practice) makes the row's earlier tiles be scaled once more.

Kept ids are read first and marked, so that the stream's sum is that of the others, without cancellation in the ghost
bucket. Their gradients are written last, in float32 from their own logits, as is the label's. Cross-entropy beside a
KL at another temperature needs two sums before anything can be written: two reads then.

Legend: C rows of a chunk, R rows of the targets, V ids, K kept entries.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from logitstream.kernels import launching_on
from logitstream.kernels.arithmetic import exp2

MARK = tl.constexpr(-(2 - 2.0**-7) * 2.0**127)
"""Stands for a kept id in the stream: bf16's lowest number, which counts as no logit at all."""
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
HEADROOM = tl.constexpr(40.0)
"""How far, in powers of two, an exponential may exceed the reference before that is raised."""
LEAST = tl.constexpr(1e-12)
"""Stands for a row factor of 0 (a ghost bucket can have it), so that kept ids can be divided by it."""
TILE, NUM_WARPS = 2048, 4
"""Numbers of bf16 that a program holds at once; of float32 half as many."""


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2_E)))


@triton.jit
def capped(z, cap, HAS_CAP: tl.constexpr):
    return cap * tanh(z / cap) if HAS_CAP else z


@triton.jit
def stream_logit(raw, is_padding, cap, HAS_CAP: tl.constexpr):
    """Return a tile's logits, −∞ at marks and in the padding, and the soft cap's slope there."""
    x = raw.to(tl.float32)
    is_mark = (x == MARK) | is_padding
    slope = 1.0
    if HAS_CAP:
        t = tanh(x / cap)
        slope = tl.where(is_mark, 0.0, 1.0 - t * t)
        x = cap * t
    return tl.where(is_mark, -float("inf"), x), slope


@triton.jit
def entry_weights(counts, at, in_use, of_tail):
    """Return the entries' weights in units; one whose count is 0 is a tail entry."""
    count = tl.load(counts + at, in_use, 1).to(tl.float32)
    return tl.where(in_use, tl.where(count == 0, of_tail, count), 0.0)


@triton.jit(do_not_specialize=["first_row"])
def loss_gradient_kernel(
    logits, stride, starts, ids, counts, kept_logits, labels, mask, rows, inverse_items, factors, sums, first_row,
    V, padded, scale, kd, ce, cap, units, tail_units,
    HAS_TARGETS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_GHOST: tl.constexpr, TWO_SOFTMAXES: tl.constexpr,
    TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """One program a row, of logits [C, padded] whose first V columns count; factors [N], sums [N, 7].

    scale: log2 e / τ; rows: where each of the N rows stands in the targets. Longer than 50 lines because all parts
    share one row's registers.
    """
    place = first_row + tl.program_id(0).to(tl.int64)
    z_row = logits + tl.program_id(0).to(tl.int64) * stride
    sums += place * 7
    row = place
    if HAS_ROWS:
        row = tl.load(rows + place).to(tl.int64)
    if HAS_MASK:  # noqa: SIM102  the compiler drops what a constant rules out only in this form
        if tl.load(mask + row) == 0:
            tl.store(factors + place, 0.0)
            tl.store(sums + tl.arange(0, 8), tl.zeros([8], tl.float32), tl.arange(0, 8) < 7)
            return

    # 1. The kept ids' and the label's logits, before anything is overwritten; then the kept ids are marked.
    k = tl.arange(0, K_TILE)
    begin, end = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    num_units, num_tail = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    peak = tl.full([], -float("inf"), tl.float32)
    label = tl.full([], -1, tl.int64)
    z_label = tl.zeros([], tl.float32)
    if HAS_LABELS:
        label = tl.load(labels + row).to(tl.int64)
        z_label = capped(tl.load(z_row + tl.maximum(label, 0), label < V, float("nan")).to(tl.float32), cap, HAS_CAP)
        peak = tl.where(label >= 0, z_label, peak)
    is_labelled = label >= 0
    if HAS_TARGETS:
        begin = tl.load(starts + row)
        end = tl.load(starts + row + 1)
        for at in range(begin, end, K_TILE):
            in_use = at + k < end
            token = tl.load(ids + at + k, in_use, 0)
            is_inside = (token >= 0) & (token < V)
            z = capped(tl.load(z_row + token, in_use & is_inside, float("nan")).to(tl.float32), cap, HAS_CAP)
            tl.store(kept_logits + at + k, z, in_use)
            count = tl.load(counts + at + k, in_use, 1).to(tl.float32)
            num_units += tl.sum(tl.where(in_use, count, 0.0), 0)
            num_tail += tl.sum(tl.where(count == 0, 1.0, 0.0), 0)
            peak = tl.maximum(peak, tl.max(tl.where(in_use, z, -float("inf")), 0))
        tl.debug_barrier()
        for at in range(begin, end, K_TILE):
            token = tl.load(ids + at + k, at + k < end, -1)
            marks = tl.full([K_TILE], MARK, tl.float32).to(logits.dtype.element_ty)
            tl.store(z_row + token, marks, (token >= 0) & (token < V))
        tl.debug_barrier()

    # 2. The stream: each tile is read while the one before it is turned into exponentials.
    lane = tl.arange(0, TILE)
    raw = tl.load(z_row + lane, lane < padded, MARK)
    x, slope = stream_logit(raw, lane >= V, cap, HAS_CAP)
    reference = tl.maximum(tl.maximum(peak, tl.max(x, 0)), -1e30)
    highest_scale = tl.maximum(scale, LOG2_E) if TWO_SOFTMAXES else scale
    rest_lanes, rest_lanes_1 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, V, TILE):
        column = start + lane
        raw_following = tl.load(z_row + column + TILE, column + TILE < padded, MARK)
        x, slope = stream_logit(raw, column >= V, cap, HAS_CAP)
        tile_peak = tl.max(x, 0)
        peak = tl.maximum(peak, tile_peak)
        if (tile_peak - reference) * highest_scale > HEADROOM:
            down = tl.exp2((reference - tile_peak) * scale)
            rest_lanes *= down
            if TWO_SOFTMAXES:
                rest_lanes_1 *= tl.exp2((reference - tile_peak) * LOG2_E)
            else:
                tl.debug_barrier()
                for before in range(0, start, TILE):
                    old = tl.load(z_row + before + lane).to(tl.float32)
                    tl.store(z_row + before + lane, (old * down).to(logits.dtype.element_ty))
                tl.debug_barrier()
            reference = tile_peak
        e = exp2((x - reference) * scale)
        rest_lanes += e
        if TWO_SOFTMAXES:
            rest_lanes_1 += exp2((x - reference) * LOG2_E)
        else:
            tl.store(z_row + column, (e * slope).to(logits.dtype.element_ty), column < padded)
        raw = raw_following
    rest = tl.sum(rest_lanes, 0)
    rest_1 = tl.sum(rest_lanes_1, 0)

    # 3. What the kept ids weigh and sum up to.
    of_tail = tl.maximum(units - num_units, tail_units) / tl.maximum(num_tail, 1.0)
    kept, kept_1, kl = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    greatest = tl.full([], -1.0, tl.float32)
    if HAS_TARGETS:
        for at in range(begin, end, K_TILE):
            in_use = at + k < end
            z = tl.load(kept_logits + at + k, in_use, -float("inf")) - reference
            weight = entry_weights(counts, at + k, in_use, of_tail)
            greatest = tl.maximum(greatest, tl.max(weight, 0))
            weight /= units
            kept += tl.sum(exp2(z * scale), 0)
            if TWO_SOFTMAXES:
                kept_1 += tl.sum(exp2(z * LOG2_E), 0)
            term = tl.where(weight > 0, weight * (tl.log2(tl.maximum(weight, 1e-37)) - z * scale), 0.0)
            kl += tl.sum(term, 0) * LN_2
    total = rest + kept
    total_1 = rest_1 + kept_1 if TWO_SOFTMAXES else total
    weight_sum = (num_units + tl.where(num_tail > 0, of_tail * num_tail, 0.0)) / units
    kl += weight_sum * tl.log2(total) * LN_2
    rest_weight = tl.zeros([], tl.float32)
    if HAS_GHOST:
        has_rest = (end > begin) & (end - begin < V)
        rest_weight = tl.where(has_rest, tl.maximum(1.0 - weight_sum, 0.0), 0.0)
        log2_share = tl.log2(tl.maximum(rest_weight, 1e-37)) - tl.log2(tl.maximum(rest, 1.2e-38) / total)
        kl += rest_weight * log2_share * LN_2

    # 4. The gradient is (others·e − …) times the row's factor.
    ce = tl.where(is_labelled, ce, 0.0)
    own_ce = ce if not TWO_SOFTMAXES else 0.0
    kept_scale = kd * (weight_sum + rest_weight) + own_ce
    others_scale = kd * (weight_sum - rest_weight * kept / tl.maximum(rest, 1.2e-38)) + own_ce
    if TWO_SOFTMAXES:
        unit = 1.0
        kept_scale /= total
        others_scale /= total
        is_used = kept_scale + ce > 0
        factor = 1.0
        for start in range(0, V, TILE):
            column = start + lane
            raw = tl.load(z_row + column, column < padded, MARK)
            x, slope = stream_logit(raw, column >= V, cap, HAS_CAP)
            g = others_scale * exp2((x - reference) * scale)
            g += ce / total_1 * exp2((x - reference) * LOG2_E)
            tl.store(z_row + column, (g * slope).to(logits.dtype.element_ty), column < padded)
    else:
        divisor = tl.where(tl.abs(others_scale) < LEAST, LEAST, others_scale)
        unit = total / divisor
        is_used = kept_scale > 0
        factor = divisor / total
        kept_scale /= divisor
        others_scale /= divisor
    tl.debug_barrier()
    agrees = tl.zeros([], tl.float32)
    is_label_kept = tl.zeros([], tl.int32)
    if HAS_TARGETS:
        for at in range(begin, end, K_TILE):
            in_use = at + k < end
            token = tl.load(ids + at + k, in_use, -1)
            z = tl.load(kept_logits + at + k, in_use, -float("inf"))
            weight = entry_weights(counts, at + k, in_use, of_tail)
            agrees = tl.maximum(agrees, tl.max(tl.where(in_use & (weight == greatest) & (z == peak), 1.0, 0.0), 0))
            is_label = in_use & (token == label)
            is_label_kept += tl.sum(is_label.to(tl.int32), 0)
            g = kept_scale * exp2((z - reference) * scale)
            if TWO_SOFTMAXES:
                g += ce / total_1 * exp2((z - reference) * LOG2_E)
            g -= (kd * weight / units + tl.where(is_label, ce, 0.0)) * unit
            if HAS_CAP:
                g *= 1.0 - (z / cap) * (z / cap)
            tl.store(z_row + token, g.to(logits.dtype.element_ty), (token >= 0) & (token < V))
    if HAS_LABELS:  # noqa: SIM102
        if is_labelled & (label < V) & (is_label_kept == 0):
            g = others_scale * tl.exp2((z_label - reference) * scale) - ce * unit
            if TWO_SOFTMAXES:
                g += ce / total_1 * tl.exp2((z_label - reference) * LOG2_E)
            if HAS_CAP:
                g *= 1.0 - (z_label / cap) * (z_label / cap)
            tl.store(z_row + label, g.to(logits.dtype.element_ty))
    tl.store(factors + place, tl.where(is_used, factor * tl.load(inverse_items), 0.0))
    tl.store(sums + 0, 1.0)
    tl.store(sums + 1, tl.where(end > begin, kl, 0.0))
    tl.store(sums + 2, (end > begin).to(tl.float32))
    tl.store(sums + 3, kept / total)
    tl.store(sums + 4, agrees)
    tl.store(sums + 5, tl.where(is_labelled, tl.log2(total_1) * LN_2 - (z_label - reference), 0.0))
    tl.store(sums + 6, is_labelled.to(tl.float32))


@torch.library.custom_op("logitstream::loss_gradient", mutates_args=("logits", "kept_logits", "factors", "sums"))
def loss_gradient(
    logits: Tensor,
    vocab_size: int,
    first_row: int,
    starts: Tensor | None,
    ids: Tensor | None,
    counts: Tensor | None,
    kept_logits: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    inverse_items: Tensor,
    factors: Tensor,
    sums: Tensor,
    kd: float,
    ce: float,
    temperature: float,
    softcap: float,
    has_ghost: bool,
    units: int,
    tail_units: int,
) -> None:
    """Turn logits [C, columns], bf16 or float32, into their gradient in place, the row's factor left out.

    The columns from vocab_size on are padding. Row r of the logits is row p = first_row + r of factors [N] and of sums
    [N, 7] (`loss.Diagnostics`), both float32, and row p, or rows[p], of labels, mask (uint8; 0: the row's factor and
    sums are 0, its logits stay and must be finite) and the targets, whose arrays are int32; kept_logits [K] is float32
    scratch. softcap 0: none.
    """
    num_columns = logits.shape[1]
    tile = min(TILE * 2 // logits.element_size(), triton.next_power_of_2(max(num_columns, 256)))
    mean_entries = 0 if ids is None or starts is None else len(ids) / max(len(starts) - 1, 1)
    unused = factors
    with launching_on(logits.device):
        loss_gradient_kernel[(len(logits),)](
            logits, logits.stride(0), *(unused if x is None else x for x in (starts, ids, counts, kept_logits)),
            *(unused if x is None else x for x in (labels, mask, rows)), inverse_items, factors, sums, first_row,
            vocab_size, num_columns, math.log2(math.e) / temperature, kd, ce, softcap, float(units), float(tail_units),
            HAS_TARGETS=ids is not None, HAS_LABELS=labels is not None, HAS_MASK=mask is not None,
            HAS_ROWS=rows is not None, HAS_CAP=softcap > 0, HAS_GHOST=has_ghost,
            TWO_SOFTMAXES=ce > 0 and kd > 0 and temperature != 1,
            TILE=tile, K_TILE=64 if mean_entries <= 64 else 256, num_warps=NUM_WARPS,
        )  # fmt: skip


@loss_gradient.register_fake
def _(*arguments: object) -> None: ...
