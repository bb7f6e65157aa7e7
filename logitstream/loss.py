"""The distillation loss in plain torch: the specification that `fused_loss` is tested against.

With teacher weights t̂ (sparse, S = Σ t̂) and student logits z, one row's forward KL and its gradient are

    KL = Σ t̂ (log t̂ − log softmax(z/τ))    and    ∂KL/∂z = (S·softmax(z/τ) − t̂) / τ        (RS-KD, section 3)

both times τ², as in Hinton et al. (2015, section 2), so that the gradient's size does not depend on τ. S may differ
from 1 (a threshold draw, a proposal temperature, an unrenormalised top-k); a row without entries has S = 0 and adds
nothing. For sampled targets Σ t̂ log t̂ is the sample's entropy, so the value exceeds KL(teacher‖student) in
expectation by the entropy that sampling removes; the gradient does not depend on that and stays unbiased. Compare
methods by held-out statistics, never by this value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logitstream.data.loss_mask import IGNORED_LABEL, counted_rows
from logitstream.types import SparseTargets


class Diagnostics(NamedTuple):
    """Sums over supervised rows, detached float64 scalars: add them over calls and processes, then divide.

    kl is at the loss's temperature, without τ². kept_mass (the student's mass on the kept ids) and agreements (rows
    whose first choice of the student has the teacher's greatest weight) are over kept_rows, the rows with entries.
    cross_entropy is over labelled_rows; if it is not part of the loss, it is still summed for labels at τ = 1.
    """

    rows: Tensor
    kl: Tensor
    kept_rows: Tensor
    kept_mass: Tensor
    agreements: Tensor
    cross_entropy: Tensor
    labelled_rows: Tensor


def sparse_kl(
    logits: Tensor,
    targets: SparseTargets | None,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    loss_mask: Tensor | None = None,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Return ((1 − ce_weight)·τ²·KL + ce_weight·cross-entropy), summed over supervised rows, over num_items.

    logits: [..., V], R rows in all, V no smaller than the targets' vocabulary; row r of the targets belongs to row r of
        the logits (no shift: both predict the next token).
    targets: their spec tells the temperature τ and whether there is a ghost bucket, which holds what the kept ids leave
        of the teacher's and of the student's mass (RS-KD, section 2); without a spec τ is 1. None needs ce_weight=1.
    labels: int64, R in all, row r's next token, already shifted, -100 for none; cross-entropy is at τ = 1.
    loss_mask: bool, R in all: the supervised rows; by default those with a label, or all rows without labels.
    num_items: supervised rows of the whole step over all micro-batches and processes; by default those of this call.

    Raises ValueError if shapes or settings do not fit.
    """
    logits_RV = logits.reshape(-1, logits.shape[-1])
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    labels_R = None if labels is None else labels.reshape(-1)
    num_rows, vocab_size = logits_RV.shape
    check_arguments(targets, labels_R, loss_mask, ce_weight, num_rows=num_rows, vocab_size=vocab_size)
    mask_R = counted_rows(logits_RV[:, 0], loss_mask=loss_mask, labels=labels_R)
    total = logits_RV.new_zeros(())
    if targets is not None and ce_weight != 1:
        kl_R = _row_kl(logits_RV, targets)
        total = total + (1 - ce_weight) * drawn_with(targets)[0] ** 2 * kl_R[mask_R].sum()
    if labels_R is not None and ce_weight != 0:
        ce_R = torch.nn.functional.cross_entropy(logits_RV, labels_R, ignore_index=IGNORED_LABEL, reduction="none")
        total = total + ce_weight * ce_R[mask_R].sum()
    return total / (mask_R.sum().clamp(min=1) if num_items is None else num_items)


def drawn_with(targets: SparseTargets | None) -> tuple[float, bool]:
    """Return the temperature that targets were drawn at, and whether they have a ghost bucket."""
    spec = None if targets is None else targets.spec
    return (1.0, False) if spec is None else (spec.temperature, spec.kind.has_ghost)


def check_arguments(
    targets: SparseTargets | None,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    ce_weight: float,
    *,
    num_rows: int,
    vocab_size: int,
) -> None:
    """Raise ValueError if a loss's arguments do not fit together."""
    if not 0 <= ce_weight <= 1:
        raise ValueError(f"ce_weight must lie in [0, 1], got {ce_weight}")
    if ce_weight < 1 and targets is None:
        raise ValueError(f"no targets: expected ce_weight=1, got {ce_weight}")
    if ce_weight > 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight} needs labels")
    if targets is not None and targets.num_rows != num_rows:
        raise ValueError(
            f"expected targets of {num_rows} rows, one for each row of the student, got {targets.num_rows}"
        )
    if targets is not None and targets.vocab_size > vocab_size:  # more ids than the teacher's are padding
        raise ValueError(f"targets over {targets.vocab_size} ids, but the student's vocabulary has {vocab_size}")
    if labels is not None and labels.numel() != num_rows:
        raise ValueError(f"expected {num_rows} labels, got {labels.numel()}")
    if loss_mask is not None and loss_mask.numel() != num_rows:
        raise ValueError(f"expected a loss_mask of {num_rows} rows, got {loss_mask.numel()}")


def _row_kl(logits_RV: Tensor, targets: SparseTargets) -> Tensor:
    """Return Σ t̂ (log t̂ − log p) for each row, [R], with the ghost bucket's term if there is one."""
    temperature, has_ghost = drawn_with(targets)
    arrays = (targets.row_index(), targets.token_ids, targets.weights())
    rows_K, ids_K, weights_K = (torch.from_numpy(array).to(logits_RV.device) for array in arrays)
    ids_K, weights_K = ids_K.long(), weights_K.to(logits_RV.dtype)
    logprobs_RV = torch.log_softmax(logits_RV / temperature, dim=-1)
    terms_K = torch.xlogy(weights_K, weights_K) - weights_K * logprobs_RV[rows_K, ids_K]
    kl_R = logits_RV.new_zeros(len(logits_RV)).index_add(0, rows_K, terms_K)
    if not has_ghost:
        return kl_R
    kept_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
    kept_RV[rows_K, ids_K] = True
    teacher_rest_R = 1 - logits_RV.new_zeros(len(logits_RV)).index_add(0, rows_K, weights_K)
    has_rest = kept_RV.any(1) & ~kept_RV.all(1) & (teacher_rest_R > 0)
    rest_logprob = torch.logsumexp(logprobs_RV[has_rest].masked_fill(kept_RV[has_rest], -torch.inf), dim=-1)
    rest = teacher_rest_R[has_rest]
    return kl_R.index_add(0, has_rest.nonzero().squeeze(1), torch.xlogy(rest, rest) - rest * rest_logprob)
