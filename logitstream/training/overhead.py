"""Measures what distillation costs over cross-entropy in the same run: the same batch, fused head and step both ways.

At every n-th optimizer step the first micro-batch's forward and backward pass is timed twice, with its targets and as
plain cross-entropy, in turn first and second. The cross-entropy pass is then undone, so the student trains as if
nothing had been measured. Clipping, optimizer and scheduler are timed once and belong to both. Per optimizer step of n
micro-batches, in medians over an epoch's measured steps:

    cross-entropy step = n·(forward + backward without targets) + optimizer
    computing          = n·(forward + backward without targets)·(median of the pairs' ratios − 1)
    waiting, decoding  = their means over all steps: waiting is the time in which the step stood still, decoding its CPU
                         seconds, counted whole although it runs in a thread beside the step

and the overheads are these over the cross-entropy step. On a CPU a pair's ratio is one of the training thread's CPU
time: that thread takes part in all of a pass's work, and other processes on the same cores disturb it little, while
they make single wall times differ by a factor of two. Targets also arrive while a step is measured: that can hide at
most the share of waiting that `measurement` tells. Under data parallelism every process measures at the same step, from
a barrier on, and a step waits as long as the process that waits longest.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from logitstream.data.documents import Batch

if TYPE_CHECKING:
    from logitstream.training.stats import RunStats

logger = logging.getLogger(__name__)

MAX_STEPS = 10_000
"""Steps of an epoch that are remembered."""
WARM_UP_STEPS = 2
"""First steps of a run that are never measured: they allocate memory and start threads."""


class Pair(NamedTuple):
    """One micro-batch timed both ways: its time with targets over that without, and the latter in wall seconds."""

    ratio: float
    cross_entropy_seconds: float


@dataclass(slots=True, kw_only=True)
class StepTimes:
    """One optimizer step: the times of its beginning and of its last backward pass's end, and its parts' seconds.

    tokens is a tensor while the device counts them; pair is None unless the step was measured.
    """

    began: float = 0.0
    computed: float = 0.0
    tokens: Tensor | int = 0
    micro_batches: int = 0
    waiting: float = 0.0
    decoding: float = 0.0
    optimizer: float = 0.0
    whole: float = 0.0
    measuring: float = 0.0
    pair: Pair | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Extra time of a distillation step as ratios to a cross-entropy step; measurement is a ratio to the run's time."""

    waiting: float
    decoding: float
    computing: float
    measurement: float

    @property
    def total(self) -> float:
        return self.waiting + self.decoding + self.computing

    def logs(self) -> dict[str, float]:
        """Return the ratios under the names that logs and the report use."""
        parts = {
            f"overhead_{name}": getattr(self, name) for name in ("waiting", "decoding", "computing", "measurement")
        }
        return parts | {
            "overhead_vs_cross_entropy": self.total,
            "overhead_vs_cross_entropy_without_waiting": self.total - self.waiting,
        }


class OverheadMeter:
    """Remembers an epoch's steps and says which steps are to be measured; every=0: none."""

    def __init__(self, *, every: int) -> None:
        if every < 0:
            raise ValueError(f"overhead_every must not be negative, got {every}")
        self.every = every
        self.num_measured = 0
        self.steps: deque[StepTimes] = deque(maxlen=MAX_STEPS)
        self._num_steps = 0

    def is_due(self) -> bool:
        """Say if the step that begins is to be measured: the same answer on every process."""
        past_warm_up = self._num_steps - WARM_UP_STEPS
        return self.every > 0 and past_warm_up >= 0 and past_warm_up % self.every == 0

    def add(self, step: StepTimes) -> None:
        self._num_steps += 1
        self.num_measured += step.pair is not None
        self.steps.append(step)

    def overhead(self, *, waiting: Sequence[float] | None = None) -> Overhead | None:
        """Return the epoch's overhead so far, None if no step was measured.

        waiting: seconds for which each step waited in the slowest process; by default in this one.
        """
        measured = [(step.micro_batches, step.pair) for step in self.steps if step.pair is not None]
        if not measured:
            return None
        passes = median(n * pair.cross_entropy_seconds for n, pair in measured)
        cross_entropy_step = passes + median(step.optimizer for step in self.steps)
        ratio = median(pair.ratio for _, pair in measured)
        whole = math.fsum(step.whole for step in self.steps)
        return Overhead(
            waiting=fmean(waiting or [step.waiting for step in self.steps]) / cross_entropy_step,
            decoding=fmean(step.decoding for step in self.steps) / cross_entropy_step,
            computing=passes * (ratio - 1) / cross_entropy_step,
            measurement=math.fsum(step.measuring for step in self.steps) / whole if whole else 0.0,
        )


