"""Any Hugging Face causal language model as a teacher, on a CPU or a GPU; the reference for other backends."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from logitstream import metrics
from logitstream.sampling import warm_up
from logitstream.split_model import SplitModel
from logitstream.tokenizer import Vocabulary, load_tokenizer
from logitstream.types import TeacherInfo
from teacher_server.backend import ScoreRequest, ScoreResult, check_vocab_size, served_vocab_size
from teacher_server.draw_loop import Drawing, draw_pieces
from teacher_server.rope_lengths import LengthDependence
from teacher_server.weights import loading_unchanged, weights_digest, weights_folder

PASS_OVERHEAD_TOKENS = {"cpu": 32, "cuda": 1024}
"""Cost of a forward pass beside that of its tokens, in tokens: rough guesses, not measured."""
LONGEST_SEQUENCE = 1 << 20
"""Limit for a model whose configuration gives none."""

log = logging.getLogger(__name__)


class TransformersBackend:
    """Scores batches with a loaded model; see TeacherBackend.

    vocab_size: serve only the first so many ids, if those past the tokenizer's are padding; 0: all rows of the head.
    """

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
        self._by_length = LengthDependence(model)  # before the first pass, which may change the model's buffers
        self.lm: SplitModel | None = SplitModel(model.eval().requires_grad_(False))
        self.pads_safely = self.lm.pads_safely()
        if not self.pads_safely:
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
        **options: int,
    ) -> TransformersBackend:
        """Load safetensors weights from a folder or the hub; code that comes with a model is never run.

        Raises ValueError for an adapter or part of a model, or if the weights are written to meanwhile.
        """
        folder = weights_folder(model, revision)
        device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        started = time.monotonic()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with loading_unchanged(folder):
            digest = weights_digest(folder)
            words = load_tokenizer(tokenizer, str(folder))
            check_vocab_size(vocab_size, words)
            lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
            lm = lm.to(device)
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
        return cls(lm, info, vocab_size=vocab_size, **options)

    def describe(self) -> TeacherInfo:
        return self._info

    def healthy(self) -> bool:
        return self.lm is not None

    def close(self) -> None:
        self.lm = None
        torch.cuda.empty_cache()  # does nothing if CUDA was never used

    def score(self, batch: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Run each distinct sequence through the model once, whoever asked for it and with whatever spec."""
        drawings = [Drawing(request) for request in batch]
        sharing: dict[bytes, list[Drawing]] = {}
        for drawing in drawings:
            sharing.setdefault(drawing.request.sequence.token_ids.tobytes(), []).append(drawing)
        distinct = list(sharing.values())
        try:
            for members in self.passes([len(shared[0].request.sequence) for shared in distinct]):
                self._score_pass([distinct[index] for index in members])
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise MemoryError(str(error)) from error
        return [drawing.result(self._info.vocab_size) for drawing in drawings]

    def passes(self, lengths: list[int]) -> list[list[int]]:
        assert self.lm is not None, "score after close"
        overhead = self._pass_overhead_tokens if self.pads_safely else 0
        groups: dict[Any, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault(self._by_length.group(length), []).append(index)
        passes = [
            [members[place] for place in one]
            for members in groups.values()
            for one in split_by_length(
                [lengths[index] for index in members],
                pass_overhead_tokens=overhead,
                max_padded_tokens=self._max_padded_tokens if self.lm.is_split else 1,
            )
        ]
        padded = sum(len(members) * max(lengths[index] for index in members) for members in passes)
        metrics.TEACHER_PADDING_TOKENS.inc(padded - sum(lengths))
        return passes

    def _score_pass(self, distinct: list[list[Drawing]]) -> None:
        """Draw the targets of distinct sequences, each with everybody who asked for it, from one forward pass."""
        assert self.lm is not None
        start = time.perf_counter()
        token_ids = [torch.from_numpy(shared[0].request.sequence.token_ids).long() for shared in distinct]
        self._by_length.forget()
        hidden_BTH = self.lm.hidden(pad_sequence(token_ids, batch_first=True).to(self._device, non_blocking=True))
        pieces = [
            drawing.piece(0, len(drawing.request.sequence), offset=place * hidden_BTH.shape[1])
            for place, shared in enumerate(distinct)
            for drawing in shared
        ]
        draw_seconds = draw_pieces(
            hidden_BTH.flatten(0, 1),
            pieces,
            self._project,
            vocab_size=self._info.vocab_size,
            max_rows=self._chunk_rows,
        )
        metrics.TEACHER_STAGE_SECONDS.labels("forward").observe(time.perf_counter() - start - draw_seconds)
        metrics.TEACHER_STAGE_SECONDS.labels("draw").observe(draw_seconds)

    def _project(self, hidden_RH: Tensor) -> Tensor:
        assert self.lm is not None
        logits = self.lm.logits(hidden_RH)[:, : self._info.vocab_size]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # the draw would wait anyway, and the stages' seconds mean their work
        return logits


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
