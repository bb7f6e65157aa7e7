"""Rows of token ids: columns known by name, padding dropped, the ends of long rows cut with a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value

from logitstream.data.documents import ROW_MASK, TOKEN_MASKS, number_documents, positions_of
from logitstream.data.student_limits import StudentLimits

logger = logging.getLogger(__name__)

LOSS_COLUMNS = ("labels", ROW_MASK, *TOKEN_MASKS)
DOCUMENTS = ("position_ids", "seq_idx", "seq_lengths")
"""Columns that mark the documents of a packed row; seq_lengths (TRL's) has one entry a document."""
COLUMNS = ("input_ids", *LOSS_COLUMNS, "attention_mask", *DOCUMENTS)
ROWS_AT_ONCE = 1000
ROWS_LOOKED_AT = 100

Part = tuple[str, Dataset]
"""A path, and the columns of COLUMNS that it has."""


def known_columns(rows: Dataset, path: str) -> Dataset:
    """Return the rows with those of COLUMNS that they have, and log the names of the others.

    ValueError if one of those is not a list of whole numbers or bools a row, or if another column has an entry for each
    token: leaving it out would change what the row means.
    """
    columns = [name for name in COLUMNS if name in rows.column_names]
    others = [name for name in rows.column_names if name not in columns]
    for name in columns:
        entry = getattr(rows.features[name], "feature", None)
        if not isinstance(entry, Value) or not ("int" in entry.dtype or entry.dtype in ("bool", "null")):
            raise ValueError(
                f"{path}: expected {name} to hold a list of whole numbers a row, got {rows.features[name]}"
            )
    if wrong := per_token(rows, others):
        raise ValueError(
            f"{path}: the column {wrong[0]!r} has an entry for each token, and is not known: remove it, or name it as "
            f"one of {', '.join(COLUMNS[1:])}"
        )
    if others:
        logger.info("%s: not used: %s", path, ", ".join(others))
    return rows.select_columns(columns)


def per_token(rows: Dataset, names: Sequence[str]) -> list[str]:
    """Return the names of columns with an entry for each of a row's input_ids, judged by the first rows."""
    first = rows.with_format(None)[:ROWS_LOOKED_AT]
    found = []
    for name in names:
        pairs = zip(first.get("input_ids", ()), first[name], strict=False)
        both = [(ids, own) for ids, own in pairs if ids and own is not None]
        if both and all(isinstance(own, list) and len(own) == len(ids) for ids, own in both):
            found.append(name)
    return found


def cut(parts: Sequence[Part], sequence_tokens: int, limits: StudentLimits) -> Iterator[dict[str, Any]]:
    """Yield the first `sequence_tokens` tokens of each row without its padding; rows of padding alone are left out.

    If any row may hold several documents, all rows come with position_ids. ValueError, with path and row, if columns do
    not belong together or the student cannot take an id or a document.
    """
    is_packed = any(_may_be_packed(rows) for _, rows in parts)
    for path, rows in parts:
        for index, row in enumerate(rows):
            where = f"{path}: row {index}"
            values, numbers = _row(row, where)
            kept = np.flatnonzero(numbers)[:sequence_tokens]
            if not len(kept):
                continue
            ids = values["input_ids"][kept]
            positions = positions_of(numbers[None])[0, kept]
            limits.check_ids(ids, where)
            limits.check_length(int(positions.max()) + 1, where)
            found = {name: values[name][kept] for name in ("input_ids", *LOSS_COLUMNS) if name in values}
            yield found | ({"position_ids": positions} if is_packed else {})


def _row(row: dict[str, Any], where: str) -> tuple[dict[str, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Return a row's columns, and the number of each token's document, 0 for padding."""
    lengths = {name: None if values is None else len(values) for name, values in row.items()}
    if None in lengths.values() or len({number for name, number in lengths.items() if name != "seq_lengths"}) > 1:
        raise ValueError(f"{where}: expected lists of one length, one entry a token, got lengths {lengths}")
    if empty := [name for name, column in row.items() if None in column]:
        raise ValueError(f"{where}: expected whole numbers, got an entry of {empty[0]} that is null")
    values = {name: np.asarray(column, np.int64) for name, column in row.items()}
    marks = ("input_ids", "attention_mask", "position_ids", "seq_idx")
    batch = {name: values[name][None] for name in marks if name in values}
    try:
        if "seq_lengths" in values:
            batch["seq_idx"] = np.repeat(np.arange(len(row["seq_lengths"])), values["seq_lengths"])[None]
        return values, number_documents(batch)[0]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def warn_of_cuts(parts: Sequence[Part], sequence_tokens: int) -> None:
    """Log how many rows are longer than `sequence_tokens`, and the share of all tokens that is lost with their ends."""
    lengths = np.concatenate([_lengths(rows) for _, rows in parts])
    lost = int((lengths - sequence_tokens).clip(min=0).sum())
    if lost:
        logger.warning(
            "%d of %d rows are longer than sequence_tokens = %d: their ends, %d tokens (%.1f %% of all), are not "
            "trained on; the longest has %d",
            int((lengths > sequence_tokens).sum()),
            len(lengths),
            sequence_tokens,
            lost,
            100 * lost / int(lengths.sum()),
            int(lengths.max()),
        )


def _lengths(rows: Dataset) -> npt.NDArray[np.int64]:
    """Return how many tokens of each row are not padding."""
    has_mask = "attention_mask" in rows.column_names
    found = [np.zeros(0, np.int64)]
    for lists in _arrays(rows, "attention_mask" if has_mask else "input_ids"):
        owners = pc.list_parent_indices(lists).to_numpy()
        present = _values(lists) != 0 if has_mask else slice(None)
        found.append(np.bincount(owners[present], minlength=len(lists)))
    return np.concatenate(found)


def _may_be_packed(rows: Dataset) -> bool:
    """Tell whether some row may hold several documents: marked by a column of its own, or by the attention_mask."""
    if any(name in rows.column_names for name in DOCUMENTS):
        return True
    masks = _arrays(rows, "attention_mask") if "attention_mask" in rows.column_names else ()
    return any((_values(lists) > 1).any() for lists in masks)


def _arrays(rows: Dataset, name: str) -> Iterator[pa.Array]:
    for table in rows.select_columns([name]).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        yield table[name].combine_chunks()


def _values(lists: pa.Array) -> npt.NDArray[Any]:
    return np.asarray(pc.list_flatten(lists).cast(pa.int64()).to_numpy(zero_copy_only=False))
