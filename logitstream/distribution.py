"""Distributions of a chunk of rows, and the ids at points of their running sums: in torch, on the CPU in `cpu_rows.py`.

A float32 running sum over a vocabulary would lose the tail behind the head. So the float64 running sums are taken over
the sums of blocks and, for each point, within the one block that it falls into. Suffixes: R rows, V vocabulary rounded
up to whole blocks, B blocks, P points of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from logitstream import cpu_rows
from logitstream.cpu_rows import BLOCK
from logitstream.errors import NonFiniteLogits

CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 26
"""Probabilities to hold at once: on the CPU few enough to stay in its cache."""
GATHER_BYTES = 1 << 26
"""Bytes of the blocks to look into at once, as float32 and float64; at least one row's."""

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


def chunk_rows(logits: Tensor) -> int:
    """Return how many rows of these logits to draw from at once."""
    return max(1, (CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK) // logits.shape[1])


def bad_row(row: int) -> NonFiniteLogits:
    return NonFiniteLogits(f"logits of row {row} hold NaN, +inf or nothing finite")


def scratch(logits: Tensor, max_rows: int) -> Tensor:
    """Return zeroed memory for the values of at most so many of these rows, used chunk after chunk."""
    return torch.zeros(min(len(logits), max_rows), -(-logits.shape[1] // BLOCK) * BLOCK)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Unnormalised probabilities, float32 [R, V], and the sums of their blocks, float64 [R, B]."""

    values: Tensor
    sums: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Distribution:
        return cls(values, values.view(len(values), -1, BLOCK).sum(dim=-1).double())

    @classmethod
    def of_logits(
        cls, logits: Tensor, temperature: float, *, row_names: Int64s | None = None, memory: Tensor | None = None
    ) -> Distribution:
        """Return the distribution of exp(logits / temperature), up to a factor a row.

        NonFiniteLogits names a row that holds NaN, +inf or nothing finite. memory: from `scratch`, used on the CPU.
        """
        if logits.device.type == "cpu":
            blocks = -(-logits.shape[1] // BLOCK)
            values = (scratch(logits, len(logits)) if memory is None else memory)[: len(logits)]
            distribution = cls(values, torch.empty(len(values), blocks, dtype=torch.float64))
            bad = cpu_rows.fill(logits, temperature, values, distribution.sums)
        else:
            distribution = cls.of_logits_plain(logits, temperature)
            bad = int(next(iter(np.flatnonzero(~np.isfinite(distribution.total()))), -1))
        if bad >= 0:
            raise bad_row(bad if row_names is None else int(row_names[bad]))
        return distribution

    @classmethod
    def of_logits_plain(cls, logits: Tensor, temperature: float) -> Distribution:
        """Return the softmax of logits / temperature: the specification of `of_logits`."""
        if temperature != 1.0:
            logits = logits.float()
            logits = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)
        return cls.of(pad(torch.softmax(logits, dim=-1, dtype=torch.float32), (0, -logits.shape[1] % BLOCK)))

    def total(self) -> Float64s:
        return _host(self.sums.cumsum(dim=-1)[:, -1])

    def locate(self, points: Float64s) -> Int64s:
        """Return the first id whose share of the running sum reaches each point: [R, P].

        points: [R, P] in (0, 1], rising in each row.
        """
        if self.values.device.type == "cpu":
            return cpu_rows.locate(self.values, self.sums, points)
        return _host(locate(self.values, self.sums, torch.from_numpy(points).to(self.values.device)))

    def at_least(self, share: float) -> tuple[Int64s, Int64s, Float64s]:
        """Return rows, ids and shares of the entries with at least this share of their row, by row and id."""
        total = self.sums.cumsum(dim=-1)[:, -1]
        # Such an entry makes its block that large; the margin covers the rounding of the block's float32 sum.
        rows, blocks = (self.sums >= (0.999 * share) * total[:, None]).nonzero(as_tuple=True)
        shares = self.values.view(len(self.values), -1, BLOCK)[rows, blocks].double() / total[rows, None]
        hit, column = (shares >= share).nonzero(as_tuple=True)
        return _host(rows[hit]), _host(blocks[hit] * BLOCK + column), _host(shares[hit, column])

    def shares(self, rows: Int64s, ids: Int64s) -> Float64s:
        shares: Float64s = _host(self.values[self._indices(rows, ids)].double()) / self.total()[rows]
        return shares

    def largest(self, k: int) -> tuple[Int64s, Float64s]:
        """Return ids [R, k], rising in each row, and values of each row's k largest."""
        values, ids = self.values.topk(min(k, self.values.shape[1]), dim=-1)
        ids, order = ids.sort(dim=-1)
        return _host(ids), _host(values.gather(1, order).double())

    def without(self, rows: Int64s, ids: Int64s) -> Distribution:
        """Return the distribution with these entries set to zero; this one's values change too."""
        self.values[self._indices(rows, ids)] = 0.0
        return Distribution.of(self.values)

    def power(self, exponent: float) -> Distribution:
        return Distribution.of((self.values / self.values.amax(dim=-1, keepdim=True)) ** exponent)

    def _indices(self, rows: Int64s, ids: Int64s) -> tuple[Tensor, Tensor]:
        device = self.values.device
        return torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)


def _host(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.cpu().numpy()
    return array


def locate(values: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    """Return what `locate_plain` does, looking at the block sums and into one block a point."""
    step = max(1, GATHER_BYTES // max(1, points.shape[1] * BLOCK * (4 + 8)))
    parts = [slice(i, i + step) for i in range(0, max(1, len(points)), step)]
    return torch.cat([_locate(values[part], sums[part], points[part]) for part in parts])


def _locate(values: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    num_rows, num_blocks = sums.shape
    ends = sums.cumsum(dim=-1)
    targets = points * ends[:, -1:]
    block = torch.searchsorted(ends, targets).clamp_max_(num_blocks - 1)
    starts = pad(ends[:, :-1], (1, 0))
    row_starts = torch.arange(0, num_rows * num_blocks, num_blocks, device=points.device)[:, None]
    hit = values.view(-1, BLOCK).index_select(0, (block + row_starts).view(-1))
    inside = hit.cumsum(dim=-1, dtype=torch.float64)
    # A block's float32 sum may exceed its running sum by a rounding: its last id with mass takes the point.
    rest = torch.minimum((targets - starts.gather(1, block)).view(-1), inside[:, -1])
    return block * BLOCK + torch.searchsorted(inside, rest[:, None]).view(block.shape)


def locate_plain(values: Tensor, points: Tensor) -> Tensor:
    """Return the ids at these points by one running sum over the vocabulary: the specification of `locate`."""
    running = values.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(running, points * running[:, -1:])
