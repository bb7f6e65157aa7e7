"""A corpus: text files, rows of text or of token ids, or a cache -> token sequences in an order of their own.

The sequences and their order do not depend on the number of workers.
"""

from __future__ import annotations

import bisect
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher

from logitstream.cache import CacheReader
from logitstream.cache.disk import cache_disk
from logitstream.data import documents, packing
from logitstream.data.documents import ROW_MASK, TOKEN_MASKS, number_documents, positions_of
from logitstream.data.loss_mask import IGNORED_LABEL
from logitstream.data.student_limits import StudentLimits
from logitstream.errors import CorruptRecord
from logitstream.types import TokenSequence, request_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOSS_COLUMNS = ("labels", ROW_MASK, *TOKEN_MASKS)
DOCUMENTS = ("position_ids", "seq_idx", "seq_lengths")
"""Columns that mark the documents of a packed row; seq_lengths (TRL's) has one entry a document."""
COLUMNS = ("input_ids", *LOSS_COLUMNS, "attention_mask", *DOCUMENTS)
ROWS_LOOKED_AT = 100
TEXT = {"sample_by": "document", "encoding": "utf-8-sig"}
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((".txt", ".md", ".rst"), ("text", TEXT)),
    **dict.fromkeys((".json", ".jsonl"), ("json", {})),
    ".parquet": ("parquet", {}),
}
"""Builder of the datasets library and its options, by a file's ending."""


def load_sequences(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_tokens: int,
    text_column: str = "text",
    document_start: str = "auto",
    document_end: str = "auto",
    limits: StudentLimits | None = None,
) -> Dataset:
    """Return a dataset with `input_ids` and, if the input has them, `labels`, masks and `position_ids`.

    A text file is one document, and so is a row of text; each gets the tokenizer's ids of the whole, framed as
    `packing.frame_of` says. Documents are joined and cut into sequences of `sequence_tokens`; the incomplete last one
    is dropped. Rows that hold input_ids already are used as they are, without their padding (attention_mask 0) and cut
    to `sequence_tokens`. ValueError if the student of these limits cannot take them, or the input is of another kind.
    """
    limits = limits or StudentLimits(vocab_size=0)
    parts = tuple(_load(Path(path), text_column) for path in paths)  # datasets would split lists among processes
    kinds = {tuple(sorted(part.column_names)): path for path, part in zip(paths, parts, strict=True)}
    if len(kinds) > 1:
        told = "; ".join(f"{path} has {', '.join(names)}" for names, path in kinds.items())
        raise ValueError(f"expected the same of {', '.join((text_column, *COLUMNS))} in every file: {told}")
    arguments: dict[str, Any] = {"parts": parts, "sequence_tokens": sequence_tokens, "limits": limits}
    if "input_ids" in parts[0].column_names:
        return _generate(cut, arguments | {"paths": tuple(paths)}, f"no row holds a token: {', '.join(paths)}")
    limits.check_length(sequence_tokens, "sequence_tokens")
    frame = packing.frame_of(tokenizer, start=document_start, end=document_end)
    return _generate(
        packing.pack,
        arguments | {"column": text_column, "tokenizer": tokenizer, "frame": frame},
        f"the text holds less than one sequence of {sequence_tokens} tokens: {', '.join(paths)}",
    )


def _generate(sequences: Callable[..., Iterator[dict[str, Any]]], arguments: dict[str, Any], if_none: str) -> Dataset:
    """Return the sequences, kept on disk by the datasets library; raise what making them raises.

    They are found there again by the arguments and by the code that makes them: another version makes others.
    """
    if next(sequences(**arguments), None) is None:
        raise ValueError(if_none)
    code = [Path(str(file)).read_bytes() for file in (__file__, documents.__file__, packing.__file__)]
    known = Hasher.hash((code, sequences.__name__, arguments))
    try:
        return Dataset.from_generator(sequences, gen_kwargs=arguments, fingerprint=known)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _load(file: Path, text_column: str) -> Dataset:
    """Return the token columns, or the text, of one file or of a folder that `datasets` saved."""
    rows = _read(file, text_column)
    if "input_ids" in rows.column_names:
        return known_columns(rows, str(file))
    if text_column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise ValueError(f"{file}: expected a column {text_column!r} or 'input_ids', got {names}")
    feature = rows.features[text_column]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "null"):
        raise ValueError(f"{file}: expected a text in each row of {text_column!r}, got {feature}")
    return rows.select_columns([text_column])


