"""A teacher backend without a model: targets that follow from the sequence. Imports no torch, so it starts fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from logitstream.errors import RequestError
from logitstream.types import SparseTargets, TeacherInfo
from teacher_server.backend import ScoreRequest

FAKE_DIGEST = "fa" * 32


def fake_targets(request: ScoreRequest, *, vocab_size: int, entries_per_row: int = 4) -> SparseTargets:
    """`entries_per_row` distinct ids a wanted row, a function of the row's token, its position and the draw set."""
    sequence = request.sequence
    num_rows = len(sequence)
    wanted = np.ones(num_rows, bool) if sequence.loss_mask is None else sequence.loss_mask
    rows = np.flatnonzero(wanted)
    width = min(entries_per_row, vocab_size)
    step = vocab_size // width
    mixed = sequence.token_ids[rows].astype(np.int64) * 31 + rows * 17 + request.draw_set % 1009
    token_ids = np.arange(width) * step + (mixed % step)[:, None]
    counts = np.ones((len(rows), width), np.int32)
    units = max(request.spec.num_samples, width)
    counts[:, 0] = units - (width - 1)
    return SparseTargets(
        vocab_size=vocab_size,
        units=units,
        row_offsets=np.concatenate([[0], np.cumsum(wanted * width)]).astype(np.int64),
        token_ids=token_ids.reshape(-1).astype(np.int32),
        counts=counts.reshape(-1),
    )


class FakeBackend:
    """Takes `delay_seconds` a batch plus `seconds_per_token`; `fault` may raise or give a request's error."""

    def __init__(
        self,
        *,
        vocab_size: int = 1000,
        entries_per_row: int = 4,
        delay_seconds: float = 0.0,
        seconds_per_token: float = 0.0,
        max_sequence_tokens: int = 4096,
        weights_digest: str = FAKE_DIGEST,
        tokenizer_digest: str = "70" * 32,
        fault: Callable[[Sequence[ScoreRequest]], RequestError | None] | None = None,
    ) -> None:
        self.batches: list[list[ScoreRequest]] = []
        self.closed = False
        self._entries_per_row = entries_per_row
        self._delay_seconds = delay_seconds
        self._seconds_per_token = seconds_per_token
        self._fault = fault
        self._info = TeacherInfo(
            model="fake",
            weights_digest=weights_digest,
            tokenizer_digest=tokenizer_digest,
            vocab_size=vocab_size,
            dtype="float32",
            max_sequence_tokens=max_sequence_tokens,
            backend="fake",
        )

    def describe(self) -> TeacherInfo:
        return self._info

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        self.batches.append(list(batch))
        del self.batches[:-1000]
        seconds = self._delay_seconds + self._seconds_per_token * sum(len(request.sequence) for request in batch)
        if seconds:
            time.sleep(seconds)
        if self._fault is not None:
            self._fault(batch)
        return [self._one(request) for request in batch]

    def _one(self, request: ScoreRequest) -> SparseTargets | RequestError:
        error = self._fault([request]) if self._fault is not None else None
        if error is not None:
            return error
        return fake_targets(request, vocab_size=self._info.vocab_size, entries_per_row=self._entries_per_row)

    def healthy(self) -> bool:
        return not self.closed

    def close(self) -> None:
        self.closed = True
