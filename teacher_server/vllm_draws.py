"""Draws inside a vLLM worker, request by request, whatever a step of the engine holds.

vLLM computes a prompt in chunks of its own choosing, mixes chunks of several prompts in a step, and may start a prompt
again after a preemption. A chunk that starts earlier replaces the rows from there on, so that every position has one
row. `hook` puts the draws before the prompt-logprob step of vLLM's model runners (docs/vllm.md says why). This file
imports nothing of vLLM.
"""

from __future__ import annotations

import logging
import math
import pickle
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logitstream.errors import RequestError, ScoringFailed
from teacher_server.backend import EncodedTargets, ScoreResult
from teacher_server.draw_loop import draw_pieces, launch_pieces, plan, select
from teacher_server.drawings import Drawing, Piece
from teacher_server.encoding import encode_all, encoder
from teacher_server.gpu import Gpu

SUPPORTED_VERSIONS = ("0.32", "0.33")
KEY, REQUEST = "logitstream_key", "logitstream_request"
"""Names in SamplingParams.extra_args of a request's key and of the pickled ScoreRequest; both stay in the engine."""
CHUNK_BYTES, VOCAB_SIZE = "logitstream_chunk_bytes", "logitstream_vocab_size"
"""Names in vLLM's additional_config of logits_chunk_bytes and vocab_size, for the worker."""
SERVER_PID = "LOGITSTREAM_SERVER_PID"
"""Environment variable for the worker: in vLLM's configuration it would spoil what is compiled for each start."""

log = logging.getLogger(__name__)


def check_version(found: str) -> None:
    """Raise RuntimeError for a vLLM version that the hooks were not written for."""
    if not found.startswith(tuple(f"{supported}." for supported in SUPPORTED_VERSIONS)):
        raise RuntimeError(f"the vllm backend works with vLLM {' and '.join(SUPPORTED_VERSIONS)}, found {found}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """Rows first_row to first_row + num_rows of request `key`, at `offset` in the step's hidden states."""

    key: str
    first_row: int
    num_rows: int
    offset: int


@dataclass(slots=True)
class _Prompt:
    """A request's way through the engine; `gap` ends it on all ranks, what fails in a draw only for the drawing one."""

    drawing: Drawing
    rows_done: int = 0
    gap: ScoringFailed | None = None
    encoded: Future[ScoreResult] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.drawing.request.sequence)


class PromptDraws:
    """The draws of the requests that an engine is computing.

    project: hidden states [R, H] -> logits [R, V], at most max_rows rows; is_drawing: False on the ranks that help to
    project a divided vocabulary and leave the draw to one of them; is_alone: no other rank projects; gpu: where the
    kernels draw.
    """

    def __init__(
        self,
        project: Callable[[Tensor], Tensor | None],
        *,
        vocab_size: int,
        max_rows: int,
        is_drawing: bool = True,
        is_alone: bool = True,
        gpu: Gpu | None = None,
    ) -> None:
        self.is_drawing = is_drawing
        self.max_rows = max_rows
        self._is_alone = is_alone
        self._gpu = gpu
        self._num_projected = 0
        self.has_met_nan = False
        self._project = project
        self._vocab_size = vocab_size
        self._prompts: dict[str, _Prompt] = {}
        self._encode = encoder(b"", sys.maxsize)
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    def configure_encoding(self, id_model: bytes, max_bytes: int) -> None:
        """Encode with this id model from now on, and refuse targets of more than max_bytes."""
        self._encode = encoder(id_model, max_bytes)

    def add(self, key: str, pickled: bytes) -> None:
        """Expect chunks of this request; does nothing for a known key."""
        if key not in self._prompts:
            self._prompts[key] = _Prompt(Drawing(pickle.loads(pickled)))

    def step(self, hidden_states: Tensor, chunks: Iterable[PromptChunk]) -> None:
        """Draw the wanted rows of one step from its hidden states [R, H]; encode what is complete in a thread.

        On a GPU the draws are only launched, and the thread waits for them. An exception, such as out of memory, fails
        the step's requests and not the engine. On a CPU, `has_met_nan` becomes True if the hidden states are not all
        finite, including masked rows.
        """
        if hidden_states.device.type == "cpu" and not self.has_met_nan:
            self.has_met_nan = not math.isfinite(float(hidden_states.sum(dtype=torch.float32)))
        prompts = [(self._prompts[chunk.key], chunk) for chunk in chunks]
        advanced = [(prompt, piece) for prompt, chunk in prompts if (piece := _advance(prompt, chunk)) is not None]
        pieces = [piece for _, piece in advanced]
        try:
            self._draw(hidden_states, pieces)
        except Exception as error:
            log.exception("the draws of %d requests failed", len(advanced))
            self._project_the_rest(hidden_states, pieces)
            for prompt, _ in advanced:
                prompt.drawing.fail(_failed(error))  # its later rows are still projected, as on other ranks
        for prompt, _ in advanced:
            if self.is_drawing and prompt.rows_done == prompt.num_rows:
                prompt.encoded = self._encoders.submit(self._finish, prompt.drawing)

    def take(self, keys: Iterable[str]) -> list[bytes]:
        """Forget these requests; return the pickled result of each, or nothing on a rank that does not draw."""
        prompts = [self._prompts.pop(key, None) for key in keys]
        return [pickle.dumps(_outcome(prompt)) for prompt in prompts] if self.is_drawing else []

    def _draw(self, hidden_states: Tensor, pieces: list[Piece]) -> None:
        self._num_projected = 0
        limits = {"vocab_size": self._vocab_size, "max_rows": self.max_rows}
        if self._gpu is None:
            draw_pieces(hidden_states, pieces, self._logits, **limits)
        else:
            launch_pieces(hidden_states, pieces, self._logits, self._gpu, **limits)

    def _logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self._project(hidden_states)
        self._num_projected += 1
        return logits if self.is_drawing else None

    def _project_the_rest(self, hidden_states: Tensor, pieces: list[Piece]) -> None:
        """Take part in the projections that other ranks still wait for."""
        if not self._is_alone:
            chunks = list(plan(len(hidden_states), pieces, vocab_size=self._vocab_size, max_rows=self.max_rows))
            for chunk in chunks[self._num_projected :]:
                self._project(select(hidden_states, chunk.places))

    def _finish(self, drawing: Drawing) -> ScoreResult:
        try:
            targets = drawing.result(self._vocab_size)
        except Exception as error:  # of the device, which is told of when its numbers are waited for
            log.exception("the draws of a request failed")
            return _failed(error)
        (payload,) = encode_all(self._encode, [targets], [drawing.request.spec])
        if isinstance(payload, RequestError) or isinstance(targets, RequestError):
            return payload if isinstance(payload, RequestError) else targets
        return EncodedTargets(payload, num_rows=targets.num_rows, num_entries=targets.num_entries)


