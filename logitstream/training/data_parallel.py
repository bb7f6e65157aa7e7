"""Processes (ranks) train one student together, whatever came before, or end the run saying that they do not.

Their parameters are compared after the first step and at the end; their numbers of batches before each loop.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from logitstream.data.documents import Batch
from logitstream.errors import RanksDiffer
from logitstream.training.distributed import num_processes, of_all_processes
from logitstream.training.order import LengthGrouped

MAX_NAMES = 3

logger = logging.getLogger(__name__)

Digests = dict[tuple[str, tuple[int, ...]], int]
"""A digest for each tensor's name and place: which shard a process holds, by mesh dimension, () for the whole."""


class DataParallelTrainer(Trainer):
    """Puts the student into DDP at each start, draws the order of sequences from settings alone, compares the ranks.

    Raises RanksDiffer, on every process, if they would train apart.
    """

    retry_seconds = 120.0
    """Time that processes wait for each other when memory ran out and `auto_find_batch_size` tries a smaller batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        expect_all_processes(self.accelerator.num_processes)
        self.add_callback(_CompareRanks(lambda: self.model_wrapped))
        self._retry_group: Any = None
        self._is_described = False

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._retry_group = None
        return super().train(*args, **kwargs)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Before each try of `auto_find_batch_size`: go on to a smaller batch together with all processes."""
        if num_processes() > 1 and self._retry_group is None:
            # A group of its own, because the default one may hold other processes in a gradient's reduction.
            self._retry_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.retry_seconds))
        elif num_processes() > 1:
            try:
                dist.barrier(self._retry_group)
            except RuntimeError as error:
                raise RanksDiffer(
                    f"memory ran out on rank {dist.get_rank()}, but within {self.retry_seconds:.0f} s not on every "
                    "rank, and only all together can try a smaller batch: set a smaller `per_device_train_batch_size`"
                ) from error
        super()._update_auto_batch_size(batch_size)  # type: ignore[no-untyped-call]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Begin from the bare student.

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
        """A setting, because processes may have drawn different random numbers before."""
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
        """Return the step's batches; log what runs at a run's first step."""
        samples: tuple[list[Batch], Tensor | int | None]
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
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


