"""A budget in bytes or noise to the sampler's one number, measured on the run's own text through the real teacher."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import torch.distributed as dist

from logitstream.budget import Choice, choose_for_bytes, choose_for_noise
from logitstream.id_model import IdModel
from logitstream.types import TargetSpec, TokenSequence
from student_worker.teacher_client import TeacherClient

logger = logging.getLogger(__name__)

CALIBRATION_SEQUENCES = 16

Connect = Callable[[TargetSpec], TeacherClient]


def choose_spec(
    connect: Connect, sequences: Sequence[TokenSequence], spec: TargetSpec, *, bytes_per_token: float, noise: float
) -> TargetSpec:
    """The spec that meets the budget, the same on every process; only the main one asks the teacher."""
    chosen: list[TargetSpec | Exception] = [spec]
    distributed = dist.is_available() and dist.is_initialized()
    if not distributed or dist.get_rank() == 0:
        try:
            choice = _choose(connect, sequences, spec, bytes_per_token=bytes_per_token, noise=noise)
            logger.info("%s", choice.sentence)
            chosen = [choice.spec]
        except Exception as error:  # raised on every process, so that none waits for the others
            chosen = [error]
    if distributed:
        dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], Exception):
        raise chosen[0]
    return chosen[0]


def _choose(
    connect: Connect, sequences: Sequence[TokenSequence], spec: TargetSpec, *, bytes_per_token: float, noise: float
) -> Choice:
    def draw(wanted: Sequence[TokenSequence], tried: TargetSpec, draw_set: int) -> list[bytes]:
        with contextlib.closing(connect(tried)) as client:
            futures = [client.submit(sequence, draw_set=draw_set) for sequence in wanted]
            return [future.result().payload for future in futures]

    with contextlib.closing(connect(spec)) as client:
        content = client.info.id_model
    id_model = IdModel.from_bytes(content) if content else None
    if bytes_per_token:
        return choose_for_bytes(draw, sequences, spec, bytes_per_token, id_model=id_model)
    return choose_for_noise(draw, sequences, spec, noise, id_model=id_model)
