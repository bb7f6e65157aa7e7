"""Score a batch whatever happens: halve it when it does not fit, find the sequence that breaks the backend."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logitstream.errors import RequestError, ScoringFailed, ServerDraining
from logitstream.types import SparseTargets
from teacher_server.backend import ScoreRequest, TeacherBackend

TRIES_ALONE = 2
"""How often a sequence is tried by itself before it is given up."""
ENGINE_DEAD = "EngineDeadError"
"""vLLM's error of an engine that died, told by name; it is started again, and need not die of the same sequence."""
BROKE_DOWN = "the teacher broke down: ask another replica"

log = logging.getLogger(__name__)


class BackendBroken(Exception):
    """The backend fails on sequences that it has scored before; only a new process can help."""


@dataclass(slots=True)
class Trouble:
    """What went wrong on the way: numbers for metrics and for the scheduler's next batches."""

    num_failures: int = 0
    num_out_of_memory: int = 0
    num_given_up: int = 0


class Turns:
    """Of threads that score: batches side by side, but what failed is tried again with nothing else in the backend, so
    that no sequence is blamed for what another one breaks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_shared = 0
        self._is_taken = False
        self.is_over = False  # what has failed is not tried again

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others of this kind."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._num_shared += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_shared -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Once everybody else is done; nobody begins meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._is_taken = True
            self._changed.wait_for(lambda: self._num_shared == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()


def score_isolating(
    backend: TeacherBackend,
    batch: Sequence[ScoreRequest],
    trouble: Trouble,
    turns: Turns | None = None,
    good: ScoreRequest | None = None,
) -> list[SparseTargets | RequestError]:
    """One result a request, in order.

    A batch that fails is scored in halves, so one bad sequence costs log2(n) batches and the others get their targets.
    turns: shared with other threads that score; good: a request that the backend has answered before. Raises
    BackendBroken where the whole batch and this one fail, which ends the turns; else nothing for what the backend does.
    """
    turns = turns or Turns()
    with turns.shared():
        first = _try(backend, batch, trouble)
    if not isinstance(first, Exception):
        return first
    with turns.alone():
        results = _score_again(backend, batch, trouble, first, turns)
        if good is not None and trouble.num_given_up == len(batch) and is_broken(backend, good):
            turns.is_over = True
            raise BackendBroken("the backend fails on sequences that it has scored before")
        return results


def _try(
    backend: TeacherBackend, batch: Sequence[ScoreRequest], trouble: Trouble
) -> list[SparseTargets | RequestError] | Exception:
    try:
        results = backend.score(batch)
        if len(results) != len(batch):
            raise RuntimeError(f"the backend gave {len(results)} results for {len(batch)} sequences")
        return results
    except Exception as error:
        _note(trouble, batch, error)
        return error


def _score_again(
    backend: TeacherBackend, batch: Sequence[ScoreRequest], trouble: Trouble, error: Exception, turns: Turns
) -> list[SparseTargets | RequestError]:
    """Results of a batch that failed once, with this error."""
    if turns.is_over:
        return [ServerDraining(BROKE_DOWN) for _ in batch]
    if len(batch) > 1:
        middle = len(batch) // 2
        halves = (batch[:middle], batch[middle:])
        return [result for half in halves for result in _score_half(backend, half, trouble, turns)]
    for _ in range(TRIES_ALONE - 1):
        again = _try(backend, batch, trouble)
        if not isinstance(again, Exception):
            return again
        error = again
    trouble.num_given_up += 1
    out_of_memory = is_out_of_memory(error)
    reason = "it does not fit into the teacher's memory" if out_of_memory else "the teacher failed on it"
    failure = ScoringFailed(f"sequence of {len(batch[0].sequence)} tokens given up after {TRIES_ALONE} tries: {reason}")
    failure.lasting = not out_of_memory and type(error).__name__ != ENGINE_DEAD
    return [failure]


def _score_half(
    backend: TeacherBackend, batch: Sequence[ScoreRequest], trouble: Trouble, turns: Turns
) -> list[SparseTargets | RequestError]:
    first = _try(backend, batch, trouble)
    return _score_again(backend, batch, trouble, first, turns) if isinstance(first, Exception) else first


def is_broken(backend: TeacherBackend, good: ScoreRequest) -> bool:
    """Whether the backend fails on a request that it has answered before: then no sequence is to blame."""
    try:
        backend.score([good])
    except Exception:
        log.exception("the backend fails on a sequence that it has scored before")
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """MemoryError or torch.OutOfMemoryError, told by name: the scheduler runs without torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _note(trouble: Trouble, batch: Sequence[ScoreRequest], error: Exception) -> None:
    out_of_memory = is_out_of_memory(error)
    trouble.num_failures += 1
    trouble.num_out_of_memory += out_of_memory
    num_tokens = sum(len(request.sequence) for request in batch)
    if out_of_memory:
        log.warning("batch of %d sequences, %d tokens, does not fit: %s", len(batch), num_tokens, error)
    else:
        log.error("batch of %d sequences, %d tokens, failed", len(batch), num_tokens, exc_info=error)
