"""Random sparse targets, ragged, with empty rows and sums other than 1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from logitstream.types import SparseTargets, TargetSpec


def random_targets(
    rng: np.random.Generator, *, num_rows: int, vocab_size: int, max_entries: int, units: int = 50, exact: bool = False
) -> SparseTargets:
    """Rows of 0 to max_entries ids; exact: every row's counts sum to units (max_entries must not exceed them)."""
    sizes = rng.integers(1 if exact else 0, min(max_entries, vocab_size) + 1, num_rows)
    rows = [np.sort(rng.choice(vocab_size, size, replace=False)) for size in sizes]
    counts = [
        1 + rng.multinomial(units - size, np.ones(size) / size) if exact else rng.integers(1, units, size)
        for size in sizes
    ]
    return SparseTargets(
        vocab_size=vocab_size,
        units=units,
        row_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        token_ids=np.concatenate([*rows, np.zeros(0)]).astype(np.int32),
        counts=np.concatenate([*counts, np.zeros(0)]).astype(np.int32),
    )


def drawn(targets: SparseTargets, *, temperature: float = 1.0, ghost: bool = False) -> SparseTargets:
    """The same targets as if drawn at this temperature, with a ghost bucket or without one."""
    sampler = "top_k_ghost" if ghost else "systematic"
    return replace(targets, spec=TargetSpec(sampler=sampler, temperature=temperature))
