"""A budget in bytes or noise to the sampler's one number, measured on the run's own text through the real teacher."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from logitstream.budget import Choice, choose_for_bytes, choose_for_noise
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
    """Sequences from all over the training set, with their masks, as training will send them."""
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
    """The spec that meets the budget, the same on every process; only the main one asks the teacher.

    A cache that holds targets already has had its budget: its N, θ or k is taken, and no teacher is asked. connect
    None: no teacher is asked in any case. Raises ValueError where there is no sequence, RequestError where the teacher
    refuses every one.
    """
    chosen: TargetSpec | Exception = spec
    if is_main_process():  # the cache too: another process may look when this one has made it
        try:
            known = _spec_of_cache(cache, spec, alone=connect is None) if cache else None
            if known is not None or connect is None:
                chosen = known or spec
            else:
                choice = _choose(connect, sequences, spec, bytes_per_token=bytes_per_token, noise=noise)
                logger.info("%s", choice.sentence)
                chosen = choice.spec
        except Exception as error:  # raised on every process, so that none waits for the others
            chosen = error
    chosen = of_main_process(chosen)
    if isinstance(chosen, Exception):
        raise chosen
    return chosen


def _spec_of_cache(directory: str, spec: TargetSpec, *, alone: bool) -> TargetSpec | None:
    """The spec with N, θ or k of the targets in a cache; None where there is none, or another sampler drew them.

    alone: no teacher can be asked instead; else a disk that hangs holds none.
    """
    try:
        held = from_disk(directory, lambda: _fingerprint_of(directory), alone=alone)
    except DiskHangs:
        if alone:
            raise
        return None
    if held is None or held.spec["sampler"] != spec.sampler:
        return None
    found = held.spec
    sizes: dict[str, Any] = {name: found[name] for name in ("num_samples", "threshold", "top_k") if name in found}
    logger.info("the cache %s holds targets already: %s in place of the budget", directory, sizes)
    return replace(spec, **sizes)


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
    if bytes_per_token:
        return choose_for_bytes(draw, sequences, spec, bytes_per_token, id_model=id_model, vocab_size=vocab_size)
    return choose_for_noise(draw, sequences, spec, noise, id_model=id_model, vocab_size=vocab_size)


def _accepted(client: TeacherClient, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences that the teacher answers; as in training, one that it refuses is left out."""
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
