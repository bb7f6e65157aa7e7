"""A run from the cache alone trains on what lies there: the sampler's settings and the draw sets give way to it."""

from __future__ import annotations

import contextlib
import logging
import math

import numpy as np
from transformers import TrainingArguments

from logitstream.cache import CacheReader
from logitstream.cache.disk import from_disk, open_reader
from logitstream.types import TargetSpec
from student_worker.config import StudentConfig

logger = logging.getLogger(__name__)


def adopt_cache_spec(config: StudentConfig) -> None:
    """Take the targets as they were drawn, in place of the run's own sampler settings and budget."""
    with open_reader(config.cache) as cache:
        config.draw_by(TargetSpec.from_canonical(cache.fingerprint.spec))
    config.bytes_per_token = config.noise = 0.0
    logger.info("targets of the cache %s were drawn by %s", config.cache, config.target_spec().canonical())


def choose_draw_set(
    config: StudentConfig, arguments: TrainingArguments, num_sequences: int, *, cache: CacheReader | None = None
) -> int | None:
    """The draw set that every epoch trains on; None: each epoch on its own.

    From the cache alone, fresh draws need a whole draw set an epoch, 0, 1, …: each with as many records as the first.
    Where one is missing the first is used again, and `config.draws` says so. cache: that its sequences come from.
    """
    if config.targets != "cache":
        return None if config.draws == "fresh" else 0
    with contextlib.nullcontext(cache) if cache is not None else open_reader(config.cache) as known:
        draw_sets, num_records = np.unique(from_disk(known.source, known.draw_sets), return_counts=True)
    held = dict(zip(draw_sets.tolist(), num_records.tolist(), strict=True))
    first, num_epochs = min(held, default=0), count_epochs(arguments, num_sequences)
    if config.draws == "fresh" and any(held.get(epoch, 0) < held.get(first, 1) for epoch in range(num_epochs)):
        config.draws = "reuse"
        logger.info(
            "the cache holds no whole draw set for each of %d epochs (records by draw set: %s): every epoch trains on "
            "draw set %d (draws: reuse)",
            num_epochs,
            held,
            first,
        )
    return None if config.draws == "fresh" else first


def count_epochs(arguments: TrainingArguments, num_sequences: int) -> int:
    """Epochs that the Trainer begins on so many sequences."""
    if arguments.max_steps <= 0:
        return math.ceil(arguments.num_train_epochs)
    batch_size = arguments.train_batch_size * arguments.world_size
    num_batches = num_sequences // batch_size if arguments.dataloader_drop_last else -(-num_sequences // batch_size)
    steps_an_epoch: int = max(math.ceil(num_batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.max_steps / steps_an_epoch)
