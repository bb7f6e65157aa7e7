"""A corpus: text files, rows of text or of token ids, or a cache -> token sequences in an order of their own.

The sequences and their order do not depend on the number of workers.
"""

from __future__ import annotations

import bisect
import copy
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
from logitstream.data import documents, packing, token_rows
from logitstream.data.loss_mask import IGNORED_LABEL
from logitstream.data.student_limits import StudentLimits
from logitstream.data.token_rows import COLUMNS, LOSS_COLUMNS
from logitstream.errors import CorruptRecord
from logitstream.types import TokenSequence, request_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        return _generate(
            token_rows.cut, arguments | {"paths": tuple(paths)}, f"no row holds a token: {', '.join(paths)}"
        )
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
    code = [Path(str(module.__file__)).read_bytes() for module in (documents, packing, token_rows)]
    known = Hasher.hash((code, sequences.__name__, arguments))
    try:
        return Dataset.from_generator(sequences, gen_kwargs=arguments, fingerprint=known)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _load(file: Path, text_column: str) -> Dataset:
    """Return the token columns, or the text, of one file or of a folder that `datasets` saved."""
    rows = _read(file, text_column)
    if "input_ids" in rows.column_names:
        return token_rows.known_columns(rows, str(file))
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
