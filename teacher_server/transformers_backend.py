"""Any Hugging Face causal language model as a teacher, on a CPU or a GPU; the reference for other backends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from logitstream import metrics
from logitstream.samplers import SAMPLERS
from logitstream.sampling import warm_up
from logitstream.split_model import SplitModel
from logitstream.tokenizer import Vocabulary, load_tokenizer
from logitstream.types import TargetSpec, TeacherInfo, TokenSequence
from teacher_server.backend import (
    BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    ScoreRequest,
    ScoreResult,
    check_vocab_size,
    served_vocab_size,
)
from teacher_server.draw_loop import draw_pieces, launch_pieces
from teacher_server.drawings import Drawing, Launched
from teacher_server.gpu import Gpu, chunk_rows
from teacher_server.large_models import check_one_device, load_weights
from teacher_server.packed_attention import pack, packed
from teacher_server.rope_lengths import LengthDependence
from teacher_server.weights import loading_unchanged, weights_digest, weights_folder

PASS_OVERHEAD_TOKENS = {"cpu": 32, "cuda": 1024}
"""Cost of a forward pass beside that of its tokens, in tokens: rough guesses, not measured."""
LONGEST_SEQUENCE = 1 << 20
"""Limit for a model whose configuration gives none."""

log = logging.getLogger(__name__)


class TransformersBackend:
    """Scores batches with a loaded model; see TeacherBackend.

    On a GPU a batch is launched whole, without waiting for it, while the one before is still computed or encoded.
    vocab_size: serve only the first so many ids, if those past the tokenizer's are padding; 0: all rows of the head.
    logits_chunk_bytes: 0 chooses by the device's memory; compiles: compile the model's body.
    max_padded_tokens: of one pass; 0 chooses. gpu: how a GPU is used, for tests.
    """

    def __init__(
        self,
        model: Any,
        info: TeacherInfo,
        *,
        vocab_size: int = 0,
        max_padded_tokens: int = 0,
        logits_chunk_bytes: int = 0,
        compiles: bool = False,
        gpu: Gpu | None = None,
    ) -> None:
        check_one_device(model)
        head = model.get_output_embeddings()
        num_rows = model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
        self._info = replace(info, vocab_size=served_vocab_size(vocab_size, num_rows=num_rows))
        self._by_length = LengthDependence(model)  # before the first pass, which may change the model's buffers
        self.lm: SplitModel | None = SplitModel(model.eval().requires_grad_(False))
        device: torch.device = model.device
        self._gpu = gpu or Gpu.of(device)
        self._send = self._gpu.send if self._gpu is not None else lambda array: torch.from_numpy(array).to(device)
        self.batches_at_once = 1 if self._gpu is None else 2
        self.packs = self._gpu is not None and self.lm.is_split and pack(model, self.lm, self._send)
        self.pads_safely = self.packs or self.lm.pads_safely()
        if not self.pads_safely:
            log.warning("%s: padding changes its results, only equal lengths share a pass", type(model).__name__)
        if self._by_length:
            log.info("%s: %s: shorter and longer ones never share a pass", type(model).__name__, self._by_length)
        self.batch_tokens = max_padded_tokens or (BATCH_TOKENS if self._gpu is None else GPU_BATCH_TOKENS)
        self._chunk_rows = chunk_rows(
            model.dtype.itemsize * num_rows,
            logits_chunk_bytes=logits_chunk_bytes,
            memory_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        )
        self._pass_overhead_tokens = PASS_OVERHEAD_TOKENS.get(device.type, 1024)
        self._launching = threading.Lock()
        if compiles and model.base_model is not model:
            model.base_model.compile(dynamic=True)

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
        **options: Any,
    ) -> TransformersBackend:
        """Load safetensors weights from a folder or the hub; code that comes with a model is never run.

        Raises ValueError for an adapter, part of a model or one that one GPU cannot hold, or if the weights are written
        to meanwhile.
        """
        folder = weights_folder(model, revision)
        device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        started = time.monotonic()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with loading_unchanged(folder):
            digest = weights_digest(folder)
            words = load_tokenizer(tokenizer, str(folder))
            check_vocab_size(vocab_size, words)
            lm: Any = load_weights(folder, dtype=dtype, device=device)
            if device == "cpu":  # move the weights out of the mapped files, which may be overwritten while they serve
                for tensor in (*lm.parameters(), *lm.buffers()):
                    tensor.data = tensor.data.clone()
                warm_up(lm.dtype)
        text_config = lm.config.get_text_config()
        info = TeacherInfo(
            model=model,
            revision="" if Path(model).is_dir() else revision,
            weights_digest=digest,
            tokenizer_digest=Vocabulary.of(words).digest,
            vocab_size=text_config.vocab_size,
            dtype=str(lm.dtype).removeprefix("torch."),
            max_sequence_tokens=getattr(text_config, "max_position_embeddings", LONGEST_SEQUENCE),
            backend="transformers",
        )
        log.info("loaded %s in %s on %s, %.1f s", model, info.dtype, device, time.monotonic() - started)
        backend = cls(lm, info, vocab_size=vocab_size, **options)
        backend.warm_up()
        return backend

    def describe(self) -> TeacherInfo:
        return self._info

    def healthy(self) -> bool:
        return self.lm is not None

    def close(self) -> None:
        self.lm = None
        torch.cuda.empty_cache()  # does nothing if CUDA was never used

    def score(self, batch: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Run each distinct sequence through the model once, whoever asked for it and with whatever spec."""
        try:
            return self._score(batch)
        except torch.OutOfMemoryError as error:
            message = str(error)
        # Here the error is gone and with it what the frames of its traceback held, or nothing could be freed.
        torch.cuda.empty_cache()
        raise MemoryError(message)

    def _score(self, batch: Sequence[ScoreRequest]) -> list[ScoreResult]:
        drawings = [Drawing(request) for request in batch]
        with self._launching:
            launched = self.launch(drawings)
        results: list[ScoreResult] = [drawing.result(self._info.vocab_size) for drawing in drawings]
        for start, draws, end in launched:
            draw_seconds = draws.draw_seconds()
            _observe(start.elapsed_time(end) / 1000 - draw_seconds, draw_seconds)
        return results

    def launch(self, drawings: Sequence[Drawing]) -> list[tuple[Any, Launched, Any]]:
        """Run the passes of a batch; on a GPU, start them, and return for each its draws between two events."""
        sharing: dict[bytes, list[Drawing]] = {}
        for drawing in drawings:
            sharing.setdefault(drawing.request.sequence.token_ids.tobytes(), []).append(drawing)
        distinct = list(sharing.values())
        launched = []
        with nullcontext() if self._gpu is None else self._gpu.current():
            for members in self.passes([len(shared[0].request.sequence) for shared in distinct]):
                launched += self._run_pass([distinct[index] for index in members])
        return launched

    def passes(self, lengths: list[int]) -> list[list[int]]:
        assert self.lm is not None, "score after close"
        groups: dict[Any, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault(self._by_length.group(length), []).append(index)
        most = self.batch_tokens if self.lm.is_split else 1
        passes = []
        for members in groups.values():
            inside = [lengths[index] for index in members]
            if self.packs:
                cut = split_by_budget(inside, max_tokens=most)
            else:
                overhead = self._pass_overhead_tokens if self.pads_safely else 0
                cut = split_by_length(inside, pass_overhead_tokens=overhead, max_padded_tokens=most)
            passes += [[members[place] for place in one] for one in cut]
        if not self.packs:
            padded = sum(len(members) * max(lengths[index] for index in members) for members in passes)
            metrics.TEACHER_PADDING_TOKENS.inc(padded - sum(lengths))
        return passes

    def _run_pass(self, distinct: list[list[Drawing]]) -> list[tuple[Any, Launched, Any]]:
        """Draw the targets of distinct sequences, each with everybody who asked for it, from one forward pass."""
        assert self.lm is not None
        start = time.perf_counter() if self._gpu is None else self._gpu.mark()
        sequences = [shared[0].request.sequence.token_ids for shared in distinct]
        self._by_length.forget()
        if self.packs:
            hidden = self.lm.hidden(**packed(sequences, self._send))
            offsets = np.cumsum([0] + [len(one) for one in sequences[:-1]]).tolist()
        else:
            padded = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
            for row, one in zip(padded, sequences, strict=True):
                row[: len(one)] = one
            hidden = self.lm.hidden(self._send(padded))
            offsets = [place * padded.shape[1] for place in range(len(sequences))]
        pieces = [
            drawing.piece(0, len(drawing.request.sequence), offset=offset)
            for offset, shared in zip(offsets, distinct, strict=True)
            for drawing in shared
        ]
        flat, limits = hidden.flatten(0, 1), {"vocab_size": self._info.vocab_size, "max_rows": self._chunk_rows}
        if self._gpu is not None:
            draws = launch_pieces(flat, pieces, self._project, self._gpu, **limits)
            return [(start, draws, self._gpu.mark())]
        draw_seconds = draw_pieces(flat, pieces, self._project, **limits)
        _observe(time.perf_counter() - start - draw_seconds, draw_seconds)
        return []

    def _project(self, hidden_RH: Tensor) -> Tensor:
        assert self.lm is not None
        return self.lm.logits(hidden_RH)[:, : self._info.vocab_size]

    def warm_up(self) -> None:
        """On a GPU, compile every kernel and fill the caches, then let torch warn of what waits in a launch."""
        if self._gpu is None:
            return
        started = time.monotonic()
        length = max(1, min(self._info.max_sequence_tokens, self.batch_tokens, 1024))
        sequences = [TokenSequence(token_ids=np.zeros(n, np.int32)) for n in sorted({length, length // 2 + 1, 1})]
        for sampler in SAMPLERS.values():
            if sampler.on_gpu:
                self.score([ScoreRequest(sequence=one, spec=TargetSpec(sampler=sampler.name)) for one in sequences])
        drawings = [Drawing(ScoreRequest(sequence=one, spec=TargetSpec())) for one in sequences]
        with self._gpu.warning_of_waits():
            self.launch(drawings)
        log.info("warmed up in %.1f s", time.monotonic() - started)


def _observe(forward_seconds: float, draw_seconds: float) -> None:
    metrics.TEACHER_STAGE_SECONDS.labels("forward").observe(forward_seconds)
    metrics.TEACHER_STAGE_SECONDS.labels("draw").observe(draw_seconds)


def split_by_budget(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Return the indices of each forward pass over packed sequences: of at most max_tokens, or a single sequence."""
    passes: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            passes.append([])
            room = max_tokens
        passes[-1].append(index)
        room -= length
    return passes


def split_by_length(lengths: Sequence[int], *, pass_overhead_tokens: int, max_padded_tokens: int) -> list[list[int]]:
    """Return the indices of each forward pass: similar lengths together, longest first.

    Minimises padded tokens + pass_overhead_tokens for each pass, the fixed cost of one. No pass has more than
    max_padded_tokens padded tokens, unless it is a single sequence.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    longest_first = np.array([lengths[index] for index in order], dtype=np.int64)
    best = np.zeros(len(order) + 1, dtype=np.int64)  # cost of the first n sequences
    start_of = np.zeros(len(order) + 1, dtype=np.int64)  # where the last of their passes begins
    for stop in range(1, len(order) + 1):
        padded = longest_first[:stop] * np.arange(stop, 0, -1)
        costs = best[:stop] + padded + pass_overhead_tokens
        costs[:-1][padded[:-1] > max_padded_tokens] = np.iinfo(np.int64).max
        start_of[stop] = costs.argmin()
        best[stop] = costs[start_of[stop]]
    passes: list[list[int]] = []
    stop = len(order)
    while stop:
        passes.append(order[start_of[stop] : stop])
        stop = int(start_of[stop])
    return passes[::-1]
