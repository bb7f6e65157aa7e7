"""Where draws happen inside vLLM: at the prompt-logprob step of both of its model runners.

That step sees the final hidden states of every row of a step and may project them, which nothing else that vLLM lets
one extend does (docs/vllm.md). Nothing of vLLM is imported here; what is touched is checked by vllm_backend.check_seam.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor

from teacher_server.prompt_draws import PromptChunk, PromptDraws

KEY, REQUEST = "logitstream_key", "logitstream_request"
"""Names in SamplingParams.extra_args: of a request's key, and of what pack_request packed."""
SUPPORTED_VERSIONS = ("0.32", "0.33")


def check_version(found: str) -> None:
    """Raises RuntimeError for a vLLM whose insides nobody has looked at."""
    if not found.startswith(tuple(f"{supported}." for supported in SUPPORTED_VERSIONS)):
        raise RuntimeError(f"the vllm backend works with vLLM {' and '.join(SUPPORTED_VERSIONS)}, found {found}")


def hook(runner: Any, draws: PromptDraws) -> None:
    """Draw right before the runner's own prompt-logprob step, which sees the hidden states of all rows of a step.

    Raises RuntimeError where the runner lacks what is read from it there; check_seam sees classes, not objects.
    """
    if hasattr(runner, "prompt_logprobs_worker"):
        _hook_v2(runner.prompt_logprobs_worker, draws)
    else:
        _hook_v1(runner, draws)


def _hook_v1(runner: Any, draws: PromptDraws) -> None:
    """vllm/v1/worker/gpu_model_runner.py, GPUModelRunner (and CPUModelRunner, which inherits it)."""
    for name in ("requests", "query_start_loc.np", "input_batch.req_id_to_index", "model.compute_logits"):
        try:
            attrgetter(name)(runner)
        except AttributeError:
            raise RuntimeError(f"expected {type(runner).__name__}.{name} in this version of vLLM") from None
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
    """vllm/v1/worker/gpu/sample/prompt_logprob.py, PromptLogprobsWorker."""
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
    """The key of a request of ours, told to `draws` at its first sight; None for others (warm-up)."""
    extra = sampling_params.extra_args if sampling_params is not None else None
    if not extra or KEY not in extra:
        return None
    key = str(extra[KEY])
    draws.add(key, extra[REQUEST])
    return key