class _CompareRanks(TrainerCallback):
    """Ends a run whose processes train apart; wrapped_model returns DDP around the student, or a sharded student."""

    def __init__(self, wrapped_model: Callable[[], nn.Module]) -> None:
        self._wrapped_model = wrapped_model
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step = state.global_step + 1
        model = self._wrapped_model()
        if num_processes() > 1 and joined_by(model) is None:
            raise RanksDiffer(
                f"{num_processes()} processes were started to train one student, but nothing joins them: expected DDP "
                f"or a sharded model, got {type(model).__name__}"
            )
        if has_length(kwargs["train_dataloader"]):
            expect_equal_numbers(len(kwargs["train_dataloader"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._first_step:
            expect_equal_ranks(self._wrapped_model(), when=f"after step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        expect_equal_ranks(self._wrapped_model(), when=f"at the end of training, after step {state.global_step}")


def expect_all_processes(found: int) -> None:
    """Raise RanksDiffer if a launcher started more processes than the `found` ones that train together."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and found == 1:
        raise RanksDiffer(
            f"{started} processes were started (WORLD_SIZE), but each would train a student of its own: on CPUs set "
            "ACCELERATE_USE_CPU=true, or use_cpu=True in the TrainingArguments"
        )


def expect_equal_numbers(num_batches: int) -> None:
    """Raise RanksDiffer, on every process, if some would wait in a step for one that has no batch for it."""
    numbers = of_all_processes(num_batches)
    if len(set(numbers)) > 1:
        raise RanksDiffer(
            f"expected as many batches on every rank as on rank 0, got {', '.join(map(str, numbers))}: set "
            "`even_batches` in accelerator_config, or `dataloader_drop_last`"
        )


def joined_by(model: nn.Module) -> str | None:
    """Return how the processes share one model's gradients, None if they do not."""
    parts = list(model.modules())
    for kind, name in ((DistributedDataParallel, "DDP"), (FSDPModule, "FSDP2"), (FullyShardedDataParallel, "FSDP")):
        if any(isinstance(part, kind) for part in parts):
            return name
    if type(model).__name__ == "DeepSpeedEngine":
        return "DeepSpeed"
    return "sharded tensors" if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else None


def describe_run(model: nn.Module, batches: Sequence[Batch]) -> str:
    """Return one line about the model as it is called and a step's own batches; every process calls it."""
    lengths = [length for batch in batches for length in _sequence_lengths(batch)]
    everyone = of_all_processes((len(lengths), min(lengths, default=0), max(lengths, default=0)))
    sequences, longest = sum(number for number, _, _ in everyone), max(high for _, _, high in everyone)
    shortest = min((low for number, low, _ in everyone if number), default=0)
    size = f"{sequences} × {longest} tokens"
    if shortest < longest:
        size = f"{sequences} sequences of {shortest} to {longest} tokens (the first step's)"
    accumulated = f", in {len(batches)} micro-batches a process" if len(batches) > 1 else ""
    processes = "1 process" if len(everyone) == 1 else f"{len(everyone)} processes, {joined_by(model)}"
    return f"{processes}, global batch {size}{accumulated}"


def _sequence_lengths(batch: Batch) -> list[int]:
    mask = batch.get("attention_mask")
    number, tokens = batch["input_ids"].shape
    lengths: list[int] = [tokens] * number if mask is None or mask.ndim != 2 else mask.bool().sum(1).tolist()
    return lengths


def expect_equal_ranks(model: nn.Module, *, when: str) -> None:
    """Raise RanksDiffer, on every process, if processes hold different bits of what should be equal.

    Parameters are compared and, if DDP does not broadcast the main process's, saved buffers; a shard is compared with
    its replicas. FSDP1 and DeepSpeed keep flat parameters that cannot be told apart, so theirs are not compared.
    """
    if num_processes() == 1 or joined_by(model) in ("FSDP", "DeepSpeed"):
        return
    if message := difference(of_all_processes(digests(model))):
        raise RanksDiffer(
            f"the processes' students differ {when}: {message}. Each process has trained another student; likely a "
            "parameter is trained that was frozen or not there when training began, or the model is called around its "
            "wrapper"
        )


def digests(model: nn.Module) -> Digests:
    """Return a digest of each tensor's bytes."""
    wrappers = [part for part in model.modules() if isinstance(part, DistributedDataParallel)]
    student = wrappers[0].module if wrappers else model
    tensors: dict[str, Tensor] = dict(student.named_parameters())
    if not (wrappers and wrappers[0].broadcast_buffers):
        saved = student.state_dict().keys()
        tensors |= {name: buffer for name, buffer in student.named_buffers() if name in saved}
    return {(name, _place(tensor)): _digest(tensor) for name, tensor in tensors.items()}


def difference(everyone: Sequence[Digests]) -> str | None:
    """Say which tensors some ranks hold otherwise than others; None if all agree."""
    holders: defaultdict[tuple[str, tuple[int, ...]], defaultdict[int, list[int]]]
    holders = defaultdict(lambda: defaultdict(list))
    for rank, mine in enumerate(everyone):
        for key, digest in mine.items():
            holders[key][digest].append(rank)
    names = {frozenset(name for name, _ in mine) for mine in everyone}
    if len(names) > 1:
        return f"not every rank has {_some(sorted(frozenset.union(*names) - frozenset.intersection(*names)))}"
    differing = {name: list(by.values()) for (name, _), by in holders.items() if len(by) > 1}
    if not differing:
        return None
    ranks = ", ".join("+".join(map(str, group)) for group in next(iter(differing.values())))
    return f"{len(differing)} of {len(holders)} tensors ({_some(list(differing))}), between ranks {ranks}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _place(tensor: Tensor) -> tuple[int, ...]:
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate() or ()
    return tuple(at for at, how in zip(coordinate, tensor.placements, strict=True) if not how.is_replicate())


def _digest(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return xxhash.xxh3_64_intdigest(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
