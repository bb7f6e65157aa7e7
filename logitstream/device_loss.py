"""The fused loss on CUDA: `fused_loss` around the loss kernel, without a wait for the host.

A chunk's logits exist once, in the products' dtype, and become the operand of both gradient products in place. The
weight's gradient is added up in float32 by the product itself. Rows that do not count are left out where the host
knows them (a loss_mask or labels on the CPU); else their hidden states and factors are 0.

Legend: R rows of the targets, N rows that are projected, C rows of a chunk, V ids, H hidden size, K kept entries.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.data.loss_mask import IGNORED_LABEL
from logitstream.kernels import ROWS_MULTIPLE
from logitstream.kernels import chunk_rows as most_chunk_rows
from logitstream.loss import Diagnostics
from logitstream.types import SparseTargets

if TYPE_CHECKING:
    from logitstream.fused_loss import Step

COLUMNS_MULTIPLE = 64
"""A row of logits has a multiple of so many columns, so that it is read in words of 16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRows:
    """Hold on the device what the kernel needs of a batch; ready: the event after which it is there.

    num_rows: R; index: int64 [N], the rows that are projected, None: all; mask: uint8 [R], those that count, None: all.
    starts: int32 [R + 1]; ids, counts: int32 [K]: the arrays of SparseTargets, None without targets.
    """

    num_rows: int
    labels: Tensor | None
    index: Tensor | None = None
    mask: Tensor | None = None
    starts: Tensor | None = None
    ids: Tensor | None = None
    counts: Tensor | None = None
    units: int = 1
    tail_units: int = 0
    ready: Any = None

    @classmethod
    def place(
        cls, targets: SparseTargets | None, labels: Tensor | None, loss_mask: Tensor | None, *, like: Tensor
    ) -> DeviceRows:
        """Copy what is not there yet to the device of `like` [R, …], from pinned memory, without waiting."""
        counted = loss_mask if loss_mask is not None or labels is None else labels != IGNORED_LABEL
        index = mask = None
        if counted is not None and counted.device.type == "cpu":
            if not counted.all():
                index = counted.reshape(-1).bool().nonzero().squeeze(1)
        elif counted is not None:
            mask = counted.reshape(-1).bool().view(torch.uint8)
        tensors: dict[str, Tensor | None] = {"labels": None if labels is None else labels.reshape(-1), "index": index}
        if targets is not None:
            tensors["starts"] = _int32(targets.row_offsets)
            tensors |= {"ids": _int32(targets.token_ids), "counts": _int32(targets.counts)}
        return cls(
            num_rows=len(like),
            mask=mask,
            units=1 if targets is None else targets.units,
            tail_units=0 if targets is None else targets.tail_units,
            **{name: _send(tensor, like.device) for name, tensor in tensors.items()},
        )

    def num_items(self) -> Tensor | int:
        """Return how many rows count, at least 1."""
        if self.mask is not None:
            return self.mask.sum().clamp(min=1)
        return max(1, self.num_rows if self.index is None else len(self.index))

    def wait(self) -> None:
        """Let the current stream, not the host, wait until everything is there."""
        if self.ready is not None:
            for tensor in (self.starts, self.ids, self.counts):
                if tensor is not None:
                    stream = torch.cuda.current_stream(tensor.device)
                    stream.wait_event(self.ready)
                    tensor.record_stream(stream)


def _int32(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))