class MeasuringTrainer(Trainer):
    """Times the steps that its `stats` ask for both ways; `is_measuring` is true during the cross-entropy pass."""

    stats: RunStats
    is_measuring = False

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Train on one micro-batch and time it if it is due."""
        with self.stats.micro_batch(inputs):
            if not self.stats.is_due(inputs) or not self._can_measure(model):
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
                return loss
            return self._measured_step(model, inputs, num_items_in_batch)

    def _can_measure(self, model: nn.Module) -> bool:
        reason = why_not_undone(model, self.accelerator, accumulates=self.args.gradient_accumulation_steps > 1)
        if reason is not None:
            logger.warning("the overhead over cross-entropy is not measured: %s", reason)
            self.stats.meter.every = 0
        return reason is None

    def _measured_step(self, model: nn.Module, inputs: Batch, num_items: Tensor | int | None) -> Tensor:
        started, num_measured = time.perf_counter(), self.stats.meter.num_measured
        if num_measured == 0:  # the first pass without targets allocates and compiles: not counted
            self._time_cross_entropy(model, inputs, num_items)
        views = isinstance(model, DistributedDataParallel) and model.gradient_as_bucket_view
        plain_first = views or num_measured % 2 == 0
        plain = self._time_cross_entropy(model, inputs, num_items) if plain_first else (0.0, 0.0)
        loss, wall, busy = self._time_step(model, inputs, num_items)
        plain_wall, plain_busy = plain if plain_first else self._time_cross_entropy(model, inputs, num_items)
        pair = Pair(ratio=busy / plain_busy, cross_entropy_seconds=plain_wall)
        self.stats.add_pair(pair, seconds=time.perf_counter() - started - wall)
        return loss

    def _time_step(
        self, model: nn.Module, inputs: Batch, num_items: Tensor | int | None
    ) -> tuple[Tensor, float, float]:
        """Return a pass's loss, its wall and its busy seconds; all processes begin it together."""
        is_cpu = self.args.device.type == "cpu"
        self.accelerator.wait_for_everyone()
        if not is_cpu:
            torch.accelerator.synchronize()
        started, thread_started = time.perf_counter(), time.thread_time()
        loss: Tensor = super().training_step(model, inputs, num_items)
        if not is_cpu:
            torch.accelerator.synchronize()
        wall, busy = time.perf_counter() - started, time.thread_time() - thread_started
        return loss, wall, busy if is_cpu else wall

    def _time_cross_entropy(
        self, model: nn.Module, inputs: Batch, num_items: Tensor | int | None
    ) -> tuple[float, float]:
        """Return the wall and busy seconds of the same pass without targets, which is undone."""
        plain = {name: value for name, value in inputs.items() if name != "targets"}
        self.is_measuring = True
        try:
            with undone(model, self.args.device):
                return self._time_step(model, plain, num_items)[1:]
        finally:
            self.is_measuring = False


def why_not_undone(model: nn.Module, accelerator: Accelerator, *, accumulates: bool) -> str | None:
    """Return why a pass cannot be undone, None if it can. Ask while training: optimizers add their hooks there.

    DeepSpeed and FSDP1 keep gradients where they cannot be put aside; so does FSDP2 while it accumulates. A hook on a
    parameter's gradient may be an optimizer that steps inside the backward pass (LOMO, layer-wise GaLore), and fp8
    libraries keep their scales outside the model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    is_fsdp1 = plugin is not None and plugin.fsdp_version == 1
    if accelerator.distributed_type == "DEEPSPEED" or is_fsdp1:
        return "this way of sharding keeps gradients where they cannot be put aside"
    if accumulates and (plugin or any(isinstance(module, FSDPModule) for module in model.modules())):
        return "FSDP2 keeps gradients where they cannot be put aside while it accumulates"
    if accelerator.mixed_precision == "fp8":
        return "fp8 keeps its scales where they cannot be put back"
    if accelerator.has_lomo_optimizer:
        return "the optimizer steps inside the backward pass"
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"a hook on the gradient of {name} may change the student, as optimizers inside the backward pass do"
    return None


@contextmanager
def undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give the block a model without gradients; afterwards restore gradients, buffers and all random numbers.

    Buffers hold a model's statistics: running means, routers' biases and loads, amax histories.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modules = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies = {id(buffer): buffer.clone() for _, own in modules for buffer in own.values() if buffer is not None}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, own in modules:
            module._buffers.clear()
            module._buffers.update(own)
            for buffer in own.values():
                if buffer is not None and not torch.equal(buffer, copies[id(buffer)]):
                    with torch.no_grad():
                        buffer.copy_(copies[id(buffer)])
