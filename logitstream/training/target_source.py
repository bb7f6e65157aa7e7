"""The source of an epoch's targets: the cache on disk first, then the teacher, whose answers are cached."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from logitstream import codec, metrics
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.batches import Rows
from logitstream.errors import (
    CacheMiss,
    CodecError,
    CorruptRecord,
    FingerprintMismatch,
    RequestError,
)
from logitstream.id_model import IdModel
from logitstream.training.target_cache import TargetCache
from logitstream.types import Fingerprint, ReceivedTargets, SparseTargets, TargetSpec, TokenSequence

logger = logging.getLogger(__name__)


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
    """

    rows: Rows
    sequence: TokenSequence
    priority: int
    key: bytes = b""
    future: Future[ReceivedTargets] | None = None


class TargetSource:
    """The targets of one epoch. client=None: from the cache alone; look_up: try the cache before the teacher."""

    def __init__(
        self,
        client: TeacherClient | None,
        cache: TargetCache | None,
        *,
        look_up: bool,
        draw_set: int,
        stats: StreamStats,
    ) -> None:
        """Learn how to decode: from the cache if it may do without the teacher, else from the teacher."""
        self._client, self._cache, self._look_up = client, cache, look_up
        self._draw_set = draw_set
        self._stats = stats
        self._replaced_weights: set[str] = set()
        self.closed = threading.Event()
        self.payload_bytes = 0
        if cache is not None:
            cache.refresh()
        if cache is not None and look_up:
            id_model, self.vocab_size = cache.id_model, cache.fingerprint.vocab_size
            self.spec = TargetSpec.from_canonical(cache.fingerprint.spec)
        else:
            assert client is not None
            id_model, self.vocab_size, self.spec = client.info.id_model, client.info.vocab_size, client.spec
        self._id_model = IdModel.from_bytes(id_model) if id_model else None

    def ask(self, parts: Sequence[Part]) -> None:
        """Ask the teacher for what the cache does not hold; never blocks. Raises CacheMiss if there is no teacher."""
        wanted = []
        for part in parts:
            if self._cache is not None:
                part.key = self._cache.key(part.sequence, self._draw_set)
                if self._look_up:
                    if part.key in self._cache:
                        continue
                    metrics.CACHE_MISSES.inc()
            wanted.append(part)
        if wanted:
            self._submit(wanted)

    def fetch(self, parts: Sequence[Part]) -> Iterator[SparseTargets | RequestError | CorruptRecord]:
        """Wait for the targets of each part and decode them; yield the error instead if its sequence has none.

        Raises what else the client's futures do, CacheMiss, CodecError and FingerprintMismatch.
        """
        stored: dict[Part, ReceivedTargets | None] = {}
        on_disk = [part for part in parts if part.future is None]
        if on_disk and self._cache is not None:
            stored = dict(zip(on_disk, self._cache.get_many([part.key for part in on_disk]), strict=True))
        for part in parts:
            try:
                yield self._fetch(part, stored.pop(part, None))
            except (RequestError, CorruptRecord) as error:
                yield error

    def flush(self) -> None:
        """Make what was written to the cache visible to other readers."""
        if self._cache is not None:
            self._cache.refresh()

    def _fetch(self, part: Part, stored: ReceivedTargets | None) -> SparseTargets:
        """Decode a part's targets. What the cache holds damaged, or has lost, is asked for; so is a damaged answer."""
        if stored is None and part.future is None:
            self._ask_again(part, "its record in the cache is damaged or gone")
        for last in (False, True):
            received = stored or self._answer(part)
            try:
                targets = self._decode(received, len(part.sequence))
            except CodecError as error:
                if last:
                    raise
                stored = None
                self._ask_again(part, f"its targets cannot be decoded: {error}")
            else:
                if self._cache is not None and stored is None:
                    self._cache.put(part.key, part.sequence, self._draw_set, received)
                return targets
        raise AssertionError("the second try returns or raises")

    def _answer(self, part: Part) -> ReceivedTargets:
        """Wait for the teacher's answer and take it out of the part, so that it is freed as soon as it is decoded."""
        assert part.future is not None
        received, part.future = part.future.result(), None
        if self._look_up and self._cache is not None:
            self._check_teacher(received, self._cache)
        return received

    def _ask_again(self, part: Part, reason: str) -> None:
        """Ask for targets that are no good. Without a teacher, raise CorruptRecord, or CacheMiss for a lost record."""
        cache = self._cache
        if self._client is None and cache is not None and (part.key in cache or cache.is_damaged(part.key)):
            raise CorruptRecord(f"{reason}, and no teacher is asked in mode 'cache'")
        if cache is None or not cache.hangs:
            logger.warning("a sequence is asked for again: %s", reason)
        metrics.STUDENT_RETRIES.labels(reason=CodecError.__name__).inc()
        self._submit([part])

    def _submit(self, parts: Sequence[Part]) -> None:
        if self._client is None:
            raise CacheMiss(
                f"the cache holds no undamaged targets of a sequence of {len(parts[0].sequence)} tokens for draw set "
                f"{self._draw_set}, and no teacher is asked in mode 'cache'"
            )
        sequences = [part.sequence for part in parts]
        futures = self._client.submit(sequences, draw_set=self._draw_set, priority=parts[0].priority)
        for part, future in zip(parts, futures, strict=True):
            part.future = future
            if self.closed.is_set():  # while it was asked for, and too late to be seen by whoever closed
                future.cancel()

    def _check_teacher(self, received: ReceivedTargets, cache: TargetCache) -> None:
        """Raise FingerprintMismatch unless the teacher is the cache's, or has replaced its weights as it may."""
        if received.fingerprint == cache.fingerprint.digest or received.fingerprint in self._replaced_weights:
            return
        assert self._client is not None
        found = Fingerprint.of(self._client.info, self._client.spec)
        replaced = replace(found, weights_digest=cache.fingerprint.weights_digest) == cache.fingerprint
        if self._client.max_teacher_lag == 0 or not replaced:
            reason = cache.fingerprint.differences(found) or "weights that were replaced meanwhile"
            raise FingerprintMismatch(f"not the teacher of the cache (its value first): {reason}")
        self._replaced_weights.add(received.fingerprint)

    def _decode(self, received: ReceivedTargets, num_rows: int) -> SparseTargets:
        started = time.thread_time()  # wall-clock time would count a crowded machine's other work
        targets = codec.decode(
            received.payload, spec=self.spec, vocab_size=self.vocab_size, id_model=self._id_model, num_rows=num_rows
        )
        seconds = time.thread_time() - started
        self._stats.decoding_seconds += seconds
        metrics.STUDENT_DECODING_SECONDS.inc(seconds)
        self.payload_bytes += len(received.payload)
        self._stats.cached_sequences += received.from_cache
        if received.wire_bytes:
            self._stats.received_bytes += received.wire_bytes
            self._stats.received_rows += num_rows
        return targets
