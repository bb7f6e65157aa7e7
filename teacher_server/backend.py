"""The seam between scheduling and models: a backend scores batches and draws their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from logitstream import types
from logitstream.errors import RequestError
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One sequence to score, how to draw its targets, and which of the independent draws."""

    sequence: TokenSequence
    spec: TargetSpec
    draw_set: int = 0


def entries_bound(request: ScoreRequest, vocab_size: int) -> int:
    """The most entries that this request's targets can have."""
    return types.entries_bound(request.sequence, request.spec, vocab_size)


def cost_in_tokens(request: ScoreRequest, vocab_size: int) -> int:
    """What a request counts in credit, queues and batches."""
    return types.credit_tokens(request.sequence, request.spec, vocab_size)


class TeacherBackend(Protocol):
    """Called from one thread at a time, never from the event loop, but for `describe` and `healthy`.

    One that has an attribute `batches_at_once` (an int) has `score` called from so many threads: another batch is at
    hand when one is done.
    """

    def describe(self) -> TeacherInfo:
        """What is served now; limits of the server are filled in by the caller."""
        ...

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        """One result a request, in order: targets with a row for every token, or what is wrong with that sequence.

        Rows outside the loss mask are empty. Raises torch.OutOfMemoryError or MemoryError where the batch is too large
        for the device (the scheduler splits it), any other exception where the backend failed.
        """
        ...

    def healthy(self) -> bool:
        """Whether it can score at the moment; called from any thread."""
        ...

    def close(self) -> None:
        """Free the model; idempotent."""
        ...
