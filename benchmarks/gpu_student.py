"""The student's part of benchmarks/gpu.py: the loss against float64, and a 0.6B step under several losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from logitstream.device_loss import DeviceRows
from logitstream.fused_loss import fused_linear_sparse_kl
from logitstream.loss import sparse_kl
from logitstream.types import SparseTargets

if TYPE_CHECKING:
    from benchmarks.gpu import Bench


def typical_targets(num_rows: int, vocab_size: int) -> SparseTargets:
    """8 to 29 entries a row, as systematic draws of 50 have on English text."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 30, size=num_rows)
    ids = [np.cumsum(rng.integers(1, vocab_size // 32, size=size)) for size in sizes]
    return SparseTargets(
        vocab_size=vocab_size,
        units=50,
        row_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        token_ids=np.concatenate(ids).astype(np.int32),
        counts=np.ones(sizes.sum(), np.int32),
    )


def loss_is_right(bench: Bench) -> None:
    """Compare loss and gradients with the specification in float64, at several chunks."""
    rows, width, vocab = (5, 32, 1000) if bench.smoke else (384, 512, 151_936)
    targets, device = typical_targets(rows, vocab), bench.device
    hidden, weight = (torch.randn(n, width, device=device).div(8).bfloat16().requires_grad_() for n in (rows, vocab))
    labels = torch.randint(vocab, (rows,), device=device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = sparse_kl(exact[0] @ exact[1].t(), targets, labels=labels, ce_weight=0.2)
    true = torch.autograd.grad(expected, exact)
    placed = DeviceRows.place(targets, labels, None, like=hidden)
    found: dict[str, Any] = {}
    for chunk_rows in (3, 128):
        got = fused_linear_sparse_kl(
            hidden,
            weight,
            targets,
            labels=labels,
            ce_weight=0.2,
            chunk_bytes=chunk_rows * vocab * 2,
            device_rows=placed,
        ).loss
        errors = [
            float((ours.double() - theirs).norm() / theirs.norm())
            for ours, theirs in zip(torch.autograd.grad(got, (hidden, weight)), true, strict=True)
        ]
        found |= {f"loss_error_{chunk_rows}": abs(got.item() / expected.item() - 1)}
        found |= {f"hidden_error_{chunk_rows}": errors[0], f"weight_error_{chunk_rows}": errors[1]}
    bench.say("loss_is_right", **found)


class Student:
    """A model, a batch with targets, and the losses to compare, each from the body's hidden states."""

    def __init__(self, bench: Bench) -> None:
        self.model = bench.model("0.6b").train()
        self.weight: Tensor = self.model.get_output_embeddings().weight
        self.vocab = len(self.weight)
        batch, length = (2, 24) if bench.smoke else (8, 2048)
        self.num_rows = batch * length
        self.ids = torch.randint(self.vocab, (batch, length), device=bench.device)
        self.labels = functional.pad(self.ids[:, 1:], (0, 1), value=-100).flatten()
        self.targets = typical_targets(self.num_rows, self.vocab)
        self.placed = DeviceRows.place(self.targets, self.labels, None, like=self.labels)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def hidden(self) -> Tensor:
        states: Tensor = self.model.base_model(input_ids=self.ids, use_cache=False)[0]
        return states.flatten(0, 1)

    def step(self, loss: Callable[[Tensor], Tensor]) -> None:
        loss(self.hidden()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def distillation(self, hidden: Tensor, *, ahead: bool) -> Tensor:
        placed = self.placed if ahead else DeviceRows.place(self.targets, self.labels, None, like=hidden)
        options: dict[str, Any] = {"labels": self.labels, "device_rows": placed}
        return fused_linear_sparse_kl(hidden, self.weight, self.targets, **options).loss

    def cross_entropy(self, hidden: Tensor) -> Tensor:
        options: dict[str, Any] = {"labels": self.labels, "ce_weight": 1.0, "device_rows": self.placed}
        return fused_linear_sparse_kl(hidden, self.weight, None, **options).loss

    def torch_cross_entropy(self, hidden: Tensor) -> Tensor:
        return functional.cross_entropy((hidden @ self.weight.t()).float(), self.labels, ignore_index=-100)

    def losses(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return those that this environment has, torch's cross-entropy first."""
        found: dict[str, Callable[[Tensor], Tensor]] = {
            "torch_cross_entropy": self.torch_cross_entropy,
            "our_fused_cross_entropy": self.cross_entropy,
            "our_distillation": partial(self.distillation, ahead=False),
            "our_distillation_targets_ahead": partial(self.distillation, ahead=True),
            "body_alone": lambda hidden: hidden.float().mean(),
        }
        if linear := getattr(functional, "linear_cross_entropy", None):
            found["torch_linear_cross_entropy"] = lambda hidden: linear(hidden, self.weight, self.labels)
        return found


def liger_losses(student: Student) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return Liger's fused cross-entropy, its weight gradient in bf16 and in float32."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    made: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, dtype in (("bf16", None), ("float32", torch.float32)):
        loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=dtype)
        made[f"liger_{name}"] = partial(_liger, student, loss)
    return made


def _liger(student: Student, loss: Any, hidden: Tensor) -> Tensor:
    value: Tensor = loss(student.weight, hidden, student.labels)
    return value


def student_step(bench: Bench) -> None:
    """Take the step under each loss; ratios are over torch's and over our fused cross-entropy, AdamW included."""
    student = Student(bench)
    losses = student.losses()
    try:
        losses |= liger_losses(student)
    except ImportError as error:
        bench.say("student_liger", skipped=f"missing: {error}")
    base: dict[str, float] = {}
    for name, loss in losses.items():
        student.step(loss)
        seconds = bench.seconds(partial(student.step, loss), repeats=5, warm=1)
        base[name] = seconds
        bench.say(
            f"student_{name}",
            us_per_token=1e6 * seconds / student.num_rows,
            over_torch_cross_entropy=seconds / base["torch_cross_entropy"],
            over_our_cross_entropy=seconds / base.get("our_fused_cross_entropy", seconds),
            peak_gib=bench.peak_gib(partial(student.step, loss)),
        )


def student_memory_and_waits(bench: Bench) -> None:
    """Compare the loss's memory with its bound, one chunk and the gradients in float32, and look for waits."""
    from logitstream.kernels import MOST_CHUNK_BYTES

    student = Student(bench)
    hidden = student.hidden().detach().requires_grad_()

    def loss() -> None:
        student.distillation(hidden, ahead=True).backward()
        hidden.grad = None
        student.model.zero_grad(set_to_none=True)

    loss()
    gradients = 6 * (student.weight.numel() + hidden.numel())  # float32, and bf16 when they are handed over
    bound = (MOST_CHUNK_BYTES + gradients) / 2**30
    peak = bench.peak_gib(loss)
    bench.say("loss_memory", peak_gib=peak, bound_gib=bound, over_bound=peak / bound)
    frozen = student.weight.requires_grad_(False)
    bench.say("loss_memory_frozen_head", peak_gib=bench.peak_gib(loss), head_gib=frozen.numel() * 4 / 2**30)
    student.weight.requires_grad_(True)
    bench.say("student_step_waits_for_nothing", ok=bench.without_waits(loss))


PARTS: dict[str, Callable[[Bench], None]] = {
    "loss_is_right": loss_is_right,
    "student_step": student_step,
    "student_memory_and_waits": student_memory_and_waits,
}
