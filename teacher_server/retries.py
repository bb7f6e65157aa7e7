"""Score a batch whatever happens: halve one that fails, try again, and find the sequence that breaks the backend."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logitstream.errors import ScoringFailed, ServerDraining
from teacher_server.backend import ScoreRequest, ScoreResult, TeacherBackend

CLEAN_BATCHES = 16
"""Batches without a failure after which a reduced batch size grows again, by a quarter."""
ENGINE_DEAD = "EngineDeadError"
"""vLLM's error when its engine died. The engine is restarted and may well survive the same sequence."""
BROKE_DOWN = "the teacher broke down: ask another replica"

log = logging.getLogger(__name__)


class BackendBroken(Exception):
    """The backend fails on sequences that it has scored before; only a new process can help."""


@dataclass(slots=True)
class FailureStats:
    """Failures while one batch was scored."""

    num_failures: int = 0
    num_out_of_memory: int = 0
    num_given_up: int = 0


class BatchScorer:
    """Scores batches, up to `batches_at_once` concurrently, and retries those that fail.

    A retry has the backend to itself, so that a failure has one suspect. `batch_tokens`, how much a batch may hold, is
    halved after a batch that did not fit into memory and grows back later.
    """

    def __init__(self, max_batch_tokens: int, *, batches_at_once: int = 1) -> None:
        self.max_batch_tokens = self.batch_tokens = max_batch_tokens
        self._num_clean = 0
        self._slots = threading.Semaphore(batches_at_once)
        self._num_slots = batches_at_once
        self._retrying = threading.Lock()
        self._known_good: ScoreRequest | None = None
        self._is_stopped = False

    def score(self, backend: TeacherBackend, batch: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Return one result per request, in order; a failing batch of n costs one bad sequence about log2(n) tries.

        Raises BackendBroken if the whole batch fails and so does a request that the backend has answered before.
        """
        stats = FailureStats()
        with self._slots:
            results = _try(backend, batch, stats)
        if isinstance(results, Exception):
            with self._exclusive():
                results = self._retry(backend, batch, results, stats)
                if stats.num_given_up == len(batch) and self._is_broken(backend):
                    self.stop()
                    raise BackendBroken("the backend fails on sequences that it has scored before")
        if not stats.num_failures:
            self._known_good = batch[-1]
        self._adapt(batch, stats)
        return results

    def stop(self) -> None:
        """Retry nothing from now on: what fails is refused as by a draining server."""
        self._is_stopped = True

    def reset_batch_tokens(self) -> None:
        """Forget the limits of the previous weights."""
        self.batch_tokens = self.max_batch_tokens
        self._num_clean = 0

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._retrying:  # two threads that each hold some of the slots would wait for each other
            for _ in range(self._num_slots):
                self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release(self._num_slots)

    def _retry(
        self, backend: TeacherBackend, batch: Sequence[ScoreRequest], error: Exception, stats: FailureStats
    ) -> list[ScoreResult]:
        """Score a batch that failed once, with this error: in halves, or once more if it is a single sequence."""
        if self._is_stopped:
            return [ServerDraining(BROKE_DOWN) for _ in batch]
        middle = len(batch) // 2
        results: list[ScoreResult] = []
        for part in (batch[:middle], batch[middle:]) if middle else (batch,):
            found = _try(backend, part, stats)
            if isinstance(found, list):
                results += found
            elif middle:
                results += self._retry(backend, part, found, stats)
            else:
                stats.num_given_up += 1
                results.append(_failure(part[0], found))
        return results

    def _is_broken(self, backend: TeacherBackend) -> bool:
        """Return True if a request that the backend has answered before fails too: no sequence is to blame then."""
        if self._known_good is None:
            return False
        try:
            backend.score([self._known_good])
        except Exception:
            log.exception("the backend fails on a sequence that it has scored before")
            return True
        return False

    def _adapt(self, batch: Sequence[ScoreRequest], stats: FailureStats) -> None:
        self._num_clean = 0 if stats.num_failures else self._num_clean + 1
        tokens = self.batch_tokens
        if stats.num_out_of_memory and len(batch) > 1:
            tokens = max(1, min(tokens, _num_tokens(batch) // 2))
        elif self._num_clean >= CLEAN_BATCHES:
            self._num_clean = 0
            tokens = min(self.max_batch_tokens, tokens * 5 // 4 + 1)
        if tokens != self.batch_tokens:
            self.batch_tokens = tokens
            log.warning("batches hold at most %d tokens from now on", tokens)


def _try(backend: TeacherBackend, batch: Sequence[ScoreRequest], stats: FailureStats) -> list[ScoreResult] | Exception:
    try:
        results = list(backend.score(batch))
        if len(results) != len(batch):
            raise RuntimeError(f"the backend gave {len(results)} results for {len(batch)} sequences")
        return results
    except Exception as error:
        stats.num_failures += 1
        if is_out_of_memory(error):
            stats.num_out_of_memory += 1
            log.warning("batch of %d sequences, %d tokens, does not fit: %s", len(batch), _num_tokens(batch), error)
        else:
            log.error("batch of %d sequences, %d tokens, failed", len(batch), _num_tokens(batch), exc_info=error)
        return error


def _failure(request: ScoreRequest, error: Exception) -> ScoringFailed:
    out_of_memory = is_out_of_memory(error)
    reason = "it does not fit into the teacher's memory" if out_of_memory else "the teacher failed on it"
    failure = ScoringFailed(f"sequence of {len(request.sequence)} tokens given up after 2 tries alone: {reason}")
    failure.lasting = not out_of_memory and type(error).__name__ != ENGINE_DEAD
    return failure


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for MemoryError and for torch.OutOfMemoryError, by its name: the scheduler runs without torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _num_tokens(batch: Sequence[ScoreRequest]) -> int:
    return sum(len(request.sequence) for request in batch)
