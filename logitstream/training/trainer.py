"""DistillationTrainer: transformers.Trainer with the distillation loss, the target stream and the run's statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from logitstream import metrics
from logitstream.data.corpus import per_token
from logitstream.data.documents import FOR_THE_LOSS, PACKING, Batch, for_the_model
from logitstream.data.loss_mask import IGNORED_LABEL, next_token_labels, supervised_mask
from logitstream.data.student_limits import Before, StudentLimits, hides, refuse_to_see, stands_before, takes_positions
from logitstream.kernels import are_usable
from logitstream.loss import Diagnostics
from logitstream.training.checkpoints import ResumableTrainer
from logitstream.training.device_targets import Placer, placed_rows
from logitstream.training.distributed import expect_equal_ranks, is_sharded, leave_out_repeats, without_repeats
from logitstream.training.first_choices import FirstChoices
from logitstream.training.head_loss import HeadLoss, StudentLoss, install_fused_loss, reshard
from logitstream.training.stats import RunStats, heldout_means
from logitstream.types import TargetSpec

if TYPE_CHECKING:
    from logitstream.training.target_stream import TargetStream


class DistillationTrainer(ResumableTrainer):
    """Trains on batches with `targets`, and by plain cross-entropy on a batch without them.

    Evaluation is cross-entropy, with the KL beside it if the batches bring targets.

    wrap_dataloader: makes the target stream over the training dataloader; without it the batches bring their own
        targets, or have none.
    ce_weight: as in `sparse_kl`.
    first_choices: the teacher's on held-out text, for eval_teacher_top1_agreement.
    overhead_every: measure the overhead over cross-entropy at every n-th optimizer step (see `overhead`); 0: never.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        wrap_dataloader: Callable[[DataLoader[Any]], TargetStream] | None = None,
        ce_weight: float = 0.0,
        overhead_every: int = 0,
        first_choices: FirstChoices | None = None,
        **kwargs: Any,
    ) -> None:
        self.is_fused = False
        self._hidden: dict[tuple[Before, int], bool] = {}
        """Tells what the student hides from a document, for one row and several: attention kernels differ in that."""
        super().__init__(*args, **kwargs)
        refuse_what_is_not_honoured(self.args, compute_loss_func=self.compute_loss_func)
        self.wrap_dataloader = wrap_dataloader
        self.ce_weight = ce_weight
        self.first_choices = first_choices
        self.stats = RunStats(overhead_every=overhead_every)
        self.add_callback(self.stats)
        assert isinstance(self.model, nn.Module)
        model_init: Any = self.model_init
        if model_init is None:
            self.is_fused = install_fused_loss(self.model)
        self._epoch: tuple[Any, Iterator[Batch]] = (None, iter(()))
        """The Trainer's iterator over the epoch's batches, and the same batches with targets."""
        self._num_micro_batches = torch.ones(())
        """Those of the step that have a supervised row, counted over the same processes as the rows."""
        self._heldout: list[tuple[Diagnostics, TargetSpec | None]] = []

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train and close the target stream, whatever happens."""
        try:
            output = super().train(*args, **kwargs)
            expect_equal_ranks(self.model, when="at the end of training")
            return output
        finally:
            self._end_stream()

    def _end_stream(self) -> None:
        self._epoch = (None, iter(()))
        if self.stats.stream is not None:
            self.stats.stream.close()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new student with the fused loss, for each call of `train` and each trial of a search."""
        model: nn.Module = super().call_model_init(trial)
        self.is_fused = install_fused_loss(model)
        self._hidden.clear()
        return model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the plain dataloader, in which the Trainer may skip; `get_batch_samples` adds the targets."""
        self._end_stream()
        dataloader = super().get_train_dataloader()
        if self.wrap_dataloader is not None:
            stream = self.wrap_dataloader(dataloader)
            stream.place = Placer(self.args.device) if are_usable(self.args.device) else None
            self.stats.follow(stream)
        return dataloader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Return the next batches with their targets and how many supervised rows all processes' batches hold."""
        if self.state.global_step >= self.state.max_steps:
            # A run killed between its last checkpoint and its end: the Trainer would stop only after one more step.
            self.control.should_training_stop = True
            return [], None
        if self.state.global_step == self.stats.first_step + 1:
            expect_equal_ranks(self.model, when=f"after step {self.state.global_step}")
        self.stats.begin_step()
        if epoch_iterator is not self._epoch[0]:
            self._epoch = (epoch_iterator, self._with_targets(epoch_iterator))
        batches = self.stop.take(self._epoch[1], num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _with_targets(self, epoch_iterator: Iterator[Batch]) -> Iterator[Batch]:
        """Return the batches of an epoch that begins or is resumed, with targets if there is a stream."""
        seed = self.accelerator.dataloader_config.data_seed or 0
        self._order.manual_seed(seed + int(self.state.epoch or 0))
        dataloader = self.callback_handler.train_dataloader
        batches = without_repeats(epoch_iterator, dataloader, process_index=self.args.process_index)
        stream = self.stats.stream
        if stream is None:
            return batches
        if self._epoch[0] is None:  # later epochs follow by themselves
            stream.set_epoch(int(self.state.epoch or 0))
        return stream.over(batches, first_step=self.state.global_step * self.args.gradient_accumulation_steps)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | int | None:
        """Count supervised rows and micro-batches, over all processes if average_tokens_across_devices is set."""
        if not batch_samples:
            return None
        rows = torch.stack([supervised_mask(batch).sum() for batch in batch_samples])
        self.stats.step["tokens"] = rows.sum()
        counts = torch.stack([rows.sum(), (rows > 0).sum()]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts).reshape(-1, 2).sum(0)
        num_items, self._num_micro_batches = counts.unbind()
        return num_items.clamp(min=1)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Train on one micro-batch, and time it with and without its targets if it is due."""
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        stats, meter = self.stats, self.stats.meter
        is_due = stats.step["micro_batches"] == 0 and inputs.get("targets") is not None and meter.is_due()
        if is_due and meter.can_undo(model, self.accelerator):
            loss, seconds = meter.measure(step, inputs, model=model, accelerator=self.accelerator)
            stats.step["measuring_seconds"] = seconds
        else:
            loss = step(inputs)
        stats.end_pass(inputs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's loss such that DDP's mean over processes is the mean over supervised rows.

        A router's loss, which the model itself adds, has no rows: it is averaged over the step's micro-batches.
        """
        # DDP divides by as many processes as the step's rows and micro-batches were counted over.
        divisor = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        num_items = None if num_items_in_batch is None else num_items_in_batch / divisor
        loss, diagnostics, own_loss = self._student_loss(model, inputs, self.ce_weight, num_items)
        if num_items_in_batch is not None:
            counts = supervised_mask(inputs).any()  # a micro-batch that only fills up an epoch does not count
            own_loss = own_loss * counts * divisor / self._num_micro_batches.clamp(min=1)
        if model.training:
            self.stats.add_loss(diagnostics, own_loss)
        loss = loss + own_loss
        return (loss, {"loss": loss}) if return_outputs else loss

    def _student_loss(
        self, model: nn.Module, inputs: Batch, ce_weight: float, num_items: Tensor | float | None = None
    ) -> StudentLoss:
        targets, labels, loss_mask = inputs.get("targets"), next_token_labels(inputs), supervised_mask(inputs)
        head_loss = HeadLoss(
            from_logits=not self.is_fused,
            targets=targets,
            labels=labels,
            loss_mask=loss_mask,
            device_rows=placed_rows(targets, labels=labels, loss_mask=loss_mask),
            ce_weight=1.0 if targets is None else ce_weight,
            num_items=num_items,
        )
        student: StudentLoss = model(**self._model_inputs(inputs), head_loss=head_loss)
        return student

    def _model_inputs(self, batch: Batch) -> Batch:
        """Return a forward's arguments; raise ValueError if it cannot take them or sees more than the teacher."""
        model = self.model
        assert isinstance(model, nn.Module)
        inputs = for_the_model(batch, takes_positions=takes_positions(model))
        StudentLimits.of(model).check(inputs)
        before, several = stands_before(inputs), min(len(batch["input_ids"]), 2)
        cases: list[tuple[Before, int]] = [] if before is None else [(before, several)]
        if self.accelerator.num_processes > 1 and is_sharded(model):  # which is tried on all processes alike
            cases = [(kind, rows) for kind in get_args(Before) for rows in (1, 2)]
        for kind, rows in (case for case in cases if case not in self._hidden):
            self._hidden[kind, rows] = hides(model, kind, num_rows=rows)
            reshard(model)
        if before is not None and not self._hidden[before, several]:
            refuse_to_see(model, before)
        return inputs

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over all supervised tokens, where the Trainer's is of batches' means.

        If batches bring targets, eval_kl and its companions are means over the rows that have them.
        """
        self._heldout = []
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        for name, value in heldout_means(self._heldout).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        assert isinstance(self.model, nn.Module)
        reshard(self.model)  # or a later step finds weights that are stale
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the cross-entropy of held-out text; logits and labels only if something asks for them.

        Sequences that accelerate repeats to fill up the last batch are left out of the loss.
        """
        self.stop.agree()
        inputs, state = self._prepare_inputs(inputs), self.accelerator.gradient_state
        counted = inputs
        if state.end_of_dataloader and state.remainder > 0:
            counted = leave_out_repeats(inputs, state.remainder, process_index=self.args.process_index)
        if self.first_choices is not None and counted.get("targets") is None:
            counted = self.first_choices.add_to(counted)
        with torch.no_grad(), self.compute_loss_context_manager():
            seen = self._student_loss(model, counted, ce_weight=0.5).diagnostics
            self._heldout.append((seen, getattr(counted.get("targets"), "spec", None)))
            loss = (seen.cross_entropy / seen.labelled_rows).float()
            if prediction_loss_only:
                return loss, None, None
            logits = model(**self._model_inputs(inputs)).logits
        labels = next_token_labels(inputs).masked_fill(~supervised_mask(inputs), IGNORED_LABEL)
        labels = nn.functional.pad(labels, (1, -1), value=IGNORED_LABEL)  # each token at its own place
        return loss, logits.detach()[:, -labels.shape[1] :], labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the statistics over all processes beside each training loss."""
        if "loss" in logs:
            metrics.STUDENT_LOSS.set(logs["loss"])
            logs |= self.stats.logs(self.state)
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*known, *PACKING, *FOR_THE_LOSS]))  # type: ignore[assignment]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Raise ValueError if the Trainer would silently leave out a column that belongs to the tokens."""
        self._set_signature_columns_if_needed()
        unused = [name for name in dataset.column_names if name not in (self._signature_columns or [])]
        wrong = ["seq_lengths"] if "seq_lengths" in unused else per_token(dataset, unused)
        if wrong and self.args.remove_unused_columns:
            raise ValueError(
                f"the column {wrong[0]!r} of the {str(description).lower()} dataset has an entry for each token or "
                "document, and would be left out: remove it, or say the same by position_ids, labels or a known mask"
            )
        return super()._remove_unused_columns(dataset, description)


def refuse_what_is_not_honoured(args: TrainingArguments, *, compute_loss_func: Any = None) -> None:
    """Raise ValueError for a setting with which processes train apart, or that this loss would silently ignore."""
    liger = args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
    alone, started = args.world_size == 1, int(os.environ.get("WORLD_SIZE", "1"))
    uneven = not getattr(args.accelerator_config, "even_batches", True)
    refused: list[tuple[Any, str]] = [
        (args.n_gpu > 1, f"expected one device a process, got {args.n_gpu}: start with torchrun"),
        (alone and started > 1, f"{started} processes would train {started} students: on CPUs set use_cpu=True"),
        (not alone and args.auto_find_batch_size, "auto_find_batch_size would try another size on each process"),
        (not alone and uneven, "even_batches must be true: each process needs a batch for each step"),
        (args.label_smoothing_factor, "label_smoothing_factor softens labels, and the targets are soft: set it to 0"),
        (compute_loss_func, "compute_loss_func would replace the loss: override DistillationTrainer.compute_loss"),
        (liger, "use_liger_kernel needs liger_kernel_config {'fused_linear_cross_entropy': False}: the loss is ours"),
    ]
    for applies, message in refused:
        if applies:
            raise ValueError(message)
