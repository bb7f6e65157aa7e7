"""The documents of a batch: which tokens belong to which.

A row of a batch may hold several documents (packing). The teacher scores each alone, and the student sees each alone.
They are marked by position_ids [B, T] that count from 0 in each document, or by seq_idx [B, T], one number a document;
attention_mask [B, T] is 0 on padding. The cu_seq_lens and max_length of flash attention are passed over: it derives
them from position_ids. Anything in a batch that the teacher could not be told is refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Batch = dict[str, Any]
"""input_ids [B, T] and, optionally, labels, masks and the marks of documents."""
Numbers = npt.NDArray[np.int64]

ROW_MASK = "loss_mask"
"""[B, T]: entry t is about row t, which predicts token t + 1."""
TOKEN_MASKS = ("completion_mask", "assistant_masks")
"""[B, T]: entry t is about token t, as a label is; row t - 1 predicts it."""
FOR_THE_LOSS = ("labels", ROW_MASK, *TOKEN_MASKS, "targets")
"""Names that the model's forward does not get."""
DERIVED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PACKING = ("position_ids", "seq_idx", *DERIVED[:2])
MARKS = ("attention_mask", "position_ids", "seq_idx")
KNOWN = ("input_ids", *MARKS, *DERIVED, *FOR_THE_LOSS)


def number_documents(batch: Batch) -> Numbers:
    """Number each token's document from 1 within its row: int64 [B, T], 0 on padding.

    ValueError, by name, if the batch holds something that the teacher cannot be told.
    """
    shape = tuple(np.shape(batch["input_ids"]))
    _check_names(batch, shape)
    marks = {name: _mark(name, batch[name], shape) for name in MARKS if batch.get(name) is not None}
    mask, positions, seq_idx = (marks.get(name) for name in MARKS)
    if positions is None and batch.get(DERIVED[0]) is not None:
        raise ValueError(f"{DERIVED[0]} in a batch without position_ids: mark documents by position_ids")
    present = np.ones(shape, bool) if mask is None else mask != 0
    if mask is not None and not np.isin(mask, (0, 1)).all():
        raise ValueError("expected an attention_mask of 0 (padding) and 1: mark documents by position_ids or seq_idx")
    if seq_idx is not None:
        begins = np.diff(np.where(present, seq_idx, -1), axis=1, prepend=-1) != 0
    else:
        begins = np.zeros(shape, bool) if positions is None else positions == 0
    first = present & (np.cumsum(present, axis=1) == 1)
    numbers: Numbers = np.where(present, np.cumsum(first | (begins & present), axis=1), 0)
    if positions is not None and (wrong := present & (positions != positions_of(numbers))).any():
        row, token = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"row {row} of a batch, token {token}: its position is {positions[row, token]}, expected position_ids that "
            "count from 0 in each document: the teacher cannot be told of others"
        )
    return numbers


def positions_of(numbers: Numbers) -> Numbers:
    """Return each token's place in its document, counted from 0 without padding: int64 [B, T], 0 on padding."""
    present = numbers > 0
    rank = np.cumsum(present, axis=1)
    highest_before = np.maximum.accumulate(np.pad(numbers, ((0, 0), (1, 0)))[:, :-1], axis=1)
    first = np.maximum.accumulate(np.where(numbers > highest_before, rank, 0), axis=1)
    return np.where(present, rank - first, 0)


def for_the_model(batch: Batch, *, takes_positions: bool = True) -> Batch:
    """Return the arguments of the student's forward, such that each document is seen alone, at its own positions.

    Packed rows are marked by position_ids alone, as transformers understands them; with a mask beside those it would
    take a row for one document. Padding on the left or inside does not move positions, if the model takes positions.
    ValueError as from `number_documents`.
    """
    numbers = number_documents(batch)
    inputs = {name: value for name, value in batch.items() if name not in (*FOR_THE_LOSS, *DERIVED, *MARKS[:2])}
    device = torch.as_tensor(batch["input_ids"]).device
    positions = positions_of(numbers)
    present, is_packed = numbers > 0, numbers.max(initial=0) > 1
    if is_packed and (split := present[:, 1:] & ~present[:, :-1] & (positions[:, 1:] > 0)).any():
        row = int(np.argwhere(split)[0, 0])
        raise ValueError(f"row {row} of a batch: expected packed documents without padding inside")
    if not is_packed and not present.all():
        inputs["attention_mask"] = torch.from_numpy(present.astype(np.int64)).to(device)
    moved = (positions != np.arange(numbers.shape[1]))[present].any()
    if is_packed or (takes_positions and moved):  # only then, as the copy waits for a GPU
        inputs["position_ids"] = torch.from_numpy(positions).to(device)
    return inputs


def to_numpy(values: Any) -> npt.NDArray[Any]:
    """Return a tensor's or a list's values on the CPU."""
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)


def _check_names(batch: Batch, shape: tuple[int, ...]) -> None:
    """ValueError for a tensor that is none of KNOWN, unless it has one entry a row: the teacher would not get it."""
    if len(shape) != 2:
        raise ValueError(f"expected input_ids of shape [batch, tokens], got {list(shape)}")
    for name, value in batch.items():
        found = getattr(value, "shape", None)
        if name not in KNOWN and found is not None and tuple(found) not in ((), shape[:1]):
            raise ValueError(
                f"{name} of shape {list(found)} in a batch cannot be told to the teacher: take it out of the batch "
                f"(known are {', '.join(KNOWN)})"
            )


def _mark(name: str, values: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    found = to_numpy(values)
    if found.shape not in (shape, (1, shape[1])):  # one row may stand for all
        raise ValueError(f"expected {name} of shape {list(shape)}, got {list(found.shape)}: the teacher cannot be told")
    return np.broadcast_to(found, shape)
