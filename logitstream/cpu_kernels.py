"""What inverse_cdf.py does in torch on any device, compiled for the CPU: one pass over each row of logits, in cache.

The kernels release the GIL, so that rows spread over threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from logitstream.compiled import kernel, part

BLOCK = 64
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LEAST = np.float32(-87.0)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Cephes' expf (Moshier): exp(f) for |f| ≤ ln(2)/2 to about one float32 rounding.
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)


@part
def _peak(row: Floats, lanes: Floats) -> np.float32:
    """The largest; 64 running ones, as one alone would wait for itself at every step."""
    lanes[:] = row[0]
    whole = len(row) - len(row) % BLOCK
    for i in range(0, whole, BLOCK):
        for j in range(BLOCK):
            lanes[j] = row[i + j] if row[i + j] > lanes[j] else lanes[j]
    peak = lanes[0]
    for j in range(BLOCK):
        peak = max(peak, lanes[j])
    for i in range(whole, len(row)):
        peak = max(peak, row[i])
    return np.float32(peak)


@part
def _relative(row: Floats, peak: np.float32, scale: np.float32, values: Floats) -> None:
    """exp((logit - peak)·scale); 0 below e^-87, NaN where it is no number."""
    for i in range(len(row)):
        distance = (row[i] - peak) * scale
        kept = max(distance, _LEAST)
        power = np.int32(kept * _LOG2_E - _HALF)
        whole = np.float32(power)
        f = (kept - whole * _LN2_HIGH) - whole * _LN2_LOW
        q = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
        value = (q * f * f + f + _ONE) * np.int32((power + np.int32(127)) << np.int32(23)).view(np.float32)
        values[i] = value if distance >= _LEAST else (_ZERO if distance < _LEAST else distance)


@part
def _block_sums(values: Floats, sums: Doubles, lanes: Floats) -> float:
    """Sums of BLOCK values each; their sum."""
    total = 0.0
    for block in range(len(sums)):
        start = block * BLOCK
        for j in range(16):
            lanes[j] = (values[start + j] + values[start + 16 + j]) + (values[start + 32 + j] + values[start + 48 + j])
        for j in range(8):
            lanes[j] += lanes[j + 8]
        sums[block] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]))
        total += sums[block]
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


@kernel
def fill_rows(logits: Floats, scale: np.float32, values: Floats, sums: Doubles) -> int:
    """Relative probabilities and block sums of each row; the first row that is not finite, or -1.

    logits: [R, V]; values: [R, V rounded up to blocks], zero past V; sums: [R, blocks].
    """
    lanes = np.empty(BLOCK, np.float32)
    bad = -1
    for row in range(len(logits)):
        _relative(logits[row], _peak(logits[row], lanes), scale, values[row])
        total = _block_sums(values[row], sums[row], lanes)
        if bad < 0 and not (total > 0 and total < np.inf):
            bad = row
    return bad


@kernel
def locate_rows(values: Floats, sums: Doubles, points: Doubles, found: Ints) -> None:
    """The id at each point, [R, P], rising in each row."""
    for row in range(len(points)):
        total = 0.0
        for block in range(sums.shape[1]):
            total += sums[row, block]
        _walk(values[row], sums[row], total, points[row], found[row])


@kernel
def fill_and_locate_rows(logits: Floats, scale: np.float32, points: Doubles, found: Ints) -> int:
    """Both in one, where a row's values are needed for nothing else: they never leave the cache."""
    num_blocks = -(-logits.shape[1] // BLOCK)
    values, sums = np.zeros(num_blocks * BLOCK, np.float32), np.empty(num_blocks, np.float64)
    lanes = np.empty(BLOCK, np.float32)
    bad = -1
    for row in range(len(logits)):
        _relative(logits[row], _peak(logits[row], lanes), scale, values)
        total = _block_sums(values, sums, lanes)
        if total > 0 and total < np.inf:
            _walk(values, sums, total, points[row], found[row])
        elif bad < 0:
            bad = row
    return bad
