"""Text or a datasets path -> token sequences. They and their order are the same whatever the number of workers."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher

from logitstream.cache import CacheReader
from logitstream.cache.disk import cache_disk
from logitstream.data import documents, packing, token_rows
from logitstream.data.loss_mask import IGNORED_LABEL
from logitstream.data.packing import TextFile, frame_of, pack
from logitstream.data.student_limits import StudentLimits
from logitstream.data.token_rows import COLUMNS, LOSS_COLUMNS, cut, known_columns, warn_of_cuts
from logitstream.errors import CorruptRecord
from logitstream.types import TokenSequence, request_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_FILES = (".txt", ".md", ".rst")
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
    """A dataset with `input_ids` and, where the input has them, `labels`, masks and `position_ids`.

    A text file is one document, and so is a row with text; each gets the tokenizer's ids of the whole, and what
    `frame_of` says around it. Documents are joined and cut into sequences of `sequence_tokens`; the last, incomplete
    one is dropped. Rows that hold input_ids already are used as they are, but for padding (attention_mask 0), which is
    dropped, and their length, which is cut.

    limits: of the student that is to train on them. ValueError where it cannot take them, or where the input is not of
    these kinds; OSError where the datasets library cannot keep its files.
    """
    check_datasets_cache(HF_DATASETS_CACHE)
    limits = limits or StudentLimits(vocab_size=0)
    parts = {path: _load(path, text_column) for path in dict.fromkeys(paths)}
    _refuse_mixture(parts)
    if _is_tokens(parts[paths[0]]):
        rows = tuple((path, parts[path]) for path in paths)
        warn_of_cuts(rows, sequence_tokens)
        arguments: dict[str, Any] = {"parts": rows, "sequence_tokens": sequence_tokens, "limits": limits}
        if next(cut(**arguments), None) is None:
            raise ValueError(f"no row holds a token: {', '.join(paths)}")
        return _generate(cut, arguments)
    limits.check_length(sequence_tokens, "sequence_tokens")
    arguments = {
        "parts": tuple(parts[path] for path in paths),
        "column": text_column,
        "tokenizer": tokenizer,
        "sequence_tokens": sequence_tokens,
        "frame": frame_of(tokenizer, start=document_start, end=document_end),
        "limits": limits,
    }
    if next(pack(**arguments), None) is None:
        raise ValueError(f"the text holds less than one sequence of {sequence_tokens} tokens: {', '.join(paths)}")
    return _generate(pack, arguments)


def _generate(sequences: Callable[..., Iterator[dict[str, Any]]], arguments: dict[str, Any]) -> Dataset:
    """What the generator yields, kept on disk by the datasets library; raises what the generator raises.

    It is found there again by the arguments and by the code that makes rows of them: another version's are others.
    """
    code = [Path(str(module.__file__)).read_bytes() for module in (documents, packing, token_rows)]
    known = Hasher.hash((code, sequences.__name__, arguments))
    try:
        return Dataset.from_generator(sequences, gen_kwargs=arguments, fingerprint=known)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def check_datasets_cache(folder: str | Path) -> None:
    """OSError that names HF_HOME where the datasets library could not write its files to the folder."""
    reason: OSError | str = "it is read-only"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error
    else:
        if os.access(folder, os.W_OK | os.X_OK):
            return
    raise OSError(f"the datasets cache {folder} cannot be written ({reason}): set HF_HOME to a folder that can be")


def _load(path: str, text_column: str) -> TextFile | Dataset:
    """A text file, or the token columns or the text of one file or of a folder that `datasets` saved."""
    file = Path(path)
    if file.is_file() and file.suffix.lower() in TEXT_FILES:
        return TextFile(path, file.stat().st_size, file.stat().st_mtime_ns)
    rows = _read(file)
    if "input_ids" in rows.column_names:
        return known_columns(rows, path)
    if text_column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise ValueError(f"{path}: expected a column {text_column!r} or 'input_ids', got {names}")
    feature = rows.features[text_column]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "null"):
        raise ValueError(f"{path}: expected a text in each row of {text_column!r}, got {feature}")
    return rows.select_columns([text_column])


def _read(file: Path) -> Dataset:
    if file.is_dir():
        loaded = load_from_disk(str(file))
        if isinstance(loaded, DatasetDict) and "train" not in loaded:
            raise ValueError(f"{file}: expected a dataset or a split 'train', got the splits {', '.join(loaded)}")
        return (loaded["train"] if isinstance(loaded, DatasetDict) else loaded).with_format(None)
    builder = BUILDERS.get(file.suffix.lower())
    if builder is None or not file.exists():
        kinds = ", ".join((*TEXT_FILES, *BUILDERS))
        raise ValueError(f"cannot read {file}: expected an existing {kinds} file or a datasets folder")
    try:
        return load_dataset(builder, data_files=str(file), split="train")
    except (DatasetsError, ValueError, StopIteration) as error:  # an empty file ends the library's own iterator
        reason = error.__cause__ or error
        raise ValueError(
            f"{file}: expected rows in {builder}, got something else ({str(reason) or 'no row'})"
        ) from error


def _is_tokens(part: TextFile | Dataset) -> bool:
    return isinstance(part, Dataset) and "input_ids" in part.column_names


def _refuse_mixture(parts: dict[str, TextFile | Dataset]) -> None:
    """ValueError where some files hold token columns that others lack: those rows could only be guessed at."""
    found = {
        path: [name for name in COLUMNS if isinstance(part, Dataset) and name in part.column_names]
        for path, part in parts.items()
    }
    first_path, first = next(iter(found.items()))
    for path, names in found.items():
        if names != first:
            kinds = [f"{one} has {', '.join(which) or 'text'}" for one, which in ((first_path, first), (path, names))]
            raise ValueError(f"expected the same of {', '.join(COLUMNS)} in every file: {'; '.join(kinds)}")


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of token columns -> [B, T] each; shorter rows are padded, with an attention_mask then."""
    lengths = [len(row["input_ids"]) for row in rows]
    names = [name for name in ("input_ids", *LOSS_COLUMNS, "position_ids") if name in rows[0]]
    batch = {name: _stack(rows, name, IGNORED_LABEL if name == "labels" else 0) for name in names}
    if "loss_mask" in batch:
        batch["loss_mask"] = batch["loss_mask"].bool()
    if min(lengths) < max(lengths):
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def _stack(rows: Sequence[dict[str, Any]], name: str, padding: int) -> torch.Tensor:
    tensors = [torch.as_tensor(row[name], dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)


class CacheDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The token sequences of one draw set of a cache, in the order of their keys: a corpus for training from it alone.

    The order depends on the content alone. A damaged record comes as one token that no loss is taken of; CacheMiss
    where one was pruned meanwhile.
    """

    def __init__(
        self, cache: CacheReader, *, draw_set: int | None = None, indices: npt.NDArray[np.int64] | None = None
    ) -> None:
        """draw_set None: the smallest one that the cache holds; indices: of the cache's keys, instead of all of it."""
        self.cache = cache
        self._disk = cache_disk(cache.source, "reading", alone=True)
        if indices is None:
            cache.keep_to(cache.view())  # in a loader's process too, and after a refresh
        draw_sets = self._disk.call(cache.draw_sets) if indices is None or draw_set is None else np.zeros(0, np.uint64)
        if draw_set is None and len(draw_sets) == 0:
            raise ValueError(f"the cache {cache.directory} is empty: expected records to train on")
        self.draw_set = int(draw_sets.min()) if draw_set is None else draw_set
        self._indices = np.flatnonzero(draw_sets == self.draw_set) if indices is None else indices
        if indices is None and len(self._indices) == 0:
            raise ValueError(f"the cache {cache.directory} holds no records of draw set {self.draw_set}")

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
        """As it was sent; one token without a wanted row where the record is damaged."""
        row = self[index]
        mask = row["loss_mask"]
        return TokenSequence(token_ids=row["input_ids"].astype(np.int32), loss_mask=None if mask.all() else mask)

    def find(self, sequence: TokenSequence) -> int | None:
        """Where a sequence stands; None where it is none of these."""
        key = request_key(self.cache.fingerprint.digest, sequence, self.draw_set)
        index = bisect.bisect_left(self._indices, key, key=lambda i: self.cache.key(int(i)))
        is_there = index < len(self) and self.cache.key(int(self._indices[index])) == key
        return index if is_there else None

    def select(self, indices: npt.NDArray[np.int64]) -> CacheDataset:
        """Some of the sequences, in this order."""
        return CacheDataset(self.cache, draw_set=self.draw_set, indices=self._indices[indices])
