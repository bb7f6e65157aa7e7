"""Finds the ids at points of a distribution's running sum without a running sum over the vocabulary.

One pass leaves exp(logit - peak) and the sums of its blocks; float64 running sums are taken over the block sums and,
for each point, within the one block that it falls into: in torch on any device, compiled on the CPU. `locate_plain`
says what is computed. Suffixes: R rows, V vocabulary, P points of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.errors import NonFiniteLogits
from logitstream.range_coder import kernel

BLOCK = 64
CPU_CHUNK = 1 << 20
"""Elements that a CPU chunk may have: 4 MB, about a core's cache."""
DEVICE_CHUNK = 1 << 26


@dataclass(frozen=True, slots=True)
class Distribution:
    """Unnormalised probabilities, float32 [R, V rounded up to blocks], and their block sums, float64 [R, blocks]."""

    values: Tensor
    sums: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Distribution:
        return cls(values, _block_sums(values))

    def total(self) -> Tensor:
        """float64 [R]."""
        return self.sums.sum(dim=-1)

    def blocks(self) -> Tensor:
        """The values as [R, blocks, BLOCK]."""
        return self.values.view(len(self.values), -1, BLOCK)


def _block_sums(values: Tensor) -> Tensor:
    return values.view(len(values), -1, BLOCK).sum(dim=-1).double()


def chunk_rows(logits: Tensor) -> int:
    """How many rows of these logits to draw from at once."""
    return max(1, (CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK) // logits.shape[1])


def scratch(logits: Tensor) -> Tensor:
    """A buffer for `relative_probs` over chunks of these logits: fresh memory for each would cost more than the exp."""
    num_rows, vocab_size = min(chunk_rows(logits), logits.shape[0]), logits.shape[1]
    return torch.zeros(num_rows, -(-vocab_size // BLOCK) * BLOCK, device=logits.device)


def relative_probs(
    logits: Tensor, temperature: float, row_names: npt.NDArray[np.int64], buffer: Tensor
) -> Distribution:
    """exp((logit - the row's largest) / temperature), in the buffer's first rows; raises NonFiniteLogits."""
    peak = logits.amax(dim=-1, keepdim=True).float()
    bad = (~torch.isfinite(peak[:, 0])).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteLogits(
            f"logits of row {row_names[bad[0]]} hold NaN, +inf or nothing finite ({len(bad)} such rows in this chunk)"
        )
    values = buffer[: logits.shape[0]]
    used = values[:, : logits.shape[1]]
    torch.sub(logits, peak, out=used)
    if temperature != 1.0:
        used.div_(temperature)
    used.exp_()
    return Distribution.of(values)


def locate(distribution: Distribution, points: Tensor) -> Tensor:
    """The first id whose share of the running sum reaches each point: int64 [R, P].

    points: float64 [R, P] in (0, 1], rising in each row.
    """
    if points.device.type != "cpu":
        return locate_blocked(distribution, points)
    found = torch.empty(points.shape, dtype=torch.int64)
    _walk(distribution.values.numpy(), distribution.sums.numpy(), points.numpy(), found.numpy())
    return found


@kernel
def _walk(
    values: npt.NDArray[np.float32],
    sums: npt.NDArray[np.float64],
    points: npt.NDArray[np.float64],
    found: npt.NDArray[np.int64],
) -> None:
    for row in range(len(points)):
        total = 0.0
        for block in range(sums.shape[1]):
            total += sums[row, block]
        block, start, end, column, last, running = 0, 0.0, sums[row, 0], 0, 0, float(values[row, 0])
        for i in range(points.shape[1]):
            target = points[row, i] * total
            if end < target:
                while end < target and block + 1 < sums.shape[1]:
                    block += 1
                    start = end
                    end += sums[row, block]
                column, last, running = block * BLOCK, block * BLOCK, float(values[row, block * BLOCK])
            while running < target - start and column + 1 < (block + 1) * BLOCK:
                column += 1
                running += values[row, column]
                # A block's float32 sum may exceed its running sum by a rounding: its last id with mass takes the point.
                last = column if values[row, column] > 0 else last
            found[row, i] = last


def locate_blocked(distribution: Distribution, points: Tensor) -> Tensor:
    """As `locate`, in torch alone."""
    num_rows, num_blocks = distribution.sums.shape
    ends = distribution.sums.cumsum(dim=-1)
    targets = points * ends[:, -1:]
    block = torch.searchsorted(ends, targets).clamp_max_(num_blocks - 1)
    starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    row_starts = torch.arange(0, num_rows * num_blocks, num_blocks, device=points.device)[:, None]
    hit = distribution.values.view(-1, BLOCK).index_select(0, (block + row_starts).view(-1))
    inside = hit.cumsum(dim=-1, dtype=torch.float64)
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
    distribution.sums[rows, block] = distribution.blocks()[rows, block].sum(dim=-1).double()
    return distribution


def at_least(distribution: Distribution, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids and shares (float64) of the entries that hold at least this share of their row's total."""
    total = distribution.total()
    # An entry of that size makes its block that large; the margin covers the float32 sum's rounding.
    rows, block = (distribution.sums >= (0.999 * share) * total[:, None]).nonzero(as_tuple=True)
    shares = distribution.blocks()[rows, block].double() / total[rows, None]
    which, column = (shares >= share).nonzero(as_tuple=True)
    return rows[which], block[which] * BLOCK + column, shares[which, column]
