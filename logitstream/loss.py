"""The distillation loss in plain torch: the specification that `fused_loss` is tested against.

With teacher weights t̂ (sparse, S = Σ t̂) and student logits z, one row's forward KL and its gradient are

    KL = Σ t̂ (log t̂ − log softmax(z/τ))    and    ∂KL/∂z = (S·softmax(z/τ) − t̂) / τ        (RS-KD, section 3)

both times τ², as Hinton et al. (2015, section 2) have it, so that the gradient's size does not depend on τ. S may
differ from 1 (a threshold draw, a proposal temperature, an unrenormalised top-k); a row without entries has S = 0 and
gives nothing. For sampled targets Σ t̂ log t̂ is the sample's entropy, so the value exceeds KL(teacher‖student) in
expectation by what sampling takes from the entropy; the gradient does not see it and stays unbiased. Compare methods on
held-out figures, never by this value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logitstream.data.loss_mask import IGNORED_LABEL, counted_rows
from logitstream.types import SparseTargets


class Diagnostics(NamedTuple):
    """Sums over supervised rows, detached scalars: add them over calls and processes, then divide.

    kl is at the loss's temperature, without τ². kept_mass (the student's mass on the kept ids) and agreements (rows
    where the student's first choice is the teacher's, or one of those that share its greatest weight) are over
    kept_rows, the rows that have entries. cross_entropy is over labelled_rows; where it is no part of the loss it is
    still summed if labels came and τ = 1, for it costs nothing then.
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
    temperature: float | None = None,
    loss_mask: Tensor | None = None,
    num_items: Tensor | float | None = None,
    ghost: bool | None = None,
) -> Tensor:
    """Scalar ((1 − ce_weight)·τ²·KL + ce_weight·cross-entropy), summed over supervised rows and divided by num_items.

    logits: [..., V], R rows in all, V no smaller than the targets' vocabulary; row r of the targets belongs to row r of
        the logits (no shift: both predict the next token). None as targets needs ce_weight=1.
    labels: int64, R in all, row r's next token, already shifted, -100 where there is none; cross-entropy at τ = 1.
    loss_mask: bool, R in all: the supervised rows; without it, those with a label, or all rows where no labels came.
    num_items: supervised rows of the whole step over all micro-batches and processes; without it, those of this call.
    temperature, ghost: None takes them from the targets' spec (τ = 1 and no ghost where that is not known); values that
        contradict it are refused. ghost: one more bucket holds what the kept ids leave of the teacher's and of the
        student's mass (RS-KD, section 2).

    ValueError where shapes or settings do not fit.
    """
    logits_RV = logits.reshape(-1, logits.shape[-1])
    labels_R = None if labels is None else labels.reshape(-1)
    mask_R = supervised_rows(logits_RV, targets, labels_R, loss_mask, ce_weight)
    temperature, ghost = as_drawn(targets, temperature, ghost)
    if num_items is None:
        num_items = mask_R.sum().clamp(min=1)
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    total = logits_RV.new_zeros(())
    if targets is not None and ce_weight != 1:
        kl_R = _row_kl(logits_RV / temperature, targets, ghost)
        total = total + (1 - ce_weight) * temperature**2 * kl_R[mask_R].sum()
    if labels_R is not None and ce_weight != 0:
        ce_R = torch.nn.functional.cross_entropy(logits_RV, labels_R, ignore_index=IGNORED_LABEL, reduction="none")
        total = total + ce_weight * ce_R[mask_R].sum()
    return total / num_items


def as_drawn(targets: SparseTargets | None, temperature: float | None, ghost: bool | None) -> tuple[float, bool]:
    """Temperature and ghost bucket as the targets were drawn; ValueError where a given value contradicts."""
    spec = None if targets is None else targets.spec
    if spec is None:
        return (1.0 if temperature is None else temperature), bool(ghost)
    has_ghost = spec.sampler == "top_k_ghost"
    if temperature is not None and temperature != spec.temperature:
        raise ValueError(
            f"the targets were drawn at temperature {spec.temperature:g}, but the loss was given {temperature:g}: "
            "leave it out, or draw targets at that temperature"
        )
    if ghost is not None and ghost != has_ghost:
        raise ValueError(
            f"the targets were drawn by {spec.sampler}, which goes with ghost={has_ghost}, but the loss was given "
            f"ghost={ghost}: leave it out, or draw targets by {'top_k_ghost' if ghost else 'top_k'}"
        )
    return spec.temperature, has_ghost


