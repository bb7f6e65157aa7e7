"""Token batches in, (tokens, targets) out, in order: targets are asked for ahead of training and decoded beside it."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate.data_loader import DataLoaderDispatcher

from logitstream import metrics
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.documents import Batch
from logitstream.errors import TeacherUnavailable
from logitstream.training.target_cache import TargetCache
from logitstream.training.target_source import Part, StreamStats, TargetSource

Mode = Literal["online", "cache", "cache_then_online"]

DECODED_BATCHES = 2
"""Batches decoded ahead of the caller. Those after them wait encoded, in about a tenth of the memory."""


class TargetStream:
    """Wraps an iterable of batches; each comes back with `targets`, the SparseTargets of its flattened [B*T] rows.

    A batch is a dict with input_ids [B, T] and, optionally, what says which rows are wanted (`data.loss_mask`) and
    which tokens are one document's (`data.documents`): each document is scored alone, without padding. Unwanted rows,
    padding and the rows of refused sequences are empty. Each iteration is the next epoch, unless set_epoch says
    otherwise. Raises ValueError if a batch holds something that the teacher cannot be told.

    mode: `online` asks the teacher for everything and writes it to the cache, if there is one; `cache_then_online` asks
        it for what the cache does not hold; `cache` never asks it, and raises CacheMiss for what is not there.
    draw_set: None draws anew each epoch (draw set = epoch), a number uses the same draws in every epoch, several
        numbers these in turn.
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
        draw_set: int | Sequence[int] | None = None,
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
        self.draw_sets = (draw_set,) if isinstance(draw_set, int) else tuple(draw_set or ())
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
            draw_set=self.draw_sets[self.epoch % len(self.draw_sets)] if self.draw_sets else self.epoch,
            raise_refused=self.on_refused == "raise",
            stats=self.stats,
        )
        self.epoch += 1
        window = self._window = _Window(source, self.stats)
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
    """A batch whose targets are asked for; `decoded` gives the batch with them."""

    batch: Batch
    parts: list[Part]
    is_queued: bool = False
    decoded: Future[Batch] = field(default_factory=Future)


class _Window:
    """The batches of one epoch that are asked for and not yet taken, in order; one thread decodes the first of them.

    `close` may be called from any thread, the rest is the caller's.
    """

    def __init__(self, source: TargetSource, stats: StreamStats) -> None:
        self._source, self._stats = source, stats
        self._asked: deque[_Asked] = deque()
        self._jobs: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._decode_all, name="target-stream-decode", daemon=True)

    def run(self, batches: Iterator[Batch], *, ahead: int, first_step: int) -> Iterator[Batch]:
        """Ask for so many batches ahead, in the caller's thread, as accelerate's dataloaders require."""
        self._thread.start()
        failure: Exception | None = None
        left, is_over = enumerate(batches, start=first_step), False
        while not self._source.closed.is_set():
            started = time.perf_counter()
            while not is_over and len(self._asked) <= ahead:
                try:
                    is_over = not self._ask_next(left)
                except Exception as error:  # raised after the batches before it
                    failure, is_over = error, True
            if not self._asked:
                break
            batch = self._take()
            if batch is None:
                return
            if not self._asked and failure is None:
                self._source.flush()  # before another worker begins the next epoch, which may read it all from disk
            waited = time.perf_counter() - started
            self._stats.waiting_seconds += waited
            metrics.STUDENT_WAITING_SECONDS.inc(waited)
            yield batch
        if failure is not None and not self._source.closed.is_set():
            raise failure

    def num_arrived(self) -> int:
        return sum(all(p.future is None or p.future.done() for p in asked.parts) for asked in list(self._asked))

    def close(self) -> None:
        """Cancel what is in flight and end the thread; idempotent."""
        self._source.closed.set()
        for part in (part for asked in list(self._asked) for part in asked.parts):
            if (future := part.future) is not None:
                future.cancel()
        self._jobs.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._asked.clear()
        metrics.STUDENT_QUEUE_BATCHES.set(0)
        self._source.flush()

    def _ask_next(self, batches: Iterator[tuple[int, Batch]]) -> bool:
        """Ask for the next batch's targets; false if there is no batch."""
        for step, batch in batches:
            parts = self._source.split(batch, priority=step)
            self._asked.append(_Asked(batch, parts))  # before they are asked for, so that `close` finds them
            try:
                self._source.ask(parts)
            except Exception:
                self._asked.pop()
                raise
            return True
        return False

    def _take(self) -> Batch | None:
        """Wait for the first batch of the window and take it; None once the stream is closed."""
        for asked in itertools.islice(self._asked, 1 + DECODED_BATCHES):
            if not asked.is_queued:
                asked.is_queued = True
                self._jobs.put(asked)
        if self._source.closed.is_set():  # what was queued after that is not decoded any more
            return None
        try:
            batch = self._asked[0].decoded.result()
        except CancelledError:
            if self._source.closed.is_set():
                return None
            raise TeacherUnavailable("the teacher client was closed") from None
        taken = self._asked.popleft()
        metrics.STUDENT_QUEUE_BATCHES.set(self.num_arrived())
        self._stats.batches += 1
        for part in taken.parts:
            self._stats.rows += len(part.rows) if part.payload_bytes else 0
            self._stats.payload_bytes += part.payload_bytes
        self._stats.entries += batch["targets"].num_entries
        metrics.STUDENT_ENTRIES.inc(batch["targets"].num_entries)
        return batch

    def _decode_all(self) -> None:
        while (asked := self._jobs.get()) is not None:
            try:
                asked.decoded.set_result(self._source.add_targets(asked.batch, asked.parts))
            except BaseException as error:
                asked.decoded.set_exception(error)
            del asked  # a batch is not kept while the thread waits for the next one
