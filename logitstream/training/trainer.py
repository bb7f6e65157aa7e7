"""DistillationTrainer: transformers.Trainer with the distillation loss, the target stream and the run's statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from logitstream import metrics
from logitstream.data.documents import FOR_THE_LOSS, PACKING, Batch, for_the_model
from logitstream.data.loss_mask import IGNORED_LABEL, next_token_labels, supervised_mask
from logitstream.data.student_limits import (
    Before,
    StudentLimits,
    hides,
    refuse_to_see,
    stands_before,
    takes_positions,
)
from logitstream.data.token_rows import per_token
from logitstream.training.data_parallel import DataParallelTrainer, expect_equal_numbers, joined_by
from logitstream.training.first_choices import FirstChoices
from logitstream.training.head_loss import HeadLoss, StudentLoss, install_fused_loss, reshard
from logitstream.training.order import leave_out_repeats, without_repeats
from logitstream.training.overhead import MeasuringTrainer
from logitstream.training.resumable import ResumableTrainer
from logitstream.training.stats import HeldOutStats, RunStats

if TYPE_CHECKING:
    from logitstream.training.target_stream import TargetStream


class DistillationTrainer(ResumableTrainer, MeasuringTrainer, DataParallelTrainer):
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
        self.target_stream: TargetStream | None = None
        self._student_inputs: StudentInputs | None = None
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
        self._source: Iterator[Batch] | None = None
        """The Trainer's iterator over the epoch's batches; _batches are the same with targets."""
        self._batches: Iterator[Batch] = iter(())
        self._dataloader: DataLoader[Any] | None = None
        self._num_micro_batches = torch.ones(())
        """Those of the step that have a supervised row, counted over the same processes as the rows."""
        self._heldout = HeldOutStats()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train and close the target stream, whatever happens."""
        self._student_inputs = None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_stream()

    def _end_stream(self) -> None:
        self._source, self._batches = None, iter(())
        if self.target_stream is not None:
            self.target_stream.close()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new student with the fused loss, for each call of `train` and each trial of a search."""
        model: nn.Module = super().call_model_init(trial)
        self.is_fused, self._student_inputs = install_fused_loss(model), None
        return model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the plain dataloader, in which the Trainer may skip; `get_batch_samples` adds the targets."""
        self._end_stream()
        dataloader = self._dataloader = super().get_train_dataloader()
        if self.wrap_dataloader is not None:
            self.target_stream = self.wrap_dataloader(dataloader)
            self.stats.follow(self.target_stream)
        return dataloader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Return the next batches with their targets and how many supervised rows all processes' batches hold."""
        self.stats.begin_step()
        if epoch_iterator is not self._source:
            batches = without_repeats(epoch_iterator, self._dataloader, process_index=self.args.process_index)
            if self.target_stream is not None:
                if self._source is None:  # later epochs follow by themselves
                    self.target_stream.set_epoch(int(self.state.epoch or 0))
                first_step = self.state.global_step * self.args.gradient_accumulation_steps
                batches = self.target_stream.over(batches, first_step=first_step)
            self._source, self._batches = epoch_iterator, batches
        return super().get_batch_samples(self._batches, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | int | None:
        """Count supervised rows and micro-batches, over all processes if average_tokens_across_devices is set."""
        self.stop.agree()
        if not has_length(self._dataloader):  # else all processes are known to have as many batches
            expect_equal_numbers(len(batch_samples))
        if not batch_samples:
            return None
        rows = torch.stack([supervised_mask(batch).sum() for batch in batch_samples])
        counts = torch.stack([rows.sum(), (rows > 0).sum()]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts).reshape(-1, 2).sum(0)
        num_items, self._num_micro_batches = counts.unbind()
        return num_items.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return a micro-batch's loss such that DDP's mean over processes is the mean over supervised rows.

        What the model itself adds (a router's loss) has no rows: it is averaged over the step's micro-batches.
        """
        # DDP divides by as many processes as the step's rows and micro-batches were counted over.
        divisor = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        num_items = None if num_items_in_batch is None else num_items_in_batch / divisor
        loss, diagnostics, own_loss = self._student_loss(model, inputs, self.ce_weight, num_items)
        if num_items_in_batch is not None:
            counts = supervised_mask(inputs).any()  # a micro-batch that only fills up an epoch does not count
            own_loss = own_loss * counts * divisor / self._num_micro_batches.clamp(min=1)
        if model.training and not self.is_measuring:
            self.stats.add_loss(diagnostics, own_loss)
        loss = loss + own_loss
        return (loss, {"loss": loss}) if return_outputs else loss

    def _student_loss(
        self, model: nn.Module, inputs: Batch, ce_weight: float, num_items: Tensor | float | None = None
    ) -> StudentLoss:
        targets = inputs.get("targets")
        head_loss = HeadLoss(
            from_logits=not self.is_fused,
            targets=targets,
            labels=next_token_labels(inputs),
            loss_mask=supervised_mask(inputs),
            ce_weight=1.0 if targets is None else ce_weight,
            num_items=num_items,
        )
        student: StudentLoss = model(**self._model_inputs(inputs), head_loss=head_loss)
        return student

    def _model_inputs(self, inputs: Batch) -> Batch:
        if self._student_inputs is None:
            assert isinstance(self.model, nn.Module)
            self._student_inputs = StudentInputs(self.model)
        return self._student_inputs.of(inputs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over all supervised tokens, NaN without any.

        The Trainer's is a mean of batches' means. If batches bring targets, eval_kl and its companions are means over
        the rows that have them. Afterwards FSDP2 scatters its weights again.
        """
        self._heldout = HeldOutStats()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        assert output.metrics is not None
        for name, value in self._heldout.means(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        assert isinstance(self.model, nn.Module)
        reshard(self.model)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the cross-entropy of held-out text; logits and labels only if something asks for them.

        Sequences that accelerate repeats to fill up the last batch are left out of the loss.
        """
        inputs, state = self._prepare_inputs(inputs), self.accelerator.gradient_state
        counted = inputs
        if state.end_of_dataloader and state.remainder > 0:
            counted = leave_out_repeats(inputs, state.remainder, process_index=self.args.process_index)
        if self.first_choices is not None and counted.get("targets") is None:
            counted = self.first_choices.add_to(counted)
        with torch.no_grad(), self.compute_loss_context_manager():
            seen = self._student_loss(model, counted, ce_weight=0.5).diagnostics
            self._heldout.add(seen, counted["targets"].spec if counted.get("targets") is not None else None)
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
            logs |= self.stats.logs(self.accelerator, self.state)
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


class StudentInputs:
    """Makes what a student's forward gets from a batch, and tries out once what the student hides from its tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._is_sharded = joined_by(model) not in (None, "DDP")
        self._hidden: dict[tuple[Before, int], bool] = {}
        """By what stands before a document, and for one and for several rows, as attention kernels differ in that."""

    def of(self, batch: Batch) -> Batch:
        """Return a forward's arguments; raise ValueError if it cannot take them or sees more than the teacher."""
        inputs = for_the_model(batch, takes_positions=takes_positions(self._model))
        StudentLimits.of(self._model).check(inputs)
        before, several = stands_before(inputs), min(len(batch["input_ids"]), 2)
        cases: list[tuple[Before, int]] = [] if before is None else [(before, several)]
        if self._is_sharded:  # which is tried on all processes alike
            cases = [(kind, rows) for kind in get_args(Before) for rows in (1, 2)]
        for case in cases:
            if case not in self._hidden:
                self._hidden[case] = hides(self._model, case[0], num_rows=case[1])
                reshard(self._model)
        if before is not None and not self._hidden[before, several]:
            refuse_to_see(self._model, before)
        return inputs


def refuse_what_is_not_honoured(args: TrainingArguments, *, compute_loss_func: Any = None) -> None:
    """Raise ValueError for a setting of transformers' Trainer that this loss would silently ignore."""
    liger = args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
    parallel: Any = args.parallelism_config
    splits = parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)
    refused: list[tuple[Any, str]] = [
        (args.n_gpu > 1, f"expected one device a process, got {args.n_gpu}: start with torchrun"),
        (args.label_smoothing_factor, "label_smoothing_factor softens labels, and the targets are soft: set it to 0"),
        (compute_loss_func, "compute_loss_func would replace the loss: override DistillationTrainer.compute_loss"),
        (args.label_names not in (None, ["labels"]), f"expected label_names ['labels'], got {args.label_names}"),
        (liger, "use_liger_kernel needs liger_kernel_config {'fused_linear_cross_entropy': False}: the loss is ours"),
        (splits, "parallelism_config splits sequences, but a row's targets are whole: set cp_size and sp_size to 1"),
    ]
    for applies, message in refused:
        if applies:
            raise ValueError(message)
