"""Token batches in, (tokens, targets) out, in order: targets are asked for ahead of training and decoded beside it."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from accelerate.data_loader import DataLoaderDispatcher

from logitstream import metrics
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.batches import blank_out, place_rows, split_batch
from logitstream.data.documents import Batch
from logitstream.errors import LogitstreamError, TeacherUnavailable
from logitstream.training.target_cache import TargetCache
from logitstream.training.target_source import Part, StreamStats, TargetSource
from logitstream.types import SparseTargets

logger = logging.getLogger(__name__)

Mode = Literal["online", "cache", "cache_then_online"]

DECODED_BATCHES = 2
"""Batches decoded ahead of the caller. Those after them wait encoded, in about a tenth of the memory."""
MIN_REFUSED = 8
"""The stream ends once more sequences than this, and more than half of all, are refused or damaged."""


class TargetStream:
    """Wraps an iterable of batches; each comes back with `targets`, the SparseTargets of its flattened [B*T] rows.

    A batch is a dict with input_ids [B, T] and, optionally, what says which rows are wanted (`data.loss_mask`) and
    which tokens are one document's (`data.documents`): each document is scored alone, without padding. Unwanted rows,
    padding and the rows of refused sequences are empty. Each iteration is the next epoch, unless set_epoch says
    otherwise. Raises ValueError if a batch holds something that the teacher cannot be told.

    mode: `online` asks the teacher for everything and writes it to the cache, if there is one; `cache_then_online` asks
        it for what the cache does not hold; `cache` never asks it, and raises CacheMiss for what is not there.
    draw_set: None draws anew each epoch (draw set = epoch), a number uses the same draws in every epoch.
    prefetch_batches: batches asked for ahead of the caller.
    on_refused: `skip` takes a sequence that the teacher refuses, or whose record is damaged in mode `cache`, out of the
        loss and its tokens (id 0 then) out of the batch, logs and counts it; `raise` ends the stream with its error.
    """

    def __init__(
        self,
        dataloader: Iterable[Batch],
        client: TeacherClient | None,
        *,
        cache: TargetCache | None = None,
        mode: Mode = "online",
        prefetch_batches: int = 8,
        draw_set: int | None = None,
        on_refused: Literal["skip", "raise"] = "skip",
    ) -> None:
        if prefetch_batches < 1:
            raise ValueError(f"expected prefetch_batches >= 1, got {prefetch_batches}")
        if (client is None and mode != "cache") or (cache is None and mode != "online"):
            raise ValueError(f"mode {mode!r} needs {'a client' if client is None and mode != 'cache' else 'a cache'}")
        if isinstance(dataloader, DataLoaderDispatcher):
            raise ValueError("batches dispatched by one process cannot be prefetched: set `dispatch_batches: false`")
        if client is not None and cache is not None and client.spec.canonical() != cache.fingerprint.spec:
            raise ValueError(
                f"expected one way to draw targets, got the client: {client.spec.canonical()}, "
                f"the cache: {cache.fingerprint.spec}"
            )
        self.dataloader = dataloader
        self.client = client
        self.cache = cache
        self.mode = mode
        self.prefetch_batches = prefetch_batches
        self.draw_set = draw_set
        self.on_refused = on_refused
        self.epoch = 0
        self.stats = StreamStats()
        self._window: _Window | None = None

    def __len__(self) -> int:
        return len(self.dataloader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Look up in the wrapped dataloader what the stream itself does not have: dataset, batch_sampler, …"""
        if name.startswith("_") or name == "dataloader":
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    @property
    def queue_depth(self) -> int:
        """Batches whose targets have all arrived and that are not yet taken."""
        return self._window.num_arrived() if self._window else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataloader, "set_epoch"):
            self.dataloader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self.over(iter(self.dataloader))

    def over(self, batches: Iterator[Batch], *, first_step: int = 0) -> Iterator[Batch]:
        """Yield what is left of this epoch's batches, with targets; a resumed run has done first_step of them."""
        self.close()
        source = TargetSource(
            None if self.mode == "cache" else self.client,
            self.cache,
            look_up=self.mode != "online",
            draw_set=self.epoch if self.draw_set is None else self.draw_set,
            stats=self.stats,
        )
        self.epoch += 1
        window = self._window = _Window(source, self.stats, raise_refused=self.on_refused == "raise")
        try:
            yield from window.run(batches, ahead=self.prefetch_batches, first_step=first_step)
        finally:
            window.close()

    def close(self) -> None:
        """Cancel what is in flight and end the decoding thread; the next iteration starts anew."""
        if self._window is not None:
            self._window.close()
            self._window = None


@dataclass(slots=True, eq=False)
class _Asked:
    """A batch whose targets are asked for, and what becomes of it: the batch with its targets."""

    batch: Batch
    parts: list[Part]
    queued: bool = False
    num_rows: int = 0
    payload_bytes: int = 0
    decoded: Future[Batch] = field(default_factory=Future)


