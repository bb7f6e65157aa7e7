"""One pass over an epoch's batches: asked for ahead, received, spilled, decoded in order, and handed out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np

from logitstream import codec, metrics
from logitstream.errors import (
    CacheMiss,
    FingerprintMismatch,
    LogitstreamError,
    RequestError,
    StaleTeacher,
    TeacherUnavailable,
)
from logitstream.id_model import IdModel
from logitstream.types import ReceivedTargets, SparseTargets, TokenSequence
from student_worker.batches import Batch, Rows, leave_out, place_rows, split_batch
from student_worker.target_cache import TargetCache
from student_worker.teacher_client import TeacherClient

logger = logging.getLogger(__name__)

STALE_TRIES = 3
"""How often targets that grew stale while they waited are asked for again."""
MIN_REFUSED = 8
"""Refusals from which on the stream ends if more than half of all sequences were refused."""


@dataclass(slots=True)
class StreamStats:
    """Totals over all epochs of a stream; times in seconds, bytes as encoded."""

    waiting_seconds: float = 0.0
    decoding_seconds: float = 0.0
    batches: int = 0
    sequences: int = 0
    cached_sequences: int = 0
    spilled_sequences: int = 0
    refused_sequences: int = 0
    rows: int = 0
    entries: int = 0
    payload_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Slot:
    """One sequence of a batch; `future` is None where its targets lie on disk."""

    rows: Rows
    sequence: TokenSequence
    batch_number: int
    future: Future[ReceivedTargets] | None = None


@dataclass(slots=True, eq=False)
class _Pending:
    """A batch that is not decoded yet; `asked` once each slot has its future or lies on disk."""

    batch: Batch
    slots: list[_Slot] = field(default_factory=list)
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where targets come from. look_up: the cache is asked before the teacher."""

    client: TeacherClient | None
    cache: TargetCache | None
    look_up: bool
    draw_set: int
    prefetch_batches: int
    spill_batches: int
    raise_refused: bool


