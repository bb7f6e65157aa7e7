"""What inverse_cdf.py and sampling.py do in torch on any device, compiled for the CPU: one pass over each row of
logits, in cache; the rest of a row's draw looks at its block sums and into few blocks.

The kernels release the GIL, so that rows spread over threads. Logits come as the bits of float32 or bfloat16, and the
arithmetic's constants as an argument: as literals they would be loaded from memory at every step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.compiled import block_sum, contracted_part, kernel, part, prefetch, wide_vectors

BLOCK = 64
Bits = npt.NDArray[np.uint32] | npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Entries = npt.NDArray[np.int32]

EXP2: tuple[np.float32, ...] = tuple(
    np.float32(x)
    # The polynomial of degree 5 that errs least from 2^f in |f| ≤ 1/2 and not at 0, by 9·10^-8 of it; what rounds a
    # number below 2^22 it is added to; -125.5, below which 2^y is taken for 0; 86, above which it is taken for 2^86.
    for x in (1.32647273e-3, 9.67151299e-3, 5.55073358e-2, 0.240222424, 0.693147004, 1.0, 12582912.0, -125.5, 86.0)
)
LOG2_E = np.float32(math.log2(math.e))

_TILE = 256
_AHEAD = 1024
"""Elements. What is read this far ahead is under way while a tile's exponentials are taken: the processor's own
prefetching stops at every page and would leave it waiting for as long as they take."""
_REFERENCE = 1024
"""How many of a row's first ids give the reference that logits are taken relative to."""
_MOST_TOTAL = 2.0**40
"""Sum of a row's exponentials above which its largest logit becomes the reference: what is nearer to the first one is
rounded no more than the logits are."""
_BIAS = np.int32(127 << 23)


@part
def _float(bits: int, shift: np.uint32) -> np.float32:
    """shift: 16 where the bits are bfloat16's, else 0."""
    moved: np.float32 = np.uint32(np.uint32(bits) << (shift & np.uint32(16))).view(np.float32)
    return moved


