"""Text or a datasets path -> token sequences. They and their order are the same whatever the number of workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, DatasetDict, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError

from logitstream.cache import CacheReader
from logitstream.errors import CorruptRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDERS = {".txt": "text", ".md": "text", ".rst": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TOKENIZER_BATCH = 256
IGNORED_LABEL = -100
TOKEN_COLUMNS = ("input_ids", "labels", "loss_mask", "attention_mask")


def load_sequences(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, sequence_tokens: int, text_column: str = "text"
) -> Dataset:
    """A dataset with `input_ids` (int32, `sequence_tokens` a row) and, where the input has them, `labels`, `loss_mask`.

    Text is tokenized, joined with end-of-text tokens between documents and cut; the last, incomplete sequence is
    dropped. Rows that hold input_ids already are used as they are, but for padding (attention_mask 0), which is
    dropped, and their length, which is cut. ValueError where the input is not of these kinds, OSError where the
    datasets library cannot keep its files.
    """
    check_datasets_cache(HF_DATASETS_CACHE)
    parts = [_load(path, text_column) for path in paths]
    _refuse_mixture({path: part.column_names for path, part in zip(paths, parts, strict=True)})
    rows = concatenate_datasets(parts)
    arguments = {"rows": rows, "sequence_tokens": sequence_tokens}
    if "input_ids" in rows.column_names:
        if next(_cut(**arguments), None) is None:
            raise ValueError(f"no row holds a token: {', '.join(paths)}")
        return _generate(_cut, arguments)
    arguments |= {"column": text_column, "tokenizer": tokenizer}
    if next(_pack(**arguments), None) is None:
        raise ValueError(f"the text holds less than one sequence of {sequence_tokens} tokens: {', '.join(paths)}")
    return _generate(_pack, arguments)


def _generate(sequences: Callable[..., Iterator[dict[str, Any]]], arguments: dict[str, Any]) -> Dataset:
    """What the generator yields, kept on disk by the datasets library; raises what the generator raises."""
    try:
        return Dataset.from_generator(sequences, gen_kwargs=arguments)
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


Sequences = TypeVar("Sequences", Dataset, "CacheDataset")


def split_heldout(
    sequences: Sequences, *, heldout_sequences: int, max_sequences: int, seed: int
) -> tuple[Sequences, Sequences]:
    """Training and held-out sequences, chosen by seed; ValueError where too few are left to train on."""
    if heldout_sequences >= len(sequences):
        raise ValueError(f"heldout_sequences = {heldout_sequences} leaves nothing of {len(sequences)} to train on")
    order = np.random.default_rng(seed).permutation(len(sequences))
    train = np.sort(order[heldout_sequences:][: max_sequences or None])
    return sequences.select(train), sequences.select(np.sort(order[:heldout_sequences]))


def _load(path: str, text_column: str) -> Dataset:
    """The token columns or the text of one file, or of a folder that `datasets` saved."""
    rows = _read(path)
    names = rows.column_names
    if Path(path).is_file() and BUILDERS[Path(path).suffix.lower()] == "text":
        rows = rows.add_column("continues", [index < len(rows) - 1 for index in range(len(rows))])
        return rows if text_column == "text" else rows.rename_column("text", text_column)
    if "input_ids" in names:
        columns = [name for name in TOKEN_COLUMNS if name in names]
        for name in columns:
            _check_integers(rows, name, path)
        return rows.select_columns(columns)
    if text_column not in names:
        raise ValueError(f"{path}: expected a column {text_column!r} or 'input_ids', got {', '.join(names)}")
    return rows.select_columns([text_column])


def _read(path: str) -> Dataset:
    """One file, or a folder that `datasets` saved, as rows; text by paragraphs, so that none lies in memory whole."""
    file = Path(path)
    if file.is_dir():
        loaded = load_from_disk(path)
        return (loaded["train"] if isinstance(loaded, DatasetDict) else loaded).with_format(None)
    builder = BUILDERS.get(file.suffix.lower())
    if builder is None or not file.exists():
        raise ValueError(f"cannot read {path}: expected an existing {', '.join(BUILDERS)} file or a datasets folder")
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    return load_dataset(builder, data_files=path, split="train", **options)


def _check_integers(rows: Dataset, name: str, path: str) -> None:
    """ValueError where a column does not hold a list of whole numbers (or bools) a row."""
    feature = rows.features[name]
    entry = getattr(feature, "feature", None)
    if not isinstance(entry, Value) or not ("int" in entry.dtype or entry.dtype in ("bool", "null")):
        raise ValueError(f"{path}: expected {name} to hold a list of whole numbers a row, got {feature}")


def _refuse_mixture(columns: dict[str, list[str]]) -> None:
    """ValueError where some files hold token columns that others lack: those rows could only be guessed at."""
    found = {path: [name for name in TOKEN_COLUMNS if name in names] for path, names in columns.items()}
    first_path, first = next(iter(found.items()))
    for path, names in found.items():
        if names != first:
            kinds = [f"{one} has {', '.join(which) or 'text'}" for one, which in ((first_path, first), (path, names))]
            raise ValueError(f"expected the same of {', '.join(TOKEN_COLUMNS)} in every file: {'; '.join(kinds)}")


def _cut(rows: Dataset, sequence_tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of tokens without their padding, the first `sequence_tokens` of each; rows of padding alone are left out."""
    for index, row in enumerate(rows):
        lengths = {name: None if values is None else len(values) for name, values in row.items()}
        if row["input_ids"] is None or len(set(lengths.values())) > 1:
            raise ValueError(f"row {index}: expected lists of one length, one entry a token, got lengths {lengths}")
        present = row.pop("attention_mask", None) or [1] * len(row["input_ids"])
        kept = [position for position, is_token in enumerate(present) if is_token][:sequence_tokens]
        if kept:
            yield {name: [values[position] for position in kept] for name, values in row.items()}


