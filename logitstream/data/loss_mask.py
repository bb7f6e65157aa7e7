"""Which rows of a batch count, and what each one's label is: the one rule for what is asked for, the loss, the figures.

Row t of a batch predicts token t + 1. loss_mask is about rows; labels (transformers' convention: labels[t] is token t,
-100 is no label), completion_mask and assistant_masks are about tokens: they are shifted here, once, so that `loss` and
`fused_loss` see the label of row t at row t. A row counts

- where loss_mask says so; without one, where labels[t + 1] is a label; without either, everywhere;
- and where completion_mask and assistant_masks, if they are there, mark token t + 1;
- never on padding; without targets only with a label.

Nothing crosses the border between the documents of a row: a document's last row has no label there, as at a row's end.
So it counts for distillation where neither labels nor token masks are given, packed or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from logitstream.data.documents import PACKING, ROW_MASK, TOKEN_MASKS, Batch, number_documents
from logitstream.loss import IGNORED_LABEL


def supervised_mask(batch: Batch, *, with_targets: bool | None = None) -> Tensor:
    """bool [B, T]: the rows that count; with_targets None: whether the batch holds targets."""
    input_ids = torch.as_tensor(batch["input_ids"])
    numbers = _numbers(batch)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if numbers is None else numbers > 0
    if batch.get(ROW_MASK) is not None:
        mask = mask & torch.as_tensor(batch[ROW_MASK]).bool()
    elif batch.get("labels") is not None:
        mask = mask & (_next(batch["labels"], numbers) != IGNORED_LABEL)
    for name in TOKEN_MASKS:
        if batch.get(name) is not None:
            mask = mask & (_next(torch.as_tensor(batch[name]).long() - 1, numbers, padding=-1) >= 0)
    if not (batch.get("targets") is not None if with_targets is None else with_targets):
        mask = mask & (next_token_labels(batch) != IGNORED_LABEL)
    return mask


def next_token_labels(batch: Batch) -> Tensor:
    """int64 [B, T]: the label of row t, which is token t + 1; -100 where there is none."""
    numbers = _numbers(batch)
    labels = batch.get("labels")
    if labels is None:
        labels = torch.as_tensor(batch["input_ids"])
        if numbers is not None:
            labels = labels.masked_fill(numbers == 0, IGNORED_LABEL)
    return _next(labels, numbers)


def _numbers(batch: Batch) -> Tensor | None:
    """int64 [B, T]: `number_documents`; None where each row is one document without padding."""
    if not any(batch.get(name) is not None for name in ("attention_mask", *PACKING)):
        return None
    return torch.from_numpy(number_documents(batch)).to(torch.as_tensor(batch["input_ids"]).device)


def _next(values: Tensor, numbers: Tensor | None, *, padding: int = IGNORED_LABEL) -> Tensor:
    """Row t gets the value of token t + 1, and `padding` where that is another document's, or none."""
    shifted = nn.functional.pad(torch.as_tensor(values)[:, 1:].long(), (0, 1), value=padding)
    if numbers is None:
        return shifted
    following = nn.functional.pad(numbers[:, 1:], (0, 1))
    return shifted.masked_fill((following != numbers) & (following > 0), padding)