@part
def _peak(row: Bits, shift: np.uint32, lanes: Floats) -> np.float32:
    """The largest; 64 running ones, as one alone would wait for itself at every step."""
    lanes[:] = _float(row[0], shift)
    for block in range(len(row) // BLOCK):
        piece = row[block * BLOCK : block * BLOCK + BLOCK]
        for j in range(BLOCK):
            x = _float(piece[j], shift)
            lanes[j] = x if x > lanes[j] else lanes[j]
    peak = lanes[0]
    for j in range(BLOCK):
        peak = max(peak, lanes[j])
    for i in range(len(row) - len(row) % BLOCK, len(row)):
        peak = max(peak, _float(row[i], shift))
    return np.float32(peak)


@contracted_part
def _exp2(y: np.float32, constants: Any) -> np.float32:
    """2^y, NaN where y is NaN."""
    kept = constants[8] if y > constants[8] else y
    rounded = kept + constants[6]
    f = kept - (rounded - constants[6])
    q = constants[0]
    q = ((((q * f + constants[1]) * f + constants[2]) * f + constants[3]) * f + constants[4]) * f + constants[5]
    bits: Any = np.float32(rounded).view(np.int32)
    power: Any = np.int32((bits << np.int32(23)) + _BIAS).view(np.float32)
    value: np.float32 = np.float32(0.0) if y < constants[7] else q * power
    return value


@part
def _relative(
    row: Bits, shift: np.uint32, reference: np.float32, scale: np.float32, constants: Any, values: Floats, sums: Doubles
) -> float:  # fmt: skip
    """Fill values with 2^((logit - reference)·scale) and sums with its blocks'; their sum."""
    wide_vectors()
    total = 0.0
    for start in range(0, len(row), _TILE):
        for i in range(start, start + _TILE, 64 // row.itemsize):
            prefetch(row, i + _AHEAD)
        piece, into = row[start : start + _TILE], values[start : start + _TILE]
        for i in range(len(piece)):
            into[i] = _exp2((_float(piece[i], shift) - reference) * scale, constants)
        for block in range(start // BLOCK, min((start + _TILE) // BLOCK, len(sums))):
            sums[block] = block_sum(values, block * BLOCK)
            total += sums[block]
    return total


@part
def _fill(
    row: Bits, shift: np.uint32, scale: np.float32, constants: Any, values: Floats, sums: Doubles, lanes: Floats
) -> float:
    """Unnormalised probabilities of a row, a multiple of at most 2^40 of exp(logit - largest), and their block sums."""
    reference = _peak(row[:_REFERENCE], shift, lanes)
    total = _relative(row, shift, reference, scale, constants, values, sums)
    if not total <= _MOST_TOTAL:
        reference = _peak(row, shift, lanes)
        total = _relative(row, shift, reference, scale, constants, values, sums)
    return total


@part
def _walk(values: Floats, sums: Doubles, total: float, points: Doubles, found: Ints) -> None:
    block, start, end, column, last, running = 0, 0.0, sums[0], 0, 0, float(values[0])
    for i in range(len(points)):
        target = points[i] * total
        if end < target:
            while end < target and block + 1 < len(sums):
                block += 1
                start = end
                end += sums[block]
            column, last, running = block * BLOCK, block * BLOCK, float(values[block * BLOCK])
        while running < target - start and column + 1 < (block + 1) * BLOCK:
            column += 1
            running += values[column]
            # A block's float32 sum may exceed its running sum by a rounding: its last id with mass takes the point.
            last = column if values[column] > 0 else last
        found[i] = last


@part
def _is_finite(total: float) -> bool:
    return total > 0 and total < np.inf


@kernel
def fill_rows(logits: Bits, shift: np.uint32, scale: np.float32, constants: Any, values: Floats, sums: Doubles) -> int:
    """Unnormalised probabilities and block sums of each row; the first row that is not finite, or -1.

    logits: [R, V]; values: [R, V rounded up to blocks], zero past V; sums: [R, blocks].
    """
    lanes, bad = np.empty(BLOCK, np.float32), -1
    for row in range(len(logits)):
        total = _fill(logits[row], shift, scale, constants, values[row], sums[row], lanes)
        if bad < 0 and not _is_finite(total):
            bad = row
    return bad


@part
def _total(sums: Doubles) -> float:
    total = 0.0
    for block in range(len(sums)):
        total += sums[block]
    return total


@kernel
def locate_rows(values: Floats, sums: Doubles, points: Doubles, found: Ints) -> None:
    """The id at each point, [R, P], rising in each row."""
    for row in range(len(points)):
        _walk(values[row], sums[row], _total(sums[row]), points[row], found[row])


@kernel
def draw_at_points(
    logits: Bits, shift: np.uint32, scale: np.float32, constants: Any, points: Doubles, lengths: Ints, ids: Entries,
    counts: Entries,
) -> int:  # fmt: skip
    """How many of each row's points fall on each id; the first row that is not finite, or -1.

    points: [R, P], rising in each row; lengths: [R], how many entries each row has; ids, counts: [R, P] or less.
    """
    num_blocks = -(-logits.shape[1] // BLOCK)
    values, sums = np.zeros(num_blocks * BLOCK, np.float32), np.empty(num_blocks, np.float64)
    lanes, found, bad = np.empty(BLOCK, np.float32), np.empty(points.shape[1], np.int64), -1
    for row in range(len(logits)):
        total = _fill(logits[row], shift, scale, constants, values, sums, lanes)
        length = 0
        if _is_finite(total):
            _walk(values, sums, total, points[row], found)
            for i in range(len(found)):
                if i == 0 or found[i] != found[i - 1]:
                    ids[row, length], counts[row, length] = found[i], 0
                    length += 1
                counts[row, length - 1] += 1
        elif bad < 0:
            bad = row
        lengths[row] = length
    return bad


@part
def _take_heads(
    values: Floats, sums: Doubles, total: float, theta: float, heads: Ints, shares: Doubles
) -> tuple[int, float]:
    """Entries of θ on, in the order of ids, out of the values and into heads and shares: how many they are, and the
    largest share of what is left if that is θ/2 or more (no other can be hit by two tail points), else 0.
    """
    num_heads, largest_tail, least = 0, 0.0, 0.5 * theta
    for block in range(len(sums)):
        # An entry of that size makes its block that large; the margin covers the float32 sum's rounding.
        if sums[block] < 0.999 * least * total:
            continue
        piece, before = values[block * BLOCK : block * BLOCK + BLOCK], num_heads
        for j in range(BLOCK):
            share = piece[j] / total
            if share >= theta:
                heads[num_heads], shares[num_heads] = block * BLOCK + j, share
                num_heads += 1
                piece[j] = 0.0
            elif share >= least:
                largest_tail = max(largest_tail, share)
        if num_heads > before:
            sums[block] = block_sum(values, block * BLOCK)
    return num_heads, largest_tail


@part
def _num_tail_points(left: int, theta_units: int, largest_tail: float, tail_share: float, uniform: float) -> int:
    """As sampling._tail_points."""
    if not tail_share > 0:
        return 0
    num_points = float(math.floor(left / theta_units + uniform))
    if left >= theta_units:
        most = math.ceil(tail_share / max(largest_tail, 1e-300)) - 1.0
        num_points = min(num_points, max(most, 1.0))
    return int(num_points)


@part
def _merge(heads: Ints, units: Ints, tail: Ints, ids: Entries, counts: Entries) -> int:
    """Heads of any units and tail points, each in the order of ids, as entries; the number of them."""
    length, i, previous = 0, 0, -1
    for k in range(len(tail) + 1):
        while i < len(heads) and (k == len(tail) or heads[i] < tail[k]):
            if units[i] > 0:
                ids[length], counts[length] = heads[i], units[i]
                length += 1
            i += 1
        if k < len(tail) and tail[k] != previous:
            previous = tail[k]
            ids[length], counts[length] = previous, 0
            length += 1
    return length


@kernel
def draw_by_threshold(
    logits: Bits, shift: np.uint32, scale: np.float32, constants: Any, uniforms: Doubles, lengths: Ints,
    ids: Entries, counts: Entries, units: int, theta_units: int, most_count: int,
) -> int:  # fmt: skip
    """As sampling._threshold: the first row that is not finite, or -1. uniforms: [R, 3]; the rest as above."""
    num_blocks, most = -(-logits.shape[1] // BLOCK), ids.shape[1]
    values, sums = np.zeros(num_blocks * BLOCK, np.float32), np.empty(num_blocks, np.float64)
    lanes, shares, points = np.empty(BLOCK, np.float32), np.empty(most, np.float64), np.empty(most, np.float64)
    heads, head_units, found, bad = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64), -1
    theta = theta_units / units
    for row in range(len(logits)):
        total = _fill(logits[row], shift, scale, constants, values, sums, lanes)
        lengths[row] = 0
        if not _is_finite(total):
            bad = row if bad < 0 else bad
            continue
        num_heads, largest_tail = _take_heads(values, sums, total, theta, heads, shares)
        running, before = 0.0, 0.0
        for i in range(num_heads):
            running += shares[i]
            upper = math.floor(running * units + uniforms[row, 0])
            head_units[i] = int(min(upper - before, most_count))
            before = upper
        left = units - head_units[:num_heads].sum()
        tail_total = _total(sums)
        num_points = _num_tail_points(left, theta_units, largest_tail, tail_total / total, uniforms[row, 1])
        for j in range(num_points):
            points[j] = min((j + 1 - uniforms[row, 2]) / num_points, 1.0)
        _walk(values, sums, tail_total, points[: max(num_points, 0)], found)
        lengths[row] = _merge(
            heads[:num_heads], head_units[:num_heads], found[: max(num_points, 0)], ids[row], counts[row]
        )
    return bad
