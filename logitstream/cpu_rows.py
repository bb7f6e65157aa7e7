"""The arithmetic of `distribution.py` on the CPU, compiled: one pass over each row of logits while it is in cache.

It takes about half of plain torch's time. All sums have one order, so that draws do not depend on the width of the
processor's vectors. Suffixes: R rows, V vocabulary, B blocks, P points of a row.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.range_coder import inlined, kernel

F = TypeVar("F", bound=Callable[..., Any])
Array = npt.NDArray[Any]

BLOCK = 64
_EXP2: tuple[np.float32, ...] = tuple(
    np.float32(x)
    # The polynomial of degree 5 that errs least from 2^f in |f| <= 1/2 and not at 0, by 9e-8 of it; the number that
    # rounds what is below 2^22 when it is added; -125.5, below which 2^y counts as 0; 86, above which it is 2^86.
    for x in (1.32647273e-3, 9.67151299e-3, 5.55073358e-2, 0.240222424, 0.693147004, 1.0, 12582912.0, -125.5, 86.0)
)
_BIAS = np.int32(127 << 23)
_REFERENCE = 1024
"""The largest of this many first logits is what a row's logits are taken relative to."""
_MAX_TOTAL = 2.0**40
"""A larger sum of exponentials is taken again, relative to the row's largest logit. Below it nothing is lost."""
_TILE = 256
_RANGES_PER_THREAD = 8


def contracted(function: F) -> F:
    """Compile into the kernels that call it; a product and a sum may be rounded once together, which errs less."""
    options: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False, "fastmath": {"contract"}}
    return cast(F, numba.njit(**options)(function))


@inlined
def _float(bits: int, shift: np.uint32) -> np.float32:
    """Return the float32 of these bits. shift: 16 for bfloat16's, else 0."""
    value: np.float32 = np.uint32(np.uint32(bits) << (shift & np.uint32(16))).view(np.float32)
    return value


@contracted
def _exp2(y: np.float32, constants: Any) -> np.float32:
    """Return 2^y, NaN for NaN. The constants are an argument because literals would be loaded at every step."""
    kept = constants[8] if y > constants[8] else y
    rounded = kept + constants[6]
    f = kept - (rounded - constants[6])
    q = constants[0]
    q = ((((q * f + constants[1]) * f + constants[2]) * f + constants[3]) * f + constants[4]) * f + constants[5]
    bits: Any = np.float32(rounded).view(np.int32)
    power: Any = np.int32((bits << np.int32(23)) + _BIAS).view(np.float32)
    value: np.float32 = np.float32(0.0) if y < constants[7] else q * power
    return value


@inlined
def _block_sum(block: Array, lanes: Array) -> np.float32:
    """Return the sum of a block, by halves: loops of 16, 8 and 4 independent sums compile to vectors."""
    for j in range(16):
        lanes[j] = (block[j] + block[16 + j]) + (block[32 + j] + block[48 + j])
    for j in range(8):
        lanes[j] = lanes[j] + lanes[j + 8]
    for j in range(4):
        lanes[j] = lanes[j] + lanes[j + 4]
    total: np.float32 = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    return total


