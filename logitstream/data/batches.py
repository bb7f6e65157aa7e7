"""Rows -> a batch of tokens -> the sequences that the teacher is asked for; their targets -> the rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from logitstream.data.documents import Batch, number_documents, to_numpy
from logitstream.data.loss_mask import IGNORED_LABEL, supervised_mask
from logitstream.errors import CodecError
from logitstream.types import SparseTargets, TargetSpec, TokenSequence

Rows = npt.NDArray[np.int64]
"""The rows of a flattened batch [B*T] that a sequence's targets belong to, rising."""


def split_batch(batch: Batch) -> list[tuple[Rows, TokenSequence]]:
    """Return a batch's documents without padding, and their rows; a document without a wanted row is left out.

    ValueError if the batch holds something that the teacher cannot be told.
    """
    input_ids, numbers = to_numpy(batch["input_ids"]), number_documents(batch)
    wanted = to_numpy(supervised_mask(batch, with_targets=True))
    parts = []
    for index, own in enumerate(numbers):
        for number in range(1, own.max(initial=0) + 1):
            keep = np.flatnonzero(own == number)
            mask = wanted[index, keep]
            if mask.any():
                ids = input_ids[index, keep].astype(np.int32)
                sequence = TokenSequence(token_ids=ids, loss_mask=None if mask.all() else mask)
                parts.append((index * input_ids.shape[1] + keep, sequence))
    return parts


def place_rows(
    parts: Sequence[tuple[Rows, SparseTargets]], *, num_rows: int, vocab_size: int, spec: TargetSpec | None = None
) -> SparseTargets:
    """Join the targets of several sequences, each on its rows, in rising order; every other row is empty.

    vocab_size and spec are those of the result if there are no sequences. CodecError if some targets do not have a row
    for each of their sequence's tokens.
    """
    if not parts:
        nothing, offsets = np.zeros(0, np.int32), np.zeros(num_rows + 1, np.int64)
        return SparseTargets(
            vocab_size=vocab_size, units=1, row_offsets=offsets, token_ids=nothing, counts=nothing, spec=spec
        )
    joined = SparseTargets.concatenate([targets for _, targets in parts])
    for rows, targets in parts:
        if targets.num_rows != len(rows):
            raise CodecError(f"expected targets of {len(rows)} rows, one a token, got {targets.num_rows}")
    offsets = np.zeros(num_rows + 1, np.int64)
    offsets[1 + np.concatenate([rows for rows, _ in parts])] = np.diff(joined.row_offsets)
    return replace(joined, row_offsets=np.cumsum(offsets))


def leave_out(batch: Batch, rows: Rows) -> None:
    """Take the rows out of the loss: labels become -100, loss_mask (made if there are no labels) false.

    The batch's tensors are replaced, not changed: they may be the dataset's.
    """
    if batch.get("labels") is None and batch.get("loss_mask") is None:
        batch["loss_mask"] = torch.ones_like(torch.as_tensor(batch["input_ids"]), dtype=torch.bool)
    for name, value in (("labels", IGNORED_LABEL), ("loss_mask", False)):
        if batch.get(name) is not None:
            _fill(batch, name, rows, value)


def blank_out(batch: Batch, rows: Rows) -> None:
    """Take the rows out of the loss and set their tokens to id 0: the student never sees what the teacher refused."""
    leave_out(batch, rows)
    _fill(batch, "input_ids", rows, 0)


def _fill(batch: Batch, name: str, rows: Rows, value: int | bool) -> None:
    flat = torch.as_tensor(batch[name]).clone().reshape(-1)
    flat[torch.from_numpy(rows).to(flat.device)] = value
    batch[name] = flat.reshape(tuple(batch["input_ids"].shape))
