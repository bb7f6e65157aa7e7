"""Distributions of a chunk of rows, and the ids at points of their running sums, in plain torch on any device.

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

from logitstream.errors import NonFiniteLogits

BLOCK = 64
CPU_CHUNK = 1 << 19
DEVICE_CHUNK = 1 << 26
"""Probabilities to hold at once: on the CPU few enough to stay in its cache."""
GATHER_BYTES = 1 << 26
"""Bytes of the blocks to look into at once, as float32 and float64; at least one row's."""

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


def chunk_rows(logits: Tensor) -> int:
    """Return how many rows of these logits to draw from at once."""
    return max(1, (CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK) // logits.shape[1])


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
        cls, logits: Tensor, temperature: float, *, row_names: Int64s | None = None, out: Tensor | None = None
    ) -> Distribution:
        """Return the softmax of logits / temperature; NonFiniteLogits names a row with NaN, +inf or nothing finite.

        out: float32 of the logits' shape to put it into, as fresh memory's page faults take longer than exponentials.
        """
        if temperature != 1.0:
            logits = logits.float()
            logits = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)
        values = torch.softmax(logits, dim=-1, dtype=torch.float32, out=out)
        if num_missing := -values.shape[1] % BLOCK:
            values = pad(values, (0, num_missing))
        distribution = cls.of(values)
        if len(bad := np.flatnonzero(~np.isfinite(distribution.total()))):
            name = bad[0] if row_names is None else row_names[bad[0]]
            raise NonFiniteLogits(f"logits of row {name} hold NaN, +inf or nothing finite")
        return distribution

    def total(self) -> Float64s:
        return _host(self.sums.cumsum(dim=-1)[:, -1])

    def locate(self, points: Float64s) -> Int64s:
        """Return the first id whose share of the running sum reaches each point: [R, P].

        points: [R, P] in (0, 1], rising in each row.
        """
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
