"""One teacher replica: keeps a stream to it open, and knows what is in flight there and how fast it answers."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from logitstream.client.own_tokenizer import TokenizerMismatch
from logitstream.client.teacher_identity import Identity, KnownTeacher
from logitstream.errors import AccessDenied, FingerprintMismatch, LogitstreamError, TeacherUnavailable
from logitstream.rpc.connection import Answer, Credit, Draining, Outgoing, TeacherConnection
from logitstream.types import ReceivedTargets, TokenSequence

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = (0.2, 10.0)
"""First and largest bound of the random wait before another connection."""
REFUSED_SECONDS = 30.0
"""A replica that serves something else is asked again this often: it may have been replaced."""
FORGET_SECONDS = 5.0
"""Half-life of what is known of an idle replica's speed."""
MAX_STREAM_REQUESTS = 4096
"""Bounds what short sequences cost in bookkeeping, which their tokens do not; servers allow twice as many."""
SUSPECT_LOSSES = 2
"""Broken connections after which a sequence is sent alone."""

State = Literal["connecting", "ready", "draining", "refused"]


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One submitted sequence until its answer is accepted; num_tokens is what it counts against the credit."""

    request_id: int
    sequence: TokenSequence
    draw_set: int
    priority: int
    deadline: float
    num_tokens: int = 0
    future: Future[ReceivedTargets] = field(default_factory=Future)
    replica: Replica | None = None
    sent_at: float = 0.0
    tokens_ahead: int = 0
    losses: int = 0
    lost_at: float = 0.0
    lone_losses: int = 0
    tries: int = 0
    delays: int = 0
    avoid: Replica | None = None

    @property
    def suspect(self) -> bool:
        """It may be what kills replicas: it is sent alone, so that no other sequence is taken for the cause."""
        return self.losses >= SUSPECT_LOSSES


class _AccessUnreadable(TeacherUnavailable):
    """This client's own token or certificate cannot be read at the moment."""


class Dispatcher(Protocol):
    """What a replica tells the dispatcher."""

    def ready(self, replica: Replica) -> None: ...

    def answered(self, replica: Replica, answer: Answer) -> None: ...

    def lost(self, replica: Replica, requests: list[Request], error: LogitstreamError) -> None: ...