@inlined
def _largest(row: Array, num_ids: int, shift: np.uint32, lanes: Array) -> np.float32:
    """Return the largest of the first logits; 64 running ones, as one alone would wait for itself at every step."""
    lanes[:] = _float(row[0], shift)
    for block in range(num_ids // BLOCK):
        for j in range(BLOCK):
            x = _float(row[block * BLOCK + j], shift)
            lanes[j] = x if x > lanes[j] else lanes[j]
    largest = lanes[0]
    for j in range(BLOCK):
        largest = max(largest, lanes[j])
    for i in range(num_ids - num_ids % BLOCK, num_ids):
        largest = max(largest, _float(row[i], shift))
    return np.float32(largest)


@inlined
def _exponentials(
    row: Array, shift: np.uint32, reference: np.float32, scale: np.float32, constants: Any, values: Array, sums: Array,
    lanes: Array,
) -> float:  # fmt: skip
    """Fill values with 2^((logit - reference) · scale) and sums with its blocks'; return their sum."""
    total = 0.0
    for start in range(0, len(row), _TILE):
        piece, into = row[start : start + _TILE], values[start : start + _TILE]
        for i in range(len(piece)):
            into[i] = _exp2((_float(piece[i], shift) - reference) * scale, constants)
        for block in range(start // BLOCK, min((start + _TILE) // BLOCK, len(sums))):
            sums[block] = _block_sum(values[block * BLOCK : block * BLOCK + BLOCK], lanes)
            total += sums[block]
    return total


@kernel
def _fill_rows(
    logits: Array, shift: np.uint32, scale: np.float32, constants: Any, values: Array, sums: Array
) -> int:  # fmt: skip
    """Fill values [R, B * BLOCK] (zero past V) and sums [R, B]; return the first row that is not finite, or -1."""
    lanes, bad = np.empty(BLOCK, np.float32), -1
    for r in range(len(logits)):
        row = logits[r]
        reference = _largest(row, min(len(row), _REFERENCE), shift, lanes)
        total = _exponentials(row, shift, reference, scale, constants, values[r], sums[r], lanes)
        if not total <= _MAX_TOTAL:
            reference = _largest(row, len(row), shift, lanes)
            total = _exponentials(row, shift, reference, scale, constants, values[r], sums[r], lanes)
        if bad < 0 and not (total > 0 and total < np.inf):
            bad = r
    return bad


@kernel
def _locate_rows(values: Array, sums: Array, points: Array, found: Array) -> int:
    for r in range(len(points)):
        total = 0.0
        for block in range(sums.shape[1]):
            total += sums[r, block]
        block, start, end, column, last, running = 0, 0.0, sums[r, 0], 0, 0, float(values[r, 0])
        for i in range(points.shape[1]):
            target = points[r, i] * total
            if end < target:
                while end < target and block + 1 < sums.shape[1]:
                    block += 1
                    start = end
                    end += sums[r, block]
                column, last, running = block * BLOCK, block * BLOCK, float(values[r, block * BLOCK])
            while running < target - start and column + 1 < (block + 1) * BLOCK:
                column += 1
                running += values[r, column]
                # A block's float32 sum may exceed its running sum by a rounding: its last id with mass takes the point.
                last = column if values[r, column] > 0 else last
            found[r, i] = last
    return -1


def fill(logits: Tensor, temperature: float, values: Tensor, sums: Tensor) -> int:
    """Fill values with a multiple (up to 2^40) of exp((logit - largest) / temperature), and sums with their blocks'.

    logits: [R, V] of any float type; values: float32 [R, B * BLOCK], zero past V; sums: float64 [R, B]. Returns the
    first row that holds NaN, +inf or nothing finite, or -1.
    """
    logits = logits.detach().contiguous()
    if logits.dtype == torch.bfloat16:
        bits, shift = logits.view(torch.int16).numpy().view(np.uint16), np.uint32(16)
    else:
        bits, shift = logits.float().numpy().view(np.uint32), np.uint32(0)
    scale = np.float32(np.float32(math.log2(math.e)) / temperature)
    arrays = bits, values.numpy(), sums.numpy()
    return _over_rows(lambda bits, values, sums: _fill_rows(bits, shift, scale, _EXP2, values, sums), arrays)


def locate(values: Tensor, sums: Tensor, points: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the first id whose share of the running sum reaches each point, int64 [R, P]; points rise in each row."""
    found = np.empty(points.shape, np.int64)
    _over_rows(_locate_rows, (values.numpy(), sums.numpy(), points, found))
    return found


def _over_rows(function: Callable[..., int], arrays: Sequence[Array]) -> int:
    """Call a kernel on ranges of rows in torch's number of threads; return the first bad row, or -1.

    The ranges are short and the thread that is done takes the next one, as one core may be slower than another.
    """
    num_rows, num_threads = len(arrays[0]), min(torch.get_num_threads(), len(arrays[0]))
    step = max(1, -(-num_rows // (num_threads * _RANGES_PER_THREAD if num_threads > 1 else 1)))
    starts = iter(range(0, num_rows, step))  # each `next` is one step under the interpreter's lock
    bad: list[int] = []

    def work() -> None:
        for start in starts:
            found = function(*(array[start : start + step] for array in arrays))
            if found >= 0:
                bad.append(start + found)

    helpers = [_threads(os.getpid()).submit(work) for _ in range(num_threads - 1)]
    work()
    for helper in helpers:
        helper.result()
    return min(bad, default=-1)


@functools.lru_cache(maxsize=1)
def _threads(process_id: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked process has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="draw")
