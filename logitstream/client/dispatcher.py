"""Which request goes to which replica, when it is sent again, and which answer counts."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from logitstream import metrics
from logitstream.client.replica import Replica, Request
from logitstream.client.replica_pool import Fleet
from logitstream.client.teacher_identity import Identity, KnownTeacher
from logitstream.errors import (
    InvalidSequence,
    LogitstreamError,
    RequestError,
    ScoringFailed,
    ServerDraining,
    StaleTeacher,
    TeacherUnavailable,
    TooManyInFlight,
)
from logitstream.rpc.connection import Answer, TeacherConnection, request_bytes
from logitstream.types import ReceivedTargets, TeacherInfo, credit_tokens

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 5.0)
"""First and largest bound of the random wait before a refused request is sent again."""
MAX_TRIES = 5
"""Retryable refusals of one sequence before its error is raised."""
MAX_LONE_LOSSES = 6
"""Connections that may break with a sequence alone in flight before the sequence is held to be the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySettings:
    """Bounds of delivery, in seconds.

    deadline_seconds: from the first sending of a request, or of waiting for any answer, to TeacherUnavailable.
    stalled_seconds: a replica that answers nothing for so long, while others are ready, is taken for stuck; twice the
        longest that one of its answers took, or was waited for in vain, where that is more, up to half the deadline.
    """

    deadline_seconds: float = 300.0
    stalled_seconds: float = 60.0


