"""The processes (ranks) of one student: they exchange values, take the same sequences, and really train one student.

They and a resumed run train from one teacher or on one cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from logitstream.cache import CacheReader
from logitstream.cache.disk import open_reader
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.client.teacher_identity import teacher_differences
from logitstream.data.batches import leave_out
from logitstream.data.documents import Batch
from logitstream.errors import FingerprintMismatch, LogitstreamError, RanksDiffer
from logitstream.files import write_whole
from logitstream.types import Fingerprint, TargetSpec

TEACHER_NOTE, CACHE_NOTE = "teacher.json", "cache_view.json"
"""Files beside the checkpoints in which a run notes what it trains from."""

T = TypeVar("T")


def num_processes() -> int:
    """Return how many processes torch.distributed knows of, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    return num_processes() == 1 or dist.get_rank() == 0


def of_all_processes(value: T, *, group: Any = None) -> list[T]:
    """Return every process's value, by rank."""
    values: list[Any] = [value] * num_processes()
    if num_processes() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def of_main_process(value: T) -> T:
    """Return the main process's value on every process."""
    values = [value]
    if num_processes() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


# One student


def is_sharded(model: nn.Module) -> bool:
    """Tell whether each process holds a part of the student, by FSDP, DeepSpeed or tensor parallelism."""
    return any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def expect_equal_ranks(model: Any, *, when: str) -> None:
    """Raise RanksDiffer, on every process, if parameters differ in a bit. A sharded student exists only once."""
    if num_processes() == 1 or is_sharded(model):
        return
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if len(set(of_all_processes(digest.intdigest()))) > 1:
        raise RanksDiffer(
            f"the processes' students differ {when}: likely a parameter is trained that was frozen or not there when "
            "training began, or the model is called around its wrapper"
        )


# One order of sequences


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
    counted = dict(batch)
    if num_counted < num_sequences:
        leave_out(counted, np.arange(num_counted * num_tokens, num_sequences * num_tokens))
    return counted


# One teacher, one cache


def expected_teacher(checkpoint: Path | None, spec: TargetSpec) -> Fingerprint | None:
    """Return the teacher of the run that a checkpoint is from, drawing by this spec; None if any will do."""
    noted = _read_note(checkpoint, TEACHER_NOTE)
    return None if noted is None else replace(Fingerprint.from_json(noted), spec=spec.canonical())


def agree_on_teacher(client: GrpcTeacherClient, spec: TargetSpec, folder: Path) -> None:
    """Wait for the teacher and note in the folder which one all processes have found.

    Call it on every process before the first sequence is asked for. Raises FingerprintMismatch if one of them has found
    another teacher than the main process, or what `client.info` raised on one of them: all raise the same.
    """
    found: Any
    try:
        found = Fingerprint.of(client.info, spec)
    except LogitstreamError as error:  # told to the others, who would wait for this process
        found = error
    everyones = of_all_processes(found)
    for number, other in enumerate(everyones):
        if isinstance(other, LogitstreamError):
            raise other
        if differences := teacher_differences(everyones[0], other, max_teacher_lag=client.max_teacher_lag):
            raise FingerprintMismatch(
                f"processes 0 and {number} of this run have found teachers that differ (process 0's value first): "
                f"{differences}"
            )
    if is_main_process():
        write_whole(folder / TEACHER_NOTE, json.dumps(asdict(everyones[0]), indent=1))


def open_agreed_cache(directory: str, folder: Path, checkpoint: Path | None = None) -> CacheReader:
    """Open a cache as the main process finds it, and note that in the folder, or as a checkpoint's run began with it.

    So processes and parts of a run have the same sequences while somebody writes to the cache. Call it on every
    process. Raises CacheError if some of the sequences are gone.
    """
    view: Any = None
    if is_main_process():
        with open_reader(directory) as cache:
            view = _read_note(checkpoint, CACHE_NOTE) or cache.view()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CACHE_NOTE, json.dumps(view))
    view = of_main_process(view)
    cache = open_reader(directory)  # after the main process has looked, so that what it saw is there
    cache.keep_to(view)
    return cache


def _read_note(checkpoint: Path | None, name: str) -> Any:
    """Return what the run of a checkpoint has noted in its folder, None if nothing."""
    path = checkpoint and checkpoint.parent / name
    try:
        return json.loads(path.read_bytes()) if path is not None and path.exists() else None
    except ValueError as error:
        raise LogitstreamError(f"{path} cannot be read ({error}): delete it to take what there is now") from None
