"""The spec that meets a run's budget, measured on the run's own text through the real teacher."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from logitstream.budget import Choice, choose
from logitstream.cache import CacheReader
from logitstream.cache.disk import from_disk
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.batches import split_batch
from logitstream.data.corpus import CacheDataset, collate
from logitstream.errors import DiskHangs, RequestError
from logitstream.id_model import IdModel
from logitstream.training.distributed import is_main_process, of_main_process
from logitstream.training.target_cache import may_hold_targets
from logitstream.types import Fingerprint, TargetSpec, TokenSequence

logger = logging.getLogger(__name__)

CALIBRATION_SEQUENCES = 16

Connect = Callable[[TargetSpec], TeacherClient]


def calibration_sequences(train_set: Dataset | CacheDataset) -> list[TokenSequence]:
    """Return sequences from all over the training set, with their masks, as training will send them."""
    spread = np.linspace(0, len(train_set) - 1, min(CALIBRATION_SEQUENCES, len(train_set))).astype(np.int64)
    return [sequence for i in spread for _, sequence in split_batch(collate([train_set[int(i)]]))]


def choose_spec(
    connect: Connect | None,
    sequences: Sequence[TokenSequence],
    spec: TargetSpec,
    *,
    bytes_per_token: float,
    noise: float,
    cache: str = "",
) -> TargetSpec:
    """Return the spec that meets the budget, the same on every process; only the main one asks the teacher.

    A cache that already holds targets of the sampler has had its budget: its size is taken, and no teacher is asked.
    connect: None if no teacher may be asked, which leaves the spec as it is. Raises ValueError if there is no sequence,
    RequestError if the teacher refuses every one.
    """
    chosen: TargetSpec | Exception = spec
    if is_main_process():  # it looks at the cache, too, which it may make before another process looks
        try:
            known = _spec_of_cache(cache, spec, alone=connect is None) if cache else None
            if known is not None or connect is None:
                chosen = known or spec
            else:
                choice = _choose(connect, sequences, spec, bytes_per_token=bytes_per_token, noise=noise)
                logger.info("%s", choice.sentence)
                chosen = choice.spec
        except Exception as error:  # to be raised on every process, or the others would wait for this one
            chosen = error
    chosen = of_main_process(chosen)
    if isinstance(chosen, Exception):
        raise chosen
    return chosen


def _spec_of_cache(directory: str, spec: TargetSpec, *, alone: bool) -> TargetSpec | None:
    """Return the spec with the size of the targets in a cache; None if it holds none of this sampler.

    alone: no teacher can be asked instead, so a disk that hangs is an error.
    """
    try:
        held = from_disk(directory, lambda: _fingerprint_of(directory), alone=alone)
    except DiskHangs:
        if alone:
            raise
        return None
    if held is None or held.spec["sampler"] != spec.sampler:
        return None
    field = spec.kind.size_field
    size: dict[str, Any] = {field: held.spec[field]} if field else {}
    logger.info("the cache %s holds targets already: %s in place of the budget", directory, size)
    return replace(spec, **size)


def _fingerprint_of(directory: str) -> Fingerprint | None:
    return CacheReader(directory).fingerprint if may_hold_targets(directory) else None


def _choose(
    connect: Connect, sequences: Sequence[TokenSequence], spec: TargetSpec, *, bytes_per_token: float, noise: float
) -> Choice:
    def draw(wanted: Sequence[TokenSequence], tried: TargetSpec, draw_set: int) -> list[bytes]:
        with contextlib.closing(connect(tried)) as client:
            return [future.result().payload for future in client.submit(wanted, draw_set=draw_set)]

    if not sequences:
        raise ValueError("the sequences that a budget is measured on have no supervised token: set num_samples instead")
    with contextlib.closing(connect(spec)) as client:
        content, vocab_size = client.info.id_model, client.info.vocab_size
        sequences = _accepted(client, sequences)
    id_model = IdModel.from_bytes(content) if content else None
    budget = {"bytes_per_token": bytes_per_token, "noise": noise}
    return choose(draw, sequences, spec, **budget, id_model=id_model, vocab_size=vocab_size)


def _accepted(client: TeacherClient, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Leave out the sequences that the teacher refuses, as training does."""
    accepted: list[TokenSequence] = []
    refusals: list[RequestError] = []
    for sequence, future in zip(sequences, client.submit(sequences), strict=True):
        try:
            future.result()
            accepted.append(sequence)
        except RequestError as error:
            refusals.append(error)
    if refusals:
        logger.warning("the teacher refuses %d of %d sequences: %s", len(refusals), len(sequences), refusals[0])
    if not accepted:
        raise refusals[0]
    return accepted
