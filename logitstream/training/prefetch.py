"""One pass over an epoch's batches: asked for ahead, written through, spilled, decoded in order, and handed out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import numpy as np

from logitstream import metrics
from logitstream.data.batches import Rows, blank_out, place_rows, split_batch
from logitstream.data.documents import Batch
from logitstream.errors import CorruptRecord, LogitstreamError, RequestError, TeacherUnavailable
from logitstream.training.target_source import Slot, StreamStats, TargetSource
from logitstream.types import SparseTargets

logger = logging.getLogger(__name__)

MIN_REFUSED = 8
"""Refused or damaged sequences from which on the stream ends if they are more than half of all."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A batch that is not decoded yet; `asked` once each of its slots has its future or lies on disk."""

    batch: Batch
    slots: list[Slot] = field(default_factory=list)
    asked: bool = False


@dataclass(slots=True, eq=False)
class _Ready:
    """A batch with its targets, and how many rows and encoded bytes these came in."""

    batch: Batch
    num_rows: int
    payload_bytes: int


class Prefetch:
    """Threads ask ahead, write through and decode; the caller's takes batches in order. All share one condition.

    Batches up to prefetch_batches ahead of the caller are held in memory; of the spill_batches after them the tokens
    are, while their targets go to the cache on disk as they come in.
    """

    def __init__(
        self,
        source: TargetSource,
        batches: Iterator[Batch],
        stats: StreamStats,
        *,
        prefetch_batches: int,
        spill_batches: int = 0,
        raise_refused: bool = False,
        first_step: int = 0,
    ) -> None:
        self.ready: deque[_Ready] = deque()
        self._source = source
        self._batches = batches
        self._stats = stats
        self._prefetch_batches = prefetch_batches
        self._spill_batches = spill_batches
        self._raise_refused = raise_refused
        self._first_step = first_step
        self._asked = self._taken = 0
        self._pending: deque[_Pending] = deque()
        self._received: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._exhausted = self._finished = self._writes = False
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._asking_error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def consume(self) -> Iterator[Batch]:
        """The first batch is drawn in the caller's thread: there an accelerate dataloader synchronises its workers."""
        self._source.prepare()
        self._writes = self._source.writable
        if not self._ask_next():
            return
        works = [self._ask_ahead, self._decode_all]
        if self._writes:
            works.append(self._write_through)
        for work in works:
            name = f"target-stream{work.__name__}"
            thread = threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            with self._changed:  # `close` joins what was started, and nothing starts after it
                if self._closed.is_set():
                    return
                thread.start()
                self._threads.append(thread)
        while (batch := self._take()) is not None:
            yield batch

    def close(self) -> None:
        """Cancel what is in flight and end the threads; idempotent."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        self._received.put(None)
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        while any(thread.is_alive() for thread in others):
            self._cancel_pending()  # again and again: a request may just be on its way to its slot
            for thread in others:
                thread.join(0.05)
        self._cancel_pending()
        self._pending.clear()
        self.ready.clear()
        metrics.STUDENT_QUEUE_BATCHES.set(0)
        self._source.flush()

    def _cancel_pending(self) -> None:
        with self._changed:
            slots = [slot for pending in self._pending for slot in pending.slots]
        for slot in slots:
            if slot.future is not None:
                slot.future.cancel()

    def _take(self) -> Batch | None:
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._finished or self._error or self._closed.is_set())
            if self.ready:
                ready = self.ready.popleft()
                self._taken += 1
                self._changed.notify_all()
            elif self._error is not None and not self._closed.is_set():
                raise self._error
            else:
                return None
            metrics.STUDENT_QUEUE_BATCHES.set(len(self.ready))
            is_last = self._exhausted and not self._pending and not self.ready
        if is_last:  # before any worker can begin the next epoch, which may find it all in the cache
            self._source.flush()
        waited = time.perf_counter() - started
        self._stats.waiting_seconds += waited
        self._count(ready)
        metrics.STUDENT_WAITING_SECONDS.inc(waited)
        return ready.batch

    def _count(self, ready: _Ready) -> None:
        """Count a batch when it is taken, not when it is decoded ahead: so rows and bytes belong to the same step."""
        num_entries = ready.batch["targets"].num_entries
        self._stats.batches += 1
        self._stats.rows += ready.num_rows
        self._stats.entries += num_entries
        self._stats.payload_bytes += ready.payload_bytes
        metrics.STUDENT_ENTRIES.inc(num_entries)

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

    def _ask_ahead(self) -> None:
        """An error here is the decoding thread's once it has come to the batch in question."""
        try:
            while self._may_ask() and self._ask_next():
                pass
        except BaseException as error:
            with self._changed:
                if self._pending and not self._pending[-1].asked:
                    self._pending.pop()
                self._exhausted, self._asking_error = True, error
                self._changed.notify_all()

    def _may_ask(self) -> bool:
        """Wait for room; false once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked - self._taken < self._ahead() or self._closed.is_set())
            return not self._closed.is_set()

    def _ahead(self) -> int:
        """How many batches may be asked for and not taken yet; without a disk to spill to, what memory may hold."""
        return self._prefetch_batches + (self._spill_batches if self._source.writable else 0)

    def _ask_next(self) -> bool:
        """Take the next batch and ask for its targets; whether there was one."""
        batch = next(self._batches, None)
        if batch is None:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()
            return False
        number, priority = self._asked, self._first_step + self._asked
        slots = [Slot(rows, sequence, number, priority) for rows, sequence in split_batch(batch)]
        pending = _Pending(batch, slots)
        with self._changed:
            self._pending.append(pending)
            self._asked += 1
        for slot in pending.slots:
            if self._closed.is_set():
                return False
            self._source.locate(slot, self._received.put if self._writes else None)
        with self._changed:
            pending.asked = True
            self._changed.notify_all()
        return True

    def _write_through(self) -> None:
        """Keep what the teacher sends; beyond the prefetch window the copy on disk is the only one."""
        while (slot := self._received.get()) is not None:
            kept = self._source.keep(slot)
            if kept and slot.batch_number >= self._taken + self._prefetch_batches:
                slot.future = None
                self._stats.spilled_sequences += 1

    def _decode_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_decode)
                if self._closed.is_set() or not self._pending:
                    self._finished = self._asking_error is None
                    self._changed.notify_all()
                    break
                pending = self._pending[0]
            ready = self._complete(pending)
            with self._changed:
                self._pending.popleft()
                self.ready.append(ready)
                metrics.STUDENT_QUEUE_BATCHES.set(len(self.ready))
                self._changed.notify_all()
        if self._asking_error is not None:
            raise self._asking_error

    def _may_decode(self) -> bool:
        if self._closed.is_set() or (self._exhausted and not self._pending):
            return True
        has_room = len(self.ready) < self._prefetch_batches
        return has_room and bool(self._pending) and self._pending[0].asked

    def _complete(self, pending: _Pending) -> _Ready:
        """Wait for a batch's targets; refused sequences and damaged records are left out of the loss."""
        bytes_before = self._source.payload_bytes
        parts: list[tuple[Rows, SparseTargets]] = []
        refused: list[Rows] = []
        for slot in pending.slots:
            self._stats.sequences += 1
            try:
                parts.append((slot.rows, self._source.fetch(slot)))
            except (RequestError, CorruptRecord) as error:
                self._count_refused(slot, error)
                refused.append(slot.rows)
        batch = dict(pending.batch)
        num_rows = int(np.prod(tuple(batch["input_ids"].shape)))
        batch["targets"] = place_rows(
            parts, num_rows=num_rows, vocab_size=self._source.vocab_size, spec=self._source.spec
        )
        if refused:
            blank_out(batch, np.concatenate(refused))
        return _Ready(
            batch=batch,
            num_rows=sum(part.num_rows for _, part in parts),
            payload_bytes=self._source.payload_bytes - bytes_before,
        )

    def _count_refused(self, slot: Slot, error: RequestError | CorruptRecord) -> None:
        """Raises where refusals are errors, or where so many mean that something is wrong with the run."""
        stats = self._stats
        stats.refused_sequences += 1
        if self._raise_refused:
            raise error
        logger.warning("a sequence of %d tokens is left out of the loss: %s", len(slot.sequence), error)
        if stats.refused_sequences > MIN_REFUSED and 2 * stats.refused_sequences > stats.sequences:
            raise LogitstreamError(
                f"{stats.refused_sequences} of {stats.sequences} sequences are refused or damaged; the last: {error}"
            ) from error
