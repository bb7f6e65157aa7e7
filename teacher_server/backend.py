"""The seam between scheduling and models: a backend scores batches and draws their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from logitstream.errors import RequestError
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One sequence to score, how to draw its targets, and which of the independent draws."""

    sequence: TokenSequence
    spec: TargetSpec
    draw_set: int = 0


class TeacherBackend(Protocol):
    """Called from one thread at a time, never from the event loop."""

    def describe(self) -> TeacherInfo:
        """What is served now; limits of the server are filled in by the caller."""
        ...

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        """One result a request, in order: targets with a row for every token, or what is wrong with that sequence.

        Rows outside the loss mask are empty. Raises torch.OutOfMemoryError or MemoryError where the batch is too large
        for the device (the scheduler splits it), any other exception where the backend failed.
        """
        ...

    def close(self) -> None:
        """Free the model; idempotent."""
        ...
