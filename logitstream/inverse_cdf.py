"""Finds the ids at points of a distribution's running sum without a running sum over the vocabulary.

One pass leaves exp(logit - peak) and the sums of its blocks; float64 running sums are taken over the block sums and,
for each point, within the one block that it falls into: in torch on any device, compiled on the CPU (cpu_kernels.py).
`locate_plain` says what is computed. Suffixes: R rows, V vocabulary, P points of a row.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.cpu_kernels import BLOCK, EXP2, LOG2_E, fill_rows, locate_rows
from logitstream.errors import NonFiniteLogits

CPU_CHUNK = 1 << 21
DEVICE_CHUNK = 1 << 26
"""Elements of the scratch memory that rows are drawn from at once. On the CPU their block sums are too few for torch to
spread over threads, whose waiting for each other would cost more."""
RANGES_OF_A_THREAD = 8
GATHER_BYTES = 1 << 26
"""Of the blocks that `locate_blocked` looks into at once, in float32 and float64 running sums; one row's at least."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Unnormalised probabilities, float32 [R, V rounded up to blocks], and their block sums, float64 [R, blocks]."""

    values: Tensor
    sums: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Distribution:
        return cls(values, _block_sums(values))

    def total(self) -> Tensor:
        """float64 [R]; on the CPU added up in the order of the blocks, as cpu_kernels.py does."""
        return self.sums.cumsum(dim=-1)[:, -1]

    def blocks(self) -> Tensor:
        """The values as [R, blocks, BLOCK]."""
        return self.values.view(len(self.values), -1, BLOCK)


def _block_sums(values: Tensor) -> Tensor:
    return values.view(len(values), -1, BLOCK).sum(dim=-1).double()


