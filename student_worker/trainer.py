"""DistillationTrainer: transformers.Trainer with the distillation loss and the target stream, and nothing else.

Row t of a batch predicts token t + 1. Labels follow transformers' convention (labels[t] is token t, -100 is no label);
they are shifted here, once: `loss` and `fused_loss` see the label of row t at row t. A row is supervised where
loss_mask says so, without one where labels[t + 1] is a label, without either everywhere, and never on padding; so the
last row of a sequence counts for distillation when neither is given. Without targets only rows with a label count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from logitstream.loss import IGNORED_LABEL, sparse_kl
from logitstream.types import SparseTargets
from student_worker.split_model import install_fused_loss

if TYPE_CHECKING:
    from student_worker.target_stream import TargetStream

Batch = dict[str, Any]
NOT_FOR_THE_MODEL = ("labels", "loss_mask", "targets", "num_items_in_batch")


class DistillationTrainer(Trainer):
    """Trains on batches with `targets`; a batch without them (evaluation) gets plain cross-entropy.

    wrap_dataloader: makes the target stream over the training dataloader; without it the batches bring their own
        targets, or ce_weight is 1.
    ce_weight, temperature, ghost, chunk_bytes: as in `fused_linear_sparse_kl`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        wrap_dataloader: Callable[[DataLoader[Any]], TargetStream] | None = None,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        ghost: bool = False,
        chunk_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"expected one device a process, got {self.args.n_gpu}: start with torchrun")
        self.wrap_dataloader = wrap_dataloader
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.ghost = ghost
        self.chunk_bytes = chunk_bytes
        assert isinstance(self.model, nn.Module)
        self.is_fused = install_fused_loss(self.model)
        self.target_stream: TargetStream | None = None
        self._source: Iterator[Batch] | None = None
        self._batches: Iterator[Batch] = iter(())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's; the target stream is closed whatever happens."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._source, self._batches = None, iter(())
            if self.target_stream is not None:
                self.target_stream.close()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The plain dataloader, which the Trainer may skip in when it resumes; `get_batch_samples` adds the targets."""
        dataloader = super().get_train_dataloader()
        if self.wrap_dataloader is not None:
            self.target_stream = self.wrap_dataloader(dataloader)
        self._source = None
        return dataloader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """The next batches with their targets, and how many supervised rows they hold in all processes."""
        if epoch_iterator is not self._source:
            if self.target_stream is not None and self._source is None:
                self.target_stream.set_epoch(int(self.state.epoch or 0))
            self._source = epoch_iterator
            first_step = self.state.global_step * self.args.gradient_accumulation_steps
            stream = self.target_stream
            self._batches = epoch_iterator if stream is None else stream.over(epoch_iterator, first_step=first_step)
        samples: tuple[list[Batch], Tensor | int | None] = super().get_batch_samples(self._batches, num_batches, device)
        return samples

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | int | None:
        """Supervised rows, over all processes where average_tokens_across_devices asks for it."""
        if not batch_samples:
            return None
        num_items = torch.stack([supervised_mask(batch).sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_items = self.accelerator.gather(num_items).sum()
        return num_items.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, such that DDP's mean over processes is the mean over supervised rows."""
        targets = inputs.get("targets")
        arguments = self.loss_arguments(inputs, targets, 1.0 if targets is None else self.ce_weight)
        if num_items_in_batch is not None:
            averaged = self.args.average_tokens_across_devices
            arguments["num_items"] = num_items_in_batch / (self.accelerator.num_processes if averaged else 1)
        model_inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        if not self.is_fused:
            outputs = model(**model_inputs)
            del arguments["chunk_bytes"]
            loss = sparse_kl(outputs.logits, **arguments)
            return (loss, outputs) if return_outputs else loss
        fused = model(**model_inputs, loss_arguments=arguments)
        return (fused.loss, {"loss": fused.loss}) if return_outputs else fused.loss

    def loss_arguments(self, inputs: Batch, targets: SparseTargets | None, ce_weight: float) -> dict[str, Any]:
        """What `fused_linear_sparse_kl` takes beside the model's own tensors."""
        return {
            "targets": targets,
            "labels": next_token_labels(inputs),
            "loss_mask": supervised_mask(inputs),
            "ce_weight": ce_weight,
            "temperature": self.temperature,
            "ghost": self.ghost,
            "chunk_bytes": self.chunk_bytes,
        }

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Cross-entropy of held-out text; logits only where something asks for them."""
        inputs = self._prepare_inputs(inputs)
        inputs = {name: value for name, value in inputs.items() if name != "targets"}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            logits = model(**{name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}).logits
        labels = inputs.get("labels")
        return loss, logits.detach(), inputs["input_ids"] if labels is None else labels

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*known, *NOT_FOR_THE_MODEL]))  # type: ignore[assignment]


def supervised_mask(batch: Batch) -> Tensor:
    """bool [B, T]: the rows that count, by the rule at the top of this file."""
    mask = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if batch.get("attention_mask") is not None:
        mask &= batch["attention_mask"].bool()
    if batch.get("loss_mask") is not None:
        mask &= batch["loss_mask"].bool()
    elif batch.get("labels") is not None:
        mask &= next_token_labels(batch) != IGNORED_LABEL
    if batch.get("targets") is None:
        mask &= next_token_labels(batch) != IGNORED_LABEL
    return mask


def next_token_labels(batch: Batch) -> Tensor:
    """int64 [B, T]: the label of row t, which is token t + 1; -100 where there is none."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    return nn.functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORED_LABEL)