def _failed(error: Exception) -> ScoringFailed:
    return ScoringFailed(f"the teacher failed on it: {type(error).__name__}")


def _advance(prompt: _Prompt, chunk: PromptChunk) -> Piece | None:
    if chunk.first_row >= prompt.num_rows:
        return None  # a decoding step
    if chunk.first_row > prompt.rows_done:
        prompt.gap = ScoringFailed(
            f"the engine skipped rows {prompt.rows_done} to {chunk.first_row}: expected every position to be "
            "computed (is prefix caching on?)"
        )
    if prompt.gap is not None:
        return None
    if chunk.first_row < prompt.rows_done:
        prompt.drawing.forget_from(chunk.first_row)
    prompt.rows_done = min(chunk.first_row + chunk.num_rows, prompt.num_rows)
    return prompt.drawing.piece(chunk.first_row, prompt.rows_done, offset=chunk.offset)


def _outcome(prompt: _Prompt | None) -> ScoreResult:
    if prompt is None:
        return ScoringFailed("the engine never computed this request")
    if prompt.gap is not None:
        return prompt.gap
    if prompt.encoded is None or prompt.rows_done != prompt.num_rows:
        return ScoringFailed(f"the engine computed {prompt.rows_done} of {prompt.num_rows} rows")
    return prompt.encoded.result()


def hook(runner: Any, draws: PromptDraws) -> None:
    """Draw right before a vLLM model runner's own prompt-logprob step, which sees the hidden states of all rows."""
    if hasattr(runner, "prompt_logprobs_worker"):
        _hook_v2(runner.prompt_logprobs_worker, draws)
    else:
        _hook_v1(runner, draws)


def _hook_v1(runner: Any, draws: PromptDraws) -> None:
    """Hook vllm/v1/worker/gpu_model_runner.py, GPUModelRunner (and CPUModelRunner, which inherits it)."""
    original = runner._get_prompt_logprobs_dict

    def draw_then_original(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        chunks = []
        for request_id, num_tokens in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            key = _expect(draws, request.sampling_params)
            if key is not None:
                offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
                first_row = request.num_computed_tokens
                chunks.append(PromptChunk(key=key, first_row=first_row, num_rows=num_tokens, offset=offset))
        draws.step(hidden_states, chunks)
        return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = draw_then_original


def _hook_v2(worker: Any, draws: PromptDraws) -> None:
    """Hook vllm/v1/worker/gpu/sample/prompt_logprob.py, PromptLogprobsWorker."""
    add_request, remove_request, compute = worker.add_request, worker.remove_request, worker.compute_prompt_logprobs
    key_of: dict[str, str] = {}

    def add(req_id: str, req_idx: int, sampling_params: Any) -> None:
        key = _expect(draws, sampling_params)
        if key is not None:
            key_of[req_id] = key
        add_request(req_id, req_idx, sampling_params)

    def remove(req_id: str) -> None:
        key_of.pop(req_id, None)
        remove_request(req_id)

    def draw_then_compute(logits_fn: Any, hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        chunks = [
            PromptChunk(
                key=key_of[request_id],
                first_row=int(input_batch.num_computed_prefill_tokens_np[i]),
                num_rows=int(input_batch.num_scheduled_tokens[i]),
                offset=int(input_batch.query_start_loc_np[i]),
            )
            for i, request_id in enumerate(input_batch.req_ids)
            if request_id in key_of
        ]
        draws.step(hidden_states, chunks)
        return compute(logits_fn, hidden_states, input_batch, *args, **kwargs)

    worker.add_request, worker.remove_request = add, remove
    worker.compute_prompt_logprobs = draw_then_compute


def _expect(draws: PromptDraws, sampling_params: Any) -> str | None:
    """Return the key of a request of ours, told to `draws` the first time; None for others, as in warm-up."""
    extra = sampling_params.extra_args if sampling_params is not None else None
    if not extra or KEY not in extra:
        return None
    draws.add(extra[KEY], extra[REQUEST])
    return str(extra[KEY])
