"""The inner step of `fused_loss`: turns one chunk of student logits into its own loss gradient, in place.

Legend: N supervised rows, C rows of a chunk, V ids, K kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.data.loss_mask import IGNORED_LABEL
from logitstream.loss import Diagnostics
from logitstream.types import SparseTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """(1 − ce_weight)·τ²·KL + ce_weight·cross-entropy; without targets ce_weight is 1."""

    ce_weight: float
    temperature: float
    logit_softcap: float | None
    ghost: bool

    @property
    def has_two_softmaxes(self) -> bool:
        """True if both losses count and differ in temperature."""
        return 0 < self.ce_weight < 1 and self.temperature != 1

    @property
    def num_buffers(self) -> int:
        """Number of [C, V] blocks that `logits_to_gradient_` holds, including the logits."""
        return 1 + self.has_two_softmaxes + (self.logit_softcap is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Labels and targets of some rows; starts: host int64 [N + 1], where each row's entries begin."""

    labels: Tensor | None
    starts: npt.NDArray[np.int64]
    entry_rows: Tensor
    entry_ids: Tensor
    entry_weights: Tensor

    @classmethod
    def select(cls, targets: SparseTargets | None, labels: Tensor | None, index_N: Tensor, dtype: torch.dtype) -> Rows:
        """Return the rows at index_N, which increases, from all rows' targets and labels."""
        labels_N = None if labels is None else labels.index_select(0, index_N)
        if targets is None:
            starts, none = np.zeros(len(index_N) + 1, np.int64), index_N.new_zeros(0)
            return cls(labels=labels_N, starts=starts, entry_rows=none, entry_ids=none, entry_weights=none.to(dtype))
        index, sizes = index_N.cpu().numpy(), np.diff(targets.row_offsets)
        is_kept = np.zeros(targets.num_rows, bool)
        is_kept[index] = True
        kept_K = np.repeat(is_kept, sizes)
        arrays = (np.repeat(np.arange(len(index)), sizes[index]), targets.token_ids[kept_K], targets.weights()[kept_K])
        rows_K, ids_K, weights_K = (torch.from_numpy(array).to(index_N.device) for array in arrays)
        return cls(
            labels=labels_N,
            starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[index], dtype=np.int64)]),
            entry_rows=rows_K,
            entry_ids=ids_K.long(),
            entry_weights=weights_K.to(dtype),
        )

    def chunk(self, start: int, stop: int) -> Rows:
        """Return rows start to stop, numbered from 0."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        return Rows(
            labels=None if self.labels is None else self.labels[start:stop],
            starts=self.starts[start : stop + 1] - first,
            entry_rows=self.entry_rows[first:last] - start,
            entry_ids=self.entry_ids[first:last],
            entry_weights=self.entry_weights[first:last],
        )

    def labelled(self) -> tuple[Tensor, Tensor] | None:
        """Return row and label of the rows that have a label."""
        if self.labels is None:
            return None
        rows = (self.labels != IGNORED_LABEL).nonzero().squeeze(1)
        return rows, self.labels[rows]


def logits_to_gradient_(logits_CV: Tensor, objective: Objective, rows: Rows, sums: Diagnostics) -> Tensor:
    """Turn logits into the gradient of the rows' summed loss divided by the row factor [C] returned; add to sums."""
    slope_CV = None
    if objective.logit_softcap is not None:
        logits_CV.div_(objective.logit_softcap).tanh_()
        slope_CV = logits_CV.square().neg_().add_(1)
        logits_CV.mul_(objective.logit_softcap)
    sums.rows.add_(len(logits_CV))
    kd, ce = (1 - objective.ce_weight) * objective.temperature, objective.ce_weight
    if objective.has_two_softmaxes:
        copy_CV = logits_CV.clone()
        kd_factor_C = _softmax_to_gradient_(copy_CV, objective, rows, sums, kd=kd, ce=0)
        ce_factor_C = _softmax_to_gradient_(logits_CV, objective, rows, sums, kd=0, ce=ce)
        logits_CV.mul_(ce_factor_C[:, None]).addcmul_(copy_CV, kd_factor_C[:, None])
        factor_C = torch.ones_like(ce_factor_C)
    else:
        factor_C = _softmax_to_gradient_(logits_CV, objective, rows, sums, kd=kd, ce=ce)
    if slope_CV is not None:
        logits_CV.mul_(slope_CV)
    return factor_C


