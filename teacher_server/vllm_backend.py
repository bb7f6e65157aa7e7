"""A vLLM engine as a teacher: targets are drawn in its worker, and the [tokens, vocabulary] logits never leave it.

Two processes meet in this file, the only one that imports vllm. In the server, `VllmBackend` runs the asynchronous
engine on a loop of its own. In the engine's worker, `DrawingWorker` hooks into the step at which vLLM computes prompt
logprobs (docs/vllm.md says why there) and hands the draws out by `collective_rpc`. The file is long because of that
"only": what needs no vLLM is in prompt_draws.py and vllm_hooks.py.
"""

# ruff: noqa: E402  the version is checked before what another version may not have is imported

from __future__ import annotations

import asyncio
import contextlib
import copy
import difflib
import inspect
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from teacher_server.vllm_hooks import KEY, REQUEST, check_version, hook

try:
    import vllm
except ModuleNotFoundError as error:
    raise RuntimeError("the vllm backend needs vLLM in this environment (docs/vllm.md)") from error
check_version(vllm.__version__)

from vllm import SamplingParams
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from logitstream import metrics
from logitstream.errors import InvalidSequence, RequestError
from logitstream.sampling import warm_up
from logitstream.types import SparseTargets, TeacherInfo
from teacher_server.backend import ScoreRequest, served_vocab_size
from teacher_server.prompt_draws import (
    COPIES_OF_LOGITS,
    Outcome,
    PromptDraws,
    pack_request,
    unpack_outcome,
)
from teacher_server.weights import digest_with_options

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

DEFAULT_MAX_SEQUENCE_TOKENS = 8192
"""Longest sequence where none is set: vLLM reserves KV cache for one of that length."""
CPU_KV_CACHE_BYTES = 2 << 30
"""KV cache on a CPU where no option sizes it; vLLM's own default is most of the machine's memory."""
CPU_SPIN_COUNT = "20000"
"""About a millisecond in which OpenMP's threads wait for the next product with their core busy, in place of libgomp's
default of about fifteen: enough between the products of a layer, and the draw finds the cores free."""
EXIT_ENGINE_DEAD = 70
WATCH_SECONDS = 1.0

CHUNK_BYTES = "logitstream_chunk_bytes"
"""The name under which logits_chunk_bytes travels to the worker."""
VOCAB_SIZE = "logitstream_vocab_size"
"""Likewise of vocab_size."""
SERVER_PID = "LOGITSTREAM_SERVER_PID"
"""Environment variable, for the worker; in vLLM's configuration it would spoil what is compiled for each start."""

OUR_OPTIONS = {
    "worker_cls": "the draws live in our worker",
    "enable_prefix_caching": "a cached position has no logits to draw from",
    "max_model_len": "set max_sequence_tokens: one position more is given to the token that vLLM must generate",
    "model": "set model",
    "dtype": "set dtype",
    "data_parallel_size": "start one server per replica, and name them all to the students",
    "revision": "set revision",
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"), "nothing is decoded"),
    **dict.fromkeys(("runner", "convert"), "targets are drawn from the model's own next-token head"),
    **dict.fromkeys(
        ("kv_sharing_fast_prefill", "kv_transfer_config", "kv_offloading_size"),
        "every position of a prompt has to be computed",
    ),
}
"""Engine options that cannot be passed through, and why."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)


# In the engine's worker -----------------------------------------------------------------------------------------------


class DrawingWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker, with draws at the prompt-logprob step."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        _end_with_server()
        super().load_model(*args, **kwargs)
        self.prompt_draws: PromptDraws | None = None
        if get_pp_group().is_last_rank:
            runner = self.model_runner
            vocab_size = int(self.vllm_config.additional_config[VOCAB_SIZE]) or self.model_config.get_vocab_size()

            def project(hidden_states: Tensor) -> Tensor | None:
                logits: Tensor | None = runner.model.compute_logits(hidden_states)
                return None if logits is None else logits[:, :vocab_size]

            self.prompt_draws = PromptDraws(
                project,
                vocab_size=vocab_size,
                max_rows=max(1, _chunk_bytes(self.vllm_config) // self._bytes_of_a_row()),
                is_drawing=get_tp_group().rank_in_group == 0,
            )
            hook(runner, self.prompt_draws)
            if self.prompt_draws.is_drawing and current_platform.is_cpu():
                warm_up(self.model_config.dtype)

    def _bytes_of_a_row(self) -> int:
        """Of logits: all of the head is projected, however few ids are served."""
        return int(self.model_config.get_vocab_size() * self.model_config.dtype.itemsize)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's CPU attention multiplies what a request has not filled of its last block by zero, which is NaN where
        the request before left NaN there: after the first one, blocks are cleared when they are given out."""
        if current_platform.is_cpu() and self.prompt_draws is not None and self.prompt_draws.has_met_nan:
            self._clear(list(_new_blocks(scheduler_output)))
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def _clear(self, blocks: list[int]) -> None:
        for cache in self.model_runner.kv_caches:
            if blocks and isinstance(cache, Tensor):
                parts = len(cache) // self.cache_config.num_gpu_blocks  # the attention may divide a block
                cache[[block * parts + part for block in blocks for part in range(parts)]] = 0

    def determine_available_memory(self) -> int:
        """vLLM's profile leaves the draw out; what the user fixed in bytes stays as it is."""
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        itemsize = int(self.model_config.dtype.itemsize)
        return available - COPIES_OF_LOGITS * _chunk_bytes(self.vllm_config) * 4 // itemsize

    def take_targets(self, keys: list[str]) -> list[Outcome]:
        """The outcomes of these requests, from the one rank that drew them; every rank forgets them."""
        return self.prompt_draws.take(keys) if self.prompt_draws is not None else []


