"""The order of sequences, the same however many processes share a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from logitstream.data.batches import leave_out
from logitstream.data.documents import Batch


class LengthGrouped(LengthGroupedSampler):
    """The Trainer's sampler for `group_by_length`, with an order that follows from the seed and the epoch alone.

    The Trainer's own draws different random numbers on each process, and groups by its batch instead of the step's.
    """

    def __init__(self, lengths: list[int], *, step_sequences: int, seed: int) -> None:
        super().__init__(step_sequences, lengths=lengths)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        indices: list[int] = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)  # type: ignore[no-untyped-call]
        return iter(indices)


def without_repeats(batches: Iterator[Batch], dataloader: Any, *, process_index: int) -> Iterator[Batch]:
    """Yield the rest of an epoch's batches; mask the sequences that accelerate repeats to pad the last one."""
    sampler = dataloader.batch_sampler
    fills_up = isinstance(sampler, BatchSamplerShard) and sampler.even_batches and not sampler.drop_last
    if not fills_up or sampler.num_processes == 1 or sampler.batch_size is None:
        yield from batches
        return
    remainder = len(sampler.batch_sampler.sampler) % dataloader.total_batch_size
    held = next(batches, None)
    while held is not None:
        following = next(batches, None)
        if following is None and remainder:
            held = leave_out_repeats(held, remainder, process_index=process_index)
        yield held
        held = following


def leave_out_repeats(batch: Batch, remainder: int, *, process_index: int) -> Batch:
    """Mask a process's last batch beyond the first `remainder` sequences of all processes."""
    num_sequences, num_tokens = batch["input_ids"].shape
    num_counted = max(remainder - process_index * num_sequences, 0)
    if num_counted >= num_sequences:
        return batch
    counted = dict(batch)
    leave_out(counted, np.arange(num_counted * num_tokens, num_sequences * num_tokens))
    return counted
