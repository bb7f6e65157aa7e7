"""The targets of one epoch: from the cache if they are there, else from the teacher, whose answers the cache keeps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from logitstream import codec, metrics
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.batches import Rows, blank_out, place_rows, split_batch
from logitstream.data.documents import Batch
from logitstream.errors import (
    CacheMiss,
    CodecError,
    CorruptRecord,
    FingerprintMismatch,
    LogitstreamError,
    RequestError,
)
from logitstream.id_model import IdModel
from logitstream.training.target_cache import TargetCache
from logitstream.types import Fingerprint, ReceivedTargets, SparseTargets, TargetSpec, TokenSequence

logger = logging.getLogger(__name__)

MIN_REFUSED = 8
"""The stream ends once more sequences than this, and more than half of all, are refused or damaged."""


@dataclass(slots=True)
class StreamStats:
    """Totals over all epochs of a stream.

    Waiting is wall-clock time, decoding CPU time. Batches, rows, entries and payload_bytes (as encoded) are counted
    when the caller takes a batch, the rest when its targets are decoded.
    """

    waiting_seconds: float = 0.0
    decoding_seconds: float = 0.0
    batches: int = 0
    sequences: int = 0
    cached_sequences: int = 0
    refused_sequences: int = 0
    rows: int = 0
    entries: int = 0
    payload_bytes: int = 0
    received_bytes: int = 0
    received_rows: int = 0


@dataclass(slots=True, eq=False)
class Part:
    """One sequence of a batch and the batch's rows that it covers.

    key: its key in the cache, if there is one. future: the teacher's answer; None: the targets are on disk.
    payload_bytes: its targets, as encoded, once they are decoded.
    """

    rows: Rows
    sequence: TokenSequence
    priority: int
    key: bytes = b""
    future: Future[ReceivedTargets] | None = None
    payload_bytes: int = 0


@dataclass(slots=True, eq=False)
class Asked:
    """A batch whose targets are asked for; `decoded` gives the batch with them."""

    batch: Batch
    parts: list[Part]
    is_queued: bool = False
    decoded: Future[Batch] = field(default_factory=Future)


class TargetSource:
    """Asks for the targets of batches, and decodes them in a thread of its own.

    client=None: from the cache alone; look_up: try the cache before the teacher; place: copies a batch's targets to a
    device.
    """

    def __init__(
        self,
        client: TeacherClient | None,
        cache: TargetCache | None,
        *,
        look_up: bool,
        draw_set: int,
        stats: StreamStats,
        place: Callable[[SparseTargets], SparseTargets] | None = None,
    ) -> None:
        """Learn how to decode: from the cache if it may do without the teacher, else from the teacher."""
        self._client, self._cache, self._look_up = client, cache, look_up
        self._draw_set, self._stats, self._place = draw_set, stats, place
        self._is_same_teacher = False
        if cache is not None:
            cache.refresh()
        if cache is not None and look_up:
            id_model, spec = cache.id_model, TargetSpec.from_canonical(cache.fingerprint.spec)
            vocab_size = cache.fingerprint.vocab_size
        else:
            assert client is not None
            id_model, spec, vocab_size = client.info.id_model, client.spec, client.info.vocab_size
        self._drawn: Any = {"spec": spec, "vocab_size": vocab_size}
        self._id_model = IdModel.from_bytes(id_model) if id_model else None
        self.closed = threading.Event()
        self._jobs: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._decode_all, name="target-stream-decode", daemon=True)
        self._thread.start()

    def ask(self, batch: Batch, *, priority: int) -> Asked:
        """Ask the teacher for what the cache does not hold; never blocks.

        Raises CacheMiss if there is no teacher, ValueError if the batch holds what a teacher cannot be told.
        """
        parts = [Part(rows, sequence, priority) for rows, sequence in split_batch(batch)]
        wanted, cache = parts, self._cache
        if cache is not None:
            for part in parts:
                part.key = cache.key(part.sequence, self._draw_set)
            if self._look_up:
                wanted = [part for part in parts if part.key not in cache]
                metrics.CACHE_MISSES.inc(len(wanted))
        if wanted and self._client is None:
            raise CacheMiss(
                f"the cache does not hold a sequence of {len(wanted[0].sequence)} tokens for draw set "
                f"{self._draw_set}, and no teacher is asked in mode 'cache'"
            )
        if wanted:
            self._submit(wanted)
        return Asked(batch, parts)

    def decode(self, asked: Asked) -> None:
        """Have the thread wait for a batch's targets and decode them, after those that it was given before."""
        if not asked.is_queued:
            asked.is_queued = True
            self._jobs.put(asked)

    def close(self, asked: Sequence[Asked]) -> None:
        """Cancel these requests, end the thread, and make what was written to the cache visible to other readers."""
        self.closed.set()
        for part in (part for one in asked for part in one.parts):
            if (future := part.future) is not None:
                future.cancel()
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.flush()

    def flush(self) -> None:
        """Make what was written to the cache visible to other readers."""
        if self._cache is not None:
            self._cache.refresh()

    def _submit(self, parts: Sequence[Part]) -> None:
        assert self._client is not None
        sequences = [part.sequence for part in parts]
        futures = self._client.submit(sequences, draw_set=self._draw_set, priority=parts[0].priority)
        for part, future in zip(parts, futures, strict=True):
            part.future = future
            if self.closed.is_set():  # while it was asked for, and too late to be seen by `close`
                future.cancel()

    def _decode_all(self) -> None:
        while (asked := self._jobs.get()) is not None:
            try:
                asked.decoded.set_result(self._add_targets(asked))
            except BaseException as error:
                asked.decoded.set_exception(error)
            del asked  # a batch is not kept while the thread waits for the next one

    def _add_targets(self, asked: Asked) -> Batch:
        """Wait for a batch's targets and return it with them; leave out what is refused or damaged."""
        keys = [part.key for part in asked.parts if part.future is None]
        stored = iter(self._cache.get(keys) if keys and self._cache is not None else [])
        placed: list[tuple[Rows, SparseTargets]] = []
        refused: list[Rows] = []
        for part in asked.parts:
            self._stats.sequences += 1
            try:
                placed.append((part.rows, self._fetch(part, next(stored) if part.future is None else None)))
            except (RequestError, CorruptRecord) as error:
                self._count_refused(part, error)
                refused.append(part.rows)
        num_rows = int(np.prod(tuple(asked.batch["input_ids"].shape)))
        targets = place_rows(placed, num_rows=num_rows, **self._drawn)
        batch = asked.batch | {"targets": targets if self._place is None else self._place(targets)}
        if refused:
            blank_out(batch, np.concatenate(refused))
        return batch

    def _fetch(self, part: Part, stored: ReceivedTargets | None) -> SparseTargets:
        """Decode a part's targets; ask once more for those that are damaged, on disk or on the wire."""
        fault = "its record in the cache is damaged or gone"
        for last in (False, True):
            if stored is None and part.future is None:
                if self._client is None:
                    raise CorruptRecord(f"{fault}, and no teacher is asked in mode 'cache'")
                logger.info("a sequence is asked for again: %s", fault)
                metrics.STUDENT_RETRIES.labels(reason=CodecError.__name__).inc()
                self._submit([part])
            received = stored or self._answer(part)
            try:
                targets = self._decode(received, len(part.sequence))
            except CodecError as error:
                if last:
                    raise
                stored, fault = None, f"its targets cannot be decoded: {error}"
            else:
                if self._cache is not None and stored is None:
                    self._cache.put(part.key, part.sequence, self._draw_set, received)
                part.payload_bytes = len(received.payload)
                return targets
        raise AssertionError("the second try returns or raises")

    def _answer(self, part: Part) -> ReceivedTargets:
        """Wait for the teacher's answer and take it out of the part, so that it is freed as soon as it is decoded."""
        assert part.future is not None
        received, part.future = part.future.result(), None
        cache = self._cache
        if self._look_up and cache is not None and received.fingerprint != cache.fingerprint.digest:
            self._check_teacher(cache.fingerprint)
        return received

    def _check_teacher(self, cached: Fingerprint) -> None:
        """Raise FingerprintMismatch unless the teacher is the cache's and has replaced its weights, as it may."""
        assert self._client is not None
        if self._is_same_teacher:
            return
        found = Fingerprint.of(self._client.info, self._client.spec)
        replaced = replace(found, weights_digest=cached.weights_digest) == cached
        if self._client.max_teacher_lag == 0 or not replaced:
            reason = cached.differences(found) or "weights that were replaced meanwhile"
            raise FingerprintMismatch(f"not the teacher of the cache (its value first): {reason}")
        self._is_same_teacher = True

    def _decode(self, received: ReceivedTargets, num_rows: int) -> SparseTargets:
        started = time.thread_time()  # wall-clock time would count a crowded machine's other work
        targets = codec.decode(received.payload, id_model=self._id_model, num_rows=num_rows, **self._drawn)
        seconds, stats = time.thread_time() - started, self._stats
        metrics.STUDENT_DECODING_SECONDS.inc(seconds)
        stats.decoding_seconds += seconds
        stats.cached_sequences += received.from_cache
        if received.wire_bytes:
            stats.received_bytes += received.wire_bytes
            stats.received_rows += num_rows
        return targets

    def _count_refused(self, part: Part, error: LogitstreamError) -> None:
        """Raise if so many refusals mean that something is wrong with the run."""
        stats = self._stats
        stats.refused_sequences += 1
        logger.warning("a sequence of %d tokens is left out of the loss: %s", len(part.sequence), error)
        if stats.refused_sequences > MIN_REFUSED and 2 * stats.refused_sequences > stats.sequences:
            raise LogitstreamError(
                f"{stats.refused_sequences} of {stats.sequences} sequences are refused or damaged; the last: {error}"
            ) from error
