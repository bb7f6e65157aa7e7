"""Rows that hold token ids already: known by their columns, without padding, cut, and never without a word."""

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
"""Say which tokens are a document's in a packed row; seq_lengths (TRL's) has one entry a document."""
COLUMNS = ("input_ids", *LOSS_COLUMNS, "attention_mask", *DOCUMENTS)
ROWS_AT_ONCE = 1000
ROWS_LOOKED_AT = 100

Part = tuple[str, Dataset]
"""A path, and its rows of COLUMNS alone."""


def known_columns(rows: Dataset, path: str) -> Dataset:
    """The rows with those of COLUMNS that they have; others are left out with a line in the log.

    ValueError where one of those does not hold a list of whole numbers a row, or where another column has an entry for
    each token: that would be left out of what the row means.
    """
    columns = [name for name in COLUMNS if name in rows.column_names]
    others = [name for name in rows.column_names if name not in columns]
    for name in columns:
        _check_integers(rows, name, path)
    if wrong := per_token(rows, others):
        raise ValueError(
            f"{path}: the column {wrong[0]!r} has an entry for each token, and is not known: remove it, or name it as "
            f"one of {', '.join(COLUMNS[1:])}"
        )
    if others:
        logger.info("%s: not used: %s", path, ", ".join(others))
    return rows.select_columns(columns)


def per_token(rows: Dataset, names: Sequence[str]) -> list[str]:
    """Those of some columns that have an entry for each of a row's input_ids."""
    first = rows.with_format(None)[:ROWS_LOOKED_AT]
    tokens = first.get("input_ids", [])

    def belongs_to_tokens(column: list[Any]) -> bool:
        both = [(ids, entries) for ids, entries in zip(tokens, column, strict=True) if ids and entries is not None]
        return bool(both) and all(isinstance(entries, list) and len(entries) == len(ids) for ids, entries in both)

    return [name for name in names if belongs_to_tokens(first[name])]


def cut(parts: Sequence[Part], sequence_tokens: int, limits: StudentLimits) -> Iterator[dict[str, Any]]:
    """Rows of tokens without their padding, the first `sequence_tokens` of each; rows of padding alone are left out.

    Packed rows come with position_ids that count from 0 in each document. ValueError, with path and row, where columns
    do not belong together, or where the student cannot take an id or a document.
    """
    is_packed = _are_packed(parts)
    for path, rows in parts:
        for index, row in enumerate(rows):
            where = f"{path}: row {index}"
            values, numbers = _row(row, where)
            kept = np.flatnonzero(numbers)[:sequence_tokens]
            if not len(kept):
                continue
            ids = values["input_ids"][kept]
            places = positions_of(numbers[None])[0, kept]
            limits.check_id(int(ids.max()), int(ids.min()), where)
            limits.check_length(int(places.max()) + 1, where)
            found = {name: values[name][kept] for name in ("input_ids", *LOSS_COLUMNS) if name in values}
            yield found | ({"position_ids": places} if is_packed else {})


def warn_of_cuts(parts: Sequence[Part], sequence_tokens: int) -> None:
    """Say how many rows are longer than `sequence_tokens`, and which share of all tokens is lost with their ends."""
    lengths = np.concatenate([_lengths(rows) for _, rows in parts])
    is_longer = lengths > sequence_tokens
    if is_longer.any():
        lost = int((lengths[is_longer] - sequence_tokens).sum())
        logger.warning(
            "%d of %d rows are longer than sequence_tokens = %d: their ends, %d tokens (%.1f %% of all), are not "
            "trained on; the longest has %d",
            int(is_longer.sum()),
            len(lengths),
            sequence_tokens,
            lost,
            100 * lost / int(lengths.sum()),
            int(lengths.max()),
        )


def _row(row: dict[str, Any], where: str) -> tuple[dict[str, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """A row's columns, and each token's document, 0 for padding."""
    lengths = {name: None if values is None else len(values) for name, values in row.items()}
    if None in lengths.values() or len({number for name, number in lengths.items() if name != "seq_lengths"}) > 1:
        raise ValueError(f"{where}: expected lists of one length, one entry a token, got lengths {lengths}")
    if empty := [name for name, column in row.items() if None in column]:
        raise ValueError(f"{where}: expected whole numbers, got an entry of {empty[0]} that is null")
    values = {name: np.asarray(column, np.int64) for name, column in row.items()}
    batch = {name: values[name][None] for name in ("input_ids", "attention_mask", *DOCUMENTS[:2]) if name in values}
    if "seq_lengths" in values and len(values["input_ids"]):
        ends = np.cumsum(values["seq_lengths"][values["seq_lengths"] > 0])
        batch["cu_seq_lens_q"] = np.concatenate([np.zeros(1, np.int64), ends])
    try:
        return values, number_documents(batch)[0]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _are_packed(parts: Sequence[Part]) -> bool:
    """Whether some row may hold several documents: every row then says which tokens are whose."""
    return any(
        any(name in rows.column_names for name in DOCUMENTS)
        or ("attention_mask" in rows.column_names and _highest(rows, "attention_mask") > 1)
        for _, rows in parts
    )


def _highest(rows: Dataset, name: str) -> int:
    tables = rows.select_columns([name]).with_format("arrow").iter(batch_size=ROWS_AT_ONCE)
    highest = (pc.max(pc.list_flatten(table[name]).cast(pa.int64())).as_py() for table in tables)
    return max((value for value in highest if value is not None), default=0)


def _lengths(rows: Dataset) -> npt.NDArray[np.int64]:
    """Tokens of each row that are no padding."""
    name = "attention_mask" if "attention_mask" in rows.column_names else "input_ids"
    found = [np.zeros(0, np.int64)]
    for table in rows.select_columns([name]).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        column = table[name]
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        if name == "attention_mask":
            present = np.concatenate(
                [np.zeros(1, np.int64), np.cumsum(pc.list_flatten(column).cast(pa.int64()).to_numpy() != 0)]
            )
            ends = np.cumsum(lengths)
            lengths = present[ends] - present[ends - lengths]
        found.append(lengths)
    return np.concatenate(found)


def _check_integers(rows: Dataset, name: str, path: str) -> None:
    """ValueError where a column does not hold a list of whole numbers (or bools) a row."""
    feature = rows.features[name]
    entry = getattr(feature, "feature", None)
    if not isinstance(entry, Value) or not ("int" in entry.dtype or entry.dtype in ("bool", "null")):
        raise ValueError(f"{path}: expected {name} to hold a list of whole numbers a row, got {feature}")
