"""Delivery: batches of requests are sent to replicas until each is answered, or has failed for good."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from concurrent.futures import Future
from dataclasses import replace

from logitstream import metrics
from logitstream.client.replica import Call, Request, RequestBatch, loop_time
from logitstream.client.replicas import ReplicaPool
from logitstream.client.teacher_identity import TeacherIdentity
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
from logitstream.types import ReceivedTargets, TeacherInfo

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 5.0)
"""First and largest bound of the random wait before a refused sequence is sent again."""
MAX_REFUSALS = 5
"""Retryable refusals of one sequence before its error is raised."""
MAX_LONE_LOSSES = 6
"""Calls that may break with a sequence alone in flight before the sequence is held to be the cause."""


class Delivery:
    """One task a batch, in one event loop. Its requests are sent again, elsewhere if possible, when a call breaks."""

    def __init__(self, pool: ReplicaPool, identity: TeacherIdentity, *, deadline_seconds: float) -> None:
        self._pool = pool
        self._identity = identity
        self._deadline_seconds = deadline_seconds
        self._tasks: dict[asyncio.Task[None], RequestBatch] = {}
        self._closed = False

    def begin(self, batch: RequestBatch) -> None:
        """Deliver in a task of its own, which ends when all futures are done or cancelled."""
        if self._closed:  # meanwhile
            for request in batch.requests:
                request.future.cancel()
            return
        batch.since = batch.since or loop_time()
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(self._deliver(batch))
        self._tasks[task] = batch
        task.add_done_callback(self._ended)

        def cancelled(future: Future[ReceivedTargets]) -> None:
            if future.cancelled() and all(one.future.done() for one in batch.requests):
                loop.call_soon_threadsafe(task.cancel)

        for request in batch.requests:
            request.future.add_done_callback(cancelled)

    def _ended(self, task: asyncio.Task[None]) -> None:
        batch = self._tasks.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LogitstreamError):
            logger.error("a bug: a batch could not be delivered", exc_info=error)
        for request in batch.requests:
            if error is None:
                request.future.cancel()
            else:
                request.fail(error)

    async def _deliver(self, batch: RequestBatch) -> None:
        """Ask for a batch, one call after another, until each future is done; what a call cannot take is split off."""
        while batch.requests:
            call = await self._pool.acquire(batch, expiry=lambda: self._expiry(batch))
            if call is None:
                raise self._timed_out(batch, "not sent")
            if rest := batch.requests[len(call.requests) :]:
                self.begin(replace(batch, requests=rest))
            batch.requests = call.requests
            if not batch.sent:
                batch.sent, batch.since = True, loop_time()
            error = await self._score(batch, call)
            batch.requests = [request for request in call.requests if not request.future.done()]
            batch.avoid = call.replica
            if isinstance(error, TooManyInFlight):  # it waits for room as if it had not been sent
                batch.avoid, batch.sent = None, False
            if error is not None:
                reason = "lost" if isinstance(error, TeacherUnavailable) else type(error).__name__
                metrics.STUDENT_RETRIES.labels(reason=reason).inc(len(batch.requests))
            if batch.requests and (error is None or batch.suspect):
                low, high = RETRY_SECONDS
                await asyncio.sleep(random.uniform(0.0, min(high, low * 2 ** min(batch.delays, 10))))
                batch.delays += 1

    async def _score(self, batch: RequestBatch, call: Call) -> LogitstreamError | None:
        """Make one call and set the futures that it answers; return what ended it early, unless that is final."""
        info, expires = call.replica.info, batch.since + self._deadline_seconds
        assert info is not None
        error: BaseException | None = asyncio.CancelledError()
        try:
            call.requests = [request for request in call.requests if self._fits(request, info)]
            if not call.requests:
                return None
            async with asyncio.timeout_at(expires) as call.scope:
                answers = call.connection.score(
                    [request.sequence for request in call.requests],
                    self._identity.spec,
                    self._identity.caller(info),
                    draw_set=batch.draw_set,
                    priority=batch.priority,
                    deadline_seconds=expires - loop_time() + 1.0,
                )
                async with contextlib.aclosing(answers):
                    async for index, outcome in answers:
                        await self._take(call, call.requests[index], outcome)
            error = None
        except TimeoutError:
            if loop_time() >= expires:
                error = self._timed_out(batch, f"sent to {call.replica.address}")
                raise error from None
            error = TeacherUnavailable(f"{call.replica.address}: it answers nothing, and others are there")
        except LogitstreamError as caught:
            error = caught
            if isinstance(error, TeacherUnavailable):
                self._count_loss(batch, call, error)
        finally:
            self._pool.finish(call, error)
        return error

    async def _take(self, call: Call, request: Request, outcome: ReceivedTargets | RequestError) -> None:
        """Use an answer. Weights that changed while serving are described again before their first targets are used."""
        if isinstance(outcome, RequestError):
            self._pool.answered(call)
            self._refuse(request, outcome, may_retry=outcome.retryable)
            return
        assert call.replica.info is not None
        described, identity = call.replica.info.short_weights_digest, self._identity
        digest = outcome.weights_digest or described
        if identity.is_news(digest, described):
            info = await call.connection.describe()
            identity.accept(call.replica.address, info)
            call.replica.info = info
        self._pool.answered(call)
        fingerprint = identity.fingerprint_digest(digest)
        if fingerprint is None:  # replaced twice between two answers: nobody can tell what made these targets
            metrics.STUDENT_RETRIES.labels(reason="unknown_weights").inc()
        elif identity.is_stale(digest):
            lag = f"targets {identity.lag(digest)} versions old, at most {identity.max_teacher_lag} are allowed"
            self._refuse(request, StaleTeacher(lag), may_retry=True)
        elif request.future.set_running_or_notify_cancel():
            metrics.STUDENT_TEACHER_LAG.set(identity.lag(digest))
            metrics.STUDENT_RECEIVED_BYTES.inc(outcome.wire_bytes)
            metrics.STUDENT_ROWS.inc(len(request.sequence))
            request.future.set_result(replace(outcome, fingerprint=fingerprint, weights_digest=digest))

    def _refuse(self, request: Request, error: LogitstreamError, *, may_retry: bool) -> None:
        request.refusals += not isinstance(error, ServerDraining)
        if may_retry and request.refusals < MAX_REFUSALS:
            metrics.STUDENT_RETRIES.labels(reason=type(error).__name__).inc()
        else:
            request.fail(error)

    def _count_loss(self, batch: RequestBatch, call: Call, error: LogitstreamError) -> None:
        """Count a broken call against its sequences. Raises ScoringFailed for one that breaks replicas.

        A sequence is to blame only if it was alone at a replica that was otherwise healthy: it answered something over
        this connection, or other sequences were answered since this one first broke a call.
        """
        replica = call.replica
        alone = len(call.requests) == len(replica.calls) == 1
        healthy = replica.silent == 0 or batch.lone_losses > 0 or 0.0 < batch.lost_at < self._pool.progress_at
        batch.losses += 1
        batch.lone_losses += alone and healthy
        batch.lost_at = batch.lost_at or loop_time()
        if batch.lone_losses >= MAX_LONE_LOSSES:
            raise ScoringFailed(
                f"{batch.losses} connections broke while this sequence was being scored; the last: {error}"
            )

    def _fits(self, request: Request, info: TeacherInfo) -> bool:
        """Check that a teacher can take a sequence; if not, fail its future and return False."""
        try:
            request.sequence.validate(vocab_size=info.vocab_size, max_sequence_tokens=info.max_sequence_tokens)
            self._identity.tokenizer.check_sequence(request.sequence, info)
            if request.num_bytes > info.max_message_bytes:
                raise InvalidSequence(f"a request of {request.num_bytes} bytes: the limit is {info.max_message_bytes}")
        except RequestError as error:
            request.fail(error)
            return False
        return True

    def _expiry(self, batch: RequestBatch) -> float:
        """Return when to give up; while teachers answer others, a batch that waits for room is not late."""
        return (batch.since if batch.sent else max(batch.since, self._pool.progress_at)) + self._deadline_seconds

    def _timed_out(self, batch: RequestBatch, where: str) -> TeacherUnavailable:
        return TeacherUnavailable(
            f"no targets within {self._deadline_seconds:g} s ({where}, {batch.losses} connections lost) "
            f"{self._pool.condition()}"
        )

    async def close(self) -> None:
        """Cancel what is in flight."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
