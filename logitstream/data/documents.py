"""The documents of a batch: which tokens belong to which, however the batch says so.

A row of a batch may hold several documents (packing). The teacher scores each alone, and the student sees each alone.
Collators mark them in one of these ways; several ways in one batch have to agree:

    position_ids                    [B, T]: count from 0 in each document
    attention_mask                  [B, T] of numbers: one a document, 0 is padding (0 and 1 alone mark padding only)
    seq_idx                         [B, T]: one number a document

The cu_seq_lens and max_length of flash attention are passed over: it derives them from position_ids, which have to be
there too. Anything in a batch that the teacher could not be told is refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Batch = dict[str, Any]
"""input_ids [B, T] and, optionally, labels, masks and the marks of documents."""
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ROW_MASK = "loss_mask"
"""[B, T]: entry t is about row t, which predicts token t + 1."""
TOKEN_MASKS = ("completion_mask", "assistant_masks")
"""[B, T]: entry t is about token t, as a label is; row t - 1 predicts it."""
FOR_THE_LOSS = ("labels", ROW_MASK, *TOKEN_MASKS, "targets")
"""Names that the model's forward does not get."""
DERIVED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PACKING = ("position_ids", "seq_idx", *DERIVED[:2])
KNOWN = ("input_ids", "attention_mask", *PACKING, *DERIVED[2:], *FOR_THE_LOSS)


def number_documents(batch: Batch) -> Numbers:
    """Number each token's document from 1 within its row: int64 [B, T], 0 on padding.

    ValueError, by name, if the batch holds something that the teacher cannot be told.
    """
    shape = tuple(np.shape(batch["input_ids"]))
    if len(shape) != 2:
        raise ValueError(f"expected input_ids of shape [batch, tokens], got {list(shape)}")
    _check_names(batch, shape)
    present, found = _from_attention_mask(batch.get("attention_mask"), shape)
    for name in ("position_ids", "seq_idx"):
        if batch.get(name) is None:
            continue
        values = to_numpy(batch[name])
        if values.shape not in (shape, (1, shape[1])):  # one row may stand for all
            raise ValueError(
                f"expected {name} of shape {list(shape)}, got {list(values.shape)}: the teacher cannot be told"
            )
        values = np.broadcast_to(values, shape)
        found[name] = _from_positions(values, present) if name == "position_ids" else _from_runs(name, values, present)
    if batch.get("position_ids") is None and batch.get(DERIVED[0]) is not None:
        raise ValueError(f"{DERIVED[0]} in a batch without position_ids: mark documents by position_ids")
    (first, numbers), *others = found.items() or [("input_ids", present.astype(np.int64))]
    for name, other in others:
        if (other != numbers).any():
            row = int(np.flatnonzero((other != numbers).any(1))[0])
            raise ValueError(f"row {row} of a batch: {first} and {name} say different documents")
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
    ValueError as from `number_documents`, and for padding inside a document of a packed row.
    """
    inputs = {name: value for name, value in batch.items() if name not in (*FOR_THE_LOSS, *DERIVED)}
    _check_names(batch, tuple(np.shape(batch["input_ids"])))
    if not any(batch.get(name) is not None for name in ("attention_mask", *PACKING)):
        return inputs
    numbers = number_documents(batch)
    present, positions = numbers > 0, positions_of(numbers)
    device = torch.as_tensor(batch["input_ids"]).device
    inputs.pop("attention_mask", None)
    inputs.pop("position_ids", None)
    if numbers.max(initial=0) > 1:
        inside = (numbers[:, 1:] != numbers[:, :-1]) & (positions[:, 1:] > 0)
        if inside.any():
            row = np.argwhere(inside)[0, 0]
            raise ValueError(f"row {row} of a batch: padding inside a document of a row that holds several")
        return inputs | {"position_ids": torch.from_numpy(positions).to(device)}
    if not present.all():
        inputs["attention_mask"] = torch.from_numpy(present.astype(np.int64)).to(device)
    if takes_positions and (positions != np.arange(numbers.shape[1]))[present].any():
        inputs["position_ids"] = torch.from_numpy(positions).to(device)
    return inputs


def to_numpy(values: Any) -> npt.NDArray[Any]:
    """Return a tensor's or a list's values on the CPU; bfloat16, which numpy lacks, as float32."""
    if isinstance(values, torch.Tensor):
        return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
    return np.asarray(values)


def _check_names(batch: Batch, shape: tuple[int, ...]) -> None:
    """ValueError for a tensor that is none of KNOWN, unless it has one entry a row: the teacher would not get it."""
    for name, value in batch.items():
        found = getattr(value, "shape", None)
        if name not in KNOWN and found is not None and tuple(found) not in ((), shape[:1]):
            raise ValueError(
                f"{name} of shape {list(found)} in a batch cannot be told to the teacher: take it out of the batch "
                f"(known are {', '.join(KNOWN)})"
            )


def _from_attention_mask(mask: Any, shape: tuple[int, ...]) -> tuple[Mask, dict[str, Numbers]]:
    """Return which tokens are not padding, and the documents if the mask numbers them."""
    if mask is None:
        return np.ones(shape, bool), {}
    found = np.asarray(()) if isinstance(mask, dict) else to_numpy(mask)
    if found.shape != shape or (found < 0).any() or (found != np.floor(found)).any():
        raise ValueError(
            "expected an attention_mask of shape [batch, tokens] that is 0 on padding, got "
            f"{'a dict' if isinstance(mask, dict) else list(found.shape)}: mark documents by position_ids instead, the "
            "teacher cannot be told"
        )
    present = found != 0
    return present, {"attention_mask": _from_runs("attention_mask", found, present)} if (found > 1).any() else {}


def _from_positions(positions: npt.NDArray[Any], present: Mask) -> Numbers:
    numbers = np.where(present, np.cumsum(present & (positions == 0), axis=1), 0)
    wrong = present & (positions_of(np.maximum(numbers, present)) != positions)
    if wrong.any():
        row, token = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"row {row} of a batch, token {token}: its position is {positions[row, token]}, expected position_ids that "
            "count from 0 in each document: the teacher cannot be told of others"
        )
    return numbers


def _from_runs(name: str, values: npt.NDArray[Any], present: Mask) -> Numbers:
    """Number the runs of equal values, padding aside."""
    numbers = np.zeros(values.shape, np.int64)
    for row, (own, kept) in enumerate(zip(values, present, strict=True)):
        numbers[row, kept] = 1 + np.cumsum(np.diff(own[kept], prepend=own[kept][:1]) != 0)
        if numbers[row].max(initial=0) > len(np.unique(own[kept])):
            raise ValueError(f"row {row} of a batch: {name} gives one number to tokens that do not stand together")
    return numbers
