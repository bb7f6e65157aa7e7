"""Draws targets where the hidden states are: inside an inference engine's worker, step by step, whatever a step holds.

An engine scores a prompt in chunks of its own choosing, mixes chunks of several prompts in a step, and may start a
prompt again after a preemption. What is kept here is each request's rows so far; a chunk that starts earlier replaces
the rows from there on, so that every position has one row. Logits live for one bounded chunk of rows.

Suffixes: R rows of one step, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitstream.errors import REQUEST_ERRORS, NonFiniteLogits, RequestError, ScoringFailed
from logitstream.sampling import draw, rows_at_once, tail_units_of, units_of
from logitstream.types import SparseTargets, TargetSpec, TokenSequence
from logitstream.uniforms import draw_key, row_uniforms
from teacher_server.backend import ScoreRequest

COPIES_OF_LOGITS = 5
"""Of one chunk in float32 that may exist at a time: the projection, what a gather or a soft cap makes of it, the
float32 of a 16-bit one, and in the draw the relative probabilities and multinomial's tempered ones. What comes on top
is bounded by inverse_cdf.GATHER_BYTES and sampling.MAX_POINTS."""

Outcome = dict[str, Any]
"""What leaves the worker for one request, of plain types alone: `error` and `message`, or the arrays of its targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """Rows first_row to first_row + num_rows of request `key`, at `offset` in the step's hidden states."""

    key: str
    first_row: int
    num_rows: int
    offset: int


@dataclass(slots=True)
class _Progress:
    """One request, its wanted rows drawn so far and the key of their uniforms.

    error: of the engine, seen by all ranks, which project the request no more; bad_logits: seen by the rank that draws
    alone, which goes on to project, as the others do.
    """

    request: ScoreRequest
    wanted: npt.NDArray[np.int64]
    draw_key: bytes
    rows_done: int = 0
    parts: list[SparseTargets] = field(default_factory=list)
    error: RequestError | None = None
    bad_logits: NonFiniteLogits | None = None

    def add(self, drawn: SparseTargets) -> None:
        """The next rows, unless some before them could not be drawn."""
        if self.bad_logits is None:
            self.parts.append(drawn)

    def restart_at(self, row: int) -> None:
        """Forget the rows from `row` on: the engine computes them again."""
        if self.parts and row < self.rows_done:
            kept = SparseTargets.concatenate(self.parts).slice_rows(0, int(np.searchsorted(self.wanted, row)))
            self.parts = [kept] if kept.num_rows else []
        self.rows_done = row


@dataclass(frozen=True, slots=True)
class _Piece:
    """Wanted rows of one request within a step: their numbers in the sequence and their places in the step."""

    progress: _Progress
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


