"""The loss mask: which rows of a batch count. The one rule for the request, the loss and the statistics.

Row t of a batch predicts token t + 1. loss_mask is about rows; labels (transformers' convention: labels[t] is token t,
-100 is no label), completion_mask and assistant_masks are about tokens. They are shifted here, once, so that `loss` and
`fused_loss` find the label of row t at row t. A row counts if all of these hold:

- loss_mask marks it; without a loss_mask, it has a label; with neither, always (`counted_rows`),
- completion_mask and assistant_masks, if given, mark token t + 1,
- it is not padding,
- the batch has targets, or the row has a label.

Nothing crosses the border between two documents of a row: a document's last row has no label, as at the end of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from logitstream.data.documents import PACKING, ROW_MASK, TOKEN_MASKS, Batch, number_documents

IGNORED_LABEL = -100


def counted_rows(like: Tensor, *, loss_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Return the rows that loss_mask marks, else those with a label, else all: bool, shape and device of `like`."""
    if loss_mask is not None:
        return loss_mask.reshape(like.shape).to(device=like.device, dtype=torch.bool)
    if labels is not None:
        return labels.reshape(like.shape).to(like.device) != IGNORED_LABEL
    return torch.ones_like(like, dtype=torch.bool)


def supervised_mask(batch: Batch, *, with_targets: bool | None = None) -> Tensor:
    """Return which rows count, bool [B, T]; with_targets None looks for targets in the batch."""
    numbers = _numbers(batch)
    labels = None if batch.get("labels") is None else _next(batch["labels"], numbers)
    loss_mask = None if batch.get(ROW_MASK) is None else torch.as_tensor(batch[ROW_MASK])
    mask = counted_rows(torch.as_tensor(batch["input_ids"]), loss_mask=loss_mask, labels=labels)
    if numbers is not None:
        mask = mask & (numbers > 0)
    for name in TOKEN_MASKS:
        if batch.get(name) is not None:
            mask = mask & (_next(batch[name], numbers, padding=0) > 0)
    if with_targets is None:
        with_targets = batch.get("targets") is not None
    return mask if with_targets else mask & (next_token_labels(batch) != IGNORED_LABEL)


def next_token_labels(batch: Batch) -> Tensor:
    """Return the label of each row t, which is token t + 1: int64 [B, T], -100 if there is none."""
    numbers, labels = _numbers(batch), batch.get("labels")
    if labels is None:
        labels = torch.as_tensor(batch["input_ids"])
        labels = labels if numbers is None else labels.masked_fill(numbers == 0, IGNORED_LABEL)
    return _next(labels, numbers)


def _numbers(batch: Batch) -> Tensor | None:
    """Return `number_documents` as a tensor; None if each row is one document without padding."""
    if not any(batch.get(name) is not None for name in ("attention_mask", *PACKING)):
        return None
    return torch.from_numpy(number_documents(batch)).to(torch.as_tensor(batch["input_ids"]).device)


def _next(values: Tensor, numbers: Tensor | None, *, padding: int = IGNORED_LABEL) -> Tensor:
    """Give row t the value of token t + 1, or `padding` if that token is missing or another document's."""
    shifted = nn.functional.pad(torch.as_tensor(values)[:, 1:].long(), (0, 1), value=padding)
    if numbers is None:
        return shifted
    following = nn.functional.pad(numbers[:, 1:], (0, 1))
    return shifted.masked_fill((following != numbers) & (following > 0), padding)
