"""The plan of a run, settled before anything is built from it: the spec, the draw set, the checkpoint to resume."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from logitstream.budget import choose
from logitstream.cache import CacheReader
from logitstream.cache.disk import from_disk, open_reader
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.batches import split_batch
from logitstream.data.corpus import CacheDataset, collate
from logitstream.errors import DiskHangs
from logitstream.id_model import IdModel
from logitstream.training.split import by_main_process
from logitstream.training.target_cache import may_hold_targets
from logitstream.types import Fingerprint, TargetSpec, TokenSequence
from student_worker.config import StudentConfig

logger = logging.getLogger(__name__)

CALIBRATION_SEQUENCES = 16
"""Sequences of the run's own text on which a budget is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The settings as the run uses them, and what follows from its data and cache; the same on every process.

    draw_sets: what epochs train on in turn; empty: epoch e on draw set e. has_cache: a cache was there before the run.
    """

    config: StudentConfig
    spec: TargetSpec
    draw_sets: tuple[int, ...]
    has_cache: bool
    checkpoint: Path | None


def make_plan(
    config: StudentConfig,
    train_set: Dataset | CacheDataset,
    *,
    checkpoint: Path | None,
    connect: Callable[[TargetSpec], TeacherClient],
) -> RunPlan:
    """Settle what the cache and a budget decide: the sampler's parameters, and which draws there are."""

    def plan() -> RunPlan:
        targets, is_alone = config.targets, config.source == "cache"
        held = held_fingerprint(config.cache.path, alone=is_alone) if config.cache.path else None
        spec = targets.spec()
        if isinstance(train_set, CacheDataset):
            spec = TargetSpec.from_canonical(train_set.cache.fingerprint.spec)
            logger.info("targets of the cache %s were drawn by %s", config.cache.path, spec.canonical())
        elif targets.bytes_per_token or targets.noise:
            budget = {"bytes_per_token": targets.bytes_per_token, "noise": targets.noise}
            sequences = calibration_sequences(train_set)
            spec = choose_spec(None if is_alone else connect, sequences, spec, **budget, held=held)
        draw_sets = choose_draw_sets(config, train_set.cache if isinstance(train_set, CacheDataset) else None)
        used: Any = asdict(spec) | {"source": config.source, "bytes_per_token": 0.0, "noise": 0.0}
        resolved = replace(config, targets=replace(targets, **used))
        has_cache = held is not None
        return RunPlan(config=resolved, spec=spec, draw_sets=draw_sets, has_cache=has_cache, checkpoint=checkpoint)

    return by_main_process(plan)  # which looks at the cache before another process makes it


def held_fingerprint(cache: str, *, alone: bool) -> Fingerprint | None:
    """Return the fingerprint of a cache; None if there is none or its disk hangs.

    alone: the run has nothing but the cache, so a disk that hangs raises DiskHangs.
    """
    try:
        return from_disk(
            cache, lambda: CacheReader(cache).fingerprint if may_hold_targets(cache) else None, alone=alone
        )
    except DiskHangs:
        if alone:
            raise
        return None


def choose_draw_sets(config: StudentConfig, cache: CacheReader | None = None) -> tuple[int, ...]:
    """Return the draw sets that epochs train on in turn; empty: epoch e on draw set e.

    From the cache alone these are the ones with as many records as its first. cache: where the sequences come from.
    """
    is_reused = config.targets.draws == "reuse"
    if config.source != "cache":
        return (0,) if is_reused else ()
    with contextlib.nullcontext(cache) if cache is not None else open_reader(config.cache.path) as known:
        held, num_records = np.unique(from_disk(known.source, known.draw_sets), return_counts=True)
    whole = tuple(held[num_records >= num_records[:1]].tolist()) or (0,)
    return whole[:1] if is_reused else whole


def calibration_sequences(train_set: Dataset | CacheDataset) -> list[TokenSequence]:
    """Return sequences from all over the training set, with their masks, as training will send them."""
    spread = np.linspace(0, len(train_set) - 1, min(CALIBRATION_SEQUENCES, len(train_set))).astype(np.int64)
    return [sequence for i in spread for _, sequence in split_batch(collate([train_set[int(i)]]))]


def choose_spec(
    connect: Callable[[TargetSpec], TeacherClient] | None,
    sequences: Sequence[TokenSequence],
    spec: TargetSpec,
    *,
    bytes_per_token: float,
    noise: float,
    held: Fingerprint | None = None,
) -> TargetSpec:
    """Return the spec that meets the budget on these sequences, measured through the teacher.

    held: a cache of the sampler has had its budget: its size is taken, and no teacher is asked. connect: None if no
    teacher may be asked, which leaves the spec as it is. Raises ValueError if there is no sequence, RequestError if the
    teacher refuses one.
    """
    if held is not None and held.spec["sampler"] == spec.sampler:
        field = spec.kind.size_field
        size: dict[str, Any] = {field: held.spec[field]} if field else {}
        logger.info("the cache holds targets already: %s in place of the budget", size)
        return replace(spec, **size)
    if connect is None:
        return spec
    if not sequences:
        raise ValueError("the sequences that a budget is measured on have no supervised token: set num_samples instead")

    def draw(wanted: Sequence[TokenSequence], tried: TargetSpec, draw_set: int) -> list[bytes]:
        with contextlib.closing(connect(tried)) as client:
            return [future.result().payload for future in client.submit(wanted, draw_set=draw_set)]

    with contextlib.closing(connect(spec)) as client:
        content, vocab_size = client.info.id_model, client.info.vocab_size
    id_model = IdModel.from_bytes(content) if content else None
    budget = {"bytes_per_token": bytes_per_token, "noise": noise}
    choice = choose(draw, sequences, spec, **budget, id_model=id_model, vocab_size=vocab_size)
    logger.info("%s", choice.sentence)
    return choice.spec
