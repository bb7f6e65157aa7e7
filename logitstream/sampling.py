"""Sparse targets of logits: uniforms keyed by what is drawn, chunks of rows, and the spec's row of the sampler table.

Nothing depends on who draws or in which chunks, so replicas, retries and the local teacher agree. The uniforms are made
on the host.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream import kernels
from logitstream.distribution import Distribution, bad_row, chunk_rows, scratch
from logitstream.samplers import SAMPLERS, Float64s, Int64s
from logitstream.types import SparseTargets, TargetSpec, TokenSequence

CPU = torch.device("cpu")
MAX_POINTS = 1 << 20
"""Points of the rows to draw at once; with uniforms, ids and counts each takes about 100 bytes for a while."""


def sample(
    logits: Tensor, spec: TargetSpec, sequence: TokenSequence, *, draw_set: int = 0, first_row: int = 0
) -> SparseTargets:
    """Draw targets of rows first_row.. of a sequence from their logits [R, V] (any float dtype, any device).

    Chunks concatenate to what one call gives. Rows outside the loss mask come out empty. Raises NonFiniteLogits.
    """
    num_rows = logits.shape[0]
    if first_row < 0 or first_row + num_rows > len(sequence):
        raise ValueError(f"rows {first_row} to {first_row + num_rows} of a sequence of {len(sequence)} tokens")
    rows = np.arange(first_row, first_row + num_rows)
    if sequence.loss_mask is not None:
        rows = rows[sequence.loss_mask[rows]]
    if len(rows) < num_rows:
        logits = logits[torch.from_numpy(rows - first_row).to(logits.device)]
    key, step = draw_key(spec, sequence, draw_set), rows_at_once(spec, logits.shape[1])
    parts = []
    for i in range(0, max(1, len(rows)), step):
        part, names = logits[i : i + step], rows[i : i + step]
        if kernels.are_usable(logits.device) and spec.kind.on_gpu:
            parts.append(_draw_on_gpu(part, spec, key, names))
        else:
            parts.append(draw(part, spec, row_uniforms(spec, key, names), row_names=names))
    return scatter_rows(SparseTargets.concatenate(parts), rows - first_row, num_rows)


@torch.inference_mode()
def _draw_on_gpu(logits: Tensor, spec: TargetSpec, key: bytes, rows: Int64s) -> SparseTargets:
    from logitstream.kernels import draw as on_gpu

    words, names = (torch.from_numpy(one).to(logits.device) for one in (on_gpu.key_words([key]), rows.astype(np.int32)))
    drawn = on_gpu.draw(logits, spec, on_gpu.RowNames(words, torch.zeros_like(names), names))
    targets, is_bad = unpack(drawn.cpu().numpy(), spec, logits.shape[1])
    if is_bad.any():
        raise bad_row(int(rows[is_bad.argmax()]))
    return targets


def unpack(
    packed: npt.NDArray[np.int32], spec: TargetSpec, vocab_size: int
) -> tuple[SparseTargets, npt.NDArray[np.bool_]]:
    """Return the targets of what `kernels.draw` packed, [2, R, W], and which rows are bad, [R]."""
    ids, counts = packed
    is_used = counts >= 0
    targets = SparseTargets(
        vocab_size=vocab_size,
        units=spec.kind.units(spec),
        tail_units=spec.kind.tail_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(is_used.sum(axis=1))]),
        token_ids=ids[is_used],
        counts=counts[is_used],
        spec=spec,
    )
    return targets, counts[:, 0] == kernels.BAD


def warm_up(dtype: torch.dtype, device: torch.device = CPU, vocab_size: int = 2) -> None:
    """Compile what draws from logits of this type and shape, at start instead of with the first request."""
    if device.type == "cpu":
        Distribution.of_logits(torch.zeros(2, 2, dtype=dtype), 1.0).locate(np.ones((2, 1)))
        return
    rows = TokenSequence(token_ids=np.zeros(16, np.int32))
    for sampler in SAMPLERS.values():
        if sampler.on_gpu:
            sample(torch.zeros(16, vocab_size, dtype=dtype, device=device), TargetSpec(sampler=sampler.name), rows)


@torch.inference_mode()
def draw(logits: Tensor, spec: TargetSpec, uniforms: Float64s, *, row_names: Int64s | None = None) -> SparseTargets:
    """Draw targets of logits [R, V] from uniforms [R, uniforms_per_row(spec)]; rows may be of many sequences.

    Callers pass at most `rows_at_once` rows. row_names: how NonFiniteLogits names the rows.
    """
    num_rows, vocab_size = logits.shape
    if uniforms.shape != (num_rows, uniforms_per_row(spec)):
        raise ValueError(f"expected uniforms of shape {(num_rows, uniforms_per_row(spec))}, got {uniforms.shape}")
    names, step = np.arange(num_rows) if row_names is None else row_names, chunk_rows(logits)
    parts = [np.zeros((3, 0), np.int64)]
    memory = scratch(logits, step) if logits.device.type == "cpu" else None
    for i in range(0, num_rows, step):
        part, row_names = logits[i : i + step], names[i : i + step]
        distribution = Distribution.of_logits(part, spec.temperature, row_names=row_names, memory=memory)
        rows, *drawn = spec.kind.draw(distribution, spec, uniforms[i : i + step])
        parts.append(np.stack([rows + i, *drawn]))
    rows, token_ids, counts = np.concatenate(parts, axis=1)
    return SparseTargets(
        vocab_size=vocab_size,
        units=spec.kind.units(spec),
        tail_units=spec.kind.tail_units,
        row_offsets=np.searchsorted(rows, np.arange(num_rows + 1)),
        token_ids=token_ids.astype(np.int32),
        counts=counts.astype(np.int32),
        spec=spec,
    )


def scatter_rows(drawn: SparseTargets, rows: Int64s, num_rows: int) -> SparseTargets:
    """Return the drawn rows as these of num_rows rows, the others empty."""
    lengths = np.zeros(num_rows, np.int64)
    lengths[rows] = np.diff(drawn.row_offsets)
    return replace(drawn, row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))


def rows_at_once(spec: TargetSpec, vocab_size: int) -> int:
    """Return how many rows to make uniforms for and draw at once, which bounds memory whatever a spec asks for."""
    return max(1, MAX_POINTS // spec.kind.entries(spec, vocab_size))


def draw_key(spec: TargetSpec, sequence: TokenSequence, draw_set: int) -> bytes:
    """Return 16 bytes that key one sequence's uniforms, from seed, draw set and the sequence's content."""
    h = hashlib.blake2b(digest_size=16, person=b"ls-uniforms")
    h.update(spec.seed.to_bytes(8, "little") + draw_set.to_bytes(8, "little") + sequence.digest())
    return h.digest()


def uniforms_per_row(spec: TargetSpec) -> int:
    return spec.kind.uniforms(spec)


def row_uniforms(spec: TargetSpec, key: bytes, rows: npt.NDArray[np.int64]) -> Float64s:
    """Return uniforms in [0, 1) of these rows of a sequence (rising), float64 [R, uniforms_per_row(spec)].

    Philox4x64 under `draw_key`, its counter by the row: memory and time are those of the rows asked for.
    """
    per_row = uniforms_per_row(spec)
    uniforms, blocks = np.empty((len(rows), per_row)), -(-per_row // 4)
    if uniforms.size == 0:
        return uniforms
    generator = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64))
    done, next_row = 0, 0
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        generator.advance((int(run[0]) - next_row) * blocks)
        raw = generator.random_raw(len(run) * blocks * 4).reshape(-1, blocks * 4)[:, :per_row]
        uniforms[done : done + len(run)] = (raw >> np.uint64(11)) * 2.0**-53
        done, next_row = done + len(run), int(run[-1]) + 1
    return uniforms
