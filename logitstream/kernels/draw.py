"""The draw on a GPU: logits in, packed entries out, without a number that the host would have to wait for.

It is what the sampler table does on `Distribution`, its specification, from the same uniforms; float32 block sums put
about one point in 5,000 on a neighbouring id. R rows, V vocabulary, W entries of a row at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from logitstream.kernels import BAD, UNUSED, draw_rows, launching_on
from logitstream.kernels.arithmetic import LOG2_E
from logitstream.samplers import MAX_COUNT, PROBABILITY_UNITS, STEPS_PER_SAMPLE
from logitstream.types import TargetSpec

BLOCK, TILE, GROUP = (one.value for one in (draw_rows.BLOCK, draw_rows.TILE, draw_rows.GROUP))
BEYOND = MAX_COUNT
"""An id after all ids."""


class RowNames(NamedTuple):
    """The uniforms of R rows: of row rows[i] under the key of sequence sequences[i], all on the device.

    keys: int64 [S, 2], `key_words`; sequences, rows: int32 [R].
    """

    keys: Tensor
    sequences: Tensor
    rows: Tensor


def key_words(keys: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the draw keys of sequences as int64 [S, 2]."""
    return np.frombuffer(b"".join(keys), "<u8").astype(np.uint64).view(np.int64).reshape(-1, 2)


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start one kernel; `draw` takes another function in its place to record what is launched."""
    kernel[grid](*args, **options)


def draw(logits: Tensor, spec: TargetSpec, names: RowNames, *, launch: Callable[..., None] = launch_kernel) -> Tensor:
    """Draw the rows of logits [R, V]: int32 [2, R, W], ids and counts.

    A row's entries are in the order of their ids; places with the count UNUSED are none, and a row that holds NaN, +inf
    or nothing finite begins with the count BAD.
    """
    assert logits.stride(1) == 1
    if not len(logits):
        return torch.empty(2, 0, 1, dtype=torch.int32, device=logits.device)
    with launching_on(logits.device):
        uniforms = _uniforms(names, spec.kind.uniforms(spec), launch)
        rows = _Rows.of(logits, LOG2_E / spec.temperature, launch)
        drawn: Tensor = globals()[spec.kind.on_gpu](rows, spec, uniforms)
        return drawn


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of logits and the statistics of their blocks [R, B]; cutoffs [R]: only logits below them count."""

    logits: Tensor
    scale: float
    maxima: Tensor
    sums: Tensor
    launch: Callable[..., None]
    cutoffs: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, scale: float, launch: Callable[..., None]) -> _Rows:
        """Take the one pass over the logits."""
        num_rows, vocab_size = logits.shape
        num_blocks, num_tiles = triton.cdiv(vocab_size, BLOCK), triton.cdiv(vocab_size, TILE)
        maxima = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
        rows = cls(logits, scale, maxima, torch.empty_like(maxima), launch)
        rows.launch(
            draw_rows.block_stats_kernel, (num_rows * num_tiles,),
            logits, logits.stride(0), maxima, rows.sums, vocab_size, num_blocks, num_tiles, scale,
        )  # fmt: skip
        return rows

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return each row's largest logit and its sum of exponentials relative to it, float64 [R, 1] both."""
        peaks = torch.empty(len(self.logits), dtype=torch.float32, device=self.logits.device)
        totals = torch.empty_like(peaks, dtype=torch.float64)
        num_blocks = self.maxima.shape[1]
        self.launch(
            draw_rows.totals_kernel, (len(peaks),), self.maxima, self.sums, peaks, totals, num_blocks, self.scale,
            BLOCKS_2=_padded(num_blocks),
        )  # fmt: skip
        return peaks.double()[:, None], totals[:, None]

    def shares(self, values: Tensor) -> Tensor:
        """Return the shares of these logits [R, W] in their rows, float64."""
        peaks, totals = self.totals()
        return torch.exp2((values.double() - peaks) * self.scale) / totals

    def largest(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest logits of each row and their ids (int64), [R, k]: they lie in the k largest blocks."""
        num_rows, k = len(self.logits), min(k, self.logits.shape[1])
        blocks = self.maxima.masked_fill(self.sums == 0, -torch.inf).topk(min(k, self.maxima.shape[1])).indices
        candidates = torch.empty(num_rows, blocks.shape[1] * BLOCK, dtype=self.logits.dtype, device=self.logits.device)
        self.launch(
            draw_rows.gather_blocks_kernel, (num_rows, triton.cdiv(blocks.shape[1], GROUP)),
            self.logits, self.logits.stride(0), blocks, candidates, self.logits.shape[1], blocks.shape[1],
        )  # fmt: skip
        values, at = candidates.topk(k)
        return values, blocks.gather(1, at // BLOCK) * BLOCK + at % BLOCK

    def below(self, cutoffs: Tensor, blocks: Tensor) -> _Rows:
        """Return the rows' logits below these cutoffs [R]; all others lie in these blocks [R, W] (-1: none)."""
        rows = _Rows(self.logits, self.scale, self.maxima.clone(), self.sums.clone(), self.launch, cutoffs)
        num_rows, width = blocks.shape
        self.launch(
            draw_rows.tail_stats_kernel, (num_rows, triton.cdiv(width, GROUP)),
            self.logits, self.logits.stride(0), rows.maxima, rows.sums, blocks, cutoffs,
            self.logits.shape[1], self.maxima.shape[1], width, self.scale,
        )  # fmt: skip
        return rows

    def sample(
        self, width: int, uniforms: Tensor, *, points: Tensor | None = None, nums: Tensor | None = None
    ) -> Tensor:
        """Return the ids at points, packed: at rising points [R, width], or at (j - u)/P with u the uniforms' first.

        nums: int32 [R], the number of points P of each row, `width` where not given.
        """
        device, num_rows, num_blocks = self.logits.device, len(self.logits), self.maxima.shape[1]
        packed = torch.full((2, num_rows, width), UNUSED, dtype=torch.int32, device=device)
        blocks_2 = _padded(num_blocks)
        starts = torch.empty(num_rows, blocks_2 + 1, dtype=torch.float64, device=device)
        if nums is None:
            nums = torch.full((num_rows,), width, dtype=torch.int32, device=device)
        self.launch(
            draw_rows.sample_rows_kernel, (num_rows,),
            self.logits, self.logits.stride(0), self.maxima, self.sums, self.logits.shape[1], num_blocks, self.scale,
            self.maxima if self.cutoffs is None else self.cutoffs,
            uniforms, uniforms.stride(0), uniforms if points is None else points, width, nums, width.bit_length(),
            packed[0], packed[1], width,
            starts, torch.empty_like(starts, dtype=torch.int32), torch.empty_like(packed[0]),
            SYSTEMATIC=points is None, IS_TAIL=self.cutoffs is not None, BLOCKS_2=blocks_2, num_warps=8,
        )  # fmt: skip
        return packed


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _uniforms(names: RowNames, per_row: int, launch: Callable[..., None]) -> Tensor:
    """Return float64 [R, per_row], what `sampling.row_uniforms` returns for these rows."""
    num_rows = len(names.rows)
    uniforms = torch.empty(num_rows, per_row, dtype=torch.float64, device=names.rows.device)
    if uniforms.numel():
        grid = (triton.cdiv(num_rows, 128),)
        launch(draw_rows.uniforms_kernel, grid, *names, uniforms, num_rows, per_row, ROWS=128)
    return uniforms


def draw_systematic(rows: _Rows, spec: TargetSpec, uniforms: Tensor) -> Tensor:
    return rows.sample(spec.num_samples, uniforms)


def draw_multinomial(rows: _Rows, spec: TargetSpec, uniforms: Tensor) -> Tensor:
    points = (1.0 - uniforms[:, : spec.num_samples]).sort(dim=1).values
    if spec.proposal_temperature == 1.0:
        return rows.sample(spec.num_samples, uniforms, points=points)
    proposal = _Rows.of(rows.logits, rows.scale * spec.proposal_temperature, rows.launch)
    ids, counts = proposal.sample(spec.num_samples, uniforms, points=points)
    values = rows.logits.gather(1, ids.clamp_min(0).long())
    weights = rows.shares(values) / proposal.shares(values) * counts.clamp_min(0) / spec.num_samples
    units = _round_rows(weights, uniforms[:, spec.num_samples :], spec.kind.units(spec), rows.launch)
    return torch.stack([ids, torch.where(counts < 0, counts, torch.where(units > 0, units, UNUSED))])


def draw_threshold(rows: _Rows, spec: TargetSpec, uniforms: Tensor) -> Tensor:
    units = spec.kind.units(spec)
    theta = STEPS_PER_SAMPLE / units
    values, ids = rows.largest(int(1 / theta) + 1)  # every entry of θ or more, and the largest one below
    peaks, totals = rows.totals()
    shares = torch.exp2((values.double() - peaks) * rows.scale) / totals
    is_head = shares >= theta
    largest_tail = torch.where(is_head | (shares < theta / 2), 0.0, shares).amax(1)
    head_ids, order = torch.where(is_head, ids, BEYOND).sort(dim=1)
    counts = _round_rows(torch.where(is_head, shares, 0.0).gather(1, order), uniforms[:, :1], units, rows.launch)
    left = units - counts.sum(dim=1)
    cutoffs = torch.where(is_head, values, torch.inf).amin(1).float()
    tail = rows.below(cutoffs, torch.where(is_head, ids // BLOCK, -1))
    tail_peaks, tail_totals = tail.totals()
    tail_share = (tail_totals * torch.exp2((tail_peaks - peaks) * rows.scale) / totals)[:, 0]
    width = -(-units // STEPS_PER_SAMPLE)
    nums = _tail_points(left, largest_tail, tail_share, uniforms[:, 1]).clamp_(0, width).int()
    tail_ids, tail_counts = tail.sample(width, uniforms[:, 2:], nums=nums)
    ids = torch.cat([head_ids.int(), torch.where(tail_counts > 0, tail_ids, BEYOND)], dim=1)
    counts = torch.cat([torch.where(counts > 0, counts, UNUSED), torch.where(tail_counts > 0, 0, UNUSED)], dim=1)
    return _pack(ids, counts, totals)


def _tail_points(left: Tensor, largest_tail: Tensor, tail_share: Tensor, uniforms: Tensor) -> Tensor:
    """Do what `samplers._tail_points` does."""
    num_points = torch.floor(left / STEPS_PER_SAMPLE + uniforms)
    most = (torch.ceil(tail_share / largest_tail.clamp_min(1e-300)) - 1.0).clamp_min(1.0)
    limited = torch.where(left >= STEPS_PER_SAMPLE, torch.minimum(num_points, most), num_points)
    return torch.where(tail_share > 0, limited, 0.0)


def draw_top_k(rows: _Rows, spec: TargetSpec, uniforms: Tensor) -> Tensor:
    values, ids = rows.largest(spec.top_k)
    ids, order = ids.sort(dim=1)
    peaks, totals = rows.totals()
    shares = torch.exp2((values.gather(1, order).double() - peaks) * rows.scale)
    shares = shares / (totals if spec.kind.has_ghost else shares.sum(dim=1, keepdim=True))
    counts = _round_rows(shares, torch.full_like(totals, 0.5), PROBABILITY_UNITS, rows.launch)
    return _pack(ids.int(), torch.where(counts > 0, counts, UNUSED), totals)


def _round_rows(weights: Tensor, v: Tensor, grid: int, launch: Callable[..., None]) -> Tensor:
    """Return weights [R, W] in units, int32: `samplers._round_rows` with v [R, 1]. torch's cumsum may be refused."""
    num_rows, width = weights.shape
    units = torch.empty(num_rows, width, dtype=torch.int32, device=weights.device)
    launch(
        draw_rows.round_rows_kernel, (num_rows,), weights, v, v.stride(0), units, width, grid, MAX_COUNT,
        WIDTH_2=_padded(width),
    )  # fmt: skip
    return units


def _pack(ids: Tensor, counts: Tensor, totals: Tensor) -> Tensor:
    """Order entries by id, the used ones first, and mark bad rows."""
    ids, order = torch.where(counts == UNUSED, BEYOND, ids).sort(dim=1)
    counts = counts.gather(1, order)
    is_bad = ~((totals > 0) & (totals < torch.inf))[:, 0]
    counts[:, 0].masked_fill_(is_bad, BAD)
    return torch.stack([ids, counts])