class Dispatcher:
    """Owns every request until it is answered; runs in the client's event loop."""

    def __init__(
        self,
        *,
        identity: Identity,
        teacher: KnownTeacher,
        settings: DeliverySettings,
        connect: Callable[[str], TeacherConnection],
    ) -> None:
        self.teacher = teacher
        new_replica = functools.partial(
            Replica,
            dispatcher=self,
            identity=identity,
            teacher=teacher,
            connect=connect,
            stalled_seconds=settings.stalled_seconds,
            longest_patience_seconds=settings.deadline_seconds / 2,  # leaves time for another replica
        )
        self.fleet = Fleet(new_replica, self.lost, any_teacher=teacher.is_open)
        self._identity = identity
        self._settings = settings
        self._requests: dict[int, Request] = {}
        self._waiting: list[tuple[float, int, int]] = []
        self._order = itertools.count()
        self._last_progress = 0.0
        self._closed = False

    # What the client asks for

    def submit(self, request: Request) -> None:
        if self._closed:  # meanwhile
            request.future.cancel()
            return
        self._requests[request.request_id] = request
        self._enqueue(request)
        self._pump()

    def cancel(self, request_id: int) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None and request.replica is not None:
            request.replica.cancel(request)
            self._pump()

    async def wait_ready(self, timeout_seconds: float) -> TeacherInfo:
        """The teacher's description once a replica is ready; TeacherUnavailable or FingerprintMismatch otherwise."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not self.fleet.started or self.teacher.info is None:
                    if error := self.fleet.hopeless():
                        raise error
                    self.fleet.changed.clear()
                    await self.fleet.changed.wait()
                return self.teacher.info
        except TimeoutError:
            raise TeacherUnavailable(
                f"no teacher came up within {timeout_seconds:g} s {self.fleet.condition()}"
            ) from None

    async def close(self) -> None:
        self._closed = True
        await self.fleet.close()
        for request in self._requests.values():
            request.future.cancel()
        self._requests.clear()

    def tick(self) -> None:
        """Enforce deadlines; call it about once a second."""
        now = time.monotonic()
        self.fleet.look_at_start()  # replicas that vanish untried report nothing
        self.fleet.break_stalled(now)
        for request in list(self._requests.values()):
            if now > self._expiry(request):
                self._fail(request, self._timeout_error(request))
        if error := self.fleet.hopeless():
            for request in list(self._requests.values()):
                self._fail(request, error)
        self._pump()

    # What replicas report

    def ready(self, replica: Replica) -> None:
        self.fleet.look_at_start()
        self.fleet.changed.set()
        self._pump()

    def answered(self, replica: Replica, answer: Answer) -> None:
        """The first answer counts; a later one for the same request finds nothing and is dropped."""
        self._last_progress = time.monotonic()
        request = self._requests.get(answer.request_id)
        if request is not None:
            if answer.error is not None:
                self._refused(replica, request, answer.error)
            else:
                self._received(replica, request, answer)
        self._pump()

    def lost(self, replica: Replica, requests: list[Request], error: LogitstreamError) -> None:
        self.fleet.look_at_start()
        self.fleet.changed.set()
        for request in requests:
            if request.request_id not in self._requests or request.replica is not replica:
                continue
            if not replica.broken_off:
                request.lone_losses += len(requests) == 1 and self._is_to_blame(request, replica)
                request.lost_at = request.lost_at or time.monotonic()
                request.losses += 1
            if request.lone_losses >= MAX_LONE_LOSSES:
                message = f"{request.losses} connections broke while this sequence was being scored; the last: {error}"
                self._fail(request, ScoringFailed(message))
            else:
                self._retry(request, replica, "lost", delay_seconds=None if request.suspect else 0.0)
        self._pump()

    def _is_to_blame(self, request: Request, replica: Replica) -> bool:
        """Whether the sequence that was alone on a broken connection may be why, not a replica that answers nothing.

        It is only where others were answered: over that connection or, once there is nobody left but suspects, before
        that or since it first broke one.
        """
        if replica.has_answered:
            return True
        others_answered = request.lone_losses > 0 or 0.0 < request.lost_at < self._last_progress
        return others_answered and all(one.suspect for one in self._requests.values())

    # Decisions

    def _received(self, replica: Replica, request: Request, answer: Answer) -> None:
        weights_digest = answer.weights_digest or replica.described
        fingerprint = self.teacher.fingerprint_digest(weights_digest)
        if fingerprint is None:  # replaced twice between two answers: what made these targets cannot be told any more
            if request.replica is replica:
                self._retry(request, replica, "unknown_weights", delay_seconds=0.0)
            return
        lag = self.teacher.lag(weights_digest)
        if self.teacher.is_stale(weights_digest):
            error = StaleTeacher(f"targets {lag} versions old, at most {self.teacher.max_teacher_lag} are allowed")
            self._refused(replica, request, error)
            return
        received = ReceivedTargets(
            payload=answer.payload,
            fingerprint=fingerprint,
            teacher_version=answer.teacher_version,
            weights_digest=weights_digest,
        )
        metrics.STUDENT_TEACHER_LAG.set(lag)
        metrics.STUDENT_RECEIVED_BYTES.inc(answer.wire_bytes)
        metrics.STUDENT_ROWS.inc(len(request.sequence))
        self._forget(request, replica)
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(received)

    def _refused(self, replica: Replica, request: Request, error: RequestError | StaleTeacher) -> None:
        may_try_again = isinstance(error, StaleTeacher) or error.retryable
        if may_try_again and request.replica is not replica:
            return  # a late answer: the request is on its way to another replica by now
        outrun = isinstance(error, TooManyInFlight) and request.num_tokens <= replica.credit
        if not outrun and not isinstance(error, ServerDraining):  # else its state changed with the request on its way
            request.tries += 1
        if may_try_again and request.tries < MAX_TRIES:
            self._retry(request, replica, type(error).__name__)
        else:
            self._fail(request, error, answered_by=replica)

    def _retry(self, request: Request, replica: Replica, reason: str, *, delay_seconds: float | None = None) -> None:
        metrics.STUDENT_RETRIES.labels(reason=reason).inc()
        request.replica, request.avoid = None, replica
        if delay_seconds is None:
            low, high = RETRY_SECONDS
            delay_seconds = random.uniform(0.0, min(high, low * 2 ** min(request.delays, 10)))
            request.delays += 1
        asyncio.get_running_loop().call_later(delay_seconds, self._requeue, request.request_id)

    def _requeue(self, request_id: int) -> None:
        if request := self._requests.get(request_id):
            self._enqueue(request)
            self._pump()

    def _enqueue(self, request: Request) -> None:
        """A suspect comes after all others, and suspects take turns: only so is it seen who is to blame."""
        priority = math.inf if request.suspect else request.priority
        heapq.heappush(self._waiting, (priority, next(self._order), request.request_id))

    def _pump(self) -> None:
        """Send waiting requests, the soonest needed first, as long as a replica has room."""
        while self._waiting and self.fleet.started and (info := self.teacher.info) is not None:
            request = self._requests.get(self._waiting[0][-1])
            if request is None or request.replica is not None:
                heapq.heappop(self._waiting)
                continue
            if request.num_tokens == 0 and not self._fits(request, info):
                continue
            replica = self.fleet.choose(request)
            if replica is None:
                break
            heapq.heappop(self._waiting)
            self._send(request, replica)
        replicas = self.fleet.replicas
        metrics.STUDENT_IN_FLIGHT_TOKENS.set(sum(replica.in_flight_tokens for replica in replicas))
        metrics.STUDENT_CREDIT_TOKENS.set(sum(replica.credit for replica in replicas if replica.state == "ready"))

    def _fits(self, request: Request, info: TeacherInfo) -> bool:
        """Whether a teacher can take it at all; if not, it fails here, before it is sent."""
        sequence = request.sequence
        try:
            sequence.validate(vocab_size=info.vocab_size, max_sequence_tokens=info.max_sequence_tokens)
            self._identity.tokenizer.check_sequence(sequence, info)
            num_bytes = request_bytes(sequence)
            if num_bytes > info.max_message_bytes:
                raise InvalidSequence(f"a request of {num_bytes} bytes: the limit is {info.max_message_bytes}")
        except RequestError as error:
            self._fail(request, error)
            return False
        request.num_tokens = credit_tokens(sequence, self._identity.spec, info.vocab_size)
        return True

    def _send(self, request: Request, replica: Replica) -> None:
        if request.sent_at == 0.0:
            request.deadline = max(request.deadline, time.monotonic() + self._settings.deadline_seconds)
        replica.send(request)

    def _expiry(self, request: Request) -> float:
        """While teachers answer others, a request that waits for credit is not late."""
        if request.replica is None and request.sent_at == 0.0:
            return max(request.deadline, self._last_progress + self._settings.deadline_seconds)
        return request.deadline

    def _timeout_error(self, request: Request) -> LogitstreamError:
        where = f"sent to {request.replica.address}" if request.replica else "not sent"
        return TeacherUnavailable(
            f"no targets within {self._settings.deadline_seconds:g} s ({where}, {request.losses} connections lost, "
            f"{request.tries} refusals) {self.fleet.condition()}"
        )

    def _fail(self, request: Request, error: LogitstreamError, *, answered_by: Replica | None = None) -> None:
        self._forget(request, answered_by)
        if request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)

    def _forget(self, request: Request, answered_by: Replica | None) -> None:
        self._requests.pop(request.request_id, None)
        if request.replica is not None and request.replica is not answered_by:
            request.replica.cancel(request)