@torch.no_grad()
def diagnostics_of(
    logits: Tensor,
    targets: SparseTargets | None,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    temperature: float | None = None,
    loss_mask: Tensor | None = None,
    ghost: bool | None = None,
) -> Diagnostics:
    """What `fused_linear_sparse_kl` sees on its way, of logits that are there; arguments as in `sparse_kl`."""
    temperature, ghost = as_drawn(targets, temperature, ghost)
    logits_RV = logits.reshape(-1, logits.shape[-1])
    labels_R = None if labels is None else labels.reshape(-1)
    mask_R = supervised_rows(logits_RV, targets, labels_R, loss_mask, ce_weight)
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    sums = Diagnostics(*logits_RV.new_zeros(len(Diagnostics._fields), dtype=torch.float64).unbind())
    sums.rows.add_(mask_R.sum())
    if labels_R is not None and (ce_weight or temperature == 1):
        labels_R = labels_R.masked_fill(~mask_R, IGNORED_LABEL)
        sums.labelled_rows.add_((labels_R != IGNORED_LABEL).sum())
        sums.cross_entropy.add_(torch.nn.functional.cross_entropy(logits_RV, labels_R, reduction="sum"))
    if targets is None or ce_weight == 1:
        return sums
    rows_K, ids_K, weights_K = entries(targets, logits_RV.device, logits_RV.dtype)
    sums.kl.add_(_row_kl(logits_RV / temperature, targets, ghost)[mask_R].sum())
    kept_R = torch.zeros_like(mask_R).index_fill_(0, rows_K, True) & mask_R
    sums.kept_rows.add_(kept_R.sum())
    probs_K = torch.softmax(logits_RV / temperature, dim=-1)[rows_K, ids_K]
    sums.kept_mass.add_(probs_K[mask_R[rows_K]].sum())
    greatest_R = logits_RV.new_zeros(len(logits_RV)).scatter_reduce_(0, rows_K, weights_K, "amax")
    agrees_K = (weights_K == greatest_R[rows_K]) & (logits_RV[rows_K, ids_K] == logits_RV.amax(1)[rows_K])
    sums.agreements.add_((torch.zeros_like(mask_R).index_fill_(0, rows_K[agrees_K], True) & mask_R).sum())
    return sums


def supervised_rows(
    rows: Tensor, targets: SparseTargets | None, labels: Tensor | None, loss_mask: Tensor | None, ce_weight: float
) -> Tensor:
    """bool [R]: the rows that count; ValueError where the arguments of a loss do not fit together."""
    num_rows = len(rows)
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
    if labels is not None and labels.numel() != num_rows:
        raise ValueError(f"expected {num_rows} labels, got {labels.numel()}")
    if loss_mask is not None and loss_mask.numel() != num_rows:
        raise ValueError(f"expected a loss_mask of {num_rows} rows, got {loss_mask.numel()}")
    return counted_rows(rows[:, 0], loss_mask=loss_mask, labels=labels)


def check_vocabulary(targets: SparseTargets, vocab_size: int) -> None:
    """ValueError where the student has fewer ids than the teacher (more are fine: padded embeddings)."""
    if targets.vocab_size > vocab_size:
        raise ValueError(f"targets over {targets.vocab_size} ids, but the student's vocabulary has {vocab_size}")


def _row_kl(logits_RV: Tensor, targets: SparseTargets, ghost: bool) -> Tensor:
    """[R]: Σ t̂ (log t̂ − log p), with the ghost bucket's term where wanted."""
    check_vocabulary(targets, logits_RV.shape[-1])
    rows_K, ids_K, weights_K = entries(targets, logits_RV.device, logits_RV.dtype)
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    terms_K = torch.xlogy(weights_K, weights_K) - weights_K * logprobs_RV[rows_K, ids_K]
    kl_R = logits_RV.new_zeros(len(logits_RV)).index_add(0, rows_K, terms_K)
    if not ghost:
        return kl_R
    kept_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
    kept_RV[rows_K, ids_K] = True
    teacher_rest_R = 1 - logits_RV.new_zeros(len(logits_RV)).index_add(0, rows_K, weights_K)
    has_rest = kept_RV.any(1) & ~kept_RV.all(1) & (teacher_rest_R > 0)
    rest_logprob = torch.logsumexp(logprobs_RV[has_rest].masked_fill(kept_RV[has_rest], -torch.inf), dim=-1)
    rest = teacher_rest_R[has_rest]
    return kl_R.index_add(0, has_rest.nonzero().squeeze(1), torch.xlogy(rest, rest) - rest * rest_logprob)


def entries(targets: SparseTargets, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token id (int64) and weight of each entry, [K] each."""
    rows = torch.from_numpy(targets.row_index())
    ids = torch.from_numpy(targets.token_ids).long()
    return rows.to(device), ids.to(device), torch.from_numpy(targets.weights()).to(device=device, dtype=dtype)
