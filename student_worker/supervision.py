"""Which rows of a batch count, and what each one's label is.

Row t of a batch predicts token t + 1. Labels follow transformers' convention (labels[t] is token t, -100 is no label);
they are shifted here, once: `loss` and `fused_loss` see the label of row t at row t. A row is supervised where
loss_mask says so, without one where labels[t + 1] is a label, without either everywhere, and never on padding; so the
last row of a sequence counts for distillation when neither is given. Without targets only rows with a label count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from logitstream.loss import IGNORED_LABEL
from student_worker.batches import Batch


def supervised_mask(batch: Batch) -> Tensor:
    """bool [B, T]: the rows that count."""
    mask = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if batch.get("attention_mask") is not None:
        mask &= batch["attention_mask"].bool()
    if batch.get("loss_mask") is not None:
        mask &= batch["loss_mask"].bool()
    elif batch.get("labels") is not None:
        mask &= next_token_labels(batch) != IGNORED_LABEL
    if batch.get("targets") is None:
        mask &= next_token_labels(batch) != IGNORED_LABEL
    return mask


def next_token_labels(batch: Batch) -> Tensor:
    """int64 [B, T]: the label of row t, which is token t + 1; -100 where there is none."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    return nn.functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORED_LABEL)
