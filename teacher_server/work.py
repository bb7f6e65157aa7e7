"""What the scheduler handles: work that several requests may wait for, and its result."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from logitstream.types import TargetSpec
from teacher_server.backend import ScoreRequest
from teacher_server.fair_queue import Ticket

Key = tuple[TargetSpec, int, bytes, bytes]


def key_of(request: ScoreRequest) -> Key:
    """What requests for the same targets have in common. Its bytes are compared only where their hashes agree, and
    take a third of the time of a digest."""
    ids, mask = request.sequence.token_ids, request.sequence.loss_mask
    return request.spec, request.draw_set, ids.tobytes(), b"" if mask is None or mask.all() else mask.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Encoded targets of one request and the weights that made them; weights_digest is hex."""

    payload: bytes
    teacher_version: int
    weights_digest: str


@dataclass(slots=True, eq=False)
class Work:
    """One (spec, sequence, draw set) that is waiting or being scored, for everybody who asked for it."""

    key: Key
    request: ScoreRequest
    arrived: float
    waiters: dict[asyncio.Future[Scored], Ticket[Work] | None] = field(default_factory=dict)
    running: bool = False
