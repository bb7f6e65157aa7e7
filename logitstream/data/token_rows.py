"""Rows of token ids: columns known by name, padding dropped, the ends of long rows cut with a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value

from logitstream.data.documents import ROW_MASK, TOKEN_MASKS, number_documents, positions_of
from logitstream.data.student_limits import StudentLimits

logger = logging.getLogger(__name__)

LOSS_COLUMNS = ("labels", ROW_MASK, *TOKEN_MASKS)
DOCUMENTS = ("position_ids", "seq_idx", "seq_lengths")
"""Columns that mark the documents of a packed row; seq_lengths (TRL's) has one entry a document."""
COLUMNS = ("input_ids", *LOSS_COLUMNS, "attention_mask", *DOCUMENTS)
ROWS_LOOKED_AT = 100


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


def cut(
    parts: Sequence[Dataset], paths: Sequence[str], sequence_tokens: int, limits: StudentLimits
) -> Iterator[dict[str, Any]]:
    """Yield the first `sequence_tokens` tokens of each row without its padding; rows of padding alone are left out.

    If any row may hold several documents, all rows come with position_ids. ValueError, with path and row, if columns do
    not belong together or the student cannot take an id or a document. Logs how much the cut ends hold.
    """
    is_packed = any(name in rows.column_names for rows in parts for name in DOCUMENTS)
    lengths = []
    for path, rows in zip(paths, parts, strict=True):
        for index, row in enumerate(rows):
            try:
                values = _values(row)
                numbers = number_documents({name: one[None] for name, one in values.items()})[0]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: row {index}: {error}") from error
            kept = np.flatnonzero(numbers)[:sequence_tokens]
            lengths.append(np.count_nonzero(numbers))
            if len(kept):
                positions = positions_of(numbers[None])[0, kept]
                limits.check_ids(values["input_ids"][kept], f"{path}: row {index}")
                limits.check_length(int(positions.max()) + 1, f"{path}: row {index}")
                found = {name: values[name][kept] for name in ("input_ids", *LOSS_COLUMNS) if name in values}
                yield found | ({"position_ids": positions} if is_packed else {})
    lost = np.subtract(lengths, sequence_tokens).clip(min=0)
    if lost.any():
        logger.warning(
            "%d of %d rows are longer than sequence_tokens = %d: their ends, %d tokens (%.1f %% of all), are not "
            "trained on; the longest has %d",
            *(np.count_nonzero(lost), len(lengths), sequence_tokens),
            *(lost.sum(), 100 * lost.sum() / np.sum(lengths), max(lengths)),
        )


def _values(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row's columns as arrays of one length, with seq_idx in place of seq_lengths."""
    if empty := [name for name, column in row.items() if column is None or None in column]:
        raise ValueError(f"expected whole numbers, got an entry of {empty[0]} that is null")
    values = {name: np.asarray(column, np.int64) for name, column in row.items()}
    if (ends := values.pop("seq_lengths", None)) is not None:
        values["seq_idx"] = np.repeat(np.arange(len(ends)), ends)
    if len({len(column) for column in values.values()}) > 1:
        lengths = {name: len(column) for name, column in values.items()}
        raise ValueError(f"expected lists of one length, one entry a token, got lengths {lengths}")
    return values
