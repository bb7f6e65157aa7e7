"""Text or a datasets path -> token sequences. They and their order are the same whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

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
    packed = Dataset.from_generator(
        _pack,
        gen_kwargs={"rows": rows, "column": text_column, "tokenizer": tokenizer, "sequence_tokens": sequence_tokens},
    )
    if len(packed) == 0:
        raise ValueError(f"the text holds less than one sequence of {sequence_tokens} tokens: {', '.join(paths)}")
    return packed


def split_heldout(
    sequences: Dataset, *, heldout_sequences: int, max_sequences: int, seed: int
) -> tuple[Dataset, Dataset]:
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
    """Rows of input_ids (and labels) -> int64 [B, T]; shorter rows are padded, with an attention_mask where any is."""
    lengths = [len(row["input_ids"]) for row in rows]
    batch = {"input_ids": _stack(rows, "input_ids", 0)}
    if "labels" in rows[0]:
        batch["labels"] = _stack(rows, "labels", IGNORED_LABEL)
    if min(lengths) < max(lengths):
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def _stack(rows: Sequence[dict[str, Any]], name: str, padding: int) -> torch.Tensor:
    tensors = [torch.as_tensor(row[name], dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
