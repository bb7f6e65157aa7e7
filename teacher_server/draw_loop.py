"""The draw loop of every backend: hidden states in, targets of the wanted rows out.

Logits exist for one bounded chunk of rows at a time. Suffixes: R rows of one pass or engine step, N rows of one draw,
H hidden size, V vocabulary.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logitstream.errors import NonFiniteLogits
from logitstream.samplers import Int64s
from logitstream.sampling import draw, row_uniforms, rows_at_once
from logitstream.types import TargetSpec
from teacher_server.drawings import Drawn, Launched, Packed, Part, Piece
from teacher_server.gpu import Gpu

Project = Callable[[Tensor], Tensor | None]
"""Hidden states [R, H] -> logits [R, V]; None on a rank that helps to project and leaves the draw to another rank."""


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces of one spec to draw together, and their rows in the chunk's logits."""

    spec: TargetSpec
    pieces: list[Piece]
    rows: Int64s


@dataclass(frozen=True, slots=True)
class Chunk:
    """Places in the hidden states to project together, ascending, and what to draw from their logits."""

    places: Int64s
    groups: list[Group]


def plan(num_places: int, pieces: Iterable[Piece], *, vocab_size: int, max_rows: int) -> Iterator[Chunk]:
    """Yield chunks of at most max_rows places that hold each wanted row once, whoever wants it, in order."""
    # By the place of the next row, so that a chunk looks only at the pieces that it touches.
    pending = [(int(piece.places[0]), number, piece) for number, piece in enumerate(pieces) if len(piece.rows)]
    heapq.heapify(pending)
    is_wanted = np.zeros(num_places, bool)
    for _, _, piece in pending:
        is_wanted[piece.places] = True
    wanted = np.flatnonzero(is_wanted)
    for first in range(0, len(wanted), max_rows):
        places = wanted[first : first + max_rows]
        by_spec: dict[TargetSpec, list[Piece]] = {}
        for piece in _take_until(pending, int(places[-1])):
            by_spec.setdefault(piece.drawing.request.spec, []).append(piece)
        yield Chunk(
            places,
            [
                Group(spec, group, np.searchsorted(places, np.concatenate([piece.places for piece in group])))
                for spec, same_spec in by_spec.items()
                for group in _bounded(same_spec, min(max_rows, rows_at_once(spec, vocab_size)))
            ],
        )


def draw_pieces(
    hidden_RH: Tensor, pieces: Iterable[Piece], project: Project, *, vocab_size: int, max_rows: int
) -> float:
    """Draw every piece's rows; return the seconds spent drawing, without those of `project`."""
    seconds = 0.0
    for chunk in plan(len(hidden_RH), pieces, vocab_size=vocab_size, max_rows=max_rows):
        logits = project(select(hidden_RH, chunk.places))
        if logits is None:
            continue
        _check_shape(logits, (len(chunk.places), vocab_size))
        start = time.perf_counter()
        for group in chunk.groups:
            _draw_group(logits, group.rows, group.spec, group.pieces)
        del logits  # before the next chunk's logits, which can then reuse the memory
        seconds += time.perf_counter() - start
    return seconds


@torch.inference_mode()
def launch_pieces(
    hidden_RH: Tensor, pieces: Iterable[Piece], project: Project, gpu: Gpu, *, vocab_size: int, max_rows: int
) -> Launched:
    """Do what `draw_pieces` does on a GPU, without waiting for it: the parts that drawings get are on their way."""
    from logitstream.kernels.draw import RowNames, draw, key_words

    launched, keys, numbers = Launched(), dict[bytes, int](), list[Int64s]()
    chunks = list(plan(len(hidden_RH), pieces, vocab_size=vocab_size, max_rows=max_rows))
    for chunk in chunks:
        numbers.append(chunk.places)
        for group in chunk.groups:
            sequences = [keys.setdefault(piece.drawing.key, len(keys)) for piece in group.pieces]
            numbers.append(group.rows)
            numbers.append(np.repeat(sequences, [len(piece.rows) for piece in group.pieces]))
            numbers.append(np.concatenate([piece.rows for piece in group.pieces]))
    if not chunks:
        return launched
    words, outputs, first = gpu.send(key_words(list(keys))), list[Tensor](), 0
    sent = iter(gpu.send(np.concatenate(numbers).astype(np.int32)).split([len(one) for one in numbers]))  # type: ignore[no-untyped-call]
    for chunk in chunks:
        logits = project(select(hidden_RH, chunk.places, next(sent)))
        if logits is not None:
            _check_shape(logits, (len(chunk.places), vocab_size))
        start = gpu.mark()
        for group in chunk.groups:
            rows, *names = (next(sent) for _ in range(3))
            if logits is None:
                continue
            if not group.spec.kind.on_gpu:
                _draw_group(logits, group.rows, group.spec, group.pieces)
                continue
            packed = draw(select(logits, group.rows, rows), group.spec, RowNames(words, *names), launch=gpu.launch)
            _deliver(Packed(launched, first, packed.shape, group.spec, vocab_size), group.pieces)
            outputs.append(packed.flatten())
            first += packed.numel()
        launched.marks.append((start, gpu.mark()))
        del logits
    if outputs:
        launched.fetched = gpu.fetch(torch.cat(outputs))
    return launched


def _deliver(drawn: Drawn | Packed, pieces: Iterable[Piece]) -> None:
    start = 0
    for piece in pieces:
        piece.drawing.add(Part(drawn, start, start + len(piece.rows)))
        start += len(piece.rows)


def _check_shape(logits: Tensor, expected: tuple[int, int]) -> None:
    if logits.shape != expected:
        raise RuntimeError(f"expected logits of shape {expected}, got {tuple(logits.shape)}")


def _take_until(pending: list[tuple[int, int, Piece]], last_place: int) -> Iterator[Piece]:
    """Remove and yield the rows up to last_place from a heap of pieces."""
    while pending and pending[0][0] <= last_place:
        _, number, piece = heapq.heappop(pending)
        stop = int(np.searchsorted(piece.places, last_place, side="right"))
        if stop < len(piece.places):
            heapq.heappush(pending, (int(piece.places[stop]), number, piece.cut(stop)))
        yield piece.cut(0, stop)


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


def _draw_group(logits_RV: Tensor, rows: Int64s, spec: TargetSpec, pieces: Sequence[Piece]) -> None:
    """Draw all pieces at once; if that fails, each by itself, so that bad logits fail only their own request."""
    uniforms = np.concatenate([row_uniforms(spec, piece.drawing.key, piece.rows) for piece in pieces])
    names = np.concatenate([piece.rows for piece in pieces])
    try:
        _deliver(Drawn(draw(select(logits_RV, rows), spec, uniforms, row_names=names)), pieces)
    except NonFiniteLogits as error:
        if len(pieces) == 1:
            pieces[0].drawing.fail(error)
            return
        for piece in pieces:
            _draw_group(logits_RV, rows[: len(piece.rows)], spec, [piece])
            rows = rows[len(piece.rows) :]


def select(tensor: Tensor, rows: Int64s, on_device: Tensor | None = None) -> Tensor:
    """Return these rows of a tensor [R, ...], as a view if they are consecutive."""
    if (np.diff(rows) == 1).all():
        return tensor[int(rows[0]) : int(rows[-1]) + 1]
    return tensor[torch.from_numpy(rows).to(tensor.device) if on_device is None else on_device]
