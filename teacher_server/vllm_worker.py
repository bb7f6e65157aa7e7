"""The worker of a vLLM engine that draws targets: vLLM's own worker for the platform, with the draws hooked in."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import psutil
import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group
from vllm.platforms import current_platform

from logitstream.sampling import warm_up
from teacher_server.gpu import Gpu, chunk_rows
from teacher_server.vllm_draws import CHUNK_BYTES, SERVER_PID, VOCAB_SIZE, PromptDraws, hook

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

WATCH_SECONDS = 1.0
COPIES_OF_LOGITS = 2.2
"""Copies of a chunk of logits that may exist at a time beside the KV cache where the kernels draw: the projection, a
gather or a soft cap of it, and a tenth for the statistics of its blocks."""
PLAIN_COPIES = 10
"""The same where plain torch draws from 16 bits: five in float32, among them the probabilities."""


class DrawingWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker, with draws at the prompt-logprob step; they live on the last pipeline stage."""

    prompt_draws: PromptDraws | None = None
    draw_bytes = 0

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        _end_with_server()
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_last_rank:
            return
        head_rows, runner = self.model_config.get_vocab_size(), self.model_runner
        vocab_size = self.vllm_config.additional_config[VOCAB_SIZE] or head_rows

        def project(hidden_states: Tensor) -> Tensor | None:
            logits: Tensor | None = runner.model.compute_logits(hidden_states)
            return None if logits is None else logits[:, :vocab_size]

        on_cpu, dtype = current_platform.is_cpu(), self.model_config.dtype
        # All ranks project the same rows together, so what is free on one of them cannot decide.
        memory = None if on_cpu else int(torch.cuda.get_device_properties(self.device).total_memory) // 4
        chunk_bytes = int(self.vllm_config.additional_config[CHUNK_BYTES])
        row_bytes = head_rows * dtype.itemsize
        max_rows = chunk_rows(row_bytes, logits_chunk_bytes=chunk_bytes, memory_bytes=memory)
        gpu = None if on_cpu else Gpu.of(self.device)
        self.draw_bytes = int((PLAIN_COPIES if gpu is None else COPIES_OF_LOGITS) * max_rows * row_bytes)
        tp = get_tp_group()
        self.prompt_draws = PromptDraws(
            project,
            vocab_size=vocab_size,
            max_rows=max_rows,
            is_drawing=tp.rank_in_group == 0,
            is_alone=tp.world_size == 1,
            gpu=gpu,
        )
        hook(runner, self.prompt_draws)
        if self.prompt_draws.is_drawing:
            warm_up(dtype, self.device if gpu is not None else torch.device("cpu"), vocab_size)

    def determine_available_memory(self) -> int:
        """Take the draw's memory off what vLLM found, unless the user fixed the KV cache's bytes."""
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        return available - self.draw_bytes

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step; on a CPU that has met NaN, first clear the KV-cache blocks that are handed out.

        vLLM's CPU attention multiplies the unused tail of a block by zero; NaNs left by an earlier request survive it.
        """
        if self.prompt_draws is not None and self.prompt_draws.has_met_nan:
            self._clear_new_blocks(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def _clear_new_blocks(self, scheduler_output: Any) -> None:
        given = [request.block_ids for request in scheduler_output.scheduled_new_reqs]
        given += [ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids is not None]
        blocks = [block for groups in given for group in groups for block in group]
        for cache in self.model_runner.kv_caches:
            if blocks and isinstance(cache, Tensor):
                # The attention may divide a block into several.
                cache.view(self.cache_config.num_gpu_blocks, -1, *cache.shape[1:])[blocks] = 0

    def configure_encoding(self, id_model: bytes, max_bytes: int) -> None:
        """Encode targets with this id model, and refuse those of more than max_bytes."""
        if self.prompt_draws is not None:
            self.prompt_draws.configure_encoding(id_model, max_bytes)

    def take_targets(self, keys: list[str]) -> list[bytes]:
        """Return the results of these requests, pickled, on the one rank that drew them; every rank forgets them."""
        return self.prompt_draws.take(keys) if self.prompt_draws is not None else []


def _end_with_server() -> None:
    """Kill the engine, including this worker, once the server is gone; it would wait forever and keep its memory."""
    line = [psutil.Process(), *psutil.Process().parents()]
    server = next((process for process in line if str(process.pid) == os.environ.get(SERVER_PID)), None)
    if server is None:  # on another machine
        return

    def watch() -> None:
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_SECONDS)
        for process in reversed(line[: line.index(server)]):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    threading.Thread(target=watch, name="server-watch", daemon=True).start()
