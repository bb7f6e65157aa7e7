"""Score a batch whatever happens: halve it when it does not fit, find the sequence that breaks the backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from logitstream.errors import RequestError, ScoringFailed
from logitstream.types import SparseTargets
from teacher_server.backend import ScoreRequest, TeacherBackend

TRIES_ALONE = 2
"""How often a sequence is tried by itself before it is given up."""
ENGINE_DEAD = "EngineDeadError"
"""vLLM's error of an engine that died, told by name; it is started again, and need not die of the same sequence."""

log = logging.getLogger(__name__)


class BackendBroken(Exception):
    """The backend fails on sequences that it has scored before; only a new process can help."""


@dataclass(slots=True)
class Trouble:
    """What went wrong on the way: numbers for metrics and for the scheduler's next batches."""

    num_failures: int = 0
    num_out_of_memory: int = 0
    num_given_up: int = 0


def score_isolating(
    backend: TeacherBackend, batch: Sequence[ScoreRequest], trouble: Trouble
) -> list[SparseTargets | RequestError]:
    """One result a request, in order; never raises for what the backend does.

    A batch that fails is scored in halves, so one bad sequence costs log2(n) batches and the others get their targets.
    """
    tries = TRIES_ALONE if len(batch) == 1 else 1
    for _ in range(tries):
        try:
            results = backend.score(batch)
            if len(results) != len(batch):
                raise RuntimeError(f"the backend gave {len(results)} results for {len(batch)} sequences")
            return results
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            lasting = not out_of_memory and type(error).__name__ != ENGINE_DEAD
            _note(trouble, batch, error, out_of_memory=out_of_memory)
    if len(batch) > 1:
        middle = len(batch) // 2
        first, second = batch[:middle], batch[middle:]
        return score_isolating(backend, first, trouble) + score_isolating(backend, second, trouble)
    trouble.num_given_up += 1
    reason = "it does not fit into the teacher's memory" if out_of_memory else "the teacher failed on it"
    failure = ScoringFailed(f"sequence of {len(batch[0].sequence)} tokens given up after {tries} tries: {reason}")
    failure.lasting = lasting
    return [failure]


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


def _note(trouble: Trouble, batch: Sequence[ScoreRequest], error: Exception, *, out_of_memory: bool) -> None:
    trouble.num_failures += 1
    trouble.num_out_of_memory += out_of_memory
    num_tokens = sum(len(request.sequence) for request in batch)
    if out_of_memory:
        log.warning("batch of %d sequences, %d tokens, does not fit: %s", len(batch), num_tokens, error)
    else:
        log.error("batch of %d sequences, %d tokens, failed", len(batch), num_tokens, exc_info=error)