def _end_with_server() -> None:
    """Kill the engine, this worker with it, once the server is gone: vLLM's engine would wait for it for ever, and keep
    the memory that the next server needs."""
    above = [psutil.Process(), *psutil.Process().parents()]
    server = next((process for process in above if str(process.pid) == os.environ.get(SERVER_PID)), None)
    if server is None:  # on another machine
        return
    engine = above[: above.index(server)]

    def watch() -> None:
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_SECONDS)
        for process in reversed(engine):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    threading.Thread(target=watch, name="server-watch", daemon=True).start()


def _new_blocks(scheduler_output: Any) -> Iterator[int]:
    """The blocks of the KV cache that are given out with this step, of all groups."""
    of_requests = [request.block_ids for request in scheduler_output.scheduled_new_reqs]
    of_requests += [given for given in scheduler_output.scheduled_cached_reqs.new_block_ids if given is not None]
    return (block for given in of_requests for group in given for block in group)


def _chunk_bytes(config: VllmConfig) -> int:
    return int(config.additional_config[CHUNK_BYTES])


def check_seam() -> None:
    """Raises RuntimeError, saying what was expected, where the installed vLLM is not what this file was made for."""
    for description, present in _seam():
        if not present:
            raise RuntimeError(
                f"vLLM {vllm.__version__}: expected {description}; the vLLM backend must be adapted to this version"
            )


def _seam() -> Iterator[tuple[str, bool]]:
    """What this file relies on inside vLLM, in words, and whether it is there."""
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def takes(function: Any, *names: str) -> bool:
        return function is not None and list(inspect.signature(function).parameters)[1 : len(names) + 1] == list(names)

    def has(cls: type, *names: str) -> bool:
        return set(names) <= {f.name for f in fields(cls)}

    v1 = getattr(GPUModelRunner, "_get_prompt_logprobs_dict", None)
    yield (
        "GPUModelRunner._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)",
        takes(v1, "hidden_states", "num_scheduled_tokens"),
    )
    yield (
        "CachedRequestState.num_computed_tokens and .sampling_params",
        has(CachedRequestState, "num_computed_tokens", "sampling_params"),
    )
    yield (
        "NewRequestData.block_ids and CachedRequestData.new_block_ids",
        has(NewRequestData, "block_ids") and has(CachedRequestData, "new_block_ids"),
    )
    add = getattr(PromptLogprobsWorker, "add_request", None)
    compute = getattr(PromptLogprobsWorker, "compute_prompt_logprobs", None)
    yield (
        "PromptLogprobsWorker.add_request(req_id, req_idx, sampling_params)",
        takes(add, "req_id", "req_idx", "sampling_params"),
    )
    yield (
        "PromptLogprobsWorker.compute_prompt_logprobs(logits_fn, hidden_states, input_batch, ...)",
        takes(compute, "logits_fn", "hidden_states", "input_batch"),
    )
    yield (
        "the columns of vllm.v1.worker.gpu.input_batch.InputBatch",
        has(InputBatch, "req_ids", "num_computed_prefill_tokens_np", "num_scheduled_tokens", "query_start_loc_np"),
    )
    yield (
        "Worker.load_model, execute_model and determine_available_memory",
        all(
            callable(getattr(PlatformWorker, name, None))
            for name in ("load_model", "execute_model", "determine_available_memory")
        ),
    )


# In the server --------------------------------------------------------------------------------------------------------


