"""Requests, the batches and calls that they travel in, and the replica that answers them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from logitstream.errors import AccessDenied, LogitstreamError, ServerDraining, TeacherUnavailable
from logitstream.rpc.remote_teacher import RemoteTeacher
from logitstream.types import ReceivedTargets, TeacherInfo, TokenSequence, call_tokens

FORGET_SECONDS = 5.0
"""Half-life of what is known of an idle replica's speed."""
SUSPECT_LOSSES = 2
"""Broken calls after which a sequence is sent alone."""
MAX_CALL_BYTES = 1 << 20
"""Sequences are sent in calls of about this size at most."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence until its future is done; cost: what it counts against a replica's limit."""

    sequence: TokenSequence
    cost: int
    future: Future[ReceivedTargets] = field(default_factory=Future)
    refusals: int = 0

    @property
    def num_bytes(self) -> int:
        """An upper bound on its size in a message."""
        return 64 + 4 * len(self.sequence) + len(self.sequence) // 8

    def fail(self, error: BaseException) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class RequestBatch:
    """Requests that are sent together, and what has become of them so far; since: asked for, or sent, at this time."""

    requests: list[Request]
    draw_set: int
    priority: int
    since: float = 0.0
    sent: bool = False
    losses: int = 0
    lone_losses: int = 0
    lost_at: float = 0.0
    delays: int = 0
    avoid: Replica | None = None

    @property
    def suspect(self) -> bool:
        """True if they may be what breaks replicas. Each is sent alone then, so that no other takes the blame."""
        return self.losses >= SUSPECT_LOSSES


@dataclass(slots=True, eq=False)
class Call:
    """Requests that a replica is asked for over one connection; nothing else is sent beside a suspect."""

    replica: Replica
    connection: RemoteTeacher
    requests: list[Request]
    suspect: bool
    num_tokens: int
    tokens_ahead: int
    began: float
    scope: asyncio.Timeout | None = None


@dataclass(slots=True, eq=False)
class Replica:
    """One server. `connection` is None while it cannot be asked; `error` then says why.

    limit: tokens that may be in flight, adapted to what the server takes. silent: connections in a row that brought no
    answer, this one included. patience: how long it may answer nothing while others are ready.
    """

    address: str
    progress_at: float
    patience: float
    connection: RemoteTeacher | None = None
    info: TeacherInfo | None = None
    error: LogitstreamError | None = None
    calls: set[Call] = field(default_factory=set)
    limit: int = 0
    silent: int = 1
    seconds_per_token: float = 0.0
    paused_until: float = 0.0
    starting: asyncio.Task[None] | None = None

    @property
    def refused(self) -> bool:
        """True if it cannot be used as it is, rather than not be reached at the moment."""
        away = isinstance(self.error, (TeacherUnavailable, ServerDraining))
        rotating = isinstance(self.error, AccessDenied) and self.info is not None  # our token file may follow soon
        return self.error is not None and not away and not rotating

    @property
    def in_flight_tokens(self) -> int:
        return sum(call.num_tokens for call in self.calls)

    def admits(self, requests: Sequence[Request], *, alone: bool) -> list[Request]:
        """Return the first of the requests that fit into its limit; an idle replica takes at least one."""
        if alone or any(call.suspect for call in self.calls):
            return [] if self.calls else list(requests[:1])
        assert self.info is not None
        room, max_bytes = self.limit - self.in_flight_tokens, min(MAX_CALL_BYTES, self.info.max_message_bytes)
        costs: list[int] = []
        for request in requests:
            costs.append(request.cost)
            max_bytes -= request.num_bytes
            if (call_tokens(costs) > room and (self.calls or costs[1:])) or (max_bytes < 0 and costs[1:]):
                return list(requests[: len(costs) - 1])
        return list(requests)

    def expected_seconds(self, num_tokens: int, now: float) -> float:
        """Estimate when one more call would be answered; ties go to the emptier replica.

        An idle replica's known speed counts half as much with every FORGET_SECONDS, so that it is asked again.
        """
        idle_seconds = 0.0 if self.calls else now - self.progress_at
        speed = self.seconds_per_token * math.pow(0.5, idle_seconds / FORGET_SECONDS)
        return (self.in_flight_tokens + num_tokens) * max(speed, 1e-9)


def loop_time() -> float:
    return asyncio.get_running_loop().time()
