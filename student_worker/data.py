"""Text or a datasets path -> token sequences. They and their order are the same whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

from logitstream.cache import CacheReader
from logitstream.errors import CacheError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDERS = {".txt": "text", ".md": "text", ".rst": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TOKENIZER_BATCH = 256
IGNORED_LABEL = -100


def load_sequences(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, sequence_tokens: int, text_column: str = "text"
) -> Dataset:
    """A dataset with `input_ids` (int32, `sequence_tokens` a row) and, where the input has them, `labels`.

    Text is tokenized, joined with end-of-text tokens between documents and cut; the last, incomplete sequence is
    dropped. Rows that hold input_ids already are used as they are, but for their length, which is cut.
    """
    rows = concatenate_datasets([_load(path) for path in paths])
    if "input_ids" in rows.column_names:
        return _cut(rows, sequence_tokens)
    if text_column not in rows.column_names:
        raise ValueError(f"expected a column {text_column!r} or 'input_ids', got {', '.join(rows.column_names)}")
    arguments = {"rows": rows, "column": text_column, "tokenizer": tokenizer, "sequence_tokens": sequence_tokens}
    if next(_pack(**arguments), None) is None:
        raise ValueError(f"the text holds less than one sequence of {sequence_tokens} tokens: {', '.join(paths)}")
    return Dataset.from_generator(_pack, gen_kwargs=arguments)


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


def _load(path: str) -> Dataset:
    """One file, or a folder that `datasets` saved, as rows."""
    file = Path(path)
    if file.is_dir():
        loaded = load_from_disk(path)
        return loaded["train"] if isinstance(loaded, DatasetDict) else loaded
    builder = BUILDERS.get(file.suffix.lower())
    if builder is None or not file.exists():
        raise ValueError(f"cannot read {path}: expected an existing {', '.join(BUILDERS)} file or a datasets folder")
    if builder == "text":  # paragraph by paragraph, so that a large file never lies in memory whole
        rows = load_dataset("text", data_files=path, split="train", sample_by="paragraph")
        return rows.add_column("continues", [True] * (len(rows) - 1) + [False])
    return load_dataset(builder, data_files=path, split="train")


def _cut(rows: Dataset, sequence_tokens: int) -> Dataset:
    columns = [name for name in ("input_ids", "labels") if name in rows.column_names]
    return rows.select_columns(columns).map(
        lambda batch: {name: [ids[:sequence_tokens] for ids in batch[name]] for name in columns}, batched=True
    )


def _pack(
    rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, sequence_tokens: int
) -> Iterator[dict[str, Any]]:
    """Sequences of `sequence_tokens` ids, cut from the documents' tokens in order."""
    pending: list[int] = []
    for batch in rows.iter(batch_size=TOKENIZER_BATCH):
        continues = batch.get("continues", [False] * len(batch[column]))
        texts = [text + "\n\n" if more else text for text, more in zip(batch[column], continues, strict=True)]
        for ids, more in zip(tokenizer(texts, add_special_tokens=False)["input_ids"], continues, strict=True):
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

    The order depends on the content alone. A damaged record comes as one token that no loss is taken of.
    """

    def __init__(
        self, cache: CacheReader, *, draw_set: int | None = None, indices: npt.NDArray[np.int64] | None = None
    ) -> None:
        """draw_set None: the smallest one that the cache holds; indices: of the cache's keys, instead of all of it."""
        self._cache = cache
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
            record = self._cache.record(int(self._indices[index]))
        except CacheError:
            return {"input_ids": np.zeros(1, np.int64), "loss_mask": np.zeros(1, bool)}
        mask = record.loss_mask if record.loss_mask is not None else np.ones(len(record.token_ids), bool)
        return {"input_ids": record.token_ids.astype(np.int64), "loss_mask": mask}

    def select(self, indices: npt.NDArray[np.int64]) -> CacheDataset:
        """Some of the sequences, in this order."""
        return CacheDataset(self._cache, draw_set=self.draw_set, indices=self._indices[indices])