class PromptDraws:
    """The rows drawn so far of the requests that an engine is scoring.

    project: hidden states [R, H] -> logits [R, V]; max_rows: projected at a time; is_drawing: False on the ranks that
    take part in the projection of a divided vocabulary and leave the draw to one of them.
    """

    def __init__(
        self,
        project: Callable[[Tensor], Tensor | None],
        *,
        vocab_size: int,
        max_rows: int,
        is_drawing: bool = True,
    ) -> None:
        self._project = project
        self.is_drawing = is_drawing
        self._vocab_size = vocab_size
        self.max_rows = max_rows
        self.has_met_nan = False
        self._progress: dict[str, _Progress] = {}

    def add(self, key: str, packed: Mapping[str, Any]) -> None:
        """Expect chunks of this request; a known key is left as it is."""
        if key not in self._progress:
            request = unpack_request(packed)
            mask = request.sequence.loss_mask
            wanted = np.arange(len(request.sequence)) if mask is None else np.flatnonzero(mask)
            uniforms_key = draw_key(request.spec, request.sequence, request.draw_set)
            self._progress[key] = _Progress(request, wanted, uniforms_key)

    def step(self, hidden_states: Tensor, chunks: Iterable[PromptChunk]) -> None:
        """Draw the wanted rows of one step from its hidden states [R, H].

        On a CPU, `has_met_nan` is from now on True where they are not all finite, masked rows among them.
        """
        if hidden_states.device.type == "cpu" and not self.has_met_nan:
            self.has_met_nan = not math.isfinite(float(hidden_states.sum(dtype=torch.float32)))
        by_spec: dict[TargetSpec, list[_Piece]] = {}
        # An engine may name the requests of a step in another order than that of their rows.
        for chunk in sorted(chunks, key=attrgetter("offset")):
            piece = self._advance(chunk)
            if piece is not None and len(piece.rows):
                by_spec.setdefault(piece.progress.request.spec, []).append(piece)
        for spec, pieces in by_spec.items():
            self._draw(hidden_states, spec, pieces)

    def _advance(self, chunk: PromptChunk) -> _Piece | None:
        progress = self._progress[chunk.key]
        if chunk.first_row >= len(progress.request.sequence):
            return None  # a decoding step
        last = min(chunk.first_row + chunk.num_rows, len(progress.request.sequence))
        if chunk.first_row > progress.rows_done:
            progress.error = ScoringFailed(
                f"the engine skipped rows {progress.rows_done} to {chunk.first_row}: expected every position to be "
                "computed (is prefix caching on?)"
            )
        if progress.error:
            return None
        progress.restart_at(chunk.first_row)
        progress.rows_done = last
        low, high = np.searchsorted(progress.wanted, [chunk.first_row, last])
        rows = progress.wanted[low:high]
        return _Piece(progress, rows, rows - chunk.first_row + chunk.offset)

    def _draw(self, hidden_states: Tensor, spec: TargetSpec, pieces: Sequence[_Piece]) -> None:
        """Project and draw the rows of all pieces, max_rows at a time, across the borders of requests."""
        for group in _split(pieces, self.max_rows):
            places = np.concatenate([piece.places for piece in group])
            logits = self._project(_select(hidden_states, places))
            if not self.is_drawing:
                continue
            if logits is None or logits.shape != (len(places), self._vocab_size):
                found = None if logits is None else tuple(logits.shape)
                raise RuntimeError(f"expected logits of shape {(len(places), self._vocab_size)}, got {found}")
            start = 0
            for part in _split(group, rows_at_once(spec, self._vocab_size)):
                num_rows = sum(len(piece.rows) for piece in part)
                _draw_part(logits[start : start + num_rows], spec, part)
                start += num_rows
            del logits  # before the next chunk's, which then take their place in memory and in the cache

    def take(self, keys: Iterable[str]) -> list[Outcome]:
        """The outcome of each request, nothing on a rank that does not draw; the requests are forgotten."""
        found = [self._progress.pop(key, None) for key in keys]
        return [_outcome(progress, self._vocab_size) for progress in found] if self.is_drawing else []


def _split(pieces: Sequence[_Piece], max_rows: int) -> Iterable[list[_Piece]]:
    """Groups of pieces of max_rows rows together; a piece that crosses the border is cut."""
    group: list[_Piece] = []
    room = max_rows
    for piece in pieces:
        start = 0
        while start < len(piece.rows):
            stop = min(start + room, len(piece.rows))
            group.append(_Piece(piece.progress, piece.rows[start:stop], piece.places[start:stop]))
            room -= stop - start
            start = stop
            if room == 0:
                yield group
                group, room = [], max_rows
    if group:
        yield group


def _select(hidden_states: Tensor, places: npt.NDArray[np.int64]) -> Tensor:
    """Rows of the step at ascending places [R]; a view where they are neighbours."""
    first, last = int(places[0]), int(places[-1])
    if last - first == len(places) - 1:
        return hidden_states[first : last + 1]
    return hidden_states[torch.from_numpy(places).to(hidden_states.device)]


def _draw_part(logits: Tensor, spec: TargetSpec, part: Sequence[_Piece]) -> None:
    try:
        _append(draw(logits, spec, np.concatenate([_uniforms(piece) for piece in part])), part)
    except NonFiniteLogits:
        _draw_apart(logits, part)


