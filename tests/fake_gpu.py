"""A GPU for tests without CUDA: kernels in Triton's interpreter, or a device that holds no numbers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from teacher_server.gpu import Fetched, Gpu


@dataclass
class Moment:
    """An event that a wait is noticed of."""

    waits: list[str]

    def synchronize(self) -> None:
        self.waits.append("event")

    def elapsed_time(self, later: Moment) -> float:
        return 1.0


@dataclass
class FakeGpu(Gpu):
    """A device of torch without CUDA: "cpu", whose numbers exist, or "meta", where whoever asks for one fails."""

    device: torch.device
    launched: list[tuple[str, Any]] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    fetches: int = 0

    def current(self) -> Any:
        return nullcontext()

    def warning_of_waits(self) -> Any:
        return nullcontext()

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.launched.append((kernel.fn.__name__, args[0]))
        if self.device.type == "cpu":
            super().launch(kernel, grid, *args, **options)

    def send(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def fetch(self, tensor: Tensor) -> Fetched:
        self.fetches += 1
        return Fetched(tensor, Moment(self.waits))

    def mark(self) -> Moment:
        return Moment(self.waits)