class VllmBackend:
    """TeacherBackend over a vLLM engine in a process of its own.

    max_sequence_tokens: None for the model's context, at most 8192; vocab_size: only the first so many ids are served,
    0: all of the head; logits_chunk_bytes: of logits made at a time, whose float32 copies are taken off what is left
    for the KV cache; engine_options: passed to vLLM by their own names; engine_restarts: how often an engine that died
    is started again before `exit` is called with EXIT_ENGINE_DEAD.
    Raises ValueError for options that vLLM does not know or that are ours, RuntimeError for a vLLM of another version.
    """

    batches_at_once = 2
    """The engine's next step takes from the second batch while the first one's targets are on their way out."""

    def __init__(
        self,
        model: str,
        *,
        weights_digest: str,
        tokenizer_digest: str,
        dtype: str = "auto",
        revision: str | None = None,
        max_sequence_tokens: int | None = None,
        vocab_size: int = 0,
        logits_chunk_bytes: int = 24 << 20,
        engine_options: Mapping[str, Any] | None = None,
        engine_restarts: int = 3,
        exit: Callable[[int], Any] = os._exit,
    ) -> None:
        check_seam()
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads: it must not fork
        if current_platform.is_cpu() and "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", CPU_SPIN_COUNT)
        os.environ[SERVER_PID] = str(os.getpid())
        self._args = engine_args(
            model,
            dtype=dtype,
            revision=revision,
            max_sequence_tokens=max_sequence_tokens,
            vocab_size=vocab_size,
            logits_chunk_bytes=logits_chunk_bytes,
            options=engine_options or {},
        )
        self._vocab_size = vocab_size
        self._digests = (weights_digest, tokenizer_digest)
        self._restarts_left = engine_restarts
        self._exit = exit
        self._keys = (f"{number:x}" for number in itertools.count())
        self._starting = threading.Lock()
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=_run_loop, args=(self._loop,), name="vllm-loop", daemon=True)
        self._loop_thread.start()
        try:
            self._engine = self._run(self._start())
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        config = self._engine.model_config
        if "longrope" in str(config.hf_text_config):  # it chooses the factors, for sequences of all lengths
            own = digest_with_options(weights_digest, {"max_model_len": config.max_model_len})
            self._digests = (own, tokenizer_digest)
        threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    def describe(self) -> TeacherInfo:
        config = self._engine.model_config
        return TeacherInfo(
            model=config.model,
            revision=config.revision or "",
            weights_digest=self._digests[0],
            tokenizer_digest=self._digests[1],
            vocab_size=self._vocab_size or config.get_vocab_size(),
            dtype=str(config.dtype).removeprefix("torch."),
            max_sequence_tokens=config.max_model_len - 1,
            backend=f"vllm {vllm.__version__}",
        )

    def healthy(self) -> bool:
        """Whether the engine runs; False from its death until it has been started again."""
        return not self._closed.is_set() and not self._engine.errored

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        """See TeacherBackend; an engine that dies meanwhile is started again and EngineDeadError raised."""
        self._revive()
        start = time.perf_counter()
        try:
            results = self._run(self._score(batch))
            metrics.TEACHER_STAGE_SECONDS.labels("forward").observe(time.perf_counter() - start)
            return results
        except EngineDeadError:
            self._revive()
            raise

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        with self._starting:
            self._loop.call_soon_threadsafe(self._engine.shutdown)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()
            del self._engine  # its __del__ must not wait for the end of the interpreter

    async def _start(self) -> AsyncLLM:
        log.info("starting vLLM %s: %s", vllm.__version__, self._args)
        engine = AsyncLLM.from_engine_args(copy.deepcopy(self._args))  # vLLM writes into its arguments
        log.info("vLLM runs with %s", engine.vllm_config)
        return engine

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        """As `score`; raises EngineDeadError within WATCH_SECONDS of the engine's death, which vLLM does not tell to
        whoever waits for a collective_rpc."""
        engine = self._engine
        scoring = asyncio.ensure_future(self._score_with(engine, batch))
        try:
            while not (await asyncio.wait({scoring}, timeout=WATCH_SECONDS))[0]:
                if engine.errored:
                    raise EngineDeadError
            return scoring.result()
        finally:
            scoring.cancel()

    async def _score_with(self, engine: AsyncLLM, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        keys = [next(self._keys) for _ in batch]
        tasks = [asyncio.ensure_future(self._prefill(engine, *pair)) for pair in zip(keys, batch, strict=True)]
        try:
            refused = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not engine.errored:
                await engine.collective_rpc("take_targets", args=(keys,))
            raise
        outcomes = await engine.collective_rpc("take_targets", args=(keys,))
        drawn = (outcome for of_rank in outcomes for outcome in of_rank)
        specs = [request.spec for request in batch]
        return [
            error or unpack_outcome(outcome, spec) for error, outcome, spec in zip(refused, drawn, specs, strict=True)
        ]

    async def _prefill(self, engine: AsyncLLM, key: str, request: ScoreRequest) -> RequestError | None:
        """Run one prompt through the engine; what it refuses, or would die of, comes back as an error."""
        info = self.describe()
        try:
            request.sequence.validate(vocab_size=info.vocab_size, max_sequence_tokens=info.max_sequence_tokens)
        except InvalidSequence as error:
            return error
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
            extra_args={KEY: key, REQUEST: pack_request(request)},
        )
        prompt = tokens_input(request.sequence.token_ids.tolist())
        try:
            async for _ in engine.generate(prompt, params, key):
                pass
        except VLLMClientError as error:
            return InvalidSequence(str(error))
        return None

    def _watch(self) -> None:
        """Notice a death between batches."""
        while not self._closed.wait(WATCH_SECONDS):
            self._revive()

    def _revive(self) -> None:
        """Start a dead engine again, or exit where that was done too often; after a start that failed, wait first: what
        the one before held, memory for one, may still be on its way back."""
        pause = WATCH_SECONDS
        with self._starting:
            while not self._closed.is_set() and self._engine.errored:
                if self._restarts_left == 0:
                    log.critical("the vLLM engine is dead and engine_restarts used up: exit %d", EXIT_ENGINE_DEAD)
                    self._exit(EXIT_ENGINE_DEAD)
                    return
                self._restarts_left -= 1
                log.error("the vLLM engine is dead: starting it again, %d restarts left", self._restarts_left)
                self._loop.call_soon_threadsafe(self._engine.shutdown)
                try:
                    self._engine = self._run(self._start())
                except Exception:
                    log.exception("the vLLM engine did not start: the next try, if one is left, in %g s", pause)
                    self._closed.wait(pause)
                    pause *= 4


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run until stopped, let what was cancelled finish, close."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()


