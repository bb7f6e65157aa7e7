"""Score a batch whatever happens: halve one that fails, try again, and find the sequence that breaks the backend."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from logitstream.errors import ScoringFailed, ServerDraining
from teacher_server.backend import ScoreRequest, ScoreResult, TeacherBackend

BROKE_DOWN = "the teacher broke down: ask another replica"

log = logging.getLogger(__name__)


class BackendBroken(Exception):
    """The backend fails on sequences that it has scored before; only a new process can help."""


class BatchScorer:
    """Scores batches, up to `batches_at_once` concurrently, and retries those that fail.

    A retry has the backend to itself, so that a failure has one suspect. `batch_tokens`, how much a batch may hold, is
    halved when one does not fit into memory and grows back slowly.
    """

    def __init__(self, max_batch_tokens: int, *, batches_at_once: int = 1) -> None:
        self.max_batch_tokens = self.batch_tokens = max_batch_tokens
        self.is_stopped = False  # set to retry nothing any more
        self._slots = threading.Semaphore(batches_at_once)
        self._num_slots = batches_at_once
        self._retrying = threading.Lock()
        self._known_good: ScoreRequest | None = None

    def score(self, backend: TeacherBackend, batch: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Return one result per request, in order; one bad sequence costs a batch of n about log2(n) tries.

        Raises BackendBroken if the whole batch fails and so does a request that the backend has answered before.
        """
        with self._slots:
            results = _try(backend, batch)
        if isinstance(results, list):
            self._known_good = batch[-1]
            self.batch_tokens = min(self.max_batch_tokens, self.batch_tokens + self.batch_tokens // 64 + 1)
            return results
        if _is_out_of_memory(results) and len(batch) > 1:
            self.batch_tokens = max(1, min(self.batch_tokens, _num_tokens(batch) // 2))
        with self._retrying:  # one thread at a time, as it waits for all slots
            for _ in range(self._num_slots):
                self._slots.acquire()
            try:
                retried = self._retry(backend, batch)
                if all(isinstance(result, ScoringFailed) for result in retried) and self._is_broken(backend):
                    self.is_stopped = True
                    raise BackendBroken("the backend fails on sequences that it has scored before")
                return retried
            finally:
                self._slots.release(self._num_slots)

    def _is_broken(self, backend: TeacherBackend) -> bool:
        return self._known_good is not None and isinstance(_try(backend, [self._known_good]), Exception)

    def _retry(self, backend: TeacherBackend, batch: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score a batch that failed: in halves, or once more if it is a single sequence."""
        if self.is_stopped:
            return [ServerDraining(BROKE_DOWN) for _ in batch]
        middle = len(batch) // 2
        results: list[ScoreResult] = []
        for part in (batch[:middle], batch[middle:]) if middle else (batch,):
            found = _try(backend, part)
            if isinstance(found, list):
                results += found
            elif middle:
                results += self._retry(backend, part)
            else:
                why = "it does not fit into the teacher's memory" if _is_out_of_memory(found) else "the teacher failed"
                results.append(ScoringFailed(f"sequence of {_num_tokens(part)} tokens, tried alone: {why}"))
        return results


def _try(backend: TeacherBackend, batch: Sequence[ScoreRequest]) -> list[ScoreResult] | Exception:
    try:
        results = list(backend.score(batch))
        if len(results) != len(batch):
            raise RuntimeError(f"the backend gave {len(results)} results for {len(batch)} sequences")
        return results
    except Exception as error:
        size, trace = (len(batch), _num_tokens(batch)), None if _is_out_of_memory(error) else error
        log.warning("batch of %d sequences, %d tokens, failed: %s", *size, error, exc_info=trace)
        error.__cause__ = error.__context__ = None  # a traceback's frames hold the batch's tensors, and the halves
        return error.with_traceback(None)  # would be tried beside them


def _is_out_of_memory(error: Exception) -> bool:
    """Return True for MemoryError and for torch.OutOfMemoryError, by its name: the scheduler runs without torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _num_tokens(batch: Sequence[ScoreRequest]) -> int:
    return sum(len(request.sequence) for request in batch)