def _read(file: Path, text_column: str) -> Dataset:
    if file.is_dir():
        loaded = load_from_disk(str(file))
        if isinstance(loaded, DatasetDict) and "train" not in loaded:
            raise ValueError(f"{file}: expected a dataset or a split 'train', got the splits {', '.join(loaded)}")
        return (loaded["train"] if isinstance(loaded, DatasetDict) else loaded).with_format(None)
    if file.suffix.lower() not in BUILDERS or not file.exists():
        raise ValueError(f"cannot read {file}: expected an existing {', '.join(BUILDERS)} file or a datasets folder")
    builder, options = BUILDERS[file.suffix.lower()]
    try:
        rows: Dataset = load_dataset(builder, data_files=str(file), split="train", **options)
    except (DatasetsError, ValueError, StopIteration) as error:  # an empty file ends the library's own iterator
        reason = str(error.__cause__ or error) or "no row"
        raise ValueError(f"{file}: expected rows in {builder}, got something else ({reason})") from error
    return rows.rename_column("text", text_column) if builder == "text" and text_column != "text" else rows


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


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return rows of token columns as [B, T] each; shorter rows are padded, and an attention_mask then says so."""

    def stack(name: str, values: Sequence[Any]) -> torch.Tensor:
        tensors = [torch.as_tensor(one, dtype=torch.int64) for one in values]
        padding = IGNORED_LABEL if name == "labels" else 0
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)

    names = [name for name in ("input_ids", *LOSS_COLUMNS, "position_ids") if name in rows[0]]
    batch = {name: stack(name, [row[name] for row in rows]) for name in names}
    mask = stack("attention_mask", [[1] * len(row["input_ids"]) for row in rows])
    return batch if bool(mask.all()) else batch | {"attention_mask": mask}


class CacheDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The token sequences of a cache's smallest draw set, by rising key: a corpus for training from the cache alone.

    The order depends on the content alone. A damaged record comes as one token without a loss; CacheMiss if a record
    was pruned meanwhile.
    """

    def __init__(self, cache: CacheReader) -> None:
        self.cache = cache
        self._disk = cache_disk(cache.source, "reading", alone=True)
        cache.keep_to(cache.view())  # in a loader's process too, and after a refresh
        draw_sets = self._disk.call(cache.draw_sets)
        if len(draw_sets) == 0:
            raise ValueError(f"the cache {cache.directory} is empty: expected records to train on")
        self.draw_set = int(draw_sets.min())
        self._indices = np.flatnonzero(draw_sets == self.draw_set)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._disk.call(lambda: self.cache.record(int(self._indices[index])))
        except CorruptRecord:
            return {"input_ids": np.zeros(1, np.int64), "loss_mask": np.zeros(1, bool)}
        mask = record.loss_mask if record.loss_mask is not None else np.ones(len(record.token_ids), bool)
        return {"input_ids": record.token_ids.astype(np.int64), "loss_mask": mask}

    def sequence(self, index: int) -> TokenSequence:
        """Return a sequence as it was sent; one token without a wanted row if the record is damaged."""
        row = self[index]
        mask = row["loss_mask"]
        return TokenSequence(token_ids=row["input_ids"].astype(np.int32), loss_mask=None if mask.all() else mask)

    def find(self, sequence: TokenSequence) -> int | None:
        """Return the index of a sequence; None if it is none of these."""
        key = request_key(self.cache.fingerprint.digest, sequence, self.draw_set)
        index = bisect.bisect_left(self._indices, key, key=lambda i: self.cache.key(int(i)))
        is_there = index < len(self) and self.cache.key(int(self._indices[index])) == key
        return index if is_there else None

    def select(self, indices: npt.NDArray[np.int64]) -> CacheDataset:
        """Return some of the sequences, in this order."""
        chosen = copy.copy(self)
        chosen._indices = self._indices[indices]
        return chosen
