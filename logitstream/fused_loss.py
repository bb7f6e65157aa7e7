"""Final projection and distillation loss together, chunk by chunk: [tokens, V] logits never exist.

`loss.sparse_kl` of `hidden @ weight.T + bias` is the specification. From here to there: `fused_linear_sparse_kl` checks
and selects rows, `_FusedLinearSparseKL` is its autograd function, `_chunk_by_chunk` multiplies, and
`chunk_gradient.logits_to_gradient_` turns a chunk's logits into their gradient. On CUDA `device_loss` does these two
with a kernel. The gradients are made in the forward pass, while a chunk's softmax is at hand: three matrix products as
in the unfused loss, where recomputing would take a fourth; a frozen head leaves one out. With ce_weight=1 and no
targets this is a fused cross-entropy. Nothing here was ever run on a GPU.

Legend: N supervised rows, C rows of a chunk, V ids, H hidden size, K kept entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstream import device_loss
from logitstream.chunk_gradient import Objective, Rows, logits_to_gradient_
from logitstream.data.loss_mask import counted_rows
from logitstream.device_loss import DeviceRows
from logitstream.kernels import are_usable
from logitstream.loss import Diagnostics, check_arguments, drawn_with
from logitstream.types import SparseTargets

CPU_CHUNK_BYTES = 24 << 20
DEVICE_CHUNK_BYTES = 512 << 20
"""Room for a chunk's logits: more costs memory, less reads the head's weight more often. The kernel takes its own."""
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
MOST_ENTRIES = (1 << 31) - 1024
"""The kernel counts entries in int32."""
OPERAND_PEAK = 256.0
"""Size of the largest gradient at the logits, far from either end of float16."""


class FusedLoss(NamedTuple):
    """The scalar to call backward on, and what the forward pass saw."""

    loss: Tensor
    diagnostics: Diagnostics


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor | None,
    targets: SparseTargets | None,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    loss_mask: Tensor | None = None,
    num_items: Tensor | float | None = None,
    chunk_bytes: int | None = None,
    device_rows: DeviceRows | None = None,
) -> FusedLoss:
    """Return `loss.sparse_kl` of the logits hidden @ weight.T + bias, in memory that chunk_bytes bounds.

    hidden: [..., H], R rows in all; weight: [V, H], None if hidden are the logits themselves; bias: [V].
    logit_softcap: logits become cap·tanh(logits / cap). Everything else is as in `loss.sparse_kl`.

    device_rows: targets, labels and loss_mask already on their way to the device; by default copied here.

    Under autocast the products run in its dtype; sums, the softmax and the weight's gradient are float32 (float64 for
    float64 input). A compiled model is compiled up to here and from here on: these steps depend on data, and are little
    else than matrix products. Raises ValueError if shapes or settings do not fit.
    """
    hidden_RH = hidden.reshape(-1, hidden.shape[-1])
    num_rows, vocab_size = len(hidden_RH), hidden.shape[-1] if weight is None else len(weight)
    check_arguments(targets, labels, loss_mask, ce_weight, num_rows=num_rows, vocab_size=vocab_size)
    targets = targets if ce_weight < 1 else None
    temperature, ghost = drawn_with(targets)
    product_dtype = _accumulator(hidden.dtype) if weight is None else _product_dtype(hidden)
    if product_dtype in KERNEL_DTYPES and (device_rows is not None or _has_kernel(hidden.device, targets)):
        device_rows = device_rows or DeviceRows.place(targets, labels, loss_mask, like=hidden_RH)
        device_rows.wait()
        rows, index_N, counted = None, device_rows.index, device_rows.num_items()
    else:
        device_rows, (rows, index_N) = None, _select(targets, labels, loss_mask, hidden_RH)
        counted = max(len(index_N), 1)
    step = Step(
        objective=Objective(ce_weight=ce_weight, temperature=temperature, logit_softcap=logit_softcap, ghost=ghost),
        rows=rows,
        device_rows=device_rows,
        num_items=counted if num_items is None else num_items,
        chunk_bytes=chunk_bytes,
        product_dtype=product_dtype,
        wants_gradients=torch.is_grad_enabled(),
    )
    hidden_NH = hidden_RH if index_N is None or len(index_N) == num_rows else hidden_RH.index_select(0, index_N)
    loss, *sums = _FusedLinearSparseKL.apply(hidden_NH, weight, bias, step)  # type: ignore[no-untyped-call]
    return FusedLoss(loss, Diagnostics(*sums))


def _select(
    targets: SparseTargets | None, labels: Tensor | None, loss_mask: Tensor | None, hidden_RH: Tensor
) -> tuple[Rows, Tensor]:
    """Return the rows that count, and their numbers [N]."""
    labels_R = None if labels is None else labels.reshape(-1).to(hidden_RH.device)
    index_N = counted_rows(hidden_RH[:, 0], loss_mask=loss_mask, labels=labels_R).nonzero().squeeze(1)
    return Rows.select(targets, labels_R, index_N, _accumulator(hidden_RH.dtype)), index_N


def _has_kernel(device: torch.device, targets: SparseTargets | None) -> bool:
    return are_usable(device) and (targets is None or targets.num_entries <= MOST_ENTRIES)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if has_autocast else hidden.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call's arguments, except the tensors that get gradients; device_rows: the kernel's, None without it."""

    objective: Objective
    rows: Rows | None
    device_rows: DeviceRows | None
    num_items: Tensor | float
    chunk_bytes: int | None
    product_dtype: torch.dtype
    wants_gradients: bool

    def run(
        self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, needs: list[bool]
    ) -> tuple[Diagnostics, list[Tensor | None]]:
        """Return the sums and the gradients that are needed, by the kernel or in plain torch."""
        by_chunks = _chunk_by_chunk if self.device_rows is None else device_loss.chunk_by_chunk
        return by_chunks(hidden, weight, bias, needs, self)


