"""Targets on their way to the student's GPU: the decode thread copies them while earlier batches are trained on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from logitstream.device_loss import DeviceRows
from logitstream.types import SparseTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTargets(SparseTargets):
    """Targets whose arrays are copied to a device too; what is cut out of them no longer fits the copies."""

    on_device: DeviceRows


class Placer:
    """Copies targets to one device, from pinned memory and on a stream of its own; for any one thread."""

    def __init__(self, device: torch.device) -> None:
        self._like = torch.empty(0, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, targets: SparseTargets) -> PlacedTargets:
        """Start the copies and return the targets with the event after which they are done."""
        with torch.cuda.stream(self._stream):  # nothing on a CPU, where the stream is None
            rows = DeviceRows.place(targets, None, None, like=self._like.new_empty(targets.num_rows, 0))
            if self._stream is not None:
                rows = replace(rows, ready=self._stream.record_event())
        own = {one.name: getattr(targets, one.name) for one in fields(SparseTargets)}
        return PlacedTargets(**own, on_device=rows)


def placed_rows(targets: SparseTargets | None, *, labels: Tensor, loss_mask: Tensor) -> DeviceRows | None:
    """Return the copies with a batch's labels and mask, which are on the device; None if there are none that fit."""
    if not isinstance(targets, PlacedTargets):
        return None
    rows = targets.on_device
    if rows.num_rows != targets.num_rows or rows.ids is None or len(rows.ids) != targets.num_entries:
        return None
    return replace(rows, labels=labels.reshape(-1), mask=loss_mask.reshape(-1).view(torch.uint8))