class _Window:
    """The batches of one epoch that are asked for and not yet taken, in order; one thread decodes the first of them.

    `close` may be called from any thread, the rest is the caller's.
    """

    def __init__(self, source: TargetSource, stats: StreamStats, *, raise_refused: bool) -> None:
        self._source = source
        self._stats = stats
        self._raise_refused = raise_refused
        self._asked: deque[_Asked] = deque()
        self._jobs: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._decode_all, name="target-stream-decode", daemon=True)

    def run(self, batches: Iterator[Batch], *, ahead: int, first_step: int) -> Iterator[Batch]:
        """Ask for so many batches ahead, in the caller's thread, as accelerate's dataloaders require."""
        self._thread.start()
        error: Exception | None = None
        steps: Iterator[int] | None = itertools.count(first_step)
        while not self._source.closed.is_set():
            started = time.perf_counter()
            while steps is not None and len(self._asked) <= ahead:
                try:
                    if not self._ask(next(batches, None), next(steps)):
                        steps = None
                except Exception as caught:  # raised after the batches before it
                    error, steps = caught, None
            if not self._asked:
                break
            batch = self._first()
            if batch is None:
                return
            if not self._asked and error is None:
                self._source.flush()  # before another worker begins the next epoch, which may read it all from disk
            waited = time.perf_counter() - started
            self._stats.waiting_seconds += waited
            metrics.STUDENT_WAITING_SECONDS.inc(waited)
            yield batch
        if error is not None and not self._source.closed.is_set():
            raise error

    def num_arrived(self) -> int:
        return sum(all(p.future is None or p.future.done() for p in asked.parts) for asked in list(self._asked))

    def close(self) -> None:
        """Cancel what is in flight and end the thread; idempotent."""
        self._source.closed.set()
        for asked in list(self._asked):
            for part in asked.parts:
                if (future := part.future) is not None:
                    future.cancel()
        self._jobs.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._asked.clear()
        metrics.STUDENT_QUEUE_BATCHES.set(0)
        self._source.flush()

    def _ask(self, batch: Batch | None, step: int) -> bool:
        """Ask for a batch's targets; false if there is no batch."""
        if batch is None:
            return False
        parts = [Part(rows, sequence, priority=step) for rows, sequence in split_batch(batch)]
        self._asked.append(_Asked(batch, parts))  # before they are asked for, so that `close` finds them
        try:
            self._source.ask(parts)
        except Exception:
            self._asked.pop()
            raise
        return True

    def _first(self) -> Batch | None:
        """Wait for the first batch of the window and take it; None once the stream is closed."""
        for asked in itertools.islice(self._asked, 1 + DECODED_BATCHES):
            if not asked.queued:
                asked.queued = True
                self._jobs.put(asked)
        if self._source.closed.is_set():  # what was queued after that is not decoded any more
            return None
        first = self._asked[0]
        try:
            batch = first.decoded.result()
        except CancelledError:
            if self._source.closed.is_set():
                return None
            raise TeacherUnavailable("the teacher client was closed") from None
        self._asked.popleft()
        metrics.STUDENT_QUEUE_BATCHES.set(self.num_arrived())
        self._stats.batches += 1
        self._stats.rows += first.num_rows
        self._stats.entries += batch["targets"].num_entries
        self._stats.payload_bytes += first.payload_bytes
        metrics.STUDENT_ENTRIES.inc(batch["targets"].num_entries)
        return batch

    def _decode_all(self) -> None:
        while (asked := self._jobs.get()) is not None:
            try:
                asked.decoded.set_result(self._decode(asked))
            except BaseException as error:
                asked.decoded.set_exception(error)
            del asked  # a batch is not kept while the thread waits for the next one

    def _decode(self, asked: _Asked) -> Batch:
        """Wait for a batch's targets and place them; refused and damaged sequences are left out of the loss."""
        bytes_before = self._source.payload_bytes
        placed, refused = [], []
        for part, found in zip(asked.parts, self._source.fetch(asked.parts), strict=True):
            self._stats.sequences += 1
            if isinstance(found, SparseTargets):
                placed.append((part.rows, found))
                asked.num_rows += found.num_rows
            else:
                self._count_refused(part, found)
                refused.append(part.rows)
        asked.payload_bytes = self._source.payload_bytes - bytes_before
        batch = dict(asked.batch)
        num_rows = int(np.prod(tuple(batch["input_ids"].shape)))
        source = self._source
        batch["targets"] = place_rows(placed, num_rows=num_rows, vocab_size=source.vocab_size, spec=source.spec)
        if refused:
            blank_out(batch, np.concatenate(refused))
        return batch

    def _count_refused(self, part: Part, error: LogitstreamError) -> None:
        """Raise if refusals are errors, or if so many mean that something is wrong with the run."""
        stats = self._stats
        stats.refused_sequences += 1
        if self._raise_refused:
            raise error
        logger.warning("a sequence of %d tokens is left out of the loss: %s", len(part.sequence), error)
        if stats.refused_sequences > MIN_REFUSED and 2 * stats.refused_sequences > stats.sequences:
            raise LogitstreamError(
                f"{stats.refused_sequences} of {stats.sequences} sequences are refused or damaged; the last: {error}"
            ) from error
