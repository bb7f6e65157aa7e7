"""Batches across all clients: formed in fair order, scored in the backend's threads, encoded beside the next forward.

Everything but scoring and encoding happens on the event loop, so there are no locks. What waits is bounded by what
clients may hold (`admission.py`). The file is long because a batch's whole way, from queue to answer, is read together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from logitstream import metrics
from logitstream.errors import RequestError, ScoringFailed, ServerDraining
from logitstream.types import TargetSpec, TeacherInfo, credit_tokens
from teacher_server.backend import ScoreRequest, TeacherBackend
from teacher_server.checkpoints import check_successor
from teacher_server.disk import Disk
from teacher_server.encoding import Encode, encode_all
from teacher_server.fair_queue import FairQueue, Ticket
from teacher_server.retries import BROKE_DOWN, BackendBroken, BatchScorer
from teacher_server.stored_targets import StoredTargets

MAX_ENCODING_BATCHES = 1
"""Scored batches that may wait to be encoded; the forward pauses beyond it, so that memory stays bounded."""
NUM_ENCODERS = 2
MAX_REMEMBERED_FAILURES = 1024
SLICE = 64
"""Sequences handled before others have their turn on the event loop."""
CLOSE_SECONDS = 5.0
"""How long the running batch may take once nobody waits for it."""

T = TypeVar("T")
Key = tuple[TargetSpec, int, bytes, bytes]
log = logging.getLogger(__name__)


def key_of(request: ScoreRequest) -> Key:
    """Return what equal requests share; its bytes are compared only if hashes agree, which is faster than a digest."""
    ids, mask = request.sequence.token_ids, request.sequence.loss_mask
    return request.spec, request.draw_set, ids.tobytes(), b"" if mask is None or mask.all() else mask.tobytes()


@dataclass(frozen=True, slots=True)
class Scored:
    """Encoded targets of one request and the weights that made them; weights_digest is hex."""

    payload: bytes
    teacher_version: int
    weights_digest: str


@dataclass(slots=True, eq=False)
class Job:
    """One request that waits or is being answered, for everybody who made it.

    Each waiter has queued it in its own client's name, so that it comes at the turn of whoever is first.
    """

    key: Key
    request: ScoreRequest
    cost: int
    arrived: float = field(default_factory=time.monotonic)
    waiters: dict[asyncio.Future[Scored], Ticket[Job] | None] = field(default_factory=dict)
    running: bool = False


class Scheduler:
    """Takes requests, forms batches, runs the backend; `run` must be a task while requests are to be served.

    It has more state than other classes, as this is where queue, backend, encoders and the server's cache meet.
    """

    def __init__(
        self,
        backend: TeacherBackend,
        encode: Encode,
        *,
        max_batch_tokens: int,
        client_weights: Mapping[str, float] | None = None,
        stored: StoredTargets | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.info = backend.describe()
        self.is_draining = False  # set to refuse new requests; what was taken is still scored
        self.is_stuck = False  # after `close`: a batch or the disk is still busy and cannot be stopped
        self.disk = disk or Disk()
        self._backend = backend
        self._next_backend: TeacherBackend | None = None
        self._encode = encode
        self._stored = stored
        self._queue = FairQueue[Job](client_weights)
        self._jobs: OrderedDict[Key, Job] = OrderedDict()
        self._failures: OrderedDict[object, ScoringFailed] = OrderedDict()
        self._wake = asyncio.Event()
        self._reading: set[asyncio.Task[None]] = set()
        self._num_slots: int = getattr(backend, "batches_at_once", 1)
        self._slots = asyncio.Semaphore(self._num_slots)
        self._unencoded = asyncio.Semaphore(self._num_slots + MAX_ENCODING_BATCHES)
        self._scorer = BatchScorer(max_batch_tokens, batches_at_once=self._num_slots)
        self._backend_threads = ThreadPoolExecutor(self._num_slots, thread_name_prefix="backend")
        self._encoders = ThreadPoolExecutor(NUM_ENCODERS, thread_name_prefix="encoder")
        queue = self._queue
        metrics.TEACHER_QUEUE_TOKENS.set_function(lambda: queue.cost)

    @property
    def is_healthy(self) -> bool:
        return self._backend.healthy()

    @property
    def num_unfinished(self) -> int:
        return len(self._jobs)

    def submit(self, request: ScoreRequest, *, client_id: str, priority: int = 0) -> asyncio.Future[Scored]:
        """Return the request's future; cancelling it takes the request back. Raises RequestError if it is refused."""
        if self.is_draining:
            raise ServerDraining("the server is draining: ask another replica")
        if self._failures and (failure := self._failures.get(_failure_key(request))) is not None:
            raise ScoringFailed(str(failure))
        key = key_of(request)
        job = self._jobs.get(key)
        if job is None:
            cost = credit_tokens(request.sequence, request.spec, self.info.vocab_size)
            job = self._jobs[key] = Job(key, request, cost)
            if self._stored is not None and not self.disk.hangs and self._stored.holds(request, self.info):
                job.running = True
                reading = asyncio.ensure_future(self._read(self._stored, job, client_id, priority))
                self._reading.add(reading)  # the loop itself would not keep it alive
                reading.add_done_callback(self._reading.discard)
        else:
            metrics.TEACHER_SHARED.inc()
        future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        job.waiters[future] = None if job.running else self._enqueue(job, client_id, priority)
        future.add_done_callback(lambda done: self._leave(job, done))
        return future

    def replace_backend(self, backend: TeacherBackend) -> None:
        """Serve other weights from the next batch on; the running one finishes on the old.

        Raises ValueError if clients could not tell, as the vocabulary or the dtype differs.
        """
        check_successor(self.info, backend.describe())
        superseded, self._next_backend = self._next_backend, backend
        if superseded is not None:  # newer weights came before its first batch
            self._in_backend(superseded.close)
        self._wake.set()

    async def open_stored(self, spec: TargetSpec) -> None:
        """Find what is stored for a spec before its first request, if the disk answers soon."""
        if self._stored is not None:
            await self.disk.ask(self._stored.open, spec, self.info)

    async def refresh_stored(self) -> None:
        """Write out what was put and see what others have; called now and then."""
        if self._stored is not None:
            await self.disk.ask(self._stored.refresh)

    def measure_age(self) -> None:
        """Set the gauge of the oldest waiting request's age; called now and then."""
        oldest = next((job.arrived for job in self._jobs.values() if not job.running), None)
        metrics.TEACHER_QUEUE_AGE.set(0.0 if oldest is None else time.monotonic() - oldest)

    async def run(self) -> None:
        """Score until cancelled; raises BackendBroken."""
        try:
            async with asyncio.TaskGroup() as batches:
                while True:
                    await self._unencoded.acquire()
                    await self._slots.acquire()
                    while self._next_backend is not None or not self._queue.cost:
                        if self._next_backend is not None:
                            await self._swap_backends()
                        else:
                            self._wake.clear()
                            await self._wake.wait()
                    batches.create_task(self._process(self._next_batch()))  # formed late: what is urgent now goes first
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def close(self) -> None:
        """Free the backend once the running batch is done, or give up on it; what still waits is cancelled."""
        self.is_draining = True
        self._scorer.stop()
        for job in self._jobs.values():
            for future in job.waiters:
                future.cancel()

        def free_backend() -> None:
            self._backend_threads.shutdown(cancel_futures=True)  # waits for the running batch
            self._backend.close()

        closing = [asyncio.get_running_loop().run_in_executor(self._encoders, free_backend)]
        if self._stored is not None:
            closing.append(self.disk.submit(self._stored.close))
        _, pending = await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        self.is_stuck = bool(pending)
        self.disk.shutdown()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def _in_backend(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._backend_threads, function, *arguments)

    def _next_batch(self) -> list[Job]:
        """Take jobs in fair order up to the token budget, at least one."""
        batch: list[Job] = []
        num_tokens = 0
        while (ticket := self._queue.peek()) is not None and (
            not batch or num_tokens + ticket.cost <= self._scorer.batch_tokens
        ):
            job = self._queue.pop().item
            job.running = True
            for other in job.waiters.values():
                if other is not None:
                    self._queue.cancel(other)
            num_tokens += ticket.cost
            batch.append(job)
        metrics.TEACHER_BATCH_FILL.observe(num_tokens / self._scorer.max_batch_tokens)
        return batch

    async def _process(self, batch: list[Job]) -> None:
        """Score and encode a batch, offer it to the server's cache, and answer everybody who waits for it."""
        info, requests = self.info, [job.request for job in batch]
        specs = [request.spec for request in requests]
        try:
            try:
                results = await self._in_backend(self._scorer.score, self._backend, requests)
            finally:
                self._slots.release()
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self._encoders, encode_all, self._encode, results, specs)
        except BackendBroken:
            for job in batch:
                self._settle(job, ServerDraining(BROKE_DOWN), info)
            raise
        finally:
            self._unencoded.release()
        self._keep(requests, answers, info)
        for number, (job, answer) in enumerate(zip(batch, answers, strict=True), start=1):
            self._settle(job, answer, info)
            if number % SLICE == 0:
                await asyncio.sleep(0)

    async def _swap_backends(self) -> None:
        """Go over to the newest weights once no batch is in the backend; one slot is the caller's."""
        for _ in range(self._num_slots - 1):
            await self._slots.acquire()
        while self._next_backend is not None:
            old, self._backend, self._next_backend = self._backend, self._next_backend, None
            version = self.info.teacher_version + 1
            self.info = replace(self._backend.describe(), teacher_version=version)
            self._failures.clear()
            metrics.TEACHER_VERSION.set(version)
            log.info("serving version %d, weights %s", version, self.info.weights_digest[:16])
            await self._in_backend(old.close)
        for _ in range(self._num_slots - 1):
            self._slots.release()

    def _keep(self, requests: list[ScoreRequest], answers: list[bytes | RequestError], info: TeacherInfo) -> None:
        if self._stored is None:
            return
        scored = [(one, answer) for one, answer in zip(requests, answers, strict=True) if isinstance(answer, bytes)]
        num_bytes = sum(len(payload) + request.sequence.token_ids.nbytes for request, payload in scored)
        if not self.disk.offer(num_bytes, self._stored.put, scored, info):
            metrics.TEACHER_CACHE_UNKEPT.inc(len(scored))

    async def _read(self, stored: StoredTargets, job: Job, client_id: str, priority: int) -> None:
        """Answer a job from the disk; queue it if the record is damaged or does not come soon."""
        info = self.info
        payload = await self.disk.ask(stored.get, job.request, info)
        if payload is not None or not job.waiters:
            self._settle(job, payload or b"", info)
            return
        job.running = False
        for future in job.waiters:
            job.waiters[future] = self._enqueue(job, client_id, priority)

    def _enqueue(self, job: Job, client_id: str, priority: int) -> Ticket[Job]:
        self._wake.set()
        return self._queue.push(job, client_id=client_id, cost=job.cost, priority=priority)

    def _settle(self, job: Job, answer: bytes | RequestError, info: TeacherInfo) -> None:
        """Answer everybody who waits for the job."""
        self._jobs.pop(job.key, None)
        if isinstance(answer, ScoringFailed) and answer.lasting:
            self._failures[_failure_key(job.request)] = answer
            if len(self._failures) > MAX_REMEMBERED_FAILURES:
                self._failures.popitem(last=False)
        for future in (one for one in job.waiters if not one.done()):
            if isinstance(answer, RequestError):
                future.set_exception(answer)
            else:
                future.set_result(Scored(answer, info.teacher_version, info.weights_digest))

    def _leave(self, job: Job, future: asyncio.Future[Scored]) -> None:
        """Forget a waiter; a job that nobody waits for any more is dropped unless it runs."""
        ticket = job.waiters.pop(future, None)
        if ticket is not None:
            self._queue.cancel(ticket)
        if not job.running and not job.waiters and self._jobs.get(job.key) is job:
            del self._jobs[job.key]


def _failure_key(request: ScoreRequest) -> object:
    """Return a key smaller than `key_of`, as it is kept."""
    return request.spec, request.draw_set, request.sequence.digest()
