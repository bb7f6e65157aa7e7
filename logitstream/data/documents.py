"""Which tokens of a batch belong to which document, however the batch says so; what nobody could be told is refused.

A row of a batch may hold several documents (packing). Each is scored by the teacher alone and seen by the student
alone. Collators say which in one of these ways; where one says it in several, they have to agree:

    position_ids                    [B, T]: count from 0 in each document
    attention_mask                  [B, T] of numbers: one a document, 0 is padding (0 and 1 alone say padding alone)
    attention_mask                  [B, 1, T, T], bool or additive: causal in each document, nothing between them
    seq_idx                         [B, T]: one number a document
    cu_seq_lens_q, cu_seq_lens_k    [documents + 1]: where documents begin in the flattened batch, and its end
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Batch = dict[str, Any]
"""input_ids [B, T] and, where there are any, labels, masks, and what says which tokens make a document."""
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ROW_MASK = "loss_mask"
"""[B, T]: entry t is about row t, which predicts token t + 1."""
TOKEN_MASKS = ("completion_mask", "assistant_masks")
"""[B, T]: entry t is about token t, as a label is; it is row t - 1 that predicts it."""
FOR_THE_LOSS = ("labels", ROW_MASK, *TOKEN_MASKS, "targets")
"""What the model's forward does not get."""
CU_SEQ_LENS = ("cu_seq_lens_q", "cu_seq_lens_k")
PACKING = ("position_ids", "seq_idx", *CU_SEQ_LENS)
KNOWN = ("input_ids", "attention_mask", *PACKING, "max_length_q", "max_length_k", *FOR_THE_LOSS)


def number_documents(batch: Batch) -> Numbers:
    """int64 [B, T]: each token's document, counted from 1 within its row; 0 on padding.

    Raises ValueError where the batch holds something that the teacher cannot be told of, by name.
    """
    shape = tuple(np.shape(batch["input_ids"]))
    if len(shape) != 2:
        raise ValueError(f"expected input_ids of shape [batch, tokens], got {list(shape)}")
    _check_names(batch, shape)
    present, said = _of_attention_mask(batch.get("attention_mask"), shape)
    if batch.get("position_ids") is not None:
        said["position_ids"] = _of_positions(_per_token("position_ids", batch["position_ids"], shape), present)
    if batch.get("seq_idx") is not None:
        said["seq_idx"] = _of_runs("seq_idx", _per_token("seq_idx", batch["seq_idx"], shape), present)
    for name in CU_SEQ_LENS:
        if batch.get(name) is not None:
            said[name] = _of_lengths(name, to_numpy(batch[name]), present)
    (first, numbers), *others = said.items() or [("input_ids", present.astype(np.int64))]
    for name, other in others:
        if (other != numbers).any():
            row = int(np.flatnonzero((other != numbers).any(1))[0])
            raise ValueError(f"row {row} of a batch: {first} and {name} say different documents")
    return numbers


def positions_of(numbers: Numbers) -> Numbers:
    """int64 [B, T]: each token's place in its document, counted from 0 without padding; 0 on padding."""
    present = numbers > 0
    rank = np.cumsum(present, axis=1)
    highest_before = np.maximum.accumulate(np.pad(numbers, ((0, 0), (1, 0)))[:, :-1], axis=1)
    first = np.maximum.accumulate(np.where(numbers > highest_before, rank, 0), axis=1)
    return np.where(present, rank - first, 0)


def for_the_model(batch: Batch, *, takes_positions: bool = True) -> Batch:
    """What the student's forward gets: the batch such that each document is seen alone, at its own positions.

    Packed rows say so by position_ids alone, as transformers understands them; a mask beside those would make it take a
    row for one document. Padding on the left, or inside, does not move positions (takes_positions: the model has them).
    Raises what `number_documents` does, and ValueError for padding inside a document of a packed row.
    """
    inputs = {name: value for name, value in batch.items() if name not in FOR_THE_LOSS}
    _check_names(batch, tuple(np.shape(batch["input_ids"])))
    if not any(inputs.get(name) is not None for name in ("attention_mask", *PACKING)):
        return inputs
    numbers = number_documents(batch)
    present, positions = numbers > 0, positions_of(numbers)
    device = torch.as_tensor(batch["input_ids"]).device
    inputs.pop("attention_mask", None)
    inputs.pop("position_ids", None)
    if numbers.max(initial=0) > 1:
        _check_whole(numbers)
        return inputs | {"position_ids": torch.from_numpy(positions).to(device)}
    if not present.all():
        inputs["attention_mask"] = torch.from_numpy(present.astype(np.int64)).to(device)
    if takes_positions and (positions != np.arange(numbers.shape[1]))[present].any():
        inputs["position_ids"] = torch.from_numpy(positions).to(device)
    return inputs


def to_numpy(values: Any) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _check_names(batch: Batch, shape: tuple[int, ...]) -> None:
    """ValueError for a tensor that is none of KNOWN, unless it has one entry a row: the teacher would not get it."""
    for name, value in batch.items():
        found = getattr(value, "shape", None)
        if name not in KNOWN and found is not None and tuple(found) not in ((), shape[:1]):
            raise ValueError(
                f"{name} of shape {list(found)} in a batch cannot be told to the teacher: take it out of the batch "
                f"(known are {', '.join(KNOWN)})"
            )


