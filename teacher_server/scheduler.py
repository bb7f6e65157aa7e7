"""Token-budget batches across all clients, scored by the backend's thread while others encode what came before.

Everything but scoring and encoding happens on the event loop, so there are no locks. What waits is bounded by what
clients may have in flight (`accounts.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from logitstream import metrics
from logitstream.errors import RequestError, ScoringFailed, ServerDraining
from logitstream.types import TargetSpec, TeacherInfo
from teacher_server.backend import ScoreRequest, ScoreResult, TeacherBackend, cost_in_tokens
from teacher_server.checkpoints import check_successor
from teacher_server.disk import Disk
from teacher_server.encoding import Encode, encode_all
from teacher_server.fair_queue import FairQueue
from teacher_server.retries import BROKE_DOWN, BackendBroken, BatchScorer
from teacher_server.stored_targets import StoredTargets
from teacher_server.work import Key, Scored, Work, key_of

MAX_ENCODING_BATCHES = 1
"""Scored batches that may wait for their encoding; the forward pauses beyond it, so memory stays bounded."""
MAX_REMEMBERED_FAILURES = 1024
SLICE = 64
"""Requests or answers that are handled before others have their turn on the event loop."""

CLOSE_SECONDS = 5.0
"""How long the running batch may take once nobody waits for it."""

FailureKey = tuple[TargetSpec, int, bytes]
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Scheduler:
    """Takes requests, forms batches, runs the backend; `run` must be a task as long as requests are to be served."""

    def __init__(
        self,
        backend: TeacherBackend,
        encode: Encode,
        *,
        max_batch_tokens: int,
        client_weights: Mapping[str, float] | None = None,
        num_encoders: int = 2,
        stored: StoredTargets | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._backend = backend
        self._encode = encode
        queue = self._queue = FairQueue[Work](client_weights)
        metrics.TEACHER_QUEUE_TOKENS.set_function(lambda: queue.cost)
        self._works: OrderedDict[Key, Work] = OrderedDict()
        self._failures: OrderedDict[FailureKey, ScoringFailed] = OrderedDict()
        self._wake = asyncio.Event()
        self._batches_at_once: int = getattr(backend, "batches_at_once", 1)
        self._backend_threads = ThreadPoolExecutor(self._batches_at_once, thread_name_prefix="backend")
        self._scorer = BatchScorer(max_batch_tokens, batches_at_once=self._batches_at_once)
        self._scoring: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None
        self._encoders = ThreadPoolExecutor(num_encoders, thread_name_prefix="encoder")
        self._stored = stored
        self._disk = disk if disk is not None else Disk()
        self._encoding = asyncio.Semaphore(self._batches_at_once + MAX_ENCODING_BATCHES)
        self._finishing: set[asyncio.Task[None]] = set()
        self._next_backend: TeacherBackend | None = None
        self.is_draining = False
        self.is_stuck = False  # after `close`: a batch or the disk is still busy and cannot be stopped
        self.info = backend.describe()

    def submit(self, request: ScoreRequest, *, client_id: str, priority: int = 0) -> asyncio.Future[Scored]:
        """The request's future; cancelling it takes the request back. Raises RequestError where it is refused."""
        if self.is_draining:
            raise ServerDraining("the server is draining: ask another replica")
        if self._failures and (failure := self._failures.get(_failure_key(request))) is not None:
            raise ScoringFailed(str(failure))
        key = key_of(request)
        cost = cost_in_tokens(request, self.info.vocab_size)
        work = self._works.get(key)
        if work is None:
            work = self._works[key] = Work(key, request, time.monotonic())
            if self._stored is not None and not self._disk.hangs and self._stored.holds(request, self.info):
                work.running = True
                self._spawn(self._read(self._stored, work, client_id=client_id, cost=cost, priority=priority))
        else:
            metrics.TEACHER_SHARED.inc()
        future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        work.waiters[future] = None
        if not work.running:  # each asker queues it, so that it comes at the turn of whoever is first
            work.waiters[future] = self._queue.push(work, client_id=client_id, cost=cost, priority=priority)
        future.add_done_callback(lambda done: self._leave(work, done))
        self._wake.set()
        return future

    @property
    def is_healthy(self) -> bool:
        return self._backend.healthy()

    @property
    def num_unfinished(self) -> int:
        return len(self._works)

    async def open_stored(self, spec: TargetSpec) -> None:
        """Before a stream's first request: find what is stored for its spec, if the disk says it soon."""
        if self._stored is not None:
            await self._disk.ask(self._stored.open, spec, self.info)

    async def refresh_stored(self) -> None:
        """Write out what was put and see what others have; called now and then."""
        if self._stored is not None:
            await self._disk.ask(self._stored.refresh)

    def start_draining(self) -> None:
        """Refuse new requests from now on; what was taken is still scored."""
        self.is_draining = True

    def replace_backend(self, backend: TeacherBackend) -> None:
        """Serve other weights from the next batch on; the running one finishes on the old.

        Raises ValueError where the students' handshake does not hold for them.
        """
        check_successor(self.info, backend.describe())
        superseded, self._next_backend = self._next_backend, backend
        if superseded is not None:  # by the time of its first batch there are newer weights
            self._in_backend(superseded.close)
        self._wake.set()

    async def run(self) -> None:
        """Score until cancelled; raises BackendBroken."""
        while self._broken is None:
            while self._next_backend is not None and not self._scoring:
                await self._swap_backend(self._next_backend)
            if not self._may_score():
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._encoding.acquire()
            batch = self._next_batch() if self._may_score() else []  # as late as can be: what is urgent now goes first
            if not batch:
                self._encoding.release()
                continue
            task = asyncio.get_running_loop().create_task(self._score(batch))
            self._scoring.add(task)
            task.add_done_callback(self._has_scored)
        raise self._broken

    def _may_score(self) -> bool:
        has_room = len(self._scoring) < self._batches_at_once
        return has_room and self._queue.cost > 0 and self._next_backend is None and self._broken is None

    def _has_scored(self, task: asyncio.Task[None]) -> None:
        self._scoring.discard(task)
        if not task.cancelled():
            self._broken = self._broken or task.exception()
        self._wake.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _read(self, stored: StoredTargets, work: Work, *, client_id: str, cost: int, priority: int) -> None:
        """Answer from the disk; what is damaged there, or does not come soon, is queued."""
        info = self.info
        payload = await self._disk.ask(stored.get, work.request, info)
        if payload is not None:
            self._answer(work, payload, info)
            return
        work.running = False
        for future in list(work.waiters):
            work.waiters[future] = self._queue.push(work, client_id=client_id, cost=cost, priority=priority)
        if not work.waiters:
            self._works.pop(work.key, None)
        self._wake.set()

    async def _score(self, batch: list[Work]) -> None:
        """Have a batch scored by the backend, in a thread of its own, and see to it that it is answered."""
        requests = [work.request for work in batch]
        try:
            results = await self._in_backend(self._scorer.score, self._backend, requests)
        except BackendBroken:
            for work in batch:
                self._refuse(work, ServerDraining(BROKE_DOWN))
            raise
        self._spawn(self._finish(batch, results, self.info))

    def _in_backend(self, function: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        return asyncio.get_running_loop().run_in_executor(self._backend_threads, function, *arguments)

    async def close(self) -> None:
        """Free the backend once the running batch is done, or give up on it; what still waits is cancelled."""
        self.is_draining = True
        self._scorer.stop()
        for task in self._scoring:
            task.cancel()
        if self._finishing:
            await asyncio.wait(self._finishing, timeout=CLOSE_SECONDS)
        for work in list(self._works.values()):
            for future in list(work.waiters):
                future.cancel()
        loop = asyncio.get_running_loop()
        closing = [loop.run_in_executor(self._encoders, self._free_backend)]
        if self._stored is not None:
            closing.append(self._disk.submit(self._stored.close))
        _, pending = await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        self.is_stuck = bool(pending)
        self._disk.shutdown()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def _free_backend(self) -> None:
        """In a thread: once no other is in the backend."""
        self._backend_threads.shutdown(cancel_futures=True)
        self._backend.close()

    def _next_batch(self) -> list[Work]:
        """Work in fair order up to the token budget; at least one where anything waits."""
        batch: list[Work] = []
        num_tokens = 0
        while (ticket := self._queue.peek()) is not None and (
            not batch or num_tokens + ticket.cost <= self._scorer.batch_tokens
        ):
            work = self._queue.pop().item
            work.running = True
            for other in work.waiters.values():
                if other is not None:
                    self._queue.cancel(other)
            num_tokens += ticket.cost
            batch.append(work)
        if batch:
            metrics.TEACHER_BATCH_FILL.observe(num_tokens / self._scorer.max_batch_tokens)
        return batch

    async def _finish(self, batch: list[Work], results: Sequence[ScoreResult], info: TeacherInfo) -> None:
        """Encode a scored batch and answer everybody who waits for it."""
        loop = asyncio.get_running_loop()
        try:
            specs = [work.request.spec for work in batch]
            answers = await loop.run_in_executor(self._encoders, encode_all, self._encode, results, specs)
        finally:
            self._encoding.release()
        for number, (work, answer) in enumerate(zip(batch, answers, strict=True), start=1):
            if isinstance(answer, bytes):
                self._answer(work, answer, info)
            else:
                self._refuse(work, answer)
            if number % SLICE == 0:
                await asyncio.sleep(0)
        if self._stored is not None:
            scored = [
                (work.request, answer) for work, answer in zip(batch, answers, strict=True) if isinstance(answer, bytes)
            ]
            num_bytes = sum(len(payload) + request.sequence.token_ids.nbytes for request, payload in scored)
            if not self._disk.offer(num_bytes, self._stored.put, scored, info):
                metrics.TEACHER_CACHE_UNKEPT.inc(len(scored))

    def _answer(self, work: Work, payload: bytes, info: TeacherInfo) -> None:
        scored = Scored(payload=payload, teacher_version=info.teacher_version, weights_digest=info.weights_digest)
        self._works.pop(work.key, None)
        for future in list(work.waiters):
            if not future.done():
                future.set_result(scored)

    def _refuse(self, work: Work, error: RequestError) -> None:
        if isinstance(error, ScoringFailed) and error.lasting:
            self._failures[_failure_key(work.request)] = error
            if len(self._failures) > MAX_REMEMBERED_FAILURES:
                self._failures.popitem(last=False)
        self._works.pop(work.key, None)
        for future in list(work.waiters):
            if not future.done():
                future.set_exception(error)

    def _leave(self, work: Work, future: asyncio.Future[Scored]) -> None:
        """A waiter is answered or has gone; work that nobody waits for any more is dropped unless it runs."""
        ticket = work.waiters.pop(future, None)
        if ticket is not None:
            self._queue.cancel(ticket)
        if not work.running and not work.waiters and self._works.get(work.key) is work:
            del self._works[work.key]

    async def _swap_backend(self, backend: TeacherBackend) -> None:
        old, self._backend, self._next_backend = self._backend, backend, None
        version = self.info.teacher_version + 1
        self.info = replace(backend.describe(), teacher_version=version)
        self._failures.clear()
        self._scorer.reset_batch_tokens()
        metrics.TEACHER_VERSION.set(version)
        log.info("serving version %d, weights %s", version, self.info.weights_digest[:16])
        await self._in_backend(old.close)

    def measure_age(self) -> None:
        """Set the gauge of the oldest waiting request's age; called now and then."""
        oldest = next((work.arrived for work in self._works.values() if not work.running), None)
        metrics.TEACHER_QUEUE_AGE.set(0.0 if oldest is None else time.monotonic() - oldest)


def _failure_key(request: ScoreRequest) -> FailureKey:
    """Smaller than `Key`, as it is kept."""
    return request.spec, request.draw_set, request.sequence.digest()
