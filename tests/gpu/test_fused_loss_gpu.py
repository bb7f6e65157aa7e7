"""The fused loss on a GPU against its plain twin, and what it asks of the GPU. Never run so far: none was at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from logitstream.device_loss import DeviceRows
from logitstream.fused_loss import fused_linear_sparse_kl
from logitstream.loss import sparse_kl
from logitstream.types import SparseTargets
from tests.sparse_rows import drawn, random_targets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS, VOCAB, HIDDEN = 300, 50_000, 256


def problem(dtype: torch.dtype, *, rows: int = ROWS, vocab: int = VOCAB, device: str = "cuda") -> tuple[Any, ...]:
    """hidden, weight, targets with empty rows, labels and a mask."""
    rng = np.random.default_rng(0)
    targets = random_targets(rng, num_rows=rows, vocab_size=vocab, max_entries=40)
    hidden, weight = (
        torch.from_numpy(rng.normal(size=(n, HIDDEN)) / 16).to(device, dtype).requires_grad_() for n in (rows, vocab)
    )
    labels = torch.from_numpy(rng.integers(0, vocab, rows)).to(device)
    return hidden, weight, targets, labels, torch.from_numpy(rng.random(rows) < 0.7).to(device)


def expect_the_plain_twin(
    hidden: Any, weight: Any, targets: SparseTargets, *, tolerance: float, chunk_rows: int = 64, **options: Any
) -> None:
    """Compare as under a gradient scaler; float16 has no room for a probability over 65,536."""
    scale = 65_536.0
    loss = fused_linear_sparse_kl(hidden, weight, targets, chunk_bytes=chunk_rows * len(weight) * 4, **options).loss
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = sparse_kl(exact[0] @ exact[1].t(), targets, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(loss * scale, [hidden, weight]), torch.autograd.grad(expected * scale, exact), strict=True
    ):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("num_items", [300.0, 65_536.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_gradients_are_the_plain_twins(dtype: torch.dtype, tolerance: float, num_items: float) -> None:
    hidden, weight, targets, _, _ = problem(dtype)
    expect_the_plain_twin(hidden, weight, targets, tolerance=tolerance, num_items=num_items)


@pytest.mark.parametrize("vocab", [50_257, 151_936])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["plain", "at a temperature, mixed", "ghost"])
def test_options_masks_chunks_and_vocabularies(vocab: int, chunk_rows: int, kind: str) -> None:
    hidden, weight, targets, labels, mask = problem(torch.bfloat16, rows=40, vocab=vocab)
    options: dict[str, Any] = {"labels": labels, "loss_mask": mask}
    if kind != "plain":
        targets = drawn(targets, temperature=2.0, ghost=kind == "ghost")
        options |= {"ce_weight": 0.3}
    expect_the_plain_twin(hidden, weight, targets, tolerance=2e-2, chunk_rows=chunk_rows, **options)
    expect_the_plain_twin(hidden, weight, targets, tolerance=2e-2, **options | {"loss_mask": mask.cpu()})


def test_targets_without_entries_are_no_loss() -> None:
    hidden, weight, targets, _, _ = problem(torch.bfloat16)
    none = SparseTargets(
        vocab_size=VOCAB,
        units=50,
        row_offsets=np.zeros(ROWS + 1, np.int64),
        token_ids=targets.token_ids[:0],
        counts=targets.counts[:0],
    )
    loss = fused_linear_sparse_kl(hidden, weight, none).loss
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [hidden, weight]))


def test_a_step_with_targets_placed_ahead_waits_for_nothing() -> None:
    hidden, weight, targets, labels, mask = problem(torch.bfloat16)
    for wait in ("default", "error"):  # compile first
        placed = DeviceRows.place(targets, labels, mask, like=hidden)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(wait)
        try:
            fused_linear_sparse_kl(
                hidden, weight, targets, labels=labels, loss_mask=mask, device_rows=placed
            ).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_stays_within_a_chunk_and_the_gradients() -> None:
    hidden, weight, targets, _, _ = problem(torch.bfloat16)
    chunk = 64 * VOCAB * 2

    def step() -> None:
        fused_linear_sparse_kl(hidden, weight, targets, chunk_bytes=chunk).loss.backward()
        hidden.grad = weight.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * (chunk + 6 * (weight.numel() + hidden.numel()))


def test_runs_are_equal_bit_for_bit_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    hidden, weight, targets, labels, mask = problem(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(
                fused_linear_sparse_kl(hidden, weight, targets, labels=labels, ce_weight=0.5, loss_mask=mask).loss,
                [hidden, weight],
            )
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_does_its_own_work() -> None:
    hidden, weight, targets, labels, _ = problem(torch.bfloat16, device="cuda:1")
    expect_the_plain_twin(hidden, weight, targets, tolerance=2e-2, labels=labels)
    assert torch.cuda.memory_allocated(0) == 0
