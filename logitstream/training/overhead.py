"""Measures what distillation costs over cross-entropy in the same run: the same batch, fused head and step both ways.

At every n-th optimizer step the first micro-batch's pass, forward and backward, is timed with its targets and as plain
cross-entropy, in turn first and second; the plain pass is undone. Over an epoch's steps:

    cross-entropy     = micro-batches · (median pass without targets) + clipping, optimizer and scheduler
    computing         = micro-batches · (median pass without targets) · (median of the pairs' ratios − 1)
    waiting, decoding = seconds in which steps stood still; CPU seconds of the thread beside them, counted whole

and the overheads are these over cross-entropy. On a CPU a pair's ratio is one of the training thread's CPU time, which
other processes on the same cores disturb little. Several processes measure the same steps, from a barrier.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from logitstream.data.documents import Batch
from logitstream.training.distributed import is_sharded

logger = logging.getLogger(__name__)

Pair = tuple[float, float]
"""One micro-batch timed both ways: its time with targets over that without, and the latter in wall seconds."""
WARM_UP_STEPS = 2
"""First steps of a run that are never measured: they allocate memory and start threads."""


class OverheadMeter:
    """Times passes both ways at every n-th step; every=0: none. `pairs` are the epoch's.

    is_undoing is True during a pass that is undone and does not count.
    """

    def __init__(self, *, every: int) -> None:
        self.every = every
        self.num_steps = 0
        self.num_measured = 0
        self.pairs: list[Pair] = []
        self.is_undoing = False

    def is_due(self) -> bool:
        """Say if the optimizer step that begins is to be measured: the same answer on every process."""
        past_warm_up = self.num_steps - WARM_UP_STEPS
        return self.every > 0 and past_warm_up >= 0 and past_warm_up % self.every == 0

    def can_undo(self, model: nn.Module, accelerator: Accelerator) -> bool:
        """Tell whether a pass of this student leaves no trace; if not, say so and measure none from now on."""
        if (
            is_sharded(model)
            or any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
            or getattr(model, "gradient_as_bucket_view", False)
            or accelerator.mixed_precision == "fp8"
        ):
            logger.warning("overhead is not measured: a pass of this student cannot be undone (docs/student-step.md)")
            self.every = 0
        return self.every > 0

    def measure(
        self, step: Callable[[Batch], Tensor], batch: Batch, *, model: nn.Module, accelerator: Accelerator
    ) -> tuple[Tensor, float]:
        """Return a step's loss on a batch with targets, and the seconds that timing it took beside that step."""
        started = time.perf_counter()
        plain = {name: value for name, value in batch.items() if name != "targets"}

        def without_targets() -> tuple[float, float]:
            self.is_undoing = True
            try:
                with undone(model, accelerator.device):
                    return _time(step, plain, accelerator)[1:]
            finally:
                self.is_undoing = False

        if self.num_measured == 0:  # the first pass without targets allocates and compiles: not counted
            without_targets()
        first = without_targets() if self.num_measured % 2 == 0 else None
        loss, wall, busy = _time(step, batch, accelerator)
        plain_wall, plain_busy = first or without_targets()
        self.pairs.append((busy / plain_busy, plain_wall))
        self.num_measured += 1
        return loss, time.perf_counter() - started - wall


def overhead_of(
    pairs: list[Pair], *, micro_batches: float, waiting: float, decoding: float, optimizer: float
) -> dict[str, float]:
    """Return overheads by the logs' names, {} without pairs; seconds and counts are sums over optimizer steps."""
    if not pairs:
        return {}
    ratio, cross_entropy_seconds = (median(values) for values in zip(*pairs, strict=True))
    passes = micro_batches * cross_entropy_seconds
    computing = passes * (ratio - 1)
    seconds = {
        "overhead_waiting": waiting,
        "overhead_decoding": decoding,
        "overhead_computing": computing,
        "overhead_vs_cross_entropy": waiting + decoding + computing,
        "overhead_vs_cross_entropy_without_waiting": decoding + computing,
    }
    return {name: value / (passes + optimizer) for name, value in seconds.items()}


def _time(step: Callable[[Batch], Tensor], batch: Batch, accelerator: Accelerator) -> tuple[Tensor, float, float]:
    """Return a step's loss, its wall and its busy seconds; all processes begin it together."""
    is_cpu = accelerator.device.type == "cpu"
    accelerator.wait_for_everyone()
    if not is_cpu:
        torch.accelerator.synchronize()
    started, thread_started = time.perf_counter(), time.thread_time()
    loss = step(batch)
    if not is_cpu:
        torch.accelerator.synchronize()
    wall, busy = time.perf_counter() - started, time.thread_time() - thread_started
    return loss, wall, busy if is_cpu else wall


@contextmanager
def undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give the block a model without gradients; afterwards restore gradients, buffers and torch's random numbers.

    Buffers hold a model's statistics: running means, routers' biases and loads, amax histories.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    owned = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies = [(buffer, buffer.clone()) for _, own in owned for buffer in own.values() if buffer is not None]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, own in owned:
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, before in copies:
                buffer.copy_(before)
