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
from teacher_server.admission import Account, Accounts
from teacher_server.backend import ScoreRequest, cost_in_tokens, entries_bound
from teacher_server.scheduler import SLICE, Scheduler, Scored

MAX_STREAM_REQUESTS = 8192
"""Bounds what requests of a few tokens cost in bookkeeping, which their tokens do not."""
MAX_UNREAD_REFUSALS = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The answer to one request; num_tokens is the credit that it frees once it is sent."""

    request_id: int
    num_tokens: int
    was_taken: bool
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
        accounts: Accounts,
        account: Account,
        stream_id: int,
        max_entries: int,
    ) -> None:
        self.spec = spec
        self.client_id = account.client_id
        self.stream_id = stream_id
        self._scheduler = scheduler
        self._vocab_size = scheduler.info.vocab_size
        self._max_entries = max_entries
        self._accounts = accounts
        self._account = account
        self._futures: dict[int, asyncio.Future[Scored]] = {}
        self._unsent: dict[int, int] = {}  # request id -> tokens, until its answer is handed to gRPC
        self._num_sending = 0
        self._in_flight_tokens = 0
        self._num_taken = 0
        self._events: deque[Event] = deque()
        self._new_credit: CreditChanged | None = None
        self._num_unread_refusals = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._half_closed = False
        self._closed = False

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
            self._check_room(num_tokens)
            future = self._scheduler.submit(request, client_id=self.client_id, priority=priority)
        except RequestError as error:
            self.refuse(request_id, error)
            return
        self._unsent[request_id] = num_tokens
        self._hold(num_tokens, 1)
        self._futures[request_id] = future
        future.add_done_callback(lambda done: self._done(request_id, done))

    def refuse(self, request_id: int, error: RequestError) -> None:
        """Answer a request that goes no further."""
        self._note_refusal(request_id, error)
        self._unsent[request_id] = 0
        self._num_unread_refusals += 1
        self._put(Outcome(request_id=request_id, num_tokens=0, was_taken=False, answer=error))

    def cancel(self, request_id: int) -> None:
        """Forget a request that is not answered yet; unknown ids are those that crossed their answer on the way."""
        future = self._futures.get(request_id)
        if future is not None:
            future.cancel()

    def offer_credit(self, max_in_flight_tokens: int) -> None:
        """Tell the client a new bound; of several that it has not been told, the last."""
        self._new_credit = CreditChanged(max_in_flight_tokens)
        self._wake.set()

    def announce_drain(self, grace_seconds: float) -> None:
        """Tell the client to go elsewhere; the stream ends when what is in flight is answered."""
        self._put(DrainStarted(grace_seconds))
        self._half_closed = True

    def half_close(self) -> None:
        """The client sends no more; the stream ends when all is answered."""
        self._half_closed = True
        self._wake.set()

    async def wait_for_room(self) -> None:
        """Until few enough refusals wait to be sent: a client that asks and does not read is not read from either."""
        while self._num_unread_refusals > MAX_UNREAD_REFUSALS:
            self._room.clear()
            await self._room.wait()

    async def next_events(self) -> list[Event]:
        """What has to be sent next, one event to SLICE; empty when the stream is over."""
        while not self._events and self._new_credit is None:
            if self._half_closed and not self._unsent:
                return []
            self._wake.clear()
            await self._wake.wait()
        events: list[Event] = [self._new_credit] if self._new_credit is not None else []
        self._new_credit = None
        while self._events and len(events) < SLICE:
            events.append(self._events.popleft())
        return events

    @contextmanager
    def sending(self, outcomes: list[Outcome]) -> Iterator[None]:
        """While the message of these answers is being written: from now on their ids and their credit are free."""
        for outcome in outcomes:
            self._unsent.pop(outcome.request_id, None)
            if outcome.was_taken:
                self._hold(-outcome.num_tokens, -1)
            else:
                self._num_unread_refusals -= 1
        self._room.set()
        self._num_sending = len(outcomes)
        try:
            yield
        finally:
            self._num_sending = 0

    def close(self) -> None:
        """Take back everything that is still in flight."""
        for future in list(self._futures.values()):
            future.cancel()
        self._hold(-self._in_flight_tokens, -self._num_taken)
        self._closed = True

    def _hold(self, num_tokens: int, num_requests: int) -> None:
        """Count what is in flight, here and for the client; at `close` all of it is given back."""
        if not self._closed:
            self._in_flight_tokens += num_tokens
            self._num_taken += num_requests
            self._account.num_tokens += num_tokens
            self._account.num_requests += num_requests

    def _check_entries(self, request: ScoreRequest) -> None:
        entries = entries_bound(request, self._vocab_size)
        if entries > self._max_entries:
            raise InvalidSequence(
                f"{len(request.sequence)} tokens may give {entries} entries: the limit is {self._max_entries}; "
                "ask for shorter sequences or fewer entries a row"
            )

    def _check_room(self, num_tokens: int) -> None:
        self._accounts.check_room(self._account, num_tokens, held_by_stream=self._in_flight_tokens)
        if len(self._unsent) >= MAX_STREAM_REQUESTS:
            raise TooManyInFlight(f"{len(self._unsent)} requests in flight: a stream may have {MAX_STREAM_REQUESTS}")

    def _done(self, request_id: int, future: asyncio.Future[Scored]) -> None:
        del self._futures[request_id]
        num_tokens = self._unsent[request_id]
        if future.cancelled():
            del self._unsent[request_id]
            self._hold(-num_tokens, -1)
            self._wake.set()
            return
        error = future.exception()
        if error is not None and not isinstance(error, RequestError):
            raise error
        if error is not None:
            self._note_refusal(request_id, error)
        answer = future.result() if error is None else error
        self._put(Outcome(request_id=request_id, num_tokens=num_tokens, was_taken=True, answer=answer))

    def _note_refusal(self, request_id: int, error: RequestError) -> None:
        name = type(error).__name__
        metrics.TEACHER_REJECTS.labels(name).inc()
        level = logging.WARNING if isinstance(error, ScoringFailed | NonFiniteLogits) else logging.DEBUG
        context = {"stream": self.stream_id, "client": self.client_id, "request": request_id}
        log.log(level, "request refused, %s: %s", name, error, extra=context)

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._wake.set()
