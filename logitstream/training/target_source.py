"""Where one sequence's targets come from: the cache on disk, the teacher, or one after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

from logitstream import codec, metrics
from logitstream.client.teacher_client import TeacherClient
from logitstream.data.batches import Rows
from logitstream.errors import CacheMiss, CodecError, CorruptRecord, FingerprintMismatch, StaleTeacher
from logitstream.id_model import IdModel
from logitstream.training.target_cache import TargetCache
from logitstream.types import Fingerprint, ReceivedTargets, SparseTargets, TargetSpec, TokenSequence, request_key

logger = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 2.0
"""While the teacher does not answer, the cache is looked at this often: another worker may have written it."""
MAX_FETCHES = 4
"""How often targets that are damaged, or grew stale while they waited, are asked for before the stream ends."""


@dataclass(slots=True)
class StreamStats:
    """Totals over all epochs of a stream.

    Waiting is by the clock, decoding in CPU seconds; batches, rows, entries and payload_bytes (as encoded, without the
    messages around them) are counted when the caller takes a batch.
    """

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
class Slot:
    """One sequence of the stream's batch_number-th batch; `future` is None where its targets lie on disk.

    key: its key in the cache, where that was looked into.
    """

    rows: Rows
    sequence: TokenSequence
    batch_number: int
    priority: int
    future: Future[ReceivedTargets] | None = None
    kept: bool = False
    key: bytes = b""


class TargetSource:
    """Of one epoch: client None asks no teacher, look_up asks the cache before the teacher."""

    def __init__(
        self,
        client: TeacherClient | None,
        cache: TargetCache | None,
        *,
        look_up: bool,
        draw_set: int,
        stats: StreamStats,
    ) -> None:
        self._client = client
        self._cache = cache
        self._look_up = look_up
        self._draw_set = draw_set
        self._stats = stats
        self._keeping = threading.Lock()
        self._on_disk: deque[Slot] = deque()
        self._looked_up: deque[Slot] = deque()
        self._stored: Iterator[ReceivedTargets | None] = iter(())
        self._id_model: IdModel | None = None
        self._replaced_weights: set[bytes] = set()
        self.vocab_size = 0
        self.spec: TargetSpec | None = None
        self.payload_bytes = 0
        """Encoded bytes decoded so far, what had to be asked for again included."""

    @property
    def writable(self) -> bool:
        """Whether what the teacher sends is kept on disk; false also once the disk or the budget was full."""
        return self._client is not None and self._cache is not None and self._cache.writable

    def prepare(self) -> None:
        """Learn how to decode: from the cache where it may do without the teacher, else from the teacher."""
        cache = self._cache
        if cache is not None:
            cache.refresh()
        if cache is not None and self._look_up:
            id_model, self.vocab_size = cache.id_model, cache.fingerprint.vocab_size
            self.spec = TargetSpec.from_canonical(cache.fingerprint.spec)
        else:
            assert self._client is not None
            info = self._client.info
            id_model, self.vocab_size, self.spec = info.id_model, info.vocab_size, self._client.spec
        self._id_model = IdModel.from_bytes(id_model) if id_model else None

    def locate(self, slot: Slot, received: Callable[[Slot], None] | None) -> None:
        """Leave the slot to the disk where the cache holds it, else ask the teacher, whose answer calls `received`."""
        if self._look_up and self._cache is not None:
            slot.key = self._cache.key(slot.sequence, self._draw_set)
            if slot.key in self._cache:
                self._on_disk.append(slot)
                return
            metrics.CACHE_MISSES.inc()
        future = self._submit(slot)
        if received is not None:
            future.add_done_callback(lambda _: received(slot))

    def keep(self, slot: Slot) -> bool:
        """Write what came from the teacher to the cache, once; whether it lies there now."""
        with self._keeping:
            future = slot.future
            if self._cache is None or future is None or future.cancelled() or future.exception() is not None:
                return slot.kept
            slot.kept = slot.kept or self._cache.put(slot.sequence, self._draw_set, future.result())
            return slot.kept

    def fetch(self, slot: Slot) -> SparseTargets:
        """A slot's targets, decoded: from disk, from the teacher where the disk fails, anew where they are of no use.

        Raises what the client's future does, CacheMiss, CodecError or FingerprintMismatch; without a client
        CorruptRecord for a damaged record.
        """
        for last in (False,) * (MAX_FETCHES - 1) + (True,):
            received = self._receive(slot)
            stale = self._client is not None and not received.from_cache and self._client.is_stale(received)
            try:
                if not stale or last:
                    targets = self._decode(received, len(slot.sequence))
                    self.keep(slot)
                    slot.future = None  # its callback holds the slot: the payload would wait for the garbage collector
                    return targets
            except CodecError as error:
                if self._client is None:
                    raise CorruptRecord(
                        f"its record in the cache cannot be decoded, and no teacher is asked in mode 'cache': {error}"
                    ) from error
                if last:
                    raise
                logger.warning("damaged targets are asked for again: %s", error)
            metrics.STUDENT_RETRIES.labels(reason=StaleTeacher.__name__ if stale else CodecError.__name__).inc()
            self._submit(slot)
        raise AssertionError("the last fetch returns or raises")

    def flush(self) -> None:
        """Acknowledge what was written."""
        if self._cache is not None:
            self._cache.refresh()

    def _receive(self, slot: Slot) -> ReceivedTargets:
        """As they were encoded; a record on disk that is damaged or gone is asked for again."""
        cache, future = self._cache, slot.future
        if future is None and cache is not None:
            if (stored := self._read(slot, cache)) is not None:
                slot.kept = True
                return stored
            if self._client is None and cache.is_damaged(slot.sequence, self._draw_set):
                raise CorruptRecord("its record in the cache is damaged, and no teacher is asked in mode 'cache'")
            if not cache.hangs:
                logger.warning("a record of the cache is damaged or gone; its targets are asked for again")
        received = self._wait(slot, future or self._submit(slot))
        if self._look_up and cache is not None and received.key != cache.key(slot.sequence, self._draw_set):
            self._check_replaced(slot, received, cache)
        return received

    def _read(self, slot: Slot, cache: TargetCache) -> ReceivedTargets | None:
        """From disk: all slots that wait there by then are looked up at once, each is read when its turn comes."""
        if not self._looked_up:
            self._looked_up.extend(self._on_disk.popleft() for _ in range(len(self._on_disk)))
            self._stored = cache.get_many([one.key for one in self._looked_up])
        if not self._looked_up or self._looked_up[0] is not slot:  # it was spilled
            return cache.get(slot.sequence, self._draw_set)
        self._looked_up.popleft()
        return next(self._stored)

    def _check_replaced(self, slot: Slot, received: ReceivedTargets, cache: TargetCache) -> None:
        """FingerprintMismatch, unless only the weights are others than the cache's, and the client allows for that."""
        assert self._client is not None
        if received.weights_digest in self._replaced_weights:
            return
        info = self._client.info
        found = replace(Fingerprint.of(info, TargetSpec()), spec=cache.fingerprint.spec)
        replaced = replace(found, weights_digest=cache.fingerprint.weights_digest) == cache.fingerprint != found
        if received.weights_digest == bytes.fromhex(info.weights_digest)[:8]:  # else of a version between the two
            replaced &= received.key == request_key(found.digest, slot.sequence, self._draw_set)
        if self._client.max_teacher_lag == 0 or not replaced:
            reason = cache.fingerprint.differences(found) or "the way targets are drawn, or weights replaced meanwhile"
            raise FingerprintMismatch(f"not the teacher of the cache (its value first): {reason}")
        self._replaced_weights.add(received.weights_digest)

    def _wait(self, slot: Slot, future: Future[ReceivedTargets]) -> ReceivedTargets:
        """The teacher's answer, or what another process has written to the cache meanwhile."""
        cache = self._cache if self._look_up else None
        if cache is None:
            return future.result()
        while True:
            known = not future.done() and cache.holds(slot.sequence, self._draw_set)
            try:
                return future.result(0.0 if known else LOOK_AGAIN_SECONDS)
            except TimeoutError:
                if future.done():
                    raise
                if (stored := cache.get(slot.sequence, self._draw_set)) is not None:
                    future.cancel()
                    slot.kept = True
                    return stored

    def _submit(self, slot: Slot) -> Future[ReceivedTargets]:
        if self._client is None:
            raise CacheMiss(
                f"the cache holds no undamaged targets of a sequence of {len(slot.sequence)} tokens for draw set "
                f"{self._draw_set}, and no teacher is asked in mode 'cache'"
            )
        slot.kept = False
        slot.future = self._client.submit(slot.sequence, draw_set=self._draw_set, priority=slot.priority)
        return slot.future

    def _decode(self, received: ReceivedTargets, num_rows: int) -> SparseTargets:
        started = time.thread_time()  # by the clock, a crowded machine's other work would count
        targets = codec.decode(
            received.payload, spec=self.spec, vocab_size=self.vocab_size, id_model=self._id_model, num_rows=num_rows
        )
        seconds = time.thread_time() - started
        self._stats.decoding_seconds += seconds
        metrics.STUDENT_DECODING_SECONDS.inc(seconds)
        self.payload_bytes += len(received.payload)
        self._stats.cached_sequences += received.from_cache
        return targets
