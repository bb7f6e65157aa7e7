"""The draw loop of every backend: hidden states in, targets of the wanted rows out.

Logits exist for one bounded chunk of rows at a time. Suffixes: R rows of one pass or engine step, N rows of one draw,
H hidden size, V vocabulary.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.errors import NonFiniteLogits
from logitstream.sampling import draw, draw_key, row_uniforms, rows_at_once, scatter_rows, uniforms_per_row
from logitstream.types import SparseTargets, TargetSpec
from teacher_server.backend import ScoreRequest

Int64s = npt.NDArray[np.int64]
Project = Callable[[Tensor], Tensor | None]
"""Hidden states [R, H] -> logits [R, V]; None on a rank that helps to project and leaves the draw to another rank."""


@dataclass(slots=True, eq=False)
class Drawing:
    """One request while its wanted rows are drawn; bad logits end it with an error."""

    request: ScoreRequest
    error: NonFiniteLogits | None = None
    rows: Int64s = field(init=False)
    key: bytes = field(init=False)
    _parts: list[SparseTargets] = field(default_factory=list)

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

    def add(self, drawn: SparseTargets) -> None:
        """Append the next rows."""
        if self.error is None:
            self._parts.append(drawn)

    def fail(self, error: NonFiniteLogits) -> None:
        """Keep the first error and drop what was drawn."""
        self.error = self.error or error
        self._parts = []

    def forget_from(self, row: int) -> None:
        """Drop the rows from `row` on: they are computed again."""
        if self._parts:
            kept = SparseTargets.concatenate(self._parts).slice_rows(0, int(np.searchsorted(self.rows, row)))
            self._parts = [kept] if kept.num_rows else []

    def result(self, vocab_size: int) -> SparseTargets | NonFiniteLogits:
        """Return the drawn rows among all rows of the sequence, or the error."""
        if self.error is not None:
            return self.error
        spec, parts = self.request.spec, self._parts
        if not parts:
            parts = [draw(torch.empty(0, vocab_size), spec, np.empty((0, uniforms_per_row(spec))))]
        return scatter_rows(SparseTargets.concatenate(parts), self.rows, len(self.request.sequence))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one request and their places in the hidden states, both ascending."""

    drawing: Drawing
    rows: Int64s
    places: Int64s

    def cut(self, start: int, stop: int | None = None) -> Piece:
        """Return the piece's rows from start to stop."""
        return Piece(self.drawing, self.rows[start:stop], self.places[start:stop])


def draw_pieces(
    hidden_RH: Tensor, pieces: Iterable[Piece], project: Project, *, vocab_size: int, max_rows: int
) -> float:
    """Draw every piece's rows; return the seconds spent drawing, without those of `project`.

    Each wanted row is projected once, whoever wants it, max_rows rows at a time in the order of their places.
    """
    # By the place of the next row, so that a chunk looks only at the pieces that it touches.
    pending = [(int(piece.places[0]), number, piece) for number, piece in enumerate(pieces) if len(piece.rows)]
    heapq.heapify(pending)
    is_wanted = np.zeros(len(hidden_RH), bool)
    for _, _, piece in pending:
        is_wanted[piece.places] = True
    wanted = np.flatnonzero(is_wanted)
    seconds = 0.0
    for first in range(0, len(wanted), max_rows):
        places = wanted[first : first + max_rows]
        logits = project(_select(hidden_RH, places))
        if logits is None:
            continue
        if logits.shape != (len(places), vocab_size):
            raise RuntimeError(f"expected logits of shape {(len(places), vocab_size)}, got {tuple(logits.shape)}")
        start = time.perf_counter()
        _draw_chunk(logits, places, _take_until(pending, int(places[-1])), max_rows)
        del logits  # before the next chunk's logits, which can then reuse the memory
        seconds += time.perf_counter() - start
    return seconds


def _take_until(pending: list[tuple[int, int, Piece]], last_place: int) -> Iterator[Piece]:
    """Remove and yield the rows up to last_place from a heap of pieces."""
    while pending and pending[0][0] <= last_place:
        _, number, piece = heapq.heappop(pending)
        stop = int(np.searchsorted(piece.places, last_place, side="right"))
        if stop < len(piece.places):
            heapq.heappush(pending, (int(piece.places[stop]), number, piece.cut(stop)))
        yield piece.cut(0, stop)


def _draw_chunk(logits_RV: Tensor, places: Int64s, pieces: Iterable[Piece], max_rows: int) -> None:
    """Draw requests of the same spec together, at most max_rows rows at a time and no more than the spec allows."""
    by_spec: dict[TargetSpec, list[Piece]] = {}
    for piece in pieces:
        by_spec.setdefault(piece.drawing.request.spec, []).append(piece)
    for spec, same_spec in by_spec.items():
        for group in _bounded(same_spec, min(max_rows, rows_at_once(spec, logits_RV.shape[1]))):
            _draw_group(logits_RV, places, spec, group)


def _bounded(pieces: Iterable[Piece], max_rows: int) -> Iterator[list[Piece]]:
    """Yield groups of pieces, cut where needed, of at most max_rows rows each."""
    group: list[Piece] = []
    room = max_rows
    for piece in pieces:
        while len(piece.rows):
            group.append(piece.cut(0, room))
            piece, room = piece.cut(room), room - len(group[-1].rows)
            if room == 0:
                yield group
                group, room = [], max_rows
    if group:
        yield group


def _draw_group(logits_RV: Tensor, places: Int64s, spec: TargetSpec, group: Sequence[Piece]) -> None:
    """Draw all pieces at once; if that fails, each by itself, so that bad logits fail only their own request."""
    logits_NV = _select(logits_RV, np.searchsorted(places, np.concatenate([piece.places for piece in group])))
    uniforms = np.concatenate([row_uniforms(spec, piece.drawing.key, piece.rows) for piece in group])
    try:
        drawn = draw(logits_NV, spec, uniforms, row_names=np.concatenate([piece.rows for piece in group]))
    except NonFiniteLogits as error:
        if len(group) == 1:
            group[0].drawing.fail(error)
        else:
            for piece in group:
                _draw_group(logits_RV, places, spec, [piece])
        return
    start = 0
    for piece in group:
        piece.drawing.add(drawn.slice_rows(start, start + len(piece.rows)))
        start += len(piece.rows)


def _select(tensor: Tensor, rows: Int64s) -> Tensor:
    """Return these rows of a tensor [R, ...], as a view if they are consecutive."""
    if (np.diff(rows) == 1).all():
        return tensor[int(rows[0]) : int(rows[-1]) + 1]
    return tensor[torch.from_numpy(rows).to(tensor.device)]