def engine_args(
    model: str,
    *,
    dtype: str,
    revision: str | None,
    max_sequence_tokens: int | None,
    logits_chunk_bytes: int,
    options: Mapping[str, Any],
    vocab_size: int = 0,
) -> AsyncEngineArgs:
    """Our own settings and the user's options as vLLM's arguments; ValueError where they do not go together."""
    known = {f.name for f in fields(AsyncEngineArgs)}
    for name in options:
        if name in OUR_OPTIONS:
            raise ValueError(f"engine option {name!r} cannot be set: {OUR_OPTIONS[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise ValueError(f"vLLM {vllm.__version__} knows no engine option {name!r}; did you mean {near[0]!r}?")
    ours: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "revision": revision if not os.path.isdir(model) else None,
        "worker_cls": f"{__name__}.{DrawingWorker.__qualname__}",
        "enable_prefix_caching": False,
        "additional_config": {
            **options.get("additional_config", {}),
            CHUNK_BYTES: logits_chunk_bytes,
            VOCAB_SIZE: vocab_size,
        },
    }
    defaults: dict[str, Any] = {"skip_tokenizer_init": True, "generation_config": "vllm", "disable_log_stats": True}
    if current_platform.is_cpu():
        defaults["enforce_eager"] = True  # compiling takes minutes
        sized = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & set(options)
        if not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    args = AsyncEngineArgs(**{**defaults, **options, **ours})
    config = args.create_model_config()
    served_vocab_size(vocab_size, num_rows=config.get_vocab_size())
    args.max_model_len = _max_model_len(args, config, max_sequence_tokens)
    return args


def _max_model_len(args: AsyncEngineArgs, config: ModelConfig, max_sequence_tokens: int | None) -> int:
    """One position more than the longest sequence, for the token that vLLM must generate and never computes."""
    context = int(config.max_model_len)
    wanted = max_sequence_tokens or min(context, DEFAULT_MAX_SEQUENCE_TOKENS)
    if wanted > context:
        raise ValueError(f"max_sequence_tokens must be at most {context}, the context of {args.model}, got {wanted}")
    if wanted < context:
        return wanted + 1
    if "longrope" in str(config.hf_text_config):  # its scaling changes with max_model_len
        if max_sequence_tokens:
            raise ValueError(f"max_sequence_tokens must be below {context} for a model with longrope, got {wanted}")
        return context
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return wanted + 1