class Replica:
    """Runs in the client's event loop; every method is called there."""

    def __init__(
        self,
        address: str,
        *,
        dispatcher: Dispatcher,
        identity: Identity,
        teacher: KnownTeacher,
        connect: Callable[[str], TeacherConnection],
        stalled_seconds: float,
        longest_patience_seconds: float,
    ) -> None:
        self.address = address
        self.state: State = "connecting"
        self.credit = 0
        self.in_flight: dict[int, Request] = {}
        self.in_flight_tokens = 0
        self.seconds_per_token = 0.0
        self.last_error: LogitstreamError | None = None
        self._dispatcher = dispatcher
        self._identity = identity
        self._teacher = teacher
        self._connect = connect
        self._stalled_seconds = stalled_seconds
        self._longest_patience = longest_patience_seconds
        self._slowest_seconds = 0.0
        self._break_reason = ""
        self.has_answered = False  # over the connection that is open or has just ended
        self.broken_off = False  # that connection, by this client
        self._last_progress = time.monotonic()
        self._outbox: list[Request] = []
        self._cancelled: list[int] = []
        self._wake = asyncio.Event()
        self.gone = False  # its address has vanished: what is in flight is finished, nothing new is sent
        self._was_ready = False
        self._reading: asyncio.Task[None] | None = None
        self.described = b""

    def has_room(self, request: Request) -> bool:
        """Whether the credit allows one more; a sequence beyond all credit is sent alone, and refused there."""
        if self.state != "ready" or self.gone:
            return False
        if self._teacher.is_stale(self.described):  # one at a time, to see when it has caught up
            return not self.in_flight and request.avoid is not self
        if not self.in_flight:
            return True
        if len(self.in_flight) >= MAX_STREAM_REQUESTS:
            return False
        alone = request.suspect or any(other.suspect for other in self.in_flight.values())
        return not alone and self.in_flight_tokens + request.num_tokens <= self.credit

    def expected_seconds(self, num_tokens: int) -> float:
        """When one more sequence would be answered, by what the last ones took; ties go to the emptier replica.

        What they took counts half as much with every FORGET_SECONDS without work, so that one that was slow when it was
        asked last is asked again.
        """
        idle_seconds = 0.0 if self.in_flight else time.monotonic() - self._last_progress
        seconds_per_token = self.seconds_per_token * math.pow(0.5, idle_seconds / FORGET_SECONDS)
        return (self.in_flight_tokens + num_tokens) * max(seconds_per_token, 1e-9)

    def stalled(self, now: float) -> bool:
        """Whether something is in flight and nothing was answered for too long, by what answers have taken so far."""
        patience = min(max(self._stalled_seconds, 2 * self._slowest_seconds), self._longest_patience)
        return bool(self.in_flight) and now - self._last_progress > patience

    def send(self, request: Request) -> None:
        now = time.monotonic()
        if not self.in_flight:
            self._last_progress = now
        request.replica, request.sent_at, request.tokens_ahead = self, now, self.in_flight_tokens
        self.in_flight[request.request_id] = request
        self.in_flight_tokens += request.num_tokens
        self._outbox.append(request)
        self._wake.set()

    def cancel(self, request: Request) -> None:
        """Forget the request and tell the teacher."""
        self._forget(request)
        self._cancelled.append(request.request_id)
        self._wake.set()

    def break_off(self, reason: str) -> None:
        """Give the connection up, whatever is in flight is not to blame; it goes elsewhere.

        Where a stalled replica was slow after all, it has twice as long next time.
        """
        self.broken_off = True
        if self.in_flight:
            self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - self._last_progress)
        self._interrupt(reason)

    async def run(self) -> None:
        """Connect again and again until cancelled, or until retired and idle."""
        failures = 0
        while not self.gone:
            self.has_answered = self.broken_off = False
            error = await self._one_connection()
            failures = 0 if self.has_answered else failures + 1
            self._give_up(error)
            low, high = RECONNECT_SECONDS
            bound = REFUSED_SECONDS if self.state == "refused" else min(high, low * 2 ** min(failures, 10))
            if not self.gone:
                await asyncio.sleep(random.uniform(0.05, 1.0) * bound)

    async def _one_connection(self) -> LogitstreamError:
        """Serve requests over one connection; why it ended."""
        try:
            connection = self._connect(self.address)
        except (OSError, ValueError) as error:  # a token or certificate file that is being replaced
            return _AccessUnreadable(f"{self.address}: {error}")
        self._reading = asyncio.ensure_future(self._serve(connection))
        try:
            await self._reading
        except LogitstreamError as error:
            return error
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            return TeacherUnavailable(f"{self.address}: {self._break_reason}")
        finally:
            self._reading = None
            await connection.close()
        return TeacherUnavailable(f"{self.address}: the server ended the stream")

    async def _serve(self, connection: TeacherConnection) -> None:
        await self._handshake(connection)
        writing = asyncio.ensure_future(self._write(connection))
        writing.add_done_callback(self._writing_ended)
        try:
            async for event in connection.events():
                match event:
                    case Answer():
                        await self._take(connection, event)
                    case Credit(tokens):
                        self.credit = tokens
                        self._dispatcher.ready(self)
                    case Draining(grace_seconds):
                        logger.info("teacher %s drains for %g s", self.address, grace_seconds)
                        self.state = "draining"
                if not self.in_flight and (self.state == "draining" or self.gone):
                    return
        finally:
            writing.cancel()

    async def _handshake(self, connection: TeacherConnection) -> None:
        info, tokenizer = await connection.describe(), self._identity.tokenizer
        try:
            self.described = self._teacher.accept(self.address, info)
        except TokenizerMismatch as error:
            explained = await tokenizer.explain(connection.describe_tokenizer, info)
            raise FingerprintMismatch(f"{error}; {explained}") from None
        await tokenizer.compare_rules(connection.describe_tokenizer, info)
        self.credit = await connection.open(
            self._identity.spec,
            client_id=self._identity.client_id,
            vocab_size=self._identity.vocab_size,
            tokenizer_digest=tokenizer.digest_for(info),
            weights_digest=self._teacher.weights_to_ask_for(info),
        )
        self.state, self.last_error, self._was_ready = "ready", None, True
        logger.info("teacher %s ready: %s, %d tokens in flight allowed", self.address, info.model, self.credit)
        self._dispatcher.ready(self)

    async def _take(self, connection: TeacherConnection, answer: Answer) -> None:
        """Weights that changed while serving are described again before their first targets are used."""
        if answer.error is None and self._teacher.is_news(answer.weights_digest or self.described, self.described):
            self.described = self._teacher.accept(self.address, await connection.describe())
        now = time.monotonic()
        self.has_answered = True
        if request := self.in_flight.get(answer.request_id):
            self._slowest_seconds = max(self._slowest_seconds, now - self._last_progress)
            self._forget(request)
            taken = (now - request.sent_at) / (request.tokens_ahead + request.num_tokens)
            self.seconds_per_token += (0.2 if self.seconds_per_token else 1.0) * (taken - self.seconds_per_token)
        self._last_progress = now
        self._dispatcher.answered(self, answer)

    async def _write(self, connection: TeacherConnection) -> None:
        """Send what has gathered since the last write; flow control makes the writes wait."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            cancelled, outbox = self._cancelled, [r for r in self._outbox if r.request_id in self.in_flight]
            self._cancelled, self._outbox = [], []
            if cancelled:
                await connection.cancel(cancelled)
            await connection.send(
                [
                    Outgoing(
                        request_id=request.request_id,
                        sequence=request.sequence,
                        draw_set=request.draw_set,
                        priority=request.priority,
                    )
                    for request in outbox
                ]
            )

    def _writing_ended(self, writing: asyncio.Task[None]) -> None:
        """A stream that breaks is noticed by the reading side too, which says why; anything else is a bug of ours."""
        if not writing.cancelled() and (error := writing.exception()) and not isinstance(error, LogitstreamError):
            logger.error("writing to teacher %s failed", self.address, exc_info=error)
            self._interrupt(f"{error}")

    def _interrupt(self, reason: str) -> None:
        self._break_reason = reason
        if self._reading is not None:
            self._reading.cancel()

    def _forget(self, request: Request) -> None:
        if self.in_flight.pop(request.request_id, None) is not None:
            self.in_flight_tokens -= request.num_tokens

    def _give_up(self, error: LogitstreamError) -> None:
        """The connection has ended: everything in flight is the dispatcher's again."""
        if self.state == "draining" and not self.in_flight:
            logger.info("teacher %s has drained", self.address)
        elif type(self.last_error) is not type(error):  # once for each reason, not for each try
            outcome = "not reached yet" if isinstance(error, TeacherUnavailable) else "refused"
            logger.warning("teacher %s %s: %s", self.address, "lost" if self.state == "ready" else outcome, error)
        rotating = isinstance(error, AccessDenied) and self._was_ready  # the token file may follow the server's soon
        self.state = "connecting" if isinstance(error, TeacherUnavailable) or rotating else "refused"
        self.last_error = error
        self._teacher.left(self.address)
        requests = list(self.in_flight.values())
        self.in_flight.clear()
        self._outbox, self._cancelled = [], []
        self.credit = self.in_flight_tokens = 0
        self._dispatcher.lost(self, requests, error)
