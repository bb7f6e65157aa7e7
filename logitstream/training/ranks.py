"""The processes (ranks) of one student train one model: checked at the start, after the first step and at the end."""

from __future__ import annotations

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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from logitstream.data.documents import Batch
from logitstream.errors import RanksDiffer
from logitstream.training.distributed import of_all_processes

MAX_NAMES = 3

Place = tuple[int, ...]
"""Which shard of a tensor a process holds, by mesh dimension; empty: the whole tensor."""
Digests = dict[tuple[str, Place], int]


class RankGuard(TrainerCallback):
    """Ends a run whose processes train apart: nothing joins them, or their parameters differ.

    wrapped_model: gives the model as the trainer calls it, which is DDP around the student, or a sharded student.
    """

    def __init__(self, wrapped_model: Callable[[], nn.Module]) -> None:
        self._wrapped_model = wrapped_model
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = state.global_step + 1
        model = self._wrapped_model()
        if num_processes() > 1 and joined_by(model) is None:
            raise RanksDiffer(
                f"{num_processes()} processes were started to train one student, but nothing joins them: expected DDP "
                f"or a sharded model, got {type(model).__name__}"
            )
        dataloader = kwargs["train_dataloader"]
        if has_length(dataloader):
            expect_equal_numbers(len(dataloader))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._first_step:
            expect_equal_ranks(self._wrapped_model(), when=f"after step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        expect_equal_ranks(self._wrapped_model(), when=f"at the end of training, after step {state.global_step}")


def num_processes() -> int:
    """How many processes torch.distributed knows of; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def expect_all_processes(found: int) -> None:
    """Raise RanksDiffer where a launcher started more processes than the `found` ones that train together."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and found == 1:
        raise RanksDiffer(
            f"{started} processes were started (WORLD_SIZE), but each would train a student of its own: on CPUs set "
            "ACCELERATE_USE_CPU=true, or use_cpu=True in the TrainingArguments"
        )


def joined_by(model: nn.Module) -> str | None:
    """How the processes share one model's gradients; None where they do not."""
    parts = list(model.modules())
    for kind, name in ((DistributedDataParallel, "DDP"), (FSDPModule, "FSDP2"), (FullyShardedDataParallel, "FSDP")):
        if any(isinstance(part, kind) for part in parts):
            return name
    if type(model).__name__ == "DeepSpeedEngine":
        return "DeepSpeed"
    return "sharded tensors" if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else None


def describe_run(model: nn.Module, batches: Sequence[Batch]) -> str:
    """One line on what runs, from the model as it is called and a step's own batches; every process calls it."""
    lengths = [length for batch in batches for length in _sequence_lengths(batch)]
    everyone = of_all_processes((len(lengths), min(lengths, default=0), max(lengths, default=0)))
    sequences = sum(number for number, _, _ in everyone)
    shortest = min((low for number, low, _ in everyone if number), default=0)
    longest = max(high for _, _, high in everyone)
    size = f"{sequences} × {longest} tokens"
    if shortest < longest:
        size = f"{sequences} sequences of {shortest} to {longest} tokens (the first step's)"
    accumulated = f", in {len(batches)} micro-batches a process" if len(batches) > 1 else ""
    processes = "1 process" if len(everyone) == 1 else f"{len(everyone)} processes, {joined_by(model)}"
    return f"{processes}, global batch {size}{accumulated}"


def expect_equal_numbers(num_batches: int) -> None:
    """Raise RanksDiffer, on every process, where some would wait in a step for one that has no batch for it."""
    numbers = of_all_processes(num_batches)
    if len(set(numbers)) > 1:
        raise RanksDiffer(
            f"expected as many batches on every rank as on rank 0, got {', '.join(map(str, numbers))}: set "
            "`even_batches` in accelerator_config, or `dataloader_drop_last`"
        )


class SharedRetry:
    """Lets the processes try a smaller batch together, or ends the run where memory ran out on some of them only."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        # A group of its own, for the default one may hold the others in a gradient's reduction.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def wait(self) -> None:
        """Return once every process has come here; RanksDiffer where some do not within the time."""
        try:
            dist.barrier(self._group)
        except RuntimeError as error:
            raise RanksDiffer(
                f"memory ran out on rank {dist.get_rank()}, but within {self._seconds:.0f} s not on every rank, and "
                "only all together can try a smaller batch: set a smaller `per_device_train_batch_size`"
            ) from error


def expect_equal_ranks(model: nn.Module, *, when: str) -> None:
    """Raise RanksDiffer, on every process, where processes hold different bits of what they should hold alike.

    Compared are parameters and, where DDP does not broadcast the main process's, saved buffers; of a sharded tensor the
    same shard's replicas. FSDP1 and DeepSpeed keep flat parameters that cannot be told apart so: theirs are not.
    """
    if num_processes() == 1 or joined_by(model) in ("FSDP", "DeepSpeed"):
        return
    everyone = of_all_processes(digests(model))
    if message := difference(everyone):
        raise RanksDiffer(
            f"the processes' students differ {when}: {message}. Each process has trained another student; likely a "
            "parameter is trained that was frozen or not there when training began, or the model is called around its "
            "wrapper"
        )


def digests(model: nn.Module) -> Digests:
    """A digest of each tensor's bytes, by name and by which shard this process holds."""
    wrappers = [part for part in model.modules() if isinstance(part, DistributedDataParallel)]
    student = wrappers[0].module if wrappers else model
    tensors: dict[str, Tensor] = dict(student.named_parameters())
    if not (wrappers and wrappers[0].broadcast_buffers):
        saved = student.state_dict().keys()
        tensors |= {name: buffer for name, buffer in student.named_buffers() if name in saved}
    return {(name, _place(tensor)): _digest(tensor) for name, tensor in tensors.items()}


def difference(everyone: Sequence[Digests]) -> str | None:
    """Which tensors some ranks hold otherwise than others, in words; None where all agree."""
    holders: defaultdict[tuple[str, Place], defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, mine in enumerate(everyone):
        for key, digest in mine.items():
            holders[key][digest].append(rank)
    names = {frozenset(name for name, _ in mine) for mine in everyone}
    if len(names) > 1:
        odd = sorted(frozenset.union(*names) - frozenset.intersection(*names))
        return f"not every rank has {_some(odd)}"
    differing = {name: list(by.values()) for (name, _), by in holders.items() if len(by) > 1}
    if not differing:
        return None
    groups = next(iter(differing.values()))
    ranks = ", ".join("+".join(map(str, group)) for group in groups)
    return f"{len(differing)} of {len(holders)} tensors ({_some(list(differing))}), between ranks {ranks}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _place(tensor: Tensor) -> Place:
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate() or ()
    return tuple(at for at, how in zip(coordinate, tensor.placements, strict=True) if not how.is_replicate())


def _digest(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return xxhash.xxh3_64_intdigest(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _sequence_lengths(batch: Batch) -> Iterator[int]:
    mask = batch.get("attention_mask")
    number, tokens = batch["input_ids"].shape
    yield from [tokens] * number if mask is None or mask.ndim != 2 else mask.bool().sum(1).tolist()
