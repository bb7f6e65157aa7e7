"""What a run trains on, settled before anything is built from it: the spec, the draw set, the checkpoint to resume."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import TrainingArguments

from logitstream.cache import CacheReader
from logitstream.cache.disk import from_disk, open_reader
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.data.corpus import CacheDataset
from logitstream.training.distributed import of_main_process
from logitstream.types import TargetSpec
from student_worker.budget_search import calibration_sequences, choose_spec
from student_worker.config import StudentConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The settings as the run uses them, and what follows from its data and cache; the same on every process."""

    config: StudentConfig
    spec: TargetSpec
    draw_set: int | None
    """The one that every epoch trains on; None: each epoch its own."""
    checkpoint: Path | None


def make_plan(
    config: StudentConfig,
    arguments: TrainingArguments,
    train_set: Dataset | CacheDataset,
    *,
    checkpoint: Path | None,
    connect: Callable[[TargetSpec], GrpcTeacherClient],
) -> RunPlan:
    """Settle what the cache and a budget decide: the sampler's parameters, and which draws there are."""
    spec = config.targets.spec()
    if isinstance(train_set, CacheDataset):
        spec = spec_of_cache(config.cache.path)
    elif config.targets.bytes_per_token or config.targets.noise:
        spec = choose_spec(
            connect if config.source != "cache" else None,
            calibration_sequences(train_set),
            spec,
            bytes_per_token=config.targets.bytes_per_token,
            noise=config.targets.noise,
            cache=config.cache.path,
        )
    corpus = train_set.cache if isinstance(train_set, CacheDataset) else None
    draw_set = of_main_process(choose_draw_set(config, arguments, len(train_set), cache=corpus))
    used = {"source": config.source, "draws": "fresh" if draw_set is None else "reuse"}
    targets = replace(config.targets, **asdict(spec), **used, bytes_per_token=0.0, noise=0.0)  # type: ignore[arg-type]
    return RunPlan(config=replace(config, targets=targets), spec=spec, draw_set=draw_set, checkpoint=checkpoint)


def spec_of_cache(path: str) -> TargetSpec:
    """Return how the targets of a cache were drawn, which a run on that cache alone takes over."""
    with open_reader(path) as cache:
        spec = TargetSpec.from_canonical(cache.fingerprint.spec)
    logger.info("targets of the cache %s were drawn by %s", path, spec.canonical())
    return spec


def choose_draw_set(
    config: StudentConfig, arguments: TrainingArguments, num_sequences: int, *, cache: CacheReader | None = None
) -> int | None:
    """Return the draw set that every epoch trains on; None: each epoch its own.

    From the cache alone, fresh draws need a whole draw set an epoch (0, 1, ...), each with as many records as the
    first. If one is missing the first is used again. cache: the one that the sequences come from.
    """
    fresh = config.targets.draws == "fresh"
    if config.source != "cache":
        return None if fresh else 0
    with contextlib.nullcontext(cache) if cache is not None else open_reader(config.cache.path) as known:
        draw_sets, num_records = np.unique(from_disk(known.source, known.draw_sets), return_counts=True)
    held = dict(zip(draw_sets.tolist(), num_records.tolist(), strict=True))
    first, num_epochs = min(held, default=0), count_epochs(arguments, num_sequences)
    if fresh and all(held.get(epoch, 0) >= held.get(first, 1) for epoch in range(num_epochs)):
        return None
    if fresh:
        logger.info(
            "the cache holds no whole draw set for each of %d epochs (records by draw set: %s): every epoch trains on "
            "draw set %d (targets.draws: reuse)",
            num_epochs,
            held,
            first,
        )
    return first


def count_epochs(arguments: TrainingArguments, num_sequences: int) -> int:
    """Return the number of epochs that the Trainer begins."""
    if arguments.max_steps <= 0:
        return math.ceil(arguments.num_train_epochs)
    batch_size = arguments.train_batch_size * arguments.world_size
    num_batches = num_sequences // batch_size if arguments.dataloader_drop_last else -(-num_sequences // batch_size)
    steps_an_epoch: int = max(math.ceil(num_batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.max_steps / steps_an_epoch)