def chunk_rows(logits: Tensor) -> int:
    """How many rows of these logits to draw from at once."""
    return max(1, (CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK) // logits.shape[1])


def scratch(logits: Tensor) -> Tensor:
    """A buffer for `relative_probs` over chunks of these logits, zero past V.

    The CPU's is kept for the thread's next call: faulting in fresh pages would take as long as the exponentials.
    """
    num_rows, vocab_size = min(chunk_rows(logits), logits.shape[0]), logits.shape[1]
    shape = (num_rows, -(-vocab_size // BLOCK) * BLOCK)
    if logits.device.type != "cpu":
        return torch.zeros(shape, device=logits.device)
    kept: tuple[int, Tensor] | None = getattr(_kept, "buffer", None)
    if kept is None or kept[0] != vocab_size or len(kept[1]) < num_rows:
        kept = _kept.buffer = (vocab_size, torch.zeros(shape))
    return kept[1]


_kept = threading.local()


def relative_probs(
    logits: Tensor, temperature: float, row_names: npt.NDArray[np.int64], buffer: Tensor
) -> Distribution:
    """A multiple of at most 2^40 of exp((logit - the row's largest) / temperature) for each row, in the buffer's first
    rows; raises NonFiniteLogits.
    """
    values = buffer[: logits.shape[0]]
    if logits.device.type == "cpu":
        sums = torch.empty(len(values), values.shape[1] // BLOCK, dtype=torch.float64)
        over_rows(fill_rows, logits, temperature, row_names, (values.numpy(), sums.numpy()))
        return Distribution(values, sums)
    return relative_probs_plain(logits, temperature, row_names, values)


def relative_probs_plain(
    logits: Tensor, temperature: float, row_names: npt.NDArray[np.int64], values: Tensor
) -> Distribution:
    """exp((logit - the row's largest) / temperature), in torch alone."""
    peak = logits.amax(dim=-1, keepdim=True).float()
    bad = (~torch.isfinite(peak[:, 0])).nonzero()[:, 0].tolist()
    _check(bad[0] if bad else -1, row_names)
    used = values[:, : logits.shape[1]]
    torch.sub(logits, peak, out=used)
    used.div_(temperature).exp_()
    return Distribution.of(values)


def _check(bad_row: int, row_names: npt.NDArray[np.int64]) -> None:
    if bad_row >= 0:
        raise NonFiniteLogits(f"logits of row {row_names[bad_row]} hold NaN, +inf or nothing finite")


def _bits(logits: Tensor) -> tuple[npt.NDArray[Any], np.uint32]:
    """The logits' bits, and by how many places to move them for float32's."""
    logits = logits.detach().contiguous()
    if logits.dtype == torch.bfloat16:
        return logits.view(torch.int16).numpy().view(np.uint16), np.uint32(16)
    return logits.float().numpy().view(np.uint32), np.uint32(0)


def over_rows(
    function: Callable[..., int],
    logits: Tensor,
    temperature: float,
    row_names: npt.NDArray[np.int64],
    arrays: Sequence[npt.NDArray[Any]],
    *numbers: int,
) -> None:
    """A kernel over ranges of the rows of logits and arrays, in torch's number of threads; raises NonFiniteLogits.

    The ranges are short and whoever is done takes the next: a core may be slower than another, as one is on which
    OpenMP's thread still spins after a matrix product.
    """
    bits, shift = _bits(logits)
    scale = np.float32(LOG2_E / temperature)
    num_threads = min(torch.get_num_threads(), len(bits))
    num_ranges = num_threads * RANGES_OF_A_THREAD if num_threads > 1 else 1
    step = max(1, -(-len(bits) // num_ranges))
    starts = iter(range(0, len(bits), step))  # each `next` is one step under the GIL
    bad: list[int] = []

    def work() -> None:
        for start in starts:
            rows = slice(start, start + step)
            found = function(bits[rows], shift, scale, EXP2, *(array[rows] for array in arrays), *numbers)
            if found >= 0:
                bad.append(start + found)

    helping = [_threads(os.getpid()).submit(work) for _ in range(num_threads - 1)]
    work()
    for future in helping:
        future.result()
    _check(min(bad, default=-1), row_names)


@functools.lru_cache(maxsize=1)
def _threads(process_id: int) -> ThreadPoolExecutor:
    """Of this process: a forked one has no threads of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sampling", initializer=_on_other_cores)


def _on_other_cores() -> None:
    """Let this thread run wherever one of the process may, but for the core that the drawing thread is bound to, as by
    OpenMP in vLLM's CPU worker: a new thread inherits that core, and would wait there for the one that it helps."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores - os.sched_getaffinity(0) or cores)


def locate_in_logits(
    logits: Tensor, temperature: float, row_names: npt.NDArray[np.int64], points: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """The ids at rising points [R, P] of the logits' distributions, int64 [R, P]; raises NonFiniteLogits."""
    buffer, step = scratch(logits), chunk_rows(logits)
    parts = []
    for i in range(0, len(logits), step):
        distribution = relative_probs(logits[i : i + step], temperature, row_names[i : i + step], buffer)
        parts.append(locate(distribution, points[i : i + step]))
    return np.concatenate([np.zeros((0, points.shape[1]), np.int64), *parts])


def locate(distribution: Distribution, points: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The first id whose share of the running sum reaches each point: int64 [R, P].

    points: float64 [R, P] in (0, 1], rising in each row.
    """
    if distribution.values.device.type == "cpu":
        found = np.empty(points.shape, np.int64)
        locate_rows(distribution.values.numpy(), distribution.sums.numpy(), points, found)
        return found
    blocked: npt.NDArray[np.int64] = (
        locate_blocked(distribution, torch.from_numpy(points).to(distribution.values.device)).cpu().numpy()
    )
    return blocked


def locate_blocked(distribution: Distribution, points: Tensor) -> Tensor:
    """As `locate`, in torch alone, on any device."""
    step = max(1, GATHER_BYTES // max(1, points.shape[1] * BLOCK * (4 + 8)))
    parts = [slice(i, i + step) for i in range(0, max(1, len(points)), step)]
    return torch.cat([_locate_blocked(distribution.values[p], distribution.sums[p], points[p]) for p in parts])


def _locate_blocked(values: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    num_rows, num_blocks = sums.shape
    ends = sums.cumsum(dim=-1)
    targets = points * ends[:, -1:]
    block = torch.searchsorted(ends, targets).clamp_max_(num_blocks - 1)
    starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    row_starts = torch.arange(0, num_rows * num_blocks, num_blocks, device=points.device)[:, None]
    hit = values.view(-1, BLOCK).index_select(0, (block + row_starts).view(-1))
    inside = hit.cumsum(dim=-1, dtype=torch.float64)
    # A block's float32 sum may exceed its running sum by a rounding: its last id with mass takes the point.
    rest = torch.minimum((targets - starts.gather(1, block)).view(-1), inside[:, -1])
    return block * BLOCK + torch.searchsorted(inside, rest[:, None]).view(block.shape)


def locate_plain(distribution: Distribution, points: Tensor) -> Tensor:
    """What `locate` computes, by one running sum over the vocabulary."""
    running = distribution.values.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(running, points * running[:, -1:])


def without(distribution: Distribution, rows: Tensor, ids: Tensor) -> Distribution:
    """The distribution with these entries [K] set to zero, in place; the sums of their blocks are taken anew."""
    distribution.values[rows, ids] = 0.0
    block = ids // BLOCK
    distribution.sums[rows, block] = block_sum(distribution.blocks()[rows, block]).double()
    return distribution


def block_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension of [.., BLOCK], always in the same order: cpu_kernels.py's."""
    quarters = values.view(*values.shape[:-1], 4, BLOCK // 4)
    sums = (quarters[..., 0, :] + quarters[..., 1, :]) + (quarters[..., 2, :] + quarters[..., 3, :])
    for size in (8, 4):
        sums = sums[..., :size] + sums[..., size:]
    total: Tensor = (sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])
    return total


def at_least(distribution: Distribution, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids and shares (float64) of the entries that hold at least this share of their row's total."""
    total = distribution.total()
    # An entry of that size makes its block that large; the margin covers the float32 sum's rounding.
    rows, block = (distribution.sums >= (0.999 * share) * total[:, None]).nonzero(as_tuple=True)
    shares = distribution.blocks()[rows, block].double() / total[rows, None]
    which, column = (shares >= share).nonzero(as_tuple=True)
    return rows[which], block[which] * BLOCK + column, shares[which, column]
