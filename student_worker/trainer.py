"""DistillationTrainer: transformers.Trainer with the distillation loss, the target stream and their figures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from logitstream import metrics
from logitstream.fused_loss import FusedLoss, fused_linear_sparse_kl
from logitstream.loss import sparse_kl
from student_worker.data_parallel import DataParallelTrainer
from student_worker.documents import FOR_THE_LOSS, PACKING, Batch, for_the_model
from student_worker.figures import StepFigures
from student_worker.order import leave_out_repeats, without_repeats
from student_worker.overhead import Pair, PassTime
from student_worker.ranks import expect_equal_numbers
from student_worker.saving import ResumableTrainer
from student_worker.split_model import install_fused_loss, reshard
from student_worker.student_limits import StudentLimits, sees_documents_alone, takes_positions
from student_worker.supervision import next_token_labels, supervised_mask

if TYPE_CHECKING:
    from student_worker.target_stream import TargetStream

logger = logging.getLogger(__name__)


class DistillationTrainer(ResumableTrainer, DataParallelTrainer):
    """Trains on batches with `targets`; one without them (evaluation) gets plain cross-entropy. See `supervision`.

    wrap_dataloader: makes the target stream over the training dataloader; without it the batches bring their own
        targets, or have none.
    ce_weight, temperature, ghost, chunk_bytes: as in `fused_linear_sparse_kl`; temperature, ghost None: the targets'.
    overhead_every: measure the overhead over cross-entropy at every n-th optimizer step; 0: never. See `overhead`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        wrap_dataloader: Callable[[DataLoader[Any]], TargetStream] | None = None,
        ce_weight: float = 0.0,
        temperature: float | None = None,
        ghost: bool | None = None,
        chunk_bytes: int | None = None,
        overhead_every: int = 0,
        **kwargs: Any,
    ) -> None:
        self.is_fused = False
        self.target_stream: TargetStream | None = None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"expected one device a process, got {self.args.n_gpu}: start with torchrun")
        self.wrap_dataloader = wrap_dataloader
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.ghost = ghost
        self.chunk_bytes = chunk_bytes
        assert isinstance(self.model, nn.Module)
        model_init: Any = self.model_init
        if model_init is None:
            self.is_fused = install_fused_loss(self.model)
        if overhead_every and not self._can_discard_gradients():
            logger.warning("the overhead over cross-entropy cannot be measured with this way of sharding")
            overhead_every = 0
        self.figures = StepFigures(overhead_every=overhead_every)
        self.add_callback(self.figures)
        self._sees_documents_alone = False
        self._source: Iterator[Batch] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._dataloader: DataLoader[Any] | None = None
        self._heldout = torch.zeros(2, dtype=torch.float64)
        """Of the evaluation that runs: the sum of cross-entropy over supervised tokens, and their number."""

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's; the target stream is closed whatever happens."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_stream()

    def _end_stream(self) -> None:
        self._source, self._batches = None, iter(())
        if self.target_stream is not None:
            self.target_stream.close()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new student of `model_init`, with the fused loss: for each call of `train` and each trial of a search."""
        model: nn.Module = super().call_model_init(trial)
        self.is_fused = install_fused_loss(model)
        self._sees_documents_alone = False
        return model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The plain dataloader, which the Trainer may skip in when it resumes; `get_batch_samples` adds the targets."""
        self._end_stream()
        dataloader = self._dataloader = super().get_train_dataloader()
        if self.wrap_dataloader is not None:
            self.target_stream = self.wrap_dataloader(dataloader)
            self.figures.follow(self.target_stream)
        return dataloader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """The next batches with their targets, and how many supervised rows they hold in all processes."""
        self.figures.begin_step()
        if epoch_iterator is not self._source:
            self._begin_epoch(epoch_iterator)
        samples: tuple[list[Batch], Tensor | int | None] = super().get_batch_samples(self._batches, num_batches, device)
        return samples

    def _begin_epoch(self, epoch_iterator: Iterator[Batch]) -> None:
        batches = without_repeats(epoch_iterator, self._dataloader, process_index=self.args.process_index)
        stream = self.target_stream
        if stream is not None:
            if self._source is None:  # later epochs follow by themselves
                stream.set_epoch(int(self.state.epoch or 0))
            first_step = self.state.global_step * self.args.gradient_accumulation_steps
            batches = stream.over(batches, first_step=first_step)
        self._source, self._batches = epoch_iterator, batches

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | int | None:
        """Supervised rows, over all processes where average_tokens_across_devices asks for it."""
        self.stop.agree()
        if not has_length(self._dataloader):  # else all processes are known to have as many batches
            expect_equal_numbers(len(batch_samples))
        if not batch_samples:
            return None
        num_items = torch.stack([supervised_mask(batch).sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_items = self.accelerator.gather(num_items).sum()
        return num_items.clamp(min=1)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One micro-batch; at steps that are due, timed beside its cross-entropy twin."""
        if not self.figures.begin_micro_batch(inputs):
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
        """The same pass without targets, which leaves gradients and random numbers as they were."""
        plain = {name: value for name, value in inputs.items() if name != "targets"}
        gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        for parameter, _ in gradients:
            parameter.grad = None
        device = self.args.device
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            _, taken = self._time_step(model, plain, num_items_in_batch)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return taken

    def _finish_device(self) -> None:
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()

    def _can_discard_gradients(self) -> bool:
        """DeepSpeed and FSDP1 keep gradients where they cannot be put aside; so does FSDP2 while it accumulates."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_deepspeed_enabled or (plugin is not None and plugin.fsdp_version == 1):
            return False
        return self.args.gradient_accumulation_steps == 1 or not (plugin or isinstance(self.model, FSDPModule))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, such that DDP's mean over processes is the mean over supervised rows."""
        arguments = self._loss_arguments(inputs)
        if num_items_in_batch is not None:
            averaged = self.args.average_tokens_across_devices
            arguments["num_items"] = num_items_in_batch / (self.accelerator.num_processes if averaged else 1)
        model_inputs = self._model_inputs(inputs)
        if not self.is_fused:
            outputs = model(**model_inputs)
            loss = sparse_kl(outputs.logits, **arguments)
            return (loss, outputs) if return_outputs else loss
        loss_of_head = partial(fused_linear_sparse_kl, chunk_bytes=self.chunk_bytes, **arguments)
        fused: FusedLoss = model(**model_inputs, head_loss=loss_of_head)
        if model.training and arguments["targets"] is not None:
            self.figures.add_diagnostics(fused.diagnostics)
        return (fused.loss, {"loss": fused.loss}) if return_outputs else fused.loss

    def _model_inputs(self, inputs: Batch) -> Batch:
        """What the student's forward gets; ValueError where it cannot take that, or is not what the teacher is told."""
        assert isinstance(self.model, nn.Module)
        model_inputs = for_the_model(inputs, takes_positions=takes_positions(self.model))
        StudentLimits.of(self.model).check(model_inputs)
        is_packed = "position_ids" in model_inputs and "attention_mask" not in model_inputs
        if is_packed and not self._sees_documents_alone:
            self._sees_documents_alone = sees_documents_alone(self.model, num_rows=len(inputs["input_ids"]))
            reshard(self.model)
            if not self._sees_documents_alone:
                raise ValueError(
                    f"{type(self.model).__name__} sees across the documents of a packed row, the teacher does not: "
                    "give it one document a row, or attn_implementation='sdpa'"
                )
        return model_inputs

    def _loss_arguments(self, inputs: Batch) -> dict[str, Any]:
        targets = inputs.get("targets")
        return {
            "targets": targets,
            "labels": next_token_labels(inputs),
            "loss_mask": supervised_mask(inputs),
            "ce_weight": 1.0 if targets is None else self.ce_weight,
            "temperature": self.temperature,
            "ghost": self.ghost,
        }

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, but the loss is the mean over all supervised tokens; NaN where there is none.

        The Trainer's is a mean of batches' means. Afterwards FSDP2 scatters its weights again.
        """
        self._heldout.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, num_rows = self.accelerator.reduce(self._heldout.to(self.args.device), "sum").tolist()
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = total / num_rows if num_rows else math.nan
        assert isinstance(self.model, nn.Module)
        reshard(self.model)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Cross-entropy of held-out text; logits only where something asks for them."""
        inputs = self._prepare_inputs(inputs)
        inputs = {name: value for name, value in inputs.items() if name != "targets"}
        counted = self._without_repeats(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, counted).detach()
            num_rows = int(supervised_mask(counted).sum())
            self._heldout += torch.tensor([float(loss) * num_rows, num_rows], dtype=torch.float64)
            if prediction_loss_only:
                return loss, None, None
            logits = model(**self._model_inputs(inputs)).logits
        labels = inputs.get("labels")
        return loss, logits.detach(), inputs["input_ids"] if labels is None else labels

    def _without_repeats(self, inputs: Batch) -> Batch:
        """Of the last batches of all processes, those sequences out of the loss that only fill them up.

        As accelerate's gather_for_metrics does: the processes' sequences in turn, of which the first `remainder` count.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        return leave_out_repeats(inputs, state.remainder, process_index=self.args.process_index)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with `figures` over all processes beside each training loss."""
        if "loss" in logs:
            metrics.STUDENT_LOSS.set(logs["loss"])
            logs |= self.figures.logs(self.accelerator)
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*known, *PACKING, *FOR_THE_LOSS]))  # type: ignore[assignment]
