"""Token batches in, (tokens, targets) out, in order: targets are asked for ahead of training and decoded beside it."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Literal

from accelerate.data_loader import DataLoaderDispatcher

from logitstream import metrics
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.documents import Batch
from logitstream.errors import TeacherUnavailable
from logitstream.training.target_cache import TargetCache
from logitstream.training.target_source import Asked, StreamStats, TargetSource
from logitstream.types import SparseTargets

Mode = Literal["online", "cache", "cache_then_online"]

DECODED_BATCHES = 2
"""Batches decoded ahead of the caller. Those after them wait encoded, in about a tenth of the memory."""


class TargetStream:
    """Wraps an iterable of batches; each comes back with `targets`, the SparseTargets of its flattened [B*T] rows.

    A batch is a dict with input_ids [B, T] and, optionally, what says which rows are wanted (`data.loss_mask`) and
    which tokens are one document's (`data.documents`): each document is scored alone, without padding. Unwanted rows,
    padding and the rows of refused sequences are empty. A sequence that the teacher refuses, or whose record is damaged
    in mode `cache`, is taken out of the loss and its tokens (id 0 then) out of the batch, logged and counted. Each
    iteration is the next epoch, unless set_epoch says otherwise. Raises ValueError if a batch holds something that the
    teacher cannot be told.

    mode: `online` asks the teacher for everything and writes it to the cache, if there is one; `cache_then_online` asks
        it for what the cache does not hold; `cache` never asks it, and raises CacheMiss for what is not there.
    draw_set: None draws anew each epoch (draw set = epoch), a number uses the same draws in every epoch, several
        numbers these in turn.
    prefetch_batches: batches asked for ahead of the caller.
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
        self.dataloader, self.client, self.cache = dataloader, client, cache
        self.mode, self.prefetch_batches = mode, prefetch_batches
        self.draw_sets = (draw_set,) if isinstance(draw_set, int) else tuple(draw_set or ())
        self.epoch = 0
        self.stats = StreamStats()
        self.place: Callable[[SparseTargets], SparseTargets] | None = None
        """Copies a batch's targets to a device, in the decode thread (`device_targets.Placer`)."""
        self._source: TargetSource | None = None
        self._asked: deque[Asked] = deque()

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
        return sum(all(p.future is None or p.future.done() for p in asked.parts) for asked in list(self._asked))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataloader, "set_epoch"):
            self.dataloader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self.over(iter(self.dataloader))

    def over(self, batches: Iterator[Batch], *, first_step: int = 0) -> Iterator[Batch]:
        """Yield what is left of this epoch's batches, with targets; a resumed run has done first_step of them."""
        self.close()
        client, look_up = None if self.mode == "cache" else self.client, self.mode != "online"
        draw_set = self.draw_sets[self.epoch % len(self.draw_sets)] if self.draw_sets else self.epoch
        options: dict[str, Any] = {"look_up": look_up, "draw_set": draw_set, "place": self.place}
        source = TargetSource(client, self.cache, stats=self.stats, **options)
        self._source, asked = source, self._asked
        self.epoch += 1
        left: Iterator[tuple[int, Batch]] | None = enumerate(batches, first_step)
        failure: Exception | None = None
        try:
            while not source.closed.is_set():
                started = time.perf_counter()
                while left is not None and len(asked) <= self.prefetch_batches:
                    try:  # in the caller's thread, as accelerate's dataloaders require
                        step, batch = next(left)
                        asked.append(source.ask(batch, priority=step))
                    except StopIteration:
                        left = None
                    except Exception as error:  # raised after the batches before it
                        failure, left = error, None
                taken = self._take(source, asked)
                if taken is None:
                    break
                if not asked and failure is None:
                    source.flush()  # before another worker begins the next epoch, which may read it all from disk
                waited = time.perf_counter() - started
                self.stats.waiting_seconds += waited
                metrics.STUDENT_WAITING_SECONDS.inc(waited)
                yield taken
            if failure is not None and not source.closed.is_set():
                raise failure
        finally:
            if self._source is source:
                self.close()

    def close(self) -> None:
        """Cancel what is in flight and end the decoding thread, from any thread; the next iteration starts anew."""
        source, asked = self._source, self._asked
        self._source, self._asked = None, deque()
        metrics.STUDENT_QUEUE_BATCHES.set(0)
        if source is not None:
            source.close(list(asked))

    def _take(self, source: TargetSource, asked: deque[Asked]) -> Batch | None:
        """Wait for the first batch's targets and take it; None after the last one, or once the stream is closed."""
        for one in itertools.islice(asked, 1 + DECODED_BATCHES):
            source.decode(one)
        if not asked or source.closed.is_set():  # what is to be decoded after that never is
            return None
        try:
            batch = asked[0].decoded.result()
        except CancelledError:
            if source.closed.is_set():
                return None
            raise TeacherUnavailable("the teacher client was closed") from None
        taken, stats, num_entries = asked.popleft(), self.stats, batch["targets"].num_entries
        metrics.STUDENT_QUEUE_BATCHES.set(self.queue_depth)
        metrics.STUDENT_ENTRIES.inc(num_entries)
        stats.batches += 1
        stats.entries += num_entries
        for part in taken.parts:
            stats.rows += len(part.rows) if part.payload_bytes else 0
            stats.payload_bytes += part.payload_bytes
        return batch
