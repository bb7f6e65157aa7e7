"""A vLLM engine as a teacher: `VllmBackend` runs the engine, whose workers draw and encode the targets.

Logits never leave the workers (vllm_worker.py, vllm_draws.py).
"""

# ruff: noqa: E402  the version is checked before anything is imported that other versions may lack

from __future__ import annotations

import asyncio
import copy
import difflib
import itertools
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from teacher_server.vllm_draws import CHUNK_BYTES, KEY, REQUEST, SERVER_PID, VOCAB_SIZE, check_version

try:
    import vllm
except ModuleNotFoundError as error:
    raise RuntimeError("the vllm backend needs vLLM in this environment (docs/vllm.md)") from error
check_version(vllm.__version__)

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from logitstream import metrics
from logitstream.errors import RequestError
from logitstream.types import TeacherInfo
from teacher_server.backend import BATCH_TOKENS, GPU_BATCH_TOKENS, EncodedTargets, ScoreRequest, served_vocab_size
from teacher_server.weights import digest_with_options

DEFAULT_MAX_SEQUENCE_TOKENS = 8192
"""Longest sequence if none is set: vLLM reserves KV cache for one of that length."""
CPU_KV_CACHE_BYTES = 2 << 30
"""KV cache on a CPU if no option sizes it; vLLM's own default is most of the machine's memory."""
CPU_SPIN_COUNT = "20000"
"""About a millisecond in which OpenMP's idle threads keep their cores busy, instead of libgomp's fifteen: long enough
between the products of a layer, and the draw finds the cores free."""
EXIT_ENGINE_DEAD = 70
WATCH_SECONDS = 1.0

CACHES = ("enable_prefix_caching", "kv_sharing_fast_prefill", "kv_transfer_config", "kv_offloading_size")
OUR_OPTIONS = {
    "worker_cls": "the draws live in our worker",
    "max_model_len": "set max_sequence_tokens: one position more is given to the token that vLLM must generate",
    "data_parallel_size": "start one server per replica, and name them all to the students",
    **dict.fromkeys(CACHES, "a cached position has no logits to draw from"),
    **{name: f"set {name}" for name in ("model", "dtype", "revision")},
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"), "nothing is decoded"),
    **dict.fromkeys(("runner", "convert"), "targets are drawn from the model's own next-token head"),
}
"""Engine options that cannot be passed through, and why."""

Returned = TypeVar("Returned")
log = logging.getLogger(__name__)