def _send(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if tensor is None or tensor.device.type != "cpu" or device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def chunk_by_chunk(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, needs: list[bool], step: Step
) -> tuple[Diagnostics, list[Tensor | None]]:
    """Return the sums and the gradients, in float32, of hidden [N, H], weight and bias where needed."""
    from logitstream.kernels.loss import loss_gradient

    assert step.device_rows is not None
    num_rows, vocab_size = len(hidden), hidden.shape[1] if weight is None else len(weight)
    device, dtype = hidden.device, step.product_dtype
    head, head_bias = (None if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if needs[0] else None
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if weight is not None and needs[1] else None
    grad_bias = torch.zeros(vocab_size, dtype=torch.float32, device=device) if needs[2] else None
    factors = torch.empty(num_rows, 1, dtype=torch.float32, device=device)
    sums = torch.empty(num_rows, len(Diagnostics._fields), dtype=torch.float32, device=device)
    num_columns = -(-vocab_size // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    chunk_rows = _chunk_rows(num_rows, num_columns * dtype.itemsize, step.chunk_bytes, device)
    buffer = torch.empty(min(chunk_rows, num_rows), num_columns, dtype=dtype, device=device)
    arguments = _kernel_arguments(step, step.device_rows, device)
    for start in range(0, num_rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, num_rows))
        x, padded = _counted(hidden, step.device_rows, part).to(dtype), buffer[: part.stop - start]
        logits = padded[:, :vocab_size]
        if head is None:
            logits.copy_(x)
        elif head_bias is None:
            torch.mm(x, head.t(), out=logits)
        else:
            torch.addmm(head_bias, x, head.t(), out=logits)
        loss_gradient(padded, vocab_size, start, factors=factors, sums=sums, **arguments)
        if grad_hidden is not None:
            if head is None:
                grad_hidden[part].copy_(logits)
            else:
                _add_product_(grad_hidden[part], logits, head, is_first=True)
            grad_hidden[part].mul_(factors[part])
        if grad_weight is not None:
            scaled = torch.mul(x, factors[part], out=torch.empty_like(x))
            _add_product_(grad_weight, logits.t(), scaled, is_first=start == 0)
        if grad_bias is not None:
            _add_product_(grad_bias[:, None], logits.t(), factors[part].to(dtype), is_first=False)
    if num_rows == 0 and grad_weight is not None:
        grad_weight.zero_()
    return Diagnostics(*sums.sum(0, dtype=torch.float64).unbind()), [grad_hidden, grad_weight, grad_bias]


def _chunk_rows(num_rows: int, row_bytes: int, chunk_bytes: int | None, device: torch.device) -> int:
    """Return the rows of a chunk: as many as chunk_bytes hold, or a part of the free memory; chunks are alike."""
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row_bytes)
    free = sys.maxsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    most_rows = most_chunk_rows(row_bytes, free)
    num_chunks = max(1, -(-num_rows // most_rows))
    return -(-num_rows // (num_chunks * ROWS_MULTIPLE)) * ROWS_MULTIPLE or ROWS_MULTIPLE


def _counted(hidden: Tensor, rows: DeviceRows, part: slice) -> Tensor:
    """Return a chunk of hidden states, 0 where a row does not count: 0 times not-a-number is not 0."""
    chunk = hidden[part]
    return chunk if rows.mask is None else chunk.masked_fill((rows.mask[part] == 0)[:, None], 0)


def _kernel_arguments(step: Step, rows: DeviceRows, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `loss_gradient` that all chunks share."""
    objective, num_items = step.objective, step.num_items
    ce_weight = objective.ce_weight
    if isinstance(num_items, Tensor) and num_items.device == device:
        inverse_items = (1 / num_items).float().reshape(1)
    else:
        inverse_items = torch.full((1,), 1 / float(num_items), device=device)
    ids = rows.ids if ce_weight < 1 else None
    has_labels = ce_weight > 0 or objective.temperature == 1
    return {
        "starts": rows.starts,
        "ids": ids,
        "counts": rows.counts,
        "units": rows.units,
        "tail_units": rows.tail_units,
        "mask": rows.mask,
        "rows": rows.index,
        "labels": rows.labels if has_labels else None,
        "kept_logits": None if ids is None else torch.empty_like(ids, dtype=torch.float32),
        "inverse_items": inverse_items,
        "kd": (1 - ce_weight) * objective.temperature,
        "ce": ce_weight,
        "temperature": objective.temperature,
        "softcap": objective.logit_softcap or 0.0,
        "has_ghost": objective.ghost and ids is not None,
    }


def _add_product_(out: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Let out, float32, be left @ right, or add that to it; a CPU (in tests) multiplies in float32."""
    if left.dtype == out.dtype or out.device.type == "cpu":
        left, right = left.to(out.dtype), right.to(out.dtype)
        out.addmm_(left, right, beta=0.0 if is_first else 1.0)
    elif is_first:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
