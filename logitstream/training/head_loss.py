"""The loss of one batch, and what comes of it in a model's forward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from logitstream.fused_loss import FusedLoss, fused_linear_sparse_kl
from logitstream.loss import Diagnostics, diagnostics_of, sparse_kl


class StudentLoss(NamedTuple):
    """The loss to train on is loss + own_loss.

    loss: the distillation loss, over the items of the whole step; diagnostics: what was seen on the way.
    own_loss: what the model itself adds to its cross-entropy, a mixture of experts its router's loss, of this batch; 0
        where it adds nothing.
    """

    loss: Tensor
    diagnostics: Diagnostics
    own_loss: Tensor


class HeadLoss:
    """`fused_linear_sparse_kl` of one batch, all but the head's part bound; or `sparse_kl`, where logits are wanted.

    An object that no framework looks into: FSDP2 casts and moves the tensors that it finds in a module's arguments, and
    torch.compile would compile anew for each batch's.
    """

    def __init__(self, *, from_logits: bool = False, chunk_bytes: int | None = None, **arguments: Any) -> None:
        self.from_logits = from_logits
        self.chunk_bytes = chunk_bytes
        self.arguments = arguments

    def of_head(self, hidden: Tensor, head: nn.Linear, logit_softcap: float | None) -> FusedLoss:
        """The loss of the head's input."""
        fused: FusedLoss = fused_linear_sparse_kl(
            hidden,
            head.weight,
            bias=head.bias,
            logit_softcap=logit_softcap,
            chunk_bytes=self.chunk_bytes,
            **self.arguments,
        )
        return fused

    def of_logits(self, logits: Tensor) -> FusedLoss:
        """The same of logits [B, T, V]; of more than T rows (a learned prompt before them) the last T count."""
        logits = logits[:, -self.arguments["labels"].shape[-1] :]
        diagnostics = diagnostics_of(logits, **{k: v for k, v in self.arguments.items() if k != "num_items"})
        return FusedLoss(sparse_kl(logits, **self.arguments), diagnostics)
