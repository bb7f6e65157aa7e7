"""`sparse_kl` against sums written out row by row in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from logitstream.fused_loss import fused_linear_sparse_kl
from logitstream.loss import sparse_kl
from logitstream.types import SparseTargets
from tests.sparse_rows import drawn, random_targets

VOCAB_SIZE = 23


def reference(
    logits: np.ndarray, targets: SparseTargets, mask: np.ndarray, *, temperature: float = 1.0, ghost: bool = False
) -> float:
    """Sum over masked rows of τ²·KL, with loops and no torch."""
    weights = targets.counts / targets.units
    total = 0.0
    for row in np.flatnonzero(mask):
        scaled = logits[row] / temperature
        probs = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
        entries = slice(targets.row_offsets[row], targets.row_offsets[row + 1])
        ids, kept = targets.token_ids[entries], weights[entries]
        total += sum(t * (math.log(t) - math.log(probs[i])) for i, t in zip(ids, kept, strict=True))
        rest = 1 - kept.sum()
        if ghost and len(ids) and rest > 1e-12:
            total += rest * (math.log(rest) - math.log(1 - probs[ids].sum()))
    return temperature**2 * total


def cases(seed: int) -> tuple[torch.Tensor, SparseTargets, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    targets = random_targets(rng, num_rows=9, vocab_size=VOCAB_SIZE - 2, max_entries=6)
    logits = torch.from_numpy(rng.normal(size=(9, VOCAB_SIZE)) * 3)
    labels = torch.from_numpy(rng.integers(0, VOCAB_SIZE, 9))
    labels[2] = -100
    return logits, targets, labels, torch.from_numpy(rng.random(9) < 0.7)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("seed", range(4))
def test_kl_is_the_written_out_sum_over_supervised_rows(seed: int, temperature: float) -> None:
    logits, targets, _, mask = cases(seed)
    got = sparse_kl(logits, drawn(targets, temperature=temperature), loss_mask=mask)
    expected = reference(logits.numpy(), targets, mask.numpy(), temperature=temperature) / mask.sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_ghost_bucket_holds_what_the_kept_ids_leave() -> None:
    rng = np.random.default_rng(0)
    targets = random_targets(rng, num_rows=9, vocab_size=VOCAB_SIZE, max_entries=6, units=400)
    logits = torch.from_numpy(rng.normal(size=(9, VOCAB_SIZE)))
    got = sparse_kl(logits, drawn(targets, ghost=True))
    assert got.item() == pytest.approx(reference(logits.numpy(), targets, np.ones(9), ghost=True) / 9, rel=1e-6)


def test_gradient_is_mass_times_softmax_less_targets() -> None:
    logits, targets, _, _ = cases(1)
    logits.requires_grad_()
    sparse_kl(logits, drawn(targets, temperature=2.0), num_items=1).backward()
    dense = torch.zeros_like(logits)
    dense[torch.from_numpy(targets.row_index()), torch.from_numpy(targets.token_ids).long()] = torch.from_numpy(
        targets.weights().astype(np.float64)
    )
    expected = 2.0 * (dense.sum(1, keepdim=True) * torch.softmax(logits / 2.0, 1) - dense)
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-6, atol=1e-9)


def test_mix_adds_cross_entropy_at_temperature_one() -> None:
    logits, targets, labels, mask = cases(2)
    got = sparse_kl(logits, drawn(targets, temperature=3.0), labels=labels, ce_weight=0.3, loss_mask=mask)
    labelled = mask & (labels != -100)
    cross_entropy = torch.nn.functional.cross_entropy(logits[labelled], labels[labelled], reduction="sum")
    kl = reference(logits.numpy(), targets, mask.numpy(), temperature=3.0)
    assert got.item() == pytest.approx((0.7 * kl + 0.3 * cross_entropy.item()) / mask.sum().item(), rel=1e-6)


def test_parts_over_the_whole_steps_rows_add_up_to_the_loss_of_the_whole() -> None:
    logits, targets, _, mask = cases(3)
    whole = sparse_kl(logits, targets, loss_mask=mask)
    parts = [
        sparse_kl(logits[a:b], targets.slice_rows(a, b), loss_mask=mask[a:b], num_items=mask.sum())
        for a, b in ((0, 1), (1, 6), (6, 9))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_without_a_mask_rows_with_a_label_are_supervised() -> None:
    logits, targets, labels, _ = cases(0)
    torch.testing.assert_close(
        sparse_kl(logits, targets, labels=labels), sparse_kl(logits, targets, loss_mask=labels != -100)
    )


def test_nothing_supervised_is_a_loss_of_zero_with_gradients() -> None:
    logits, targets, _, mask = cases(0)
    logits.requires_grad_()
    loss = sparse_kl(logits, targets, loss_mask=torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ce_weight": 1.5}, "must lie in"),
        ({"ce_weight": 0.5}, "needs labels"),
        ({"targets": None}, "no targets"),
        ({"loss_mask": torch.ones(4)}, "loss_mask of 9 rows, got 4"),
        ({"labels": torch.ones(4, dtype=torch.long)}, "expected 9 labels, got 4"),
        ({"logits": torch.zeros(8, VOCAB_SIZE)}, "targets of 8 rows"),
        ({"logits": torch.zeros(9, 5)}, "student's vocabulary has 5"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    logits, targets, _, _ = cases(0)
    arguments: dict[str, object] = {"logits": logits, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        sparse_kl(**arguments)  # type: ignore[arg-type]


def test_the_fused_loss_takes_temperature_and_ghost_from_the_targets() -> None:
    logits, targets, _, _ = cases(3)
    weight = torch.eye(logits.shape[-1], dtype=logits.dtype)
    for one in (drawn(targets, temperature=2.0), drawn(targets, ghost=True)):
        expected = sparse_kl(logits, one).item()
        assert expected != sparse_kl(logits, targets).item()
        assert fused_linear_sparse_kl(logits, weight, one).loss.item() == pytest.approx(expected, rel=1e-6)