class VllmBackend:
    """TeacherBackend over a vLLM engine in processes of its own; see `engine_args`.

    An engine that died is started again, up to engine_restarts times; after that `exit` is called.
    """

    batches_at_once = 2
    """The engine's next step takes from the second batch while the first one's targets are on their way out."""
    batch_tokens = BATCH_TOKENS if current_platform.is_cpu() else GPU_BATCH_TOKENS

    def __init__(
        self,
        args: AsyncEngineArgs,
        *,
        weights_digest: str,
        tokenizer_digest: str,
        engine_restarts: int = 3,
        exit: Callable[[int], Any] = os._exit,
    ) -> None:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads: it must not fork
        if current_platform.is_cpu() and "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", CPU_SPIN_COUNT)
        os.environ[SERVER_PID] = str(os.getpid())
        self._args = args
        self._encoding: tuple[bytes, int] | None = None
        self._restarts_left = engine_restarts
        self._exit = exit
        self._keys = (f"{number:x}" for number in itertools.count())
        self._starting = threading.Lock()
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=_run_loop, args=(self._loop,), name="vllm-loop", daemon=True)
        self._loop_thread.start()
        try:
            self.engine = self.run(self._start())
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        config = self.engine.model_config
        if "longrope" in str(config.hf_text_config):  # max_model_len chooses the factors for all sequences
            weights_digest = digest_with_options(weights_digest, {"max_model_len": config.max_model_len})
        self._info = TeacherInfo(
            model=config.model,
            revision=config.revision or "",
            weights_digest=weights_digest,
            tokenizer_digest=tokenizer_digest,
            vocab_size=args.additional_config[VOCAB_SIZE] or config.get_vocab_size(),
            dtype=str(config.dtype).removeprefix("torch."),
            max_sequence_tokens=config.max_model_len - 1,
            backend=f"vllm {vllm.__version__}",
        )
        threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    def describe(self) -> TeacherInfo:
        return self._info

    def configure_encoding(self, id_model: bytes, max_bytes: int) -> None:
        """Have the workers encode with this id model, and refuse targets of more than max_bytes."""
        self._encoding = (id_model, max_bytes)
        self.run(self.engine.collective_rpc("configure_encoding", args=self._encoding))

    def healthy(self) -> bool:
        """Return True while the engine runs, False from its death until it has been started again."""
        return not self._closed.is_set() and not self.engine.errored

    def score(self, batch: Sequence[ScoreRequest]) -> list[EncodedTargets | RequestError]:
        """Return encoded targets; if the engine dies meanwhile, start it again and raise EngineDeadError."""
        self._revive()
        start = time.perf_counter()
        try:
            results = self.run(self._score(batch))
        except EngineDeadError:
            self._revive()
            raise
        metrics.TEACHER_STAGE_SECONDS.labels("forward").observe(time.perf_counter() - start)
        return results

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        with self._starting:
            self._loop.call_soon_threadsafe(self.engine.shutdown)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()
            del self.engine  # its __del__ must not wait for the end of the interpreter

    async def _start(self) -> AsyncLLM:
        log.info("starting vLLM %s: %s", vllm.__version__, self._args)
        engine = AsyncLLM.from_engine_args(copy.deepcopy(self._args))  # vLLM writes into its arguments
        log.info("vLLM runs with %s", engine.vllm_config)
        if self._encoding is not None:
            await engine.collective_rpc("configure_encoding", args=self._encoding)
        return engine

    def run(self, work: Coroutine[Any, Any, Returned]) -> Returned:
        """Run a coroutine on the engine's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _score(self, batch: Sequence[ScoreRequest]) -> list[EncodedTargets | RequestError]:
        """Score; raise EngineDeadError soon after the engine's death, which a waiting collective_rpc never learns."""
        engine = self.engine
        scoring = asyncio.ensure_future(self._score_with(engine, batch))
        while not (await asyncio.wait({scoring}, timeout=WATCH_SECONDS))[0]:
            if engine.errored:
                scoring.cancel()
                raise EngineDeadError
        return scoring.result()

    async def _score_with(self, engine: AsyncLLM, batch: Sequence[ScoreRequest]) -> list[EncodedTargets | RequestError]:
        keys = [next(self._keys) for _ in batch]
        prefills = (self._prefill(engine, key, request) for key, request in zip(keys, batch, strict=True))
        errors: list[Any] = await asyncio.gather(*prefills, return_exceptions=True)
        pickled = itertools.chain(*await engine.collective_rpc("take_targets", args=(keys,)))
        for error in errors:
            if error is not None and not isinstance(error, RequestError):
                raise error
        return [error or pickle.loads(result) for error, result in zip(errors, pickled, strict=True)]

    async def _prefill(self, engine: AsyncLLM, key: str, request: ScoreRequest) -> None:
        """Run one prompt through the engine; raise InvalidSequence for one that it would refuse, or die of."""
        info = self._info
        request.sequence.validate(vocab_size=info.vocab_size, max_sequence_tokens=info.max_sequence_tokens)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
            extra_args={KEY: key, REQUEST: pickle.dumps(request)},
        )
        async for _ in engine.generate(tokens_input(request.sequence.token_ids.tolist()), params, key):
            pass

    def _watch(self) -> None:
        """Notice a death between batches."""
        while not self._closed.wait(WATCH_SECONDS):
            self._revive()

    def _revive(self) -> None:
        """Start a dead engine again, or exit if no restart is left.

        Waits after a start that failed: the memory of the engine before may still be on its way back.
        """
        pause = WATCH_SECONDS
        with self._starting:
            while not self._closed.is_set() and self.engine.errored:
                if self._restarts_left == 0:
                    log.critical("the vLLM engine is dead and engine_restarts used up: exit %d", EXIT_ENGINE_DEAD)
                    self._exit(EXIT_ENGINE_DEAD)
                    return
                self._restarts_left -= 1
                log.error("the vLLM engine is dead: starting it again, %d restarts left", self._restarts_left)
                self._loop.call_soon_threadsafe(self.engine.shutdown)
                try:
                    self.engine = self.run(self._start())
                except Exception:
                    log.exception("the vLLM engine did not start: the next try, if one is left, in %g s", pause)
                    self._closed.wait(pause)
                    pause *= 4


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run until stopped, let cancelled tasks finish, close."""
    with asyncio.Runner(loop_factory=lambda: loop) as runner:  # cancels and closes at its end
        runner.get_loop().run_forever()


def engine_args(
    model: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    max_sequence_tokens: int = 0,
    vocab_size: int = 0,
    logits_chunk_bytes: int = 0,
    options: Mapping[str, Any] | None = None,
) -> AsyncEngineArgs:
    """Return our own settings and the user's engine options as vLLM's arguments; ValueError if they contradict.

    max_sequence_tokens: 0 for the model's context, at most 8192; vocab_size: only the first so many ids are served,
    0: all of the head; logits_chunk_bytes: logits made at a time, which the KV cache leaves room for; 0 chooses.
    """
    options = options or {}
    _check_options(options)
    defaults: dict[str, Any] = {"skip_tokenizer_init": True, "generation_config": "vllm", "disable_log_stats": True}
    if current_platform.is_cpu():
        defaults["enforce_eager"] = True  # compiling takes minutes
        sized = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & set(options)
        if not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    ours: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "revision": revision if not os.path.isdir(model) else None,
        "worker_cls": "teacher_server.vllm_worker.DrawingWorker",
        "enable_prefix_caching": False,
        "additional_config": {
            **options.get("additional_config", {}),
            CHUNK_BYTES: logits_chunk_bytes,
            VOCAB_SIZE: vocab_size,
        },
    }
    args = AsyncEngineArgs(**{**defaults, **options, **ours})
    config = args.create_model_config()
    served_vocab_size(vocab_size, num_rows=config.get_vocab_size())
    # One position more than the longest sequence, for the token that vLLM must generate and never computes. It would
    # change the scaling of longrope, whose longest sequence is one token less than the context.
    context = int(config.max_model_len)
    limit = context - 1 if "longrope" in str(config.hf_text_config) else context
    longest = max_sequence_tokens or min(limit, DEFAULT_MAX_SEQUENCE_TOKENS)
    if longest > limit:
        raise ValueError(f"max_sequence_tokens must be at most {limit}, the context of {model}, got {longest}")
    if longest == context:
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    args.max_model_len = longest + 1
    return args


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an engine option that is ours to set, or that vLLM does not know."""
    known = {f.name for f in fields(AsyncEngineArgs)}
    for name in options:
        if name in OUR_OPTIONS:
            raise ValueError(f"engine option {name!r} cannot be set: {OUR_OPTIONS[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise ValueError(f"vLLM {vllm.__version__} knows no engine option {name!r}; did you mean {near[0]!r}?")