def _uniforms(piece: _Piece) -> npt.NDArray[np.float64]:
    return row_uniforms(piece.progress.request.spec, piece.progress.draw_key, piece.rows)


def _append(drawn: SparseTargets, group: Sequence[_Piece]) -> None:
    start = 0
    for piece in group:
        stop = start + len(piece.rows)
        piece.progress.add(drawn.slice_rows(start, stop))
        start = stop


def _draw_apart(logits: Tensor, group: Sequence[_Piece]) -> None:
    """Draw each request by itself, so that one with bad logits fails alone."""
    start = 0
    for piece in group:
        stop = start + len(piece.rows)
        try:
            drawn = draw(logits[start:stop], piece.progress.request.spec, _uniforms(piece), row_names=piece.rows)
            piece.progress.add(drawn)
        except NonFiniteLogits as error:
            piece.progress.bad_logits = piece.progress.bad_logits or error
            piece.progress.parts.clear()
        start = stop


def _outcome(progress: _Progress | None, vocab_size: int) -> Outcome:
    if progress is None:
        return _failure(ScoringFailed("the engine never computed this request"))
    num_rows = len(progress.request.sequence)
    if progress.error is None and progress.rows_done != num_rows:
        progress.error = ScoringFailed(f"the engine computed {progress.rows_done} of {num_rows} rows")
    error = progress.bad_logits or progress.error
    if error is not None:
        return _failure(error)
    row_lengths = np.zeros(num_rows, np.int64)
    row_lengths[progress.wanted] = _join([np.diff(part.row_offsets) for part in progress.parts])
    spec = progress.request.spec
    return {
        "vocab_size": vocab_size,
        "units": units_of(spec),
        "tail_units": tail_units_of(spec),
        "row_lengths": _narrow(row_lengths),
        "token_ids": _narrow(_join([part.token_ids for part in progress.parts])),
        "counts": _narrow(_join([part.counts for part in progress.parts])),
    }


def _join(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _narrow(array: npt.NDArray[Any]) -> tuple[str, bytes]:
    """Name and bytes of the narrowest unsigned type that holds every value: about 3 bytes an entry."""
    dtype = np.min_scalar_type(int(array.max(initial=0)))
    return dtype.str, array.astype(dtype).tobytes()


def _failure(error: RequestError) -> Outcome:
    return {"error": type(error).__name__, "message": str(error)}


def unpack_outcome(outcome: Outcome, spec: TargetSpec | None = None) -> SparseTargets | RequestError:
    """What `take` packed of a request with this spec, on the other side of the process border."""
    if "error" in outcome:
        return REQUEST_ERRORS[outcome["error"]](outcome["message"])
    lengths, token_ids, counts = (
        np.frombuffer(data, dtype=np.dtype(kind))
        for kind, data in (outcome[name] for name in ("row_lengths", "token_ids", "counts"))
    )
    return SparseTargets(
        vocab_size=outcome["vocab_size"],
        units=outcome["units"],
        tail_units=outcome["tail_units"],
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        token_ids=token_ids.astype(np.int32),
        counts=counts.astype(np.int32),
        spec=spec,
    )


def pack_request(request: ScoreRequest) -> dict[str, Any]:
    """A request as plain types, to travel to the worker beside the prompt."""
    mask = request.sequence.loss_mask
    return {
        "token_ids": request.sequence.token_ids.astype("<i4").tobytes(),
        "loss_mask": None if mask is None else mask.astype(np.uint8).tobytes(),
        "spec": asdict(request.spec),
        "draw_set": request.draw_set,
    }


def unpack_request(packed: Mapping[str, Any]) -> ScoreRequest:
    """What `pack_request` packed."""
    mask = packed["loss_mask"]
    sequence = TokenSequence(
        token_ids=np.frombuffer(packed["token_ids"], dtype="<i4").astype(np.int32),
        loss_mask=None if mask is None else np.frombuffer(mask, dtype=np.uint8).astype(np.bool_),
    )
    return ScoreRequest(sequence=sequence, spec=TargetSpec(**packed["spec"]), draw_set=packed["draw_set"])