class Prefetch:
    """Threads ask ahead, write through and decode; the caller's takes batches in order. All share one condition.

    Batches up to prefetch_batches ahead of the caller are held in memory; of the spill_batches after them the tokens
    are, while their targets go to the cache on disk as they come in.
    """

    def __init__(self, source: Source, batches: Iterator[Batch], stats: StreamStats, *, first_step: int = 0) -> None:
        self.ready: deque[Batch] = deque()
        self._source = source
        self._batches = batches
        self._stats = stats
        self._step = first_step
        self._asked = self._taken = 0
        self._pending: deque[_Pending] = deque()
        self._received: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._exhausted = self._finished = False
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._id_model: IdModel | None = None
        self._vocab_size = 0

    def consume(self) -> Iterator[Batch]:
        """The first batch is drawn in the caller's thread: there an accelerate dataloader synchronises its workers."""
        self._prepare()
        if not self._ask_next():
            return
        works = [self._ask_ahead, self._decode_all]
        if self._source.cache is not None and self._source.cache.writable:
            works.append(self._write_through)
        for work in works:
            thread = threading.Thread(target=self._guard, args=(work,), name=f"target-stream{work.__name__}")
            thread.daemon = True
            self._threads.append(thread)
            thread.start()
        while (batch := self._take()) is not None:
            yield batch

    def close(self) -> None:
        """Cancel what is in flight and end the threads."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
            slots = [slot for pending in self._pending for slot in pending.slots]
        self._received.put(None)
        for slot in slots:
            if slot.future is not None:
                slot.future.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._pending.clear()
        self.ready.clear()
        metrics.STUDENT_QUEUE_BATCHES.set(0)
        if self._source.cache is not None:
            self._source.cache.refresh()

    def _prepare(self) -> None:
        """Learn how to decode: from the cache where it may do without the teacher."""
        source = self._source
        if source.cache is not None:
            source.cache.refresh()
        if source.cache is not None and source.look_up:
            id_model, self._vocab_size = source.cache.id_model, source.cache.fingerprint.vocab_size
        else:
            assert source.client is not None
            info = source.client.info
            id_model, self._vocab_size = info.id_model, info.vocab_size
        self._id_model = IdModel.from_bytes(id_model) if id_model else None

    def _take(self) -> Batch | None:
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._finished or self._error or self._closed.is_set())
            if self.ready:
                batch = self.ready.popleft()
                self._taken += 1
                self._changed.notify_all()
            elif self._error is not None:
                raise self._error
            else:
                return None
            metrics.STUDENT_QUEUE_BATCHES.set(len(self.ready))
        waited = time.perf_counter() - started
        self._stats.waiting_seconds += waited
        self._stats.batches += 1
        metrics.STUDENT_WAITING_SECONDS.inc(waited)
        return batch

    def _guard(self, work: Callable[[], None]) -> None:
        """An error in a thread is raised where the batches are taken, after those that came before it."""
        try:
            work()
        except CancelledError:
            self._fail(TeacherUnavailable("the teacher client was closed"))
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    # Asking

    def _ask_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked - self._taken < self._ahead() or self._closed.is_set())
                if self._closed.is_set():
                    return
            if not self._ask_next():
                return

    def _ahead(self) -> int:
        """How many batches may be asked for and not taken yet; without a disk to spill to, what memory may hold."""
        source = self._source
        spills = source.cache is not None and source.cache.writable
        return source.prefetch_batches + (source.spill_batches if spills else 0)

    def _ask_next(self) -> bool:
        """Take the next batch and ask for its targets; whether there was one."""
        batch = next(self._batches, None)
        if batch is None:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()
            return False
        pending = _Pending(batch)
        pending.slots = [_Slot(rows, sequence, self._asked) for rows, sequence in split_batch(batch)]
        with self._changed:
            self._pending.append(pending)
            self._asked += 1
        for slot in pending.slots:
            if self._closed.is_set():
                return False
            self._locate(slot)
        self._step += 1
        with self._changed:
            pending.asked = True
            self._changed.notify_all()
        return True

    def _locate(self, slot: _Slot) -> None:
        """Leave the slot to the disk where the cache holds it, else ask the teacher."""
        source = self._source
        if source.look_up and source.cache is not None:
            if source.cache.holds(slot.sequence, source.draw_set):
                return
            metrics.CACHE_MISSES.inc()
        self._submit(slot)

    def _submit(self, slot: _Slot) -> Future[ReceivedTargets]:
        source = self._source
        if source.client is None:
            raise CacheMiss(
                f"the cache holds no undamaged targets of a sequence of {len(slot.sequence)} tokens for draw set "
                f"{source.draw_set}, and `targets: cache` asks no teacher"
            )
        future = source.client.submit(slot.sequence, draw_set=source.draw_set, priority=self._step)
        slot.future = future
        if self._closed.is_set():
            future.cancel()
        if source.cache is not None:
            future.add_done_callback(lambda _: self._received.put(slot))
        return future

    # Writing

    def _write_through(self) -> None:
        """Keep what the teacher sends; beyond the prefetch window the copy on disk is the only one."""
        source = self._source
        assert source.cache is not None
        while (slot := self._received.get()) is not None:
            future = slot.future
            if future is None or future.cancelled() or future.exception() is not None:
                continue
            kept = source.cache.put(slot.sequence, source.draw_set, future.result())
            if kept and slot.batch_number >= self._taken + source.prefetch_batches:
                slot.future = None
                self._stats.spilled_sequences += 1

    # Decoding

    def _decode_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_decode)
                if self._closed.is_set() or not self._pending:
                    self._finished = True
                    self._changed.notify_all()
                    return
                pending = self._pending[0]
            batch = self._complete(pending)
            with self._changed:
                if self._closed.is_set():
                    return
                self._pending.popleft()
                self.ready.append(batch)
                metrics.STUDENT_QUEUE_BATCHES.set(len(self.ready))
                self._changed.notify_all()

    def _may_decode(self) -> bool:
        if self._closed.is_set() or (self._exhausted and not self._pending):
            return True
        window = len(self.ready) < self._source.prefetch_batches
        return window and bool(self._pending) and self._pending[0].asked

    def _complete(self, pending: _Pending) -> Batch:
        """Wait for a batch's targets and decode them; refused sequences are left out of the loss."""
        parts: list[tuple[Rows, SparseTargets]] = []
        refused: list[Rows] = []
        for slot in pending.slots:
            self._stats.sequences += 1
            try:
                received = self._fetch(slot)
            except RequestError as error:
                self._count_refused(slot, error)
                refused.append(slot.rows)
                continue
            started = time.perf_counter()
            parts.append((slot.rows, codec.decode(received.payload, id_model=self._id_model)))
            self._count_decoding(started)
            self._stats.payload_bytes += len(received.payload)
            self._stats.cached_sequences += received.from_cache
        started = time.perf_counter()
        batch = dict(pending.batch)
        num_rows = int(np.prod(tuple(batch["input_ids"].shape)))
        batch["targets"] = place_rows(parts, num_rows=num_rows, vocab_size=self._vocab_size)
        if refused:
            leave_out(batch, np.concatenate(refused))
        self._count_decoding(started)
        self._count_rows(parts, batch["targets"])
        return batch

    def _fetch(self, slot: _Slot) -> ReceivedTargets:
        """A slot's targets from disk, or from the teacher where the disk fails; no staler than the client allows."""
        source = self._source
        future = slot.future
        if future is None and source.cache is not None:
            if (stored := source.cache.get(slot.sequence, source.draw_set)) is not None:
                return stored
            logger.warning("a record on disk is damaged or gone; its targets are asked for again")
        received = (future or self._submit(slot)).result()
        for _ in range(STALE_TRIES):
            if source.client is None or not source.client.is_stale(received):
                break
            metrics.STUDENT_RETRIES.labels(reason=StaleTeacher.__name__).inc()
            received = self._submit(slot).result()
        self._check_cache(slot, received)
        return received

    def _check_cache(self, slot: _Slot, received: ReceivedTargets) -> None:
        """An epoch that is read from the cache in part must not come from another teacher in the other part."""
        cache = self._source.cache
        if (
            self._source.look_up
            and cache is not None
            and received.key != cache.key(slot.sequence, self._source.draw_set)
        ):
            raise FingerprintMismatch(
                f"the teacher's weights {received.weights_digest.hex()}… are not those of the cache: "
                f"{cache.fingerprint.weights_digest[:16]}…, or its spec, tokenizer or dtype differ"
            )

    def _count_refused(self, slot: _Slot, error: RequestError) -> None:
        stats = self._stats
        stats.refused_sequences += 1
        if self._source.raise_refused:
            raise error
        logger.warning("a sequence of %d tokens is left out of the loss: %s", len(slot.sequence), error)
        if stats.refused_sequences > MIN_REFUSED and 2 * stats.refused_sequences > stats.sequences:
            raise LogitstreamError(
                f"{stats.refused_sequences} of {stats.sequences} sequences were refused; the last: {error}"
            ) from error

    def _count_decoding(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self._stats.decoding_seconds += seconds
        metrics.STUDENT_DECODING_SECONDS.inc(seconds)

    def _count_rows(self, parts: list[tuple[Rows, SparseTargets]], targets: SparseTargets) -> None:
        num_rows = sum(part.num_rows for _, part in parts)
        self._stats.rows += num_rows
        self._stats.entries += targets.num_entries
        metrics.STUDENT_ROWS.inc(num_rows)
        metrics.STUDENT_ENTRIES.inc(targets.num_entries)
