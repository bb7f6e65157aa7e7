"""Any Hugging Face causal language model as a teacher, on a CPU or a GPU; the reference for other backends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from logitstream import metrics
from logitstream.errors import NonFiniteLogits, RequestError
from logitstream.sampling import among_rows, draw, rows_at_once, warm_up
from logitstream.split_model import SplitModel
from logitstream.tokenizer import load_tokenizer, tokenizer_digest
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo
from logitstream.uniforms import draw_key, row_uniforms, uniforms_per_row
from teacher_server.backend import ScoreRequest
from teacher_server.batching import split_by_length
from teacher_server.rope_lengths import LengthDependence
from teacher_server.vocabulary import check_vocab_size, served_vocab_size
from teacher_server.weights import WeightsChanged, is_being_written, weights_digest, weights_folder, weights_stamps

PASS_OVERHEAD_TOKENS = {"cpu": 32, "cuda": 1024}
"""What a forward pass costs beside its tokens, in tokens of computing: rough guesses, not measured."""
LONGEST_SEQUENCE = 1 << 20
"""Where a model's configuration gives no limit."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Unique:
    """One distinct sequence of token ids, everybody who asked for it, and the rows that any of them wants."""

    token_ids: npt.NDArray[np.int32]
    askers: list[int] = field(default_factory=list)
    wanted: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))


@dataclass(slots=True, eq=False)
class _Drawing:
    """One request while its rows are drawn: wanted rows, the key of their uniforms, what was drawn so far."""

    request: ScoreRequest
    rows: npt.NDArray[np.int64]
    key: bytes
    parts: list[SparseTargets] = field(default_factory=list)
    error: RequestError | None = None