def _per_token(name: str, values: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """[B, T]; a first dimension of 1 stands for every row."""
    found = to_numpy(values)
    if found.shape not in (shape, (1, shape[1])):
        raise ValueError(f"expected {name} of shape {list(shape)}, got {list(found.shape)}: the teacher cannot be told")
    return np.broadcast_to(found, shape)


def _of_attention_mask(mask: Any, shape: tuple[int, ...]) -> tuple[Mask, dict[str, Numbers]]:
    """Which tokens are no padding, and the documents where the mask says which."""
    if mask is None:
        return np.ones(shape, bool), {}
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bfloat16:
        mask = mask.float()
    found = np.asarray(()) if isinstance(mask, dict) else to_numpy(mask)
    if found.shape in ((shape[0], 1, shape[1], shape[1]), (1, 1, shape[1], shape[1])):
        numbers = _of_blocks(np.broadcast_to(found[:, 0], (*shape, shape[1])))
        return numbers > 0, {"attention_mask": numbers}
    if found.shape != shape or (found < 0).any() or (found != np.floor(found)).any():
        raise ValueError(
            "expected an attention_mask of shape [batch, tokens] that is 0 on padding, or one of [batch, 1, tokens, "
            f"tokens], got {'a dict' if isinstance(mask, dict) else list(found.shape)}: the teacher cannot be told"
        )
    present = found != 0
    return present, {"attention_mask": _of_runs("attention_mask", found, present)} if found.max(initial=0) > 1 else {}


def _of_blocks(mask: npt.NDArray[Any]) -> Numbers:
    """The documents of a mask [B, T, T] of who attends to whom; a token that does not attend to itself is padding."""
    # A floating mask without a 1 is one to be added, were it all 0 for there is nothing to hide.
    is_added = mask.dtype != bool and ((mask < 0).any() or (mask.dtype.kind == "f" and not mask.any()))
    attends = mask == (0 if is_added else 1)
    present = np.diagonal(attends, axis1=1, axis2=2)
    first = attends.argmax(2)
    index = np.arange(mask.shape[1])
    numbers = np.where(present, np.cumsum(present & (first == index), axis=1), 0)
    expected = (numbers[:, :, None] == numbers[:, None, :]) & (index[:, None] >= index) & present[:, None, :]
    wrong = (attends != expected).any(2) & present
    if wrong.any():
        row, token = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"row {row} of a batch, token {token}: the attention_mask of 4 dimensions is not causal attention within "
            "documents that stand one after the other: the teacher cannot be told"
        )
    return numbers


def _of_positions(positions: npt.NDArray[Any], present: Mask) -> Numbers:
    numbers = np.zeros(positions.shape, np.int64)
    for row, (values, kept) in enumerate(zip(positions, present, strict=True)):
        numbers[row, kept] = np.cumsum(values[kept] == 0)
    wrong = present & (positions_of(np.maximum(numbers, present)) != positions)
    if wrong.any():
        row, token = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"row {row} of a batch, token {token}: its position is {positions[row, token]}, expected position_ids that "
            "count from 0 in each document: the teacher cannot be told of others"
        )
    return numbers


def _of_runs(name: str, values: npt.NDArray[Any], present: Mask) -> Numbers:
    """Documents of equal values that stand together."""
    numbers = np.zeros(values.shape, np.int64)
    for row, (own, kept) in enumerate(zip(values, present, strict=True)):
        changes = np.diff(own[kept], prepend=own[kept][:1]) != 0
        numbers[row, kept] = 1 + np.cumsum(changes)
        if numbers[row].max(initial=0) > len(np.unique(own[kept])):
            raise ValueError(f"row {row} of a batch: {name} gives one number to tokens that do not stand together")
    return numbers


def _of_lengths(name: str, bounds: npt.NDArray[Any], present: Mask) -> Numbers:
    num_rows, num_tokens = present.shape
    is_rising = bounds.ndim == 1 and len(bounds) > 1 and bounds[0] == 0 and (np.diff(bounds) > 0).all()
    if not is_rising or bounds[-1] != present.size or not np.isin(np.arange(num_rows) * num_tokens, bounds).all():
        raise ValueError(
            f"expected {name} to rise from 0 to the {present.size} tokens of the batch, with a bound wherever one of "
            f"its {num_rows} rows begins, got {bounds.tolist()[:16]}"
        )
    starts = np.zeros(present.size, bool)
    starts[bounds[:-1]] = True
    return np.where(present, np.cumsum(starts.reshape(present.shape), axis=1), 0)


def _check_whole(numbers: Numbers) -> None:
    """ValueError where padding lies between tokens of one document."""
    for row, own in enumerate(numbers):
        kept = np.flatnonzero(own)
        if ((np.diff(kept) > 1) & (np.diff(own[kept]) == 0)).any():
            raise ValueError(f"row {row} of a batch: padding inside a document of a row that holds several")