class _FusedLinearSparseKL(torch.autograd.Function):
    """Loss and sums forward; the gradients wait in ctx for the first backward, a second one makes them anew."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step) -> tuple[Tensor, ...]:
        ctx.step, ctx.needs = step, [step.wants_gradients and wanted for wanted in ctx.needs_input_grad[:3]]
        ctx.save_for_backward(hidden, weight, bias)
        sums, ctx.gradients = step.run(hidden, weight, bias, ctx.needs)
        ctx.mark_non_differentiable(*sums)
        kl_share = (1 - step.objective.ce_weight) * step.objective.temperature**2
        total = kl_share * sums.kl + step.objective.ce_weight * sums.cross_entropy
        return (total / step.num_items).to(_accumulator(hidden.dtype)), *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = inputs = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # handed over, so that autograd need not copy them
        if gradients is None:
            _, gradients = ctx.step.run(hidden, weight, bias, ctx.needs)
        return *(_scaled(g, grad_loss, like) for g, like in zip(gradients, inputs, strict=True)), None


def _scaled(gradient: Tensor | None, factor: Tensor, like: Tensor | None) -> Tensor | None:
    """Return the gradient times the factor in another tensor's dtype, in one pass."""
    if gradient is None or like is None:
        return None
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient.to(like.dtype)
    return torch.mul(gradient, factor, out=gradient if gradient.dtype == like.dtype else torch.empty_like(like))