def _pack(
    rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, sequence_tokens: int
) -> Iterator[dict[str, Any]]:
    """Sequences of `sequence_tokens` ids, cut from the documents' tokens in order."""
    pending: list[int] = []
    for batch in rows.iter(batch_size=TOKENIZER_BATCH):
        continues = batch.get("continues", [False] * len(batch[column]))
        documents = [pair for pair in zip(batch[column], continues, strict=True) if pair[0] is not None]
        texts = [text + "\n\n" if more else text for text, more in documents]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for ids, (_, more) in zip(encoded, documents, strict=True):
            pending += ids if more or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
            for start in range(0, len(pending) - sequence_tokens + 1, sequence_tokens):
                yield {"input_ids": np.asarray(pending[start : start + sequence_tokens], dtype=np.int32)}
            pending = pending[len(pending) // sequence_tokens * sequence_tokens :]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of input_ids (and labels or loss_mask) -> [B, T]; shorter rows are padded, with an attention_mask then."""
    lengths = [len(row["input_ids"]) for row in rows]
    batch = {"input_ids": _stack(rows, "input_ids", 0)}
    if "labels" in rows[0]:
        batch["labels"] = _stack(rows, "labels", IGNORED_LABEL)
    if "loss_mask" in rows[0]:
        batch["loss_mask"] = _stack(rows, "loss_mask", 0).bool()
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
        if indices is None:
            cache.keep_to(cache.view())  # in a loader's process too, and after a refresh
        draw_sets = cache.draw_sets() if indices is None or draw_set is None else np.zeros(0, np.uint64)
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
            record = self.cache.record(int(self._indices[index]))
        except CorruptRecord:
            return {"input_ids": np.zeros(1, np.int64), "loss_mask": np.zeros(1, bool)}
        mask = record.loss_mask if record.loss_mask is not None else np.ones(len(record.token_ids), bool)
        return {"input_ids": record.token_ids.astype(np.int64), "loss_mask": mask}

    def select(self, indices: npt.NDArray[np.int64]) -> CacheDataset:
        """Some of the sequences, in this order."""
        return CacheDataset(self.cache, draw_set=self.draw_set, indices=self._indices[indices])
