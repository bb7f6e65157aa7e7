"""Batches across all clients: formed in fair order, scored in the backend's threads, encoded beside the next forward.

Everything but scoring and encoding happens on the event loop, so there are no locks. What waits is bounded by what
clients may hold (`admission.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from logitstream import metrics
from logitstream.errors import RequestError, ServerDraining
from logitstream.types import TargetSpec, TeacherInfo, credit_tokens
from teacher_server.backend import ScoreRequest, TeacherBackend
from teacher_server.encoding import Encode, encode_all
from teacher_server.fair_queue import FairQueue
from teacher_server.retries import BROKE_DOWN, BackendBroken, BatchScorer
from teacher_server.stored_targets import StoredTargets

NUM_ENCODERS = 2
"""Batches that are encoded at a time; the forward waits for more, so that memory stays bounded."""
SLICE = 64
"""Sequences handled before others have their turn on the event loop."""
CLOSE_SECONDS = 5.0
"""How long the running batch may take once nobody waits for it."""

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
    """One request that waits, in the name of the client who made it first, or is being answered."""

    key: Key
    request: ScoreRequest
    client_id: str
    priority: int
    cost: int
    arrived: float = field(default_factory=time.monotonic)
    waiters: set[asyncio.Future[Scored]] = field(default_factory=set)
    reading: asyncio.Task[None] | None = None


class Scheduler:
    """Takes requests, forms batches, runs the backend; `run` must be a task while requests are to be served.

    More attributes than other classes, because queue, backend, encoders and the server's cache meet here.
    """

    def __init__(
        self, backend: TeacherBackend, encode: Encode, *, max_batch_tokens: int, stored: StoredTargets | None = None
    ) -> None:
        self.info = backend.describe()
        self.is_draining = False  # set to refuse new requests; what was taken is still scored
        self.is_stuck = False  # after `close`: a batch or the disk is still busy and cannot be stopped
        self.stored = stored
        self.backend = backend
        self._encode = encode
        self._queue = queue = FairQueue[Job]()
        self._jobs = jobs = dict[Key, Job]()
        self._wake = asyncio.Event()
        self._num_slots: int = getattr(backend, "batches_at_once", 1)
        self._slots = asyncio.Semaphore(self._num_slots)
        self._replacing = asyncio.Lock()
        self._encoding = asyncio.Semaphore(NUM_ENCODERS)
        self._scorer = BatchScorer(max_batch_tokens, batches_at_once=self._num_slots)
        self._backend_threads = ThreadPoolExecutor(self._num_slots, thread_name_prefix="backend")
        self._encoders = ThreadPoolExecutor(NUM_ENCODERS, thread_name_prefix="encoder")
        metrics.TEACHER_QUEUE_TOKENS.set_function(lambda: queue.cost)
        metrics.TEACHER_QUEUE_AGE.set_function(
            lambda: next((time.monotonic() - job.arrived for job in list(jobs.values())), 0.0)
        )

    @property
    def num_unfinished(self) -> int:
        return len(self._jobs)

    def submit(self, request: ScoreRequest, *, client_id: str, priority: int = 0) -> asyncio.Future[Scored]:
        """Return the request's future; cancelling it takes the request back. Raises ServerDraining."""
        if self.is_draining:
            raise ServerDraining("the server is draining: ask another replica")
        key = key_of(request)
        job = self._jobs.get(key)
        if job is not None:
            metrics.TEACHER_SHARED.inc()
        else:
            cost = credit_tokens(request.sequence, request.spec, self.info.vocab_size)
            job = self._jobs[key] = Job(key, request, client_id, priority, cost)
            if self.stored is not None and self.stored.holds(request, self.info):
                job.reading = asyncio.create_task(self._read(self.stored, job))
            else:
                self._enqueue(job)
        future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        job.waiters.add(future)
        future.add_done_callback(lambda done: self._leave(job, done))
        return future

    async def replace_backend(self, backend: TeacherBackend) -> None:
        """Serve other weights from the next batch on, once the running ones are done.

        Raises ValueError if clients could not tell, as the vocabulary or the dtype differs.
        """
        info = backend.describe()
        for name in ("vocab_size", "tokenizer_digest", "dtype"):
            if (new := getattr(info, name)) != (old := getattr(self.info, name)):
                raise ValueError(f"{name} of the new weights is {new}, expected {old}")
        async with self._replacing:
            for _ in range(self._num_slots):
                await self._slots.acquire()
            replaced, self.backend = self.backend, backend
            self.info = replace(info, teacher_version=self.info.teacher_version + 1)
            metrics.TEACHER_VERSION.set(self.info.teacher_version)
            log.info("serving version %d, weights %s", self.info.teacher_version, info.weights_digest[:16])
            try:
                await asyncio.get_running_loop().run_in_executor(self._backend_threads, replaced.close)
            finally:
                for _ in range(self._num_slots):
                    self._slots.release()

    async def open_stored(self, spec: TargetSpec) -> None:
        """Find what is stored for a spec before its first request, if the disk answers soon."""
        if self.stored is not None:
            await self.stored.ask(self.stored.folder.open, spec, self.info)

    async def run(self) -> None:
        """Score until cancelled; raises BackendBroken."""
        try:
            async with asyncio.TaskGroup() as batches:
                while True:
                    await self._wake.wait()
                    await self._slots.acquire()
                    if self._replacing.locked():  # the new weights come before the next batch
                        self._slots.release()
                        async with self._replacing:
                            continue
                    if batch := self._next_batch():  # formed late: what is urgent now goes first
                        batches.create_task(self._process(batch))
                    else:
                        self._wake.clear()
                        self._slots.release()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def close(self) -> None:
        """Free the backend once the running batch is done, or give up on it; what still waits is cancelled."""
        self.is_draining = self._scorer.is_stopped = True
        for job in self._jobs.values():
            for future in job.waiters:
                future.cancel()

        def free_backend() -> None:
            self._backend_threads.shutdown(cancel_futures=True)  # waits for the running batch
            self.backend.close()

        closing = [asyncio.get_running_loop().run_in_executor(self._encoders, free_backend)]
        if self.stored is not None:
            closing.append(self.stored.close())
        _, pending = await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        self.is_stuck = bool(pending)
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def _next_batch(self) -> list[Job]:
        """Take jobs in fair order up to the token budget, at least one if any waits."""
        batch: list[Job] = []
        job, num_tokens = self._queue.pop(), 0
        while job is not None:
            batch.append(job)
            num_tokens += job.cost
            job = self._queue.pop(max_cost=self._scorer.batch_tokens - num_tokens)
        if batch:
            metrics.TEACHER_BATCH_FILL.observe(num_tokens / self._scorer.max_batch_tokens)
        return batch

    async def _process(self, batch: list[Job]) -> None:
        """Score and encode a batch, offer it to the server's cache, and answer everybody who waits for it."""
        info, requests, loop = self.info, [job.request for job in batch], asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._backend_threads, self._scorer.score, self.backend, requests)
            await self._encoding.acquire()
        except BackendBroken:
            for job in batch:
                self._settle(job, ServerDraining(BROKE_DOWN), info)
            raise
        finally:
            self._slots.release()
        try:
            specs = [request.spec for request in requests]
            answers = await loop.run_in_executor(self._encoders, encode_all, self._encode, results, specs)
        finally:
            self._encoding.release()
        if self.stored is not None:
            scored = [(one, answer) for one, answer in zip(requests, answers, strict=True) if isinstance(answer, bytes)]
            self.stored.keep(scored, info)
        for number, (job, answer) in enumerate(zip(batch, answers, strict=True), start=1):
            self._settle(job, answer, info)
            if number % SLICE == 0:
                await asyncio.sleep(0)

    async def _read(self, stored: StoredTargets, job: Job) -> None:
        """Answer a job from the disk; queue it if the record is damaged or does not come soon."""
        info = self.info
        payload = await stored.ask(stored.folder.get, job.request, info)
        if payload is not None or not job.waiters:
            self._settle(job, payload or b"", info)
        else:
            self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        self._queue.push(job)
        self._wake.set()

    def _settle(self, job: Job, answer: bytes | RequestError, info: TeacherInfo) -> None:
        """Answer everybody who waits for the job."""
        self._jobs.pop(job.key, None)
        for future in job.waiters:
            if future.done():
                continue
            if isinstance(answer, RequestError):
                future.set_exception(answer)
            else:
                future.set_result(Scored(answer, info.teacher_version, info.weights_digest))

    def _leave(self, job: Job, future: asyncio.Future[Scored]) -> None:
        """Forget a waiter, and with the last one a job that still waits."""
        job.waiters.discard(future)
        if not job.waiters and self._queue.cancel(job):
            self._jobs.pop(job.key, None)