def _chunk_by_chunk(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, needs: list[bool], step: Step
) -> tuple[Diagnostics, list[Tensor | None]]:
    """Return the sums and the gradients, in the accumulator's dtype, of hidden, weight and bias where needed."""
    assert step.rows is not None
    num_rows, vocab_size = len(hidden), hidden.shape[1] if weight is None else len(weight)
    dtype = _accumulator(hidden.dtype)
    head = None if weight is None else weight.to(step.product_dtype)
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs[0] else None
    grad_weight = torch.empty_like(weight, dtype=dtype) if weight is not None and needs[1] else None
    grad_bias = hidden.new_zeros(vocab_size, dtype=dtype) if needs[2] else None
    sums = Diagnostics(*hidden.new_zeros(len(Diagnostics._fields), dtype=torch.float64).unbind())
    id_bytes = step.objective.num_buffers * dtype.itemsize + (step.product_dtype != dtype) * step.product_dtype.itemsize
    chunk_bytes = step.chunk_bytes or (CPU_CHUNK_BYTES if hidden.device.type == "cpu" else DEVICE_CHUNK_BYTES)
    chunk_rows = max(1, chunk_bytes // (vocab_size * id_bytes))
    buffer = torch.empty(min(chunk_rows, num_rows), vocab_size, dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # the products choose their dtypes themselves
        for start in range(0, num_rows, chunk_rows):
            hidden_CH = hidden[start : start + chunk_rows].to(step.product_dtype)
            logits_CV = _project(hidden_CH, head, bias, buffer[: len(hidden_CH)])
            rows = step.rows.chunk(start, start + len(hidden_CH))
            factor_C = logits_to_gradient_(logits_CV, step.objective, rows, sums)
            item_factor_C = factor_C / step.num_items
            operand_CV, unit = logits_CV, item_factor_C[:, None]
            if step.product_dtype != dtype:
                operand_CV, unit = _low_precision_operand(logits_CV, factor_C, step)
            if grad_hidden is not None:
                product_CH = operand_CV if head is None else _mm(operand_CV, head, dtype)
                torch.mul(product_CH, unit, out=grad_hidden[start : start + chunk_rows])
            if grad_weight is not None and operand_CV is not logits_CV and hidden.device.type == "cuda":
                product_VH = _mm(operand_CV.t(), hidden_CH, dtype).mul_(unit)
                grad_weight.copy_(product_VH) if start == 0 else grad_weight.add_(product_VH)
            elif grad_weight is not None:  # float32 operands on a CPU, whose low-precision products come rounded
                scaled_CH = hidden_CH.to(dtype) * item_factor_C[:, None]
                grad_weight.addmm_(logits_CV.t(), scaled_CH, beta=0.0 if start == 0 else 1.0)
            if grad_bias is not None:
                grad_bias.addmv_(logits_CV.t(), item_factor_C)
    if num_rows == 0 and grad_weight is not None:
        grad_weight.zero_()
    return sums, [grad_hidden, grad_weight, grad_bias]


def _project(hidden_CH: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None, out_CV: Tensor) -> Tensor:
    """Write the logits to out_CV, in the accumulator's dtype, and return it."""
    if weight_VH is None:
        out_CV.copy_(hidden_CH)
    elif hidden_CH.dtype == out_CV.dtype:
        torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
    else:
        out_CV.copy_(torch.mm(hidden_CH, weight_VH.t()))
    return out_CV if bias_V is None else out_CV.add_(bias_V)


def _low_precision_operand(gradient_CV: Tensor, factor_C: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Return the gradient at the logits in bf16 or fp16, and the power of two to multiply its products by.

    float16 ends at 6e-8: probabilities over thousands of items would vanish in it. So only the mantissa of
    1 / num_items goes into the operand; the power of two is left for the products, in which it rounds nothing.
    """
    kd = (1 - step.objective.ce_weight) * step.objective.temperature
    scale = OPERAND_PEAK / 2.0 ** math.ceil(math.log2(max(kd + step.objective.ce_weight, 1)))
    per_item = torch.as_tensor(1 / step.num_items, dtype=factor_C.dtype, device=factor_C.device)
    mantissa, exponent = torch.frexp(per_item)
    operand_CV = (gradient_CV * (factor_C * mantissa * scale)[:, None]).to(step.product_dtype)
    return operand_CV, torch.ldexp(torch.ones_like(mantissa), exponent) / scale


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply into dtype: a GPU sums low-precision products in it, a CPU rounds each sum to the operands' first."""
    if left.dtype != dtype and left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)
