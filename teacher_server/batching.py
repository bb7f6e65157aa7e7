"""How a batch of ragged sequences is cut into forward passes so that little padding is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_by_length(lengths: Sequence[int], *, pass_overhead_tokens: int, max_padded_tokens: int) -> list[list[int]]:
    """Indices of each pass, of like lengths, longest first.

    The cut minimises padded tokens + pass_overhead_tokens for each pass: what a pass costs whatever it holds, in tokens
    of computing. No pass has more than max_padded_tokens padded tokens, unless it is one sequence.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    longest_first = np.array([lengths[index] for index in order], dtype=np.int64)
    num = len(order)
    best = np.zeros(num + 1, dtype=np.int64)  # cost of the first n sequences
    start_of = np.zeros(num + 1, dtype=np.int64)  # where the last of their passes begins
    for stop in range(1, num + 1):
        starts = np.arange(stop)
        padded = longest_first[:stop] * (stop - starts)
        costs = best[:stop] + padded + pass_overhead_tokens
        costs[:-1][padded[:-1] > max_padded_tokens] = np.iinfo(np.int64).max
        start_of[stop] = int(costs.argmin())
        best[stop] = costs[start_of[stop]]
    passes: list[list[int]] = []
    stop = num
    while stop:
        start = int(start_of[stop])
        passes.append(order[start:stop])
        stop = start
    return passes[::-1]
