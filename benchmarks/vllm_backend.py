"""The cost of targets from a vLLM engine, against its own prompt_logprobs=0, and against prefill plus projection.

    PYTHONPATH=. python benchmarks/vllm_backend.py [--dtype float32 bfloat16] [--rounds 11]

One engine for all; `targets` is measured at the client of a real server, over gRPC. The floor is plain prefill, which
projects the last position alone, plus the time of projecting every position, measured in the worker. A round takes the
paths in turn, there and back, so that what a machine gains or loses evenly meanwhile cancels; a ratio is the median
round's, with quartiles. Since two runs of the same forward differ by more here than what is to be seen, clocks in the
worker give two more: `of_the_same_seconds` is the part of the targets' time that the forward and the projection took,
which is what the floor adds up, in one run; `at_equal_forward` gives both paths the mean forward of their round. The
floor's ratio to prompt_logprobs=0 is what targets could reach if drawing and delivering took no time at all. Peak
memory is the resident set of all processes of the engine and the server (VmHWM, reset before each path).
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
import numpy.typing as npt
import psutil
from tqdm import tqdm

from tests.flat_settings import teacher_config

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


def start_clocks(worker: Any) -> None:
    """In the worker: from now on add up the seconds of the model's forward and of its projection, on a CPU."""
    model = worker.model_runner.model
    clocks = worker.clocks = {"forward": 0.0, "projection": 0.0}
    project = model.compute_logits

    def timed_project(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        logits = project(*args, **kwargs)
        clocks["projection"] += time.perf_counter() - start
        return logits

    def begin(*_: Any) -> None:
        clocks["forward"] -= time.perf_counter()

    def end(*_: Any) -> None:
        clocks["forward"] += time.perf_counter()

    model.compute_logits = timed_project
    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end)


def take_clocks(worker: Any) -> dict[str, float]:
    """In the worker: the seconds since this was last called."""
    taken = dict(worker.clocks)
    worker.clocks.update(dict.fromkeys(taken, 0.0))
    return taken


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
        async for _ in backend.engine.generate(prompt, chosen, f"bench-{number}"):
            pass

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number, sequence) for number, sequence in enumerate(sequences)))

    start = time.perf_counter()
    backend.run(all_of_them())
    return time.perf_counter() - start


@contextlib.contextmanager
def serving(backend: VllmBackend, folder: Path) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The address of a server around this engine, and the loop that it runs on."""
    from teacher_server.server import Served, TeacherServer

    async def start() -> TeacherServer:
        server = TeacherServer(
            teacher_config(model=str(folder), address="127.0.0.1:0", backend="vllm"), lambda: Served(backend)
        )
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
    from benchmarks.load import Client

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


def measure(folder: Path, sequences: list[TokenSequence], dtype: str, rounds: int) -> dict[str, Any]:
    from teacher_server.vllm_backend import VllmBackend, engine_args

    num_tokens = sum(map(len, sequences))
    backend = VllmBackend(
        engine_args(str(folder), dtype=dtype, max_sequence_tokens=512),
        weights_digest="0" * 64,
        tokenizer_digest="0" * 64,
    )
    peaks: dict[str, int] = {}
    payload = 0.0

    def in_worker(function: Callable[..., Any], *args: Any) -> Any:
        return backend.run(backend.engine.collective_rpc(function, args=args))[0]

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
            "projection": lambda: in_worker(project, num_tokens),
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
        in_worker(start_clocks)
        for path in paths.values():  # warms up
            path()
        for _ in tqdm(range(rounds), desc=f"{dtype}, rounds"):
            there = list(paths)
            for name in [*there, *reversed(there)]:
                peak_bytes(processes)
                in_worker(take_clocks)
                taken = paths[name]()
                runs[name].append({"seconds": taken, **in_worker(take_clocks)})
                peaks[name] = max(peaks.get(name, 0), peak_bytes(processes))
    of_rounds = {name: by_round(found) for name, found in runs.items()}
    plain, logprobs, with_targets, projection = of_rounds.values()
    floor = plain["seconds"] + projection["seconds"]
    forward = (plain["forward"] + logprobs["forward"] + with_targets["forward"]) / 3
    logprobs_rest, targets_rest = (path["seconds"] - path["forward"] for path in (logprobs, with_targets))
    return {
        "tokens_per_second": {
            name: 2 * num_tokens / float(np.median(path["seconds"])) for name, path in of_rounds.items()
        },
        "targets_over_prompt_logprobs_0": ratio(logprobs["seconds"], with_targets["seconds"]),
        "targets_over_prompt_logprobs_0_at_equal_forward": ratio(forward + logprobs_rest, forward + targets_rest),
        "targets_over_floor": ratio(floor, with_targets["seconds"]),
        "targets_over_floor_of_the_same_seconds": ratio(
            with_targets["forward"] + with_targets["projection"], with_targets["seconds"]
        ),
        "floor_over_prompt_logprobs_0": ratio(logprobs["seconds"], floor),
        "peak_resident_bytes": peaks,
        "payload_bytes_per_token": payload,
        "runs": runs,
    }


def by_round(runs: list[dict[str, float]]) -> dict[str, npt.NDArray[np.float64]]:
    """Sums over the two runs of each round."""
    return {name: np.reshape([run[name] for run in runs], (-1, 2)).sum(axis=1) for name in runs[0]}


def ratio(slow: npt.NDArray[np.float64], fast: npt.NDArray[np.float64]) -> dict[str, Any]:
    """How many times as fast, in the median round and its quartiles."""
    low, median, high = statistics.quantiles((slow / fast).tolist(), n=4)
    return {"median": median, "quartiles": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--num-sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # `project` is sent to the worker
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    run(args)


def run(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from benchmarks.load import SPEC
    from benchmarks.machine import machine
    from demo.assets import teacher_folder, text_file
    from logitstream.types import TokenSequence

    folder = teacher_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    needed = args.num_sequences * args.tokens
    ids = np.asarray(tokenizer(text_file().read_text()[: 8 * needed])["input_ids"][:needed], np.int32)
    sequences = [TokenSequence(token_ids=part) for part in np.split(ids, args.num_sequences)]
    where = machine("vllm-cpu", "torch", "transformers", "grpcio", "numpy")
    results = {dtype: measure(folder, sequences, dtype, args.rounds) for dtype in args.dtype}
    shape = {"num_sequences": args.num_sequences, "tokens": args.tokens, "num_samples": SPEC.num_samples}
    RESULTS.write_text(json.dumps({"machine": where, "settings": shape, "results": results}, indent=2) + "\n")
    for dtype, found in results.items():
        print(dtype, json.dumps({name: value for name, value in found.items() if name != "runs"}, indent=2))


if __name__ == "__main__":
    main()
