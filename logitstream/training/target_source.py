"""The targets of one epoch: from the cache if they are there, else from the teacher, whose answers the cache keeps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

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


class TargetSource:
    """Asks for the targets of batches and adds them. client=None: from the cache alone; look_up: try the cache first.

    raise_refused: a sequence that is refused or damaged is an error, otherwise it is left out of the loss.
    """

    def __init__(
        self,
        client: TeacherClient | None,
        cache: TargetCache | None,
        *,
        look_up: bool,
        draw_set: int,
        raise_refused: bool,
        stats: StreamStats,
    ) -> None:
        """Learn how to decode: from the cache if it may do without the teacher, else from the teacher."""
        self._client, self._cache, self._look_up = client, cache, look_up
        self._draw_set, self._raise_refused, self._stats = draw_set, raise_refused, stats
        self._is_same_teacher = False
        self.closed = threading.Event()
        if cache is not None:
            cache.refresh()
        if cache is not None and look_up:
            id_model, self._vocab_size = cache.id_model, cache.fingerprint.vocab_size
            self._spec = TargetSpec.from_canonical(cache.fingerprint.spec)
        else:
            assert client is not None
            id_model, self._vocab_size, self._spec = client.info.id_model, client.info.vocab_size, client.spec
        self._id_model = IdModel.from_bytes(id_model) if id_model else None

    def split(self, batch: Batch, priority: int) -> list[Part]:
        """Return a batch's sequences, to be asked for; ValueError if it holds what the teacher cannot be told."""
        parts = [Part(rows, sequence, priority) for rows, sequence in split_batch(batch)]
        if self._cache is not None:
            for part in parts:
                part.key = self._cache.key(part.sequence, self._draw_set)
        return parts

    def ask(self, parts: Sequence[Part]) -> None:
        """Ask the teacher for what the cache does not hold; never blocks. Raises CacheMiss if there is no teacher."""
        cache = self._cache if self._look_up else None
        wanted = [part for part in parts if cache is None or part.key not in cache]
        if not wanted:
            return
        if cache is not None:
            metrics.CACHE_MISSES.inc(len(wanted))
        if self._client is None:
            raise CacheMiss(
                f"the cache does not hold a sequence of {len(wanted[0].sequence)} tokens for draw set "
                f"{self._draw_set}, and no teacher is asked in mode 'cache'"
            )
        self._submit(self._client, wanted)

    def add_targets(self, batch: Batch, parts: Sequence[Part]) -> Batch:
        """Wait for a batch's targets and return it with them.

        Raises what the client's futures do, and CodecError, FingerprintMismatch or LogitstreamError.
        """
        keys = [part.key for part in parts if part.future is None]
        stored = iter(self._cache.get(keys) if keys and self._cache is not None else [])
        placed: list[tuple[Rows, SparseTargets]] = []
        refused: list[Rows] = []
        for part in parts:
            self._stats.sequences += 1
            try:
                targets = self._fetch(part, next(stored) if part.future is None else None)
                placed.append((part.rows, targets))
            except (RequestError, CorruptRecord) as error:
                self._count_refused(part, error)
                refused.append(part.rows)
        num_rows = int(np.prod(tuple(batch["input_ids"].shape)))
        targets = place_rows(placed, num_rows=num_rows, vocab_size=self._vocab_size, spec=self._spec)
        batch = batch | {"targets": targets}
        if refused:
            blank_out(batch, np.concatenate(refused))
        return batch

    def flush(self) -> None:
        """Make what was written to the cache visible to other readers."""
        if self._cache is not None:
            self._cache.refresh()

    def _submit(self, client: TeacherClient, parts: Sequence[Part]) -> None:
        sequences = [part.sequence for part in parts]
        futures = client.submit(sequences, draw_set=self._draw_set, priority=parts[0].priority)
        for part, future in zip(parts, futures, strict=True):
            part.future = future
            if self.closed.is_set():  # while it was asked for, and too late to be seen by whoever closed
                future.cancel()

    def _fetch(self, part: Part, stored: ReceivedTargets | None) -> SparseTargets:
        """Decode a part's targets; ask once more for those that are damaged, on disk or on the wire."""
        fault = "its record in the cache is damaged or gone"
        for last in (False, True):
            if stored is None and part.future is None:
                if self._client is None:
                    raise CorruptRecord(f"{fault}, and no teacher is asked in mode 'cache'")
                logger.info("a sequence is asked for again: %s", fault)
                metrics.STUDENT_RETRIES.labels(reason=CodecError.__name__).inc()
                self._submit(self._client, [part])
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
        targets = codec.decode(
            received.payload, spec=self._spec, vocab_size=self._vocab_size, id_model=self._id_model, num_rows=num_rows
        )
        seconds, stats = time.thread_time() - started, self._stats
        metrics.STUDENT_DECODING_SECONDS.inc(seconds)
        stats.decoding_seconds += seconds
        stats.cached_sequences += received.from_cache
        if received.wire_bytes:
            stats.received_bytes += received.wire_bytes
            stats.received_rows += num_rows
        return targets

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
