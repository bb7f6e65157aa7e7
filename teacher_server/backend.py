"""The seam between scheduling and models: a backend scores batches and draws their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from logitstream.errors import RequestError
from logitstream.tokenizer import HasVocabulary
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence

BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 16_384
"""Tokens of one batch where nothing else is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One sequence to score, how to draw its targets, and which of the independent draws."""

    sequence: TokenSequence
    spec: TargetSpec
    draw_set: int = 0


@dataclass(frozen=True, slots=True)
class EncodedTargets:
    """Targets that the backend has encoded itself."""

    payload: bytes
    num_rows: int
    num_entries: int


ScoreResult = SparseTargets | EncodedTargets | RequestError
"""A request's targets, with a row for every token and those outside the loss mask empty, or its error."""


class TeacherBackend(Protocol):
    """A model that scores batches; called from one thread at a time, except for `describe` and `healthy`.

    A backend with an attribute `batches_at_once` (an int) has `score` called from that many threads, so that the next
    batch is at hand when one is done; `batch_tokens` is what it wants in a batch where the settings leave it open. One
    that returns EncodedTargets has a method `configure_encoding(id_model, max_bytes)`, called once before requests are
    served.
    """

    def describe(self) -> TeacherInfo:
        """Return what is served now; the caller fills in the server's limits."""
        ...

    def score(self, batch: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """Return one result per request, in order.

        Raises torch.OutOfMemoryError or MemoryError if the batch is too large for the device (it is retried in halves),
        any other exception if the backend failed.
        """
        ...

    def healthy(self) -> bool:
        """Return True if it can score now; called from any thread."""
        ...

    def close(self) -> None:
        """Free the model; idempotent."""
        ...


def check_vocab_size(vocab_size: int, tokenizer: HasVocabulary) -> None:
    """Raise ValueError if an id of the tokenizer would be cut off; 0 cuts nothing."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if 0 < vocab_size <= largest:
        raise ValueError(f"vocab_size must be above {largest}, the tokenizer's largest id, got {vocab_size}")


def served_vocab_size(vocab_size: int, *, num_rows: int) -> int:
    """Return how many ids are served: all rows of the head for 0; ValueError if there are fewer than asked for."""
    if not 0 <= vocab_size <= num_rows:
        raise ValueError(f"vocab_size must be at most {num_rows}, the rows of the teacher's head, got {vocab_size}")
    return vocab_size or num_rows
