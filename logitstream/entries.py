"""Entries of rows as arrays, while they are drawn: counted, rounded to whole units, put together in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Entries = tuple[Int64s, Int64s, Int64s]
"""Row, id and count of each entry, by row and id."""

MAX_COUNT = (1 << 31) - 1


def count_equal(found: Int64s, used: npt.NDArray[np.bool_] | None = None) -> Entries:
    """Equal neighbours of found [R, P] (sorted in each row) as one entry each with their number."""
    is_first = np.ones(found.shape, np.bool_)
    is_first[:, 1:] = found[:, 1:] != found[:, :-1]
    if used is not None:
        is_first &= used
    rows, columns = np.nonzero(is_first)
    last = np.full(len(rows), found.shape[1], np.int64) if used is None else used.sum(axis=1)[rows]
    ends = np.append(columns[1:], 0)
    same_row = np.append(rows[1:] == rows[:-1], False) if len(rows) else np.zeros(0, np.bool_)
    ends = np.where(same_row, ends[: len(rows)], last)
    return rows, found[rows, columns], ends - columns


def round_rows(
    rows: Int64s,
    weights: Float64s,
    v: Float64s,
    grid: int,
) -> Int64s:
    """Weights in whole units, ⌊G·W_i + v⌋ - ⌊G·W_(i-1) + v⌋ over a row's running sums W: unbiased for uniform v."""
    lengths = np.bincount(rows, minlength=len(v))
    start = np.cumsum(lengths) - lengths
    places = np.arange(len(rows)) - start[rows]
    # One row's sums depend on no other row's: in a matrix, in the order of its entries.
    by_row = np.zeros((len(v), 1 + lengths.max(initial=0)))
    by_row[rows, 1 + places] = weights
    running = np.cumsum(by_row, axis=1) * grid + v[:, None]
    units: Int64s = np.minimum(np.diff(np.floor(running), axis=1)[rows, places], MAX_COUNT).astype(np.int64)
    return units


def drop_zeros(rows: Int64s, ids: Int64s, counts: Int64s) -> Entries:
    kept = counts > 0
    return rows[kept], ids[kept], counts[kept]


def concatenate(parts: list[Entries]) -> Entries:
    empty = np.zeros(0, np.int64)
    rows, ids, counts = (np.concatenate(arrays) for arrays in zip(*parts, (empty,) * 3, strict=True))
    return rows, ids, counts


def by_row_and_id(entries: Entries) -> Entries:
    rows, ids, counts = entries
    order = np.lexsort((ids, rows))
    return rows[order], ids[order], counts[order]
