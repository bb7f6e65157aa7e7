"""The kernels of the draw: one pass over the logits, uniforms, and the ids at points. `draw.py` puts them together.

Every block of 128 ids is reduced to its largest logit and its sum of 2^((x - largest) · scale). A row's running sums
are then float64 over its blocks, and its points are found by looking once more into the few blocks that they fall into.
scale: log2(e) / temperature. Rows are int64, as a row's offset may pass 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logitstream.kernels import BAD
from logitstream.kernels.arithmetic import HAS_PTX, exp2

BLOCK = tl.constexpr(128)
TILE = tl.constexpr(4096)
BLOCKS_A_TILE = tl.constexpr(4096 // 128)
GROUP = tl.constexpr(16)
"""Blocks that a row looks into at once."""
BAD_ROW = tl.constexpr(BAD)


@triton.jit
def _philox(c0, k0, k1):
    """Return the four words of counter (c0, 0, 0, 0) under the key (k0, k1): Philox4x64-10 (Salmon et al., 2011)."""
    m0 = tl.full(c0.shape, 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full(c0.shape, 0xCA5A826395121157, tl.uint64)
    w0 = tl.full(c0.shape, 0x9E3779B97F4A7C15, tl.uint64)
    w1 = tl.full(c0.shape, 0xBB67AE8584CAA73B, tl.uint64)
    c1 = tl.zeros(c0.shape, tl.uint64)
    c2 = tl.zeros(c0.shape, tl.uint64)
    c3 = tl.zeros(c0.shape, tl.uint64)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(m0, c0), m0 * c0
        high1, low1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["num_rows", "per_row"])
def uniforms_kernel(keys, sequences, rows, out, num_rows, per_row, ROWS: tl.constexpr):
    """Fill out [R, per_row] with the uniforms of `sampling.row_uniforms`, bit for bit: numpy counts from 1."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = i < num_rows
    sequence = tl.load(sequences + i, used, 0).to(tl.int64)
    row = tl.load(rows + i, used, 0).to(tl.int64)
    k0 = tl.load(keys + 2 * sequence).to(tl.uint64, bitcast=True)
    k1 = tl.load(keys + 2 * sequence + 1).to(tl.uint64, bitcast=True)
    num_counters = (per_row + 3) // 4
    for c in range(num_counters):
        words = _philox((row * num_counters + c + 1).to(tl.uint64), k0, k1)
        for j in tl.static_range(4):
            value = (words[j] >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
            tl.store(out + i * per_row + 4 * c + j, value, used & (4 * c + j < per_row))


@triton.jit
def _block_stats(x, scale):
    """Return each block's largest logit, 0 if it has none, and its sum: NaN if it holds NaN or +inf."""
    largest = tl.max(x, axis=1)
    reference = tl.where(largest > -float("inf"), largest, 0.0)
    return reference, tl.sum(exp2((x - reference[:, None]) * scale), axis=1)


@triton.jit
def block_stats_kernel(logits, stride, maxima, sums, V, num_blocks, num_tiles, scale):
    """Fill maxima and sums [R, B], a program for each tile of a row."""
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // num_tiles, program % num_tiles
    block = tile * BLOCKS_A_TILE + tl.arange(0, BLOCKS_A_TILE)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * stride + column, mask=column < V, other=-float("inf")).to(tl.float32)
    largest, total = _block_stats(x, scale)
    tl.store(maxima + row * num_blocks + block, largest, block < num_blocks)
    tl.store(sums + row * num_blocks + block, total, block < num_blocks)


@triton.jit(do_not_specialize=["width"])
def tail_stats_kernel(logits, stride, maxima, sums, blocks, cutoffs, V, num_blocks, width, scale):
    """Replace the statistics of these blocks [R, width] (-1: none) by those of their logits below the row's cutoff."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    block = tl.load(blocks + row * width + i, i < width, -1)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    used = (block >= 0)[:, None] & (column < V)
    x = tl.load(logits + row * stride + column, mask=used, other=-float("inf")).to(tl.float32)
    x = tl.where(x < tl.load(cutoffs + row), x, -float("inf"))
    largest, total = _block_stats(x, scale)
    tl.store(maxima + row * num_blocks + block, largest, block >= 0)
    tl.store(sums + row * num_blocks + block, total, block >= 0)


@triton.jit(do_not_specialize=["width"])
def gather_blocks_kernel(logits, stride, blocks, out, V, width):
    """Copy the logits of these blocks [R, width] to out [R, width · 128], -inf past the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    block = tl.load(blocks + row * width + i, i < width, 0)
    within = tl.arange(0, BLOCK)[None, :]
    column = block[:, None] * BLOCK + within
    x = tl.load(logits + row * stride + column, mask=column < V, other=-float("inf"))
    tl.store(out + (row * width + i[:, None]) * BLOCK + within, x, (i < width)[:, None])


