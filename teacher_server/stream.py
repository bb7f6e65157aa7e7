"""One client's stream without its protobuf: what it has in flight, its credit, and what is to be sent to it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from logitstream import metrics
from logitstream.errors import (
    InvalidSequence,
    NonFiniteLogits,
    ProtocolViolation,
    RequestError,
    ScoringFailed,
    TooManyInFlight,
)
from logitstream.types import TargetSpec
from teacher_server.backend import ScoreRequest, cost_in_tokens, entries_bound
from teacher_server.scheduler import Scheduler
from teacher_server.work import Scored

MAX_STREAM_REQUESTS = 8192
"""Bounds what requests of a few tokens cost in bookkeeping, which their tokens do not."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The answer to one request; num_tokens is the credit that it frees once it is sent."""

    request_id: int
    num_tokens: int
    answer: Scored | RequestError


@dataclass(frozen=True, slots=True)
class CreditChanged:
    max_in_flight_tokens: int


@dataclass(frozen=True, slots=True)
class DrainStarted:
    grace_seconds: float


Event = Outcome | CreditChanged | DrainStarted


class ClientStream:
    """Lives on the event loop. An answer's id and credit are free when its message is handed to gRPC: its client may
    use both again before the write returns. A slow reader holds its credit and the one message that is being written.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        spec: TargetSpec,
        *,
        client_id: str,
        stream_id: int,
        max_in_flight_tokens: int,
        max_entries: int,
    ) -> None:
        self.spec = spec
        self.client_id = client_id
        self.stream_id = stream_id
        self._scheduler = scheduler
        self._vocab_size = scheduler.info.vocab_size
        self._max_entries = max_entries
        self._max_in_flight_tokens = max_in_flight_tokens
        self._futures: dict[int, asyncio.Future[Scored]] = {}
        self._unsent: dict[int, int] = {}  # request id -> tokens, until its answer is handed to gRPC
        self._num_sending = 0
        self._in_flight_tokens = 0
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._half_closed = False

    @property
    def num_unsent(self) -> int:
        """Requests whose answers have not been written yet."""
        return len(self._unsent) + self._num_sending

    def check_new(self, request_id: int) -> None:
        """Raises ProtocolViolation where the id is in flight already: its answers could not be told apart."""
        if request_id in self._unsent:
            raise ProtocolViolation(f"request_id {request_id} is in flight already: expected one unique in the stream")

    def submit(self, request_id: int, request: ScoreRequest, *, priority: int) -> None:
        """Hand a request to the scheduler; what refuses it is answered in-band."""
        num_tokens = cost_in_tokens(request, self._vocab_size)
        try:
            self._check_entries(request)
            self._check_credit(num_tokens)
            future = self._scheduler.submit(request, client_id=self.client_id, priority=priority)
        except RequestError as error:
            self.refuse(request_id, error)
            return
        self._unsent[request_id] = num_tokens
        self._in_flight_tokens += num_tokens
        self._futures[request_id] = future
        future.add_done_callback(lambda done: self._done(request_id, done))

    def refuse(self, request_id: int, error: RequestError) -> None:
        """Answer a request that goes no further."""
        self._note_refusal(request_id, error)
        self._unsent[request_id] = 0
        self._put(Outcome(request_id=request_id, num_tokens=0, answer=error))

    def cancel(self, request_id: int) -> None:
        """Forget a request that is not answered yet; unknown ids are those that crossed their answer on the way."""
        future = self._futures.get(request_id)
        if future is not None:
            future.cancel()

    def offer_credit(self, max_in_flight_tokens: int) -> None:
        """Tell the client a new bound; requests sent before it heard are still taken up to the first one."""
        self._put(CreditChanged(max_in_flight_tokens))

    def announce_drain(self, grace_seconds: float) -> None:
        """Tell the client to go elsewhere; the stream ends when what is in flight is answered."""
        self._put(DrainStarted(grace_seconds))
        self._half_closed = True

    def half_close(self) -> None:
        """The client sends no more; the stream ends when all is answered."""
        self._half_closed = True
        self._wake.set()

    async def wait_for_room(self) -> None:
        """Until few enough answers wait to be sent: a client that asks and does not read is not read from either."""
        while len(self._events) > MAX_STREAM_REQUESTS:
            self._room.clear()
            await self._room.wait()

    async def next_events(self) -> list[Event]:
        """What has to be sent, at least one event; empty when the stream is over."""
        while not self._events:
            if self._half_closed and not self._unsent:
                return []
            self._wake.clear()
            await self._wake.wait()
        events = list(self._events)
        self._events.clear()
        self._room.set()
        return events

    @contextmanager
    def sending(self, outcomes: list[Outcome]) -> Iterator[None]:
        """While the message of these answers is being written: from now on their ids and their credit are free."""
        for outcome in outcomes:
            self._unsent.pop(outcome.request_id, None)
            self._in_flight_tokens -= outcome.num_tokens
        self._num_sending = len(outcomes)
        try:
            yield
        finally:
            self._num_sending = 0

    def close(self) -> None:
        """Take back everything that is still in flight."""
        for future in list(self._futures.values()):
            future.cancel()

    def _check_entries(self, request: ScoreRequest) -> None:
        entries = entries_bound(request, self._vocab_size)
        if entries > self._max_entries:
            raise InvalidSequence(
                f"{len(request.sequence)} tokens may give {entries} entries: the limit is {self._max_entries}; "
                "ask for shorter sequences or fewer entries a row"
            )

    def _check_credit(self, num_tokens: int) -> None:
        held, limit = self._in_flight_tokens, self._max_in_flight_tokens
        if held and held + num_tokens > limit:
            raise TooManyInFlight(f"{held} tokens in flight and {num_tokens} more: the stream's credit is {limit}")
        if len(self._unsent) >= MAX_STREAM_REQUESTS:
            raise TooManyInFlight(f"{len(self._unsent)} requests in flight: a stream may have {MAX_STREAM_REQUESTS}")

    def _done(self, request_id: int, future: asyncio.Future[Scored]) -> None:
        del self._futures[request_id]
        num_tokens = self._unsent[request_id]
        if future.cancelled():
            del self._unsent[request_id]
            self._in_flight_tokens -= num_tokens
            self._wake.set()
            return
        error = future.exception()
        if error is not None and not isinstance(error, RequestError):
            raise error
        if error is not None:
            self._note_refusal(request_id, error)
        answer = future.result() if error is None else error
        self._put(Outcome(request_id=request_id, num_tokens=num_tokens, answer=answer))

    def _note_refusal(self, request_id: int, error: RequestError) -> None:
        name = type(error).__name__
        metrics.TEACHER_REJECTS.labels(name).inc()
        level = logging.WARNING if isinstance(error, ScoringFailed | NonFiniteLogits) else logging.DEBUG
        context = {"stream": self.stream_id, "client": self.client_id, "request": request_id}
        log.log(level, "request refused, %s: %s", name, error, extra=context)

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._wake.set()
