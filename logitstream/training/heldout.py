"""What an evaluation adds up over the batches of one process: labels and figures."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from logitstream.data.documents import Batch
from logitstream.data.loss_mask import IGNORED_LABEL, next_token_labels, supervised_mask
from logitstream.loss import Diagnostics
from logitstream.training.distributed import of_all_processes
from logitstream.training.stats import diagnostic_means
from logitstream.types import TargetSpec


class Heldout:
    """Sums of Diagnostics; they begin anew with each evaluation."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(Diagnostics._fields), dtype=torch.float64)
        self.spec: TargetSpec | None = None

    def add(self, seen: Diagnostics, spec: TargetSpec | None) -> None:
        """What one batch showed; spec: of its targets, None where it has none."""
        self.sums = self.sums + torch.stack(seen).cpu()
        self.spec = self.spec or spec

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over all processes; every one calls it. loss: cross-entropy per label, NaN where there was none."""
        total = accelerator.reduce(self.sums.to(accelerator.device), "sum").tolist()
        sums = dict(zip(Diagnostics._fields, total, strict=True))
        loss = sums["cross_entropy"] / sums["labelled_rows"] if sums["labelled_rows"] else math.nan
        spec = next((one for one in of_all_processes(self.spec) if one is not None), None)  # some may have had none
        return {"loss": loss} | diagnostic_means(sums, spec)


def labels_of(batch: Batch) -> Tensor:
    """int64 [B, T]: the tokens that rows which count are to predict, each at its own place; -100 elsewhere."""
    labels = next_token_labels(batch).masked_fill(~supervised_mask(batch), IGNORED_LABEL)
    return nn.functional.pad(labels, (1, -1), value=IGNORED_LABEL)