def _softmax_to_gradient_(
    logits_CV: Tensor, objective: Objective, rows: Rows, sums: Diagnostics, *, kd: float, ce: float
) -> Tensor:
    """Write kd·(S·p − t̂) + ce·(p − onehot), divided by the row factor [C] returned; both losses share one softmax.

    With e = exp(z − max), p = e / Σe and a = kd·S + ce the gradient is (e − (kd·t̂ + ce·onehot)·Σe/a)·a/Σe: only the
    entries are corrected, and the factor a/Σe is left for the smaller [C, H] product.
    """
    if kd and objective.temperature != 1:
        logits_CV.div_(objective.temperature)
    ghost = bool(kd) and objective.ghost
    at_K = (rows.entry_rows, rows.entry_ids)
    at_label = rows.labelled() if ce or objective.temperature == 1 else None
    max_C, logits_K = logits_CV.amax(1), logits_CV[at_K]
    label_logits = None if at_label is None else logits_CV[at_label]
    exp_CV = logits_CV.sub_(max_C[:, None]).exp_()
    exp_K = exp_CV[at_K]
    if ghost:
        exp_CV[at_K] = 0
    rest_C = exp_CV.sum(1)  # all of it without a ghost bucket
    kept_C = torch.zeros_like(rest_C).index_add_(0, rows.entry_rows, exp_K)
    total_C = rest_C + kept_C if ghost else rest_C
    lse_C = max_C + total_C.log()
    ce_C = torch.zeros_like(total_C)
    if at_label is not None and label_logits is not None:
        sums.cross_entropy.add_((lse_C[at_label[0]] - label_logits).sum())
        sums.labelled_rows.add_(len(at_label[0]))
        ce_C[at_label[0]] = ce
    weights_K = rows.entry_weights.double()
    mass_C = torch.zeros_like(total_C, dtype=torch.float64).index_add_(0, rows.entry_rows, weights_K)
    if kd:
        _add_target_sums(sums, rows, logits_K, max_C, lse_C, kept_C / total_C)
    if ghost:
        rest_mass_C = _add_ghost_sums(sums, rows, mass_C, rest_C, total_C, vocab_size=exp_CV.shape[1])
        over_rest_C = rest_mass_C * kept_C / rest_C.clamp(min=torch.finfo(rest_C.dtype).tiny)
        exp_CV.mul_((kd * (mass_C - over_rest_C) + ce_C).to(exp_CV.dtype)[:, None])
        kept_K = exp_K * (kd * (mass_C + rest_mass_C) + ce_C)[rows.entry_rows]
        exp_CV[at_K] = (kept_K - kd * weights_K * total_C[rows.entry_rows]).to(exp_CV.dtype)
        unit_C, factor_C = total_C, 1 / total_C
    else:
        scale_C = kd * mass_C + ce_C
        unit_C, factor_C = torch.where(scale_C > 0, total_C / scale_C, 0), scale_C / total_C
        if kd:
            exp_CV.index_put_(at_K, (-kd * weights_K * unit_C[rows.entry_rows]).to(exp_CV.dtype), accumulate=True)
    if ce and at_label is not None:
        exp_CV.index_put_(at_label, (-ce * unit_C[at_label[0]]).to(exp_CV.dtype), accumulate=True)
    return factor_C.to(exp_CV.dtype)


def _add_target_sums(
    sums: Diagnostics, rows: Rows, logits_K: Tensor, max_C: Tensor, lse_C: Tensor, kept_mass_C: Tensor
) -> None:
    weights_K, rows_K = rows.entry_weights, rows.entry_rows
    sums.kl.add_((torch.xlogy(weights_K, weights_K) + weights_K * (lse_C[rows_K] - logits_K)).sum())
    sums.kept_rows.add_(int(np.count_nonzero(np.diff(rows.starts))))
    sums.kept_mass.add_(kept_mass_C.sum())
    greatest_C = torch.zeros_like(max_C).scatter_reduce_(0, rows_K, weights_K, "amax")
    agrees_K = (weights_K == greatest_C[rows_K]) & (logits_K == max_C[rows_K])
    sums.agreements.add_(torch.zeros_like(max_C).index_fill_(0, rows_K[agrees_K], 1).sum())


def _add_ghost_sums(
    sums: Diagnostics, rows: Rows, mass_C: Tensor, rest_C: Tensor, total_C: Tensor, *, vocab_size: int
) -> Tensor:
    """Return the teacher's mass in the ghost bucket, [C]: 0 in rows that keep nothing or everything."""
    sizes_C = torch.from_numpy(np.diff(rows.starts)).to(mass_C.device)
    rest_mass_C = torch.where((sizes_C > 0) & (sizes_C < vocab_size), 1 - mass_C, 0).clamp(min=0)
    rest_logprob_C = rest_C.clamp(min=torch.finfo(rest_C.dtype).tiny).log() - total_C.log()
    sums.kl.add_((torch.xlogy(rest_mass_C, rest_mass_C) - rest_mass_C * rest_logprob_C).sum())
    return rest_mass_C
