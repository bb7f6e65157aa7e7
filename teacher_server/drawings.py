"""Requests while their rows are drawn: on the host at once, or on a GPU, whose numbers come later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from logitstream.distribution import bad_row
from logitstream.errors import RequestError
from logitstream.samplers import Int64s
from logitstream.sampling import draw, draw_key, scatter_rows, uniforms_per_row, unpack
from logitstream.types import SparseTargets, TargetSpec
from teacher_server.backend import ScoreRequest
from teacher_server.gpu import Fetched


@dataclass(slots=True, eq=False)
class Drawing:
    """One request while its wanted rows are drawn; an error, such as bad logits, ends it."""

    request: ScoreRequest
    error: RequestError | None = None
    rows: Int64s = field(init=False)
    key: bytes = field(init=False)
    _parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        sequence = self.request.sequence
        mask = sequence.loss_mask
        self.rows = np.arange(len(sequence)) if mask is None else np.flatnonzero(mask)
        self.key = draw_key(self.request.spec, sequence, self.request.draw_set)

    def piece(self, first_row: int, stop_row: int, *, offset: int) -> Piece:
        """Return the wanted rows from first_row on; first_row itself is at `offset` in the hidden states."""
        low, high = np.searchsorted(self.rows, [first_row, stop_row])
        rows = self.rows[low:high]
        return Piece(self, rows, rows - first_row + offset)

    def add(self, part: Part) -> None:
        """Append the next rows."""
        if self.error is None:
            self._parts.append(part)

    def fail(self, error: RequestError) -> None:
        """Keep the first error and drop what was drawn."""
        self.error = self.error or error
        self._parts = []

    def forget_from(self, row: int) -> None:
        """Drop the rows from `row` on: they are computed again."""
        kept, left = [], int(np.searchsorted(self.rows, row))
        for part in self._parts:
            if left > 0:
                kept.append(replace(part, stop=min(part.stop, part.start + left)))
            left -= part.stop - part.start
        self._parts = kept

    def result(self, vocab_size: int) -> SparseTargets | RequestError:
        """Return the drawn rows among all rows of the sequence, or the error; wait for them if they come from a GPU."""
        if self.error is not None:
            return self.error
        spec, parts, row = self.request.spec, [], 0
        for part in self._parts:
            targets, is_bad = part.drawn.get()
            if is_bad is not None and (bad := np.flatnonzero(is_bad[part.start : part.stop])).size:
                return bad_row(int(self.rows[row + bad[0]]))
            parts.append(targets.slice_rows(part.start, part.stop))
            row += part.stop - part.start
        if not parts:
            parts = [draw(torch.empty(0, vocab_size), spec, np.empty((0, uniforms_per_row(spec))))]
        return scatter_rows(SparseTargets.concatenate(parts), self.rows, len(self.request.sequence))


@dataclass(frozen=True, slots=True)
class Part:
    """Rows start to stop of what was drawn together."""

    drawn: Drawn | Packed
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows that the host has drawn: none of them bad, or it would have said so."""

    targets: SparseTargets

    def get(self) -> tuple[SparseTargets, None]:
        return self.targets, None


class Packed:
    """Rows that a GPU draws, [2, R, W] of a batch's numbers at `first`."""

    def __init__(self, batch: Launched, first: int, shape: Sequence[int], spec: TargetSpec, vocab_size: int) -> None:
        self._batch, self._first, self._shape = batch, first, shape
        self._spec, self._vocab_size = spec, vocab_size

    def get(self) -> tuple[SparseTargets, npt.NDArray[np.bool_]]:
        """Wait for the batch; return the targets and which rows are bad."""
        return self._unpacked

    @cached_property
    def _unpacked(self) -> tuple[SparseTargets, npt.NDArray[np.bool_]]:
        numbers = self._batch.numbers[self._first : self._first + math.prod(self._shape)]
        return unpack(numbers.reshape(self._shape), self._spec, self._vocab_size)


class Launched:
    """Draws of one batch on a GPU, whose numbers come in one copy; marks: the events around each chunk's draws."""

    def __init__(self) -> None:
        self.fetched: Fetched | None = None
        self.marks: list[tuple[Any, Any]] = []

    @cached_property
    def numbers(self) -> npt.NDArray[np.int32]:
        assert self.fetched is not None, "the launch failed"
        return self.fetched.array()

    def draw_seconds(self) -> float:
        """Return the device's time in draws, once it is over."""
        return float(sum(start.elapsed_time(end) for start, end in self.marks)) / 1000


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one request and their places in the hidden states, both ascending."""

    drawing: Drawing
    rows: Int64s
    places: Int64s

    def cut(self, start: int, stop: int | None = None) -> Piece:
        """Return the piece's rows from start to stop."""
        return Piece(self.drawing, self.rows[start:stop], self.places[start:stop])