class TransformersBackend:
    """Scores batches with a loaded model; see TeacherBackend."""

    def __init__(
        self,
        model: Any,
        info: TeacherInfo,
        *,
        vocab_size: int = 0,
        max_padded_tokens: int = 8192,
        logits_chunk_bytes: int = 24 << 20,
    ) -> None:
        head = model.get_output_embeddings()
        num_rows = model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
        self._info = replace(info, vocab_size=served_vocab_size(vocab_size, num_rows=num_rows))
        self._by_length = LengthDependence(model)  # before the first pass, which may change what it remembers
        self._lm: SplitModel | None = SplitModel(model.eval().requires_grad_(False))
        self._pads_safely = self._lm.pads_safely()
        if not self._pads_safely:
            log.warning("%s: padding changes its results, only equal lengths share a pass", type(model).__name__)
        if self._by_length:
            log.info("%s: %s: shorter and longer ones never share a pass", type(model).__name__, self._by_length)
        self._device: torch.device = model.device
        self._max_padded_tokens = max_padded_tokens
        self._chunk_rows = max(1, logits_chunk_bytes // (model.dtype.itemsize * num_rows))
        self._pass_overhead_tokens = PASS_OVERHEAD_TOKENS.get(model.device.type, 1024)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str = "main",
        tokenizer: str = "",
        dtype: str = "auto",
        device: str = "auto",
        vocab_size: int = 0,
        max_padded_tokens: int = 8192,
        logits_chunk_bytes: int = 24 << 20,
    ) -> TransformersBackend:
        """Load safetensors weights from a folder or the hub; code that comes with a model is never run.

        vocab_size: serve only the first so many ids, those past the tokenizer's being padding; 0: all rows of the head.
        Raises ValueError for an adapter or a part of a model, WeightsChanged where it is written to meanwhile.
        """
        folder = weights_folder(model, revision)
        stamps, digest = weights_stamps(folder), weights_digest(folder)
        words = load_tokenizer(tokenizer, str(folder))
        check_vocab_size(vocab_size, words)
        device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        started = time.monotonic()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a log is read line by line
        lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        lm = lm.to(device)
        if device == "cpu":
            _own_weights(lm)
        if is_being_written(folder) or weights_stamps(folder) != stamps:
            raise WeightsChanged(f"{folder} is written to while it is loaded: start again when its weights are whole")
        warm_up(lm.dtype)
        info = TeacherInfo(
            model=model,
            revision="" if Path(model).is_dir() else revision,
            weights_digest=digest,
            tokenizer_digest=tokenizer_digest(words),
            vocab_size=lm.config.get_text_config().vocab_size,
            dtype=str(lm.dtype).removeprefix("torch."),
            max_sequence_tokens=getattr(lm.config.get_text_config(), "max_position_embeddings", LONGEST_SEQUENCE),
            backend="transformers",
        )
        log.info("loaded %s in %s on %s, %.1f s", model, info.dtype, device, time.monotonic() - started)
        return cls(
            lm,
            info,
            vocab_size=vocab_size,
            max_padded_tokens=max_padded_tokens,
            logits_chunk_bytes=logits_chunk_bytes,
        )

    def describe(self) -> TeacherInfo:
        return self._info

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        """Each distinct sequence goes through the model once, whoever asked for it and with whatever spec."""
        try:
            return self._score(batch)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise MemoryError(str(error)) from error

    def healthy(self) -> bool:
        return self._lm is not None

    def close(self) -> None:
        self._lm = None
        torch.cuda.empty_cache()  # does nothing where CUDA was never used

    def _score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        uniques = _distinct(batch)
        drawings = [_drawing(request) for request in batch]
        for members in self._passes([len(unique.token_ids) for unique in uniques]):
            self._score_pass([uniques[index] for index in members], drawings)
        return [drawing.error or _all_rows(drawing, self._info.vocab_size) for drawing in drawings]

    def _passes(self, lengths: list[int]) -> list[list[int]]:
        assert self._lm is not None, "score after close"
        overhead = self._pass_overhead_tokens if self._pads_safely else 0
        most_tokens = self._max_padded_tokens if self._lm.is_split else 1
        groups: dict[Any, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault(self._by_length.group(length), []).append(index)
        passes = [
            [members[place] for place in one]
            for members in groups.values()
            for one in split_by_length(
                [lengths[index] for index in members], pass_overhead_tokens=overhead, max_padded_tokens=most_tokens
            )
        ]
        padded = sum(len(members) * max(lengths[index] for index in members) for members in passes)
        metrics.TEACHER_PADDING_TOKENS.inc(padded - sum(lengths))
        return passes

    def _score_pass(self, uniques: list[_Unique], drawings: list[_Drawing]) -> None:
        assert self._lm is not None
        start = time.perf_counter()
        ids = [torch.from_numpy(unique.token_ids).long() for unique in uniques]
        self._by_length.forget()
        hidden = self._lm.hidden(pad_sequence(ids, batch_first=True).to(self._device, non_blocking=True))
        rows = [np.flatnonzero(unique.wanted) for unique in uniques]
        if len(uniques) == 1 and uniques[0].wanted.all():
            hidden_NH = hidden[0]  # no copy: it may be whole logits
        else:
            hidden_NH = torch.cat([hidden[i, torch.from_numpy(r).to(hidden.device)] for i, r in enumerate(rows)])
        del hidden
        if hidden_NH.is_cuda:
            torch.cuda.synchronize()  # so that the stages' times mean what they say; the draw would wait anyway
        forward_seconds = time.perf_counter() - start
        draw_seconds = 0.0
        owner = np.repeat(np.arange(len(uniques)), [len(r) for r in rows])
        row_of = np.concatenate(rows)
        for first in range(0, len(row_of), self._chunk_rows):
            start = time.perf_counter()
            logits = self._lm.logits(hidden_NH[first : first + self._chunk_rows])[:, : self._info.vocab_size]
            middle = time.perf_counter()
            chunk = slice(first, first + self._chunk_rows)
            _draw_chunk(logits, _jobs(uniques, owner[chunk], row_of[chunk], drawings), self._chunk_rows)
            del logits  # before the next chunk's, which then take their place in memory and in the cache
            forward_seconds += middle - start
            draw_seconds += time.perf_counter() - middle
        metrics.TEACHER_STAGE_SECONDS.labels("forward").observe(forward_seconds)
        metrics.TEACHER_STAGE_SECONDS.labels("draw").observe(draw_seconds)


def _own_weights(lm: Any) -> None:
    """Move them out of the mapped files: a checkpoint may be written over while it is served."""
    for tensor in (*lm.parameters(), *lm.buffers()):
        tensor.data = tensor.data.clone()


def _distinct(batch: Sequence[ScoreRequest]) -> list[_Unique]:
    found: dict[bytes, _Unique] = {}
    for index, request in enumerate(batch):
        sequence = request.sequence
        unique = found.setdefault(sequence.token_ids.tobytes(), _Unique(sequence.token_ids))
        if not unique.askers:
            unique.wanted = np.zeros(len(sequence), bool)
        unique.askers.append(index)
        unique.wanted = unique.wanted | (True if sequence.loss_mask is None else sequence.loss_mask)
    return list(found.values())


def _drawing(request: ScoreRequest) -> _Drawing:
    sequence = request.sequence
    rows = np.arange(len(sequence)) if sequence.loss_mask is None else np.flatnonzero(sequence.loss_mask)
    return _Drawing(request, rows, draw_key(request.spec, sequence, request.draw_set))


Job = tuple[_Drawing, npt.NDArray[np.int64], slice]
"""A request, the chunk's rows that it wants, and which of its wanted rows they are."""


def _jobs(
    uniques: list[_Unique], owner: npt.NDArray[np.int64], row_of: npt.NDArray[np.int64], drawings: list[_Drawing]
) -> Iterator[Job]:
    for index in np.unique(owner):
        at = np.flatnonzero(owner == index)
        first_row, last_row = int(row_of[at[0]]), int(row_of[at[-1]])
        for asker in uniques[int(index)].askers:
            drawing = drawings[asker]
            start, stop = np.searchsorted(drawing.rows, [first_row, last_row + 1])
            wanted = slice(int(start), int(stop))
            if stop > start:
                yield drawing, at[np.searchsorted(row_of[at], drawing.rows[wanted])], wanted


def _draw_chunk(logits: Tensor, jobs: Iterator[Job], max_rows: int) -> None:
    """Draw requests of one spec together, at most max_rows rows at a time and no more than the spec allows."""
    by_spec: dict[TargetSpec, list[Job]] = {}
    for job in jobs:
        spec = job[0].request.spec
        most = min(max_rows, rows_at_once(spec, logits.shape[1]))
        waiting = by_spec.setdefault(spec, [])
        for piece in _pieces(job, most):
            if waiting and sum(len(at) for _, at, _ in waiting) + len(piece[1]) > most:
                _draw_jobs(logits, waiting)
                waiting.clear()
            waiting.append(piece)
    for waiting in by_spec.values():
        _draw_jobs(logits, waiting)


def _pieces(job: Job, most: int) -> Iterator[Job]:
    drawing, at, wanted = job
    for i in range(0, len(at), most):
        yield drawing, at[i : i + most], slice(wanted.start + i, min(wanted.start + i + most, wanted.stop))


def _draw_jobs(logits: Tensor, jobs: list[Job]) -> None:
    """One draw for all; where it fails, one each, so that bad logits fail their own sequence alone."""
    at = np.concatenate([job[1] for job in jobs])
    spec = jobs[0][0].request.spec
    uniforms = np.concatenate([row_uniforms(spec, drawing.key, drawing.rows[wanted]) for drawing, _, wanted in jobs])
    names = np.concatenate([drawing.rows[wanted] for drawing, _, wanted in jobs])
    whole = len(at) == len(logits) and bool((at == np.arange(len(at))).all())
    rows = logits if whole else logits[torch.from_numpy(at).to(logits.device)]
    try:
        drawn = draw(rows, spec, uniforms, row_names=names)
    except NonFiniteLogits as error:
        if len(jobs) == 1:
            jobs[0][0].error = error
            return
        for job in jobs:
            _draw_jobs(logits, [job])
        return
    start = 0
    for drawing, job_rows, _ in jobs:
        drawing.parts.append(drawn.slice_rows(start, start + len(job_rows)))
        start += len(job_rows)


def _all_rows(drawing: _Drawing, vocab_size: int) -> SparseTargets:
    """The drawn rows among all rows of the sequence, the others empty."""
    request = drawing.request
    if drawing.parts:
        drawn = SparseTargets.concatenate(drawing.parts)
    else:
        drawn = draw(torch.empty(0, vocab_size), request.spec, np.empty((0, uniforms_per_row(request.spec))))
    return among_rows(drawn, drawing.rows, len(request.sequence))