@triton.jit
def _weights(maxima, sums, row, num_blocks, scale, BLOCKS_2: tl.constexpr):
    """Return a row's sums by block in float64, relative to its largest logit, and that logit."""
    b = tl.arange(0, BLOCKS_2)
    largest = tl.load(maxima + row * num_blocks + b, b < num_blocks, -float("inf"))
    block_sum = tl.load(sums + row * num_blocks + b, b < num_blocks, 0.0)
    peak = tl.max(tl.where(block_sum > 0, largest, -float("inf")), 0)
    factor = exp2((tl.where(block_sum > 0, largest, peak) - peak) * scale)
    return tl.where(block_sum == 0, 0.0, block_sum.to(tl.float64) * factor.to(tl.float64)), peak  # NaN stays NaN


@triton.jit
def totals_kernel(maxima, sums, peaks, totals, num_blocks, scale, BLOCKS_2: tl.constexpr):
    """Fill each row's largest logit and the sum of 2^((x - largest) · scale), which is 0 or NaN for a bad row."""
    row = tl.program_id(0).to(tl.int64)
    weight, peak = _weights(maxima, sums, row, num_blocks, scale, BLOCKS_2)
    tl.store(peaks + row, peak)
    tl.store(totals + row, tl.sum(weight, 0))


@triton.jit(do_not_specialize=["v_stride", "width", "grid"])
def round_rows_kernel(weights, v, v_stride, units, width, grid, limit, WIDTH_2: tl.constexpr):
    """Round weights to whole units, ⌊G·W_i + v⌋ - ⌊G·W_(i-1) + v⌋ over a row's running sums W, v in [0, 1)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH_2)
    weight = tl.load(weights + row * width + i, i < width, 0.0)
    up_to = tl.floor(tl.cumsum(weight, 0) * grid + tl.load(v + row * v_stride))
    before = tl.where(i == 0, 0.0, tl.gather(up_to, tl.maximum(i - 1, 0), 0))
    tl.store(units + row * width + i, tl.minimum(up_to - before, limit).to(tl.int32), i < width)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _running_sum(x, axis: tl.constexpr):
    """Return running sums that never fall: a parallel scan's rounding may, by an ulp, the interpreter's does not."""
    if HAS_PTX:
        return tl.associative_scan(tl.cumsum(x, axis), axis, _larger)
    else:  # noqa: RET505
        return tl.cumsum(x, axis)


@triton.jit
def _points_up_to(running, total, u, points, num_points, num_bits, SYSTEMATIC: tl.constexpr):
    """Return how many points lie at or below each running sum: where this rises, there are points.

    Systematic points are (j - u)/P, j = 1..P: ⌊P·C + u⌋ of them. Others, rising, are searched for.
    """
    if SYSTEMATIC:
        return tl.minimum((running * (num_points / total) + u).to(tl.int32), num_points)
    else:  # noqa: RET505
        low = tl.zeros(running.shape, tl.int32)
        for k in range(num_bits):
            middle = low + (1 << (num_bits - 1 - k))
            target = tl.load(points + middle - 1, middle <= num_points, float("inf")) * total
            low = tl.where((middle <= num_points) & (target <= running), middle, low)
        return low


@triton.jit
def _find_in_blocks(x, largest, peak, scale, start, low, high, total, u, points, num_points, num_bits,
                    SYSTEMATIC: tl.constexpr):  # fmt: skip
    """Return the points at each id of these blocks [GROUP, BLOCK], of the low to high that lie up to it."""
    mass = _running_sum(exp2((x - largest[:, None]) * scale).to(tl.float64), 1)
    factor = exp2((largest - peak) * scale).to(tl.float64)
    running = start[:, None] + mass * factor[:, None]
    found = _points_up_to(running, total, u, points, num_points, num_bits, SYSTEMATIC)
    # A block's sum and its running sum may differ by a rounding: its last id with mass takes what is left.
    found = tl.where(mass >= tl.max(mass, 1)[:, None], high[:, None], found)
    found = tl.minimum(tl.maximum(found, low[:, None]), high[:, None])
    within = tl.arange(0, BLOCK)[None, :] + tl.zeros_like(found)
    before = tl.gather(found, tl.maximum(within - 1, 0), 1)
    return found - tl.where(within == 0, low[:, None], before)


@triton.jit
def _hit_blocks(running, total, up_to, starts, befores, hits, num_blocks, BLOCKS_2: tl.constexpr):
    """Store what lies before each block, and in order the blocks that hold points; return how many do."""
    b = tl.arange(0, BLOCKS_2)
    tl.store(starts + b + 1, running)
    tl.store(befores + b + 1, up_to)
    tl.store(starts + b, 0.0, b == 0)
    tl.store(befores + b, 0, b == 0)
    tl.debug_barrier()
    is_hit = ((b < num_blocks) & (up_to > tl.load(befores + b))).to(tl.int32)
    tl.store(hits + tl.cumsum(is_hit, 0) - 1, b, is_hit > 0)
    tl.debug_barrier()
    return tl.sum(is_hit, 0)


@triton.jit(do_not_specialize=["width", "points_width", "uniforms_width", "num_bits"])
def sample_rows_kernel(
    logits, stride, maxima, sums, V, num_blocks, scale, cutoffs,
    uniforms, uniforms_width, points, points_width, nums_points, num_bits,
    ids, counts, width, starts, befores, hits,
    SYSTEMATIC: tl.constexpr, IS_TAIL: tl.constexpr, BLOCKS_2: tl.constexpr,
):  # fmt: skip
    """Write each row's entries in the order of their ids, a program for a row; counts past them are left alone.

    IS_TAIL: only logits below the row's cutoff count, as in maxima and sums, and a row without any has no entries.
    """
    r = tl.program_id(0).to(tl.int64)
    weight, peak = _weights(maxima, sums, r, num_blocks, scale, BLOCKS_2)
    running = _running_sum(weight, 0)
    total, check = tl.max(running, 0), tl.sum(weight, 0)  # `max` may hide NaN, a sum does not
    if (check > 0) & (check < float("inf")):
        u, num_points = tl.load(uniforms + r * uniforms_width), tl.load(nums_points + r)
        points += r * points_width
        up_to = _points_up_to(running, total, u, points, num_points, num_bits, SYSTEMATIC)
        up_to = tl.where(running >= total, num_points, up_to)  # what rounding left belongs to the last with mass
        starts += r * (BLOCKS_2 + 1)
        befores += r * (BLOCKS_2 + 1)
        num_hits = _hit_blocks(running, total, up_to, starts, befores, hits + r * width, num_blocks, BLOCKS_2)
        length = tl.zeros([], tl.int32)
        for first in range(0, num_hits, GROUP):
            g = first + tl.arange(0, GROUP)
            block = tl.load(hits + r * width + g, g < num_hits, 0)
            column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            used = (column < V) & (g < num_hits)[:, None]
            x = tl.load(logits + r * stride + column, mask=used, other=-float("inf")).to(tl.float32)
            if IS_TAIL:
                x = tl.where(x < tl.load(cutoffs + r), x, -float("inf"))
            largest = tl.load(maxima + r * num_blocks + block)
            low, high = tl.load(befores + block), tl.load(befores + block + 1)
            start = tl.load(starts + block)
            count = _find_in_blocks(
                x, largest, peak, scale, start, low, high, total, u, points, num_points, num_bits, SYSTEMATIC
            )
            is_entry = (count > 0) & (g < num_hits)[:, None]
            by_block = tl.sum(is_entry.to(tl.int32), 1)
            at = length + (tl.cumsum(by_block, 0) - by_block)[:, None] + tl.cumsum(is_entry.to(tl.int32), 1) - 1
            tl.store(ids + r * width + at, column, is_entry & (at < width))
            tl.store(counts + r * width + at, count, is_entry & (at < width))
            length += tl.sum(by_block, 0)
    elif not IS_TAIL:
        tl.store(counts + r * width, BAD_ROW)
