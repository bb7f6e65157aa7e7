"""CUDA as the launch path uses it: what goes to the device and what comes back; the one wait is `Fetched.array`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from logitstream import kernels

CPU_CHUNK_BYTES = 24 << 20


def chunk_rows(row_bytes: int, *, logits_chunk_bytes: int, memory_bytes: int | None) -> int:
    """Return how many rows of logits to make at a time.

    logits_chunk_bytes: 0 chooses: 24 MiB on a CPU, whose caches are small; on a GPU a 16th of memory_bytes, at most
    1 GiB, in multiples of 128 rows. memory_bytes: None on a CPU.
    """
    if logits_chunk_bytes:
        return max(1, logits_chunk_bytes // row_bytes)
    if memory_bytes is None:
        return max(1, CPU_CHUNK_BYTES // row_bytes)
    return kernels.chunk_rows(row_bytes, memory_bytes)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A tensor on its way to the host: pinned memory, and the event after which it is there."""

    pinned: Tensor
    ready: Any

    def array(self) -> npt.NDArray[Any]:
        """Wait, without the interpreter's lock, and return the numbers."""
        self.ready.synchronize()
        return self.pinned.numpy()


class Gpu:
    """One CUDA device, with a stream of its own for what goes to the host; torch's current stream does the rest.

    Pinned memory comes from torch's cache, which hands out a block again once the copies that used it are done: after
    a few batches it is a ring of as many blocks as batches are in flight.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, device: torch.device) -> Gpu | None:
        """Return the device if the kernels run on it."""
        return cls(device) if kernels.are_usable(device) else None

    def current(self) -> AbstractContextManager[object]:
        return kernels.launching_on(self.device)

    @contextmanager
    def warning_of_waits(self) -> Iterator[None]:
        """Have torch warn, with the line, of operations that wait for the device; for all threads, so do no more."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kernel[grid](*args, **options)

    def send(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Fetched:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            pinned.copy_(tensor, non_blocking=True)
            ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            ready.record()
        tensor.record_stream(self._copies)
        return Fetched(pinned, ready)

    def mark(self) -> Any:
        """Return an event of this moment on the device; `elapsed_time` of two is in milliseconds."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event
