"""Steps that are timed beside a twin without targets, of which no trace stays in the training."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from logitstream.data.documents import Batch
from logitstream.training.overhead import Pair, PassTime
from logitstream.training.stats import StepFigures

logger = logging.getLogger(__name__)


class MeasuringTrainer(Trainer):
    """Times the steps that its `figures` ask for both ways; `is_measuring` while the twin runs."""

    figures: StepFigures
    is_measuring = False

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One micro-batch; at steps that are due, timed beside its cross-entropy twin."""
        if not self.figures.begin_micro_batch(inputs) or not self._can_measure(model):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            self.figures.end_micro_batch(inputs)
            return loss
        if self.figures.meter.num_measured == 0:  # the first pass without targets allocates and compiles: not counted
            self._time_cross_entropy(model, inputs, num_items_in_batch)
        views = isinstance(model, DistributedDataParallel) and model.gradient_as_bucket_view
        plain_first = views or self.figures.meter.num_measured % 2 == 0
        if plain_first:
            cross_entropy = self._time_cross_entropy(model, inputs, num_items_in_batch)
        loss, distillation = self._time_step(model, inputs, num_items_in_batch)
        if not plain_first:
            cross_entropy = self._time_cross_entropy(model, inputs, num_items_in_batch)
        self.figures.add_pair(Pair(distillation=distillation, cross_entropy=cross_entropy))
        self.figures.end_micro_batch(inputs)
        return loss

    def _can_measure(self, model: nn.Module) -> bool:
        reason = why_not(model, self.accelerator, accumulates=self.args.gradient_accumulation_steps > 1)
        if reason is not None:
            logger.warning("the overhead over cross-entropy is not measured: %s", reason)
            self.figures.meter.every = 0
        return reason is None

    def _time_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, PassTime]:
        """Loss and time of one forward and backward pass that all processes begin together."""
        self.accelerator.wait_for_everyone()
        self._finish_device()
        started, thread_started = time.perf_counter(), time.thread_time()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._finish_device()
        wall, busy = time.perf_counter() - started, time.thread_time() - thread_started
        return loss, PassTime(wall=wall, busy=busy if self.args.device.type == "cpu" else wall)

    def _time_cross_entropy(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None) -> PassTime:
        """The same pass without targets, which leaves no trace."""
        plain = {name: value for name, value in inputs.items() if name != "targets"}
        self.is_measuring = True
        try:
            with undone(model, self.args.device):
                return self._time_step(model, plain, num_items_in_batch)[1]
        finally:
            self.is_measuring = False

    def _finish_device(self) -> None:
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()


def why_not(model: nn.Module, accelerator: Accelerator, *, accumulates: bool) -> str | None:
    """Why a pass of a model cannot be taken back; None where it can. Ask in training: optimizers add their hooks there.

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
    """Give the block a model without gradients; afterwards its gradients, buffers and all random numbers are as before.

    Buffers are what statistics are kept in: running means, routers' biases and loads, amax histories.
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
