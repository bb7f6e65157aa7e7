"""A Trainer whose processes train one student together, whatever came before, or say that they do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from logitstream.data.documents import Batch
from logitstream.training.order import LengthGrouped
from logitstream.training.ranks import (
    RankGuard,
    SharedRetry,
    describe_run,
    expect_all_processes,
    expect_equal_numbers,
    num_processes,
)

logger = logging.getLogger(__name__)


class DataParallelTrainer(Trainer):
    """Puts the student into DDP at each start, draws the order of sequences from settings alone, checks the ranks.

    Raises RanksDiffer, on every process, where they would train apart. See `ranks` and `order`.
    """

    retry_seconds = 120.0
    """How long processes wait for each other when memory ran out and `auto_find_batch_size` tries a smaller batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        expect_all_processes(self.accelerator.num_processes)
        self.add_callback(RankGuard(lambda: self.model_wrapped))
        self._retry: SharedRetry | None = None
        self._is_described = False

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._retry = None
        return super().train(*args, **kwargs)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Before each try of `auto_find_batch_size`: the processes go on to a smaller batch together or not at all."""
        if num_processes() > 1:
            if self._retry is None:
                self._retry = SharedRetry(seconds=self.retry_seconds)
            else:
                self._retry.wait()
        super()._update_auto_batch_size(batch_size)  # type: ignore[no-untyped-call]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, from the bare student, whatever it went through before.

        An evaluation marks the bare student as prepared (or compiles it), and accelerate then never puts DDP around it;
        a DDP from an earlier call does not know parameters that were added or unfrozen since.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            vars(self.model).pop("_is_accelerate_prepared", None)
            self.model_wrapped = self.model
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_train_dataloader(self) -> DataLoader[Any]:
        self._is_described = False
        self.accelerator.dataloader_config.data_seed = self._order_seed
        return super().get_train_dataloader()

    @property
    def _order_seed(self) -> int:
        """Of the order of sequences: a setting, for processes may have drawn different random numbers before."""
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        sampler: Sampler[Any] | None = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            step_sequences = self.get_total_train_batch_size(self.args)
            return LengthGrouped(sampler.lengths, step_sequences=step_sequences, seed=self._order_seed)
        return sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """As the Trainer's; the first batches of a run say what it is."""
        samples: tuple[list[Batch], Tensor | int | None] = super().get_batch_samples(
            epoch_iterator, num_batches, device
        )
        if not self._is_described:
            self._is_described = True
            assert isinstance(self.model_wrapped, nn.Module)
            line = describe_run(self.model_wrapped, samples[0])
            if self.is_world_process_zero():
                logger.info("training: %s", line)
        return samples

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if has_length(dataloader):
            expect_equal_numbers(len(dataloader))
        return super().evaluation_loop(dataloader, *args, **kwargs)
