"""A batch of tokens to the sequences that are sent, and their targets back onto the batch's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from logitstream.errors import CodecError
from logitstream.types import SparseTargets, TargetSpec, TokenSequence

Batch = dict[str, Any]
"""input_ids [B, T] and, where there are any, attention_mask, labels and loss_mask of the same shape."""
Rows = npt.NDArray[np.int64]
"""Which of a batch's flattened [B*T] rows a sequence's targets belong to, rising."""


def split_batch(batch: Batch) -> list[tuple[Rows, TokenSequence]]:
    """A batch's sequences without padding, and their rows; a sequence with no wanted row is left out."""
    input_ids = to_numpy(batch["input_ids"])
    if input_ids.ndim != 2:
        raise ValueError(f"expected input_ids of shape [batch, tokens], got {list(input_ids.shape)}")
    num_tokens = input_ids.shape[1]
    present = None if batch.get("attention_mask") is None else to_numpy(batch["attention_mask"]).astype(bool)
    wanted = _wanted(batch, input_ids.shape)
    parts = []
    for index, ids in enumerate(input_ids):
        keep = np.arange(num_tokens) if present is None else np.flatnonzero(present[index])
        mask = np.ones(len(keep), bool) if wanted is None else wanted[index, keep]
        if mask.any():
            sequence = TokenSequence(token_ids=ids[keep].astype(np.int32), loss_mask=None if mask.all() else mask)
            parts.append((index * num_tokens + keep, sequence))
    return parts


def _wanted(batch: Batch, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """bool [B, T]: the rows that will be trained on; None: all."""
    if batch.get("loss_mask") is not None:
        return to_numpy(batch["loss_mask"]).astype(bool)
    if batch.get("labels") is None:
        return None
    wanted = np.zeros(shape, dtype=bool)
    wanted[:, :-1] = to_numpy(batch["labels"])[:, 1:] != -100
    return wanted


def place_rows(
    parts: Sequence[tuple[Rows, SparseTargets]], *, num_rows: int, vocab_size: int, spec: TargetSpec | None = None
) -> SparseTargets:
    """Targets of several sequences, each on its rows, in rising order; every other row is empty.

    vocab_size, spec: of the targets where there are no sequences.

    Raises CodecError where targets do not have a row for each of their sequence's tokens.
    """
    nothing = np.zeros(0, np.int32)
    if not parts:
        offsets = np.zeros(num_rows + 1, np.int64)
        return SparseTargets(
            vocab_size=vocab_size, units=1, row_offsets=offsets, token_ids=nothing, counts=nothing, spec=spec
        )
    joined = SparseTargets.concatenate([targets for _, targets in parts])
    entries = np.zeros(num_rows, np.int64)
    for rows, targets in parts:
        if targets.num_rows != len(rows):
            raise CodecError(f"expected targets of {len(rows)} rows, one a token, got {targets.num_rows}")
    entries[np.concatenate([rows for rows, _ in parts])] = np.diff(joined.row_offsets)
    return replace(joined, row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(entries)]))


def leave_out(batch: Batch, rows: Rows) -> None:
    """Take the rows out of the loss: labels become -100, loss_mask (made where there are no labels) false.

    The batch's tensors are replaced, not changed: they may be the dataset's.
    """
    index = torch.from_numpy(rows)
    if batch.get("labels") is None and batch.get("loss_mask") is None:
        batch["loss_mask"] = torch.ones(tuple(batch["input_ids"].shape), dtype=torch.bool)
    for name, value in (("labels", -100), ("loss_mask", False)):
        if batch.get(name) is not None:
            flat = torch.as_tensor(batch[name]).clone().reshape(-1)
            flat[index.to(flat.device)] = value
            batch[name] = flat.reshape(tuple(batch["input_ids"].shape))


def to_numpy(values: Any) -> npt.NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
