"""The cost of serving: tokens/s against the bare forward, goodput against bare gRPC calls, fairness, memory.

    python -m benchmarks.serving [teacher|goodput|fairness|memory …]   all, without a name
    python -m benchmarks.serving soak --minutes 30

Writes benchmarks/results/serving.json, a part at a time. Servers are processes of their own; what is compared is
measured in turn, several times, and medians are given, so that ratios survive a machine that others use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.instant_teacher import VOCAB_SIZE
from benchmarks.load import Client, instant, random_sequences, teacher, tokens_per_second
from benchmarks.machine import machine
from benchmarks.serving_goodput import measure_goodput
from benchmarks.serving_memory import measure_memory, measure_soak

MANY_TOKENS = 65_536
RESULTS = Path(__file__).parent / "results" / "serving.json"


def measure_teacher(args: argparse.Namespace) -> dict[str, Any]:
    """Served tokens/s over those of the model's forward on the same batches; real tokens, padding is not counted.

    CPU seconds a token are given as well, of the process that computes: they suffer less from a machine that is shared.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from demo.assets import teacher_folder

    folder, budget = teacher_folder(), args.max_batch_tokens
    lengths = np.random.default_rng(1).integers(32, args.max_length + 1, args.num_sequences).tolist()
    num_tokens = sum(lengths)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shapes, unsorted = batch_shapes(lengths, budget)
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}

    @torch.inference_mode()
    def bare(name: str, of: list[tuple[int, int]]) -> None:
        start, used = time.perf_counter(), time.process_time()
        for rows, width in of:
            model(input_ids=torch.randint(0, VOCAB_SIZE, (rows, width)), use_cache=False)
        rates.setdefault(name, []).append(num_tokens / (time.perf_counter() - start))
        cpu.setdefault(name, []).append((time.process_time() - used) / num_tokens)

    def served(num_clients: int, seed: int) -> None:
        name, used = f"served_{num_clients}_clients", sum(server.cpu_times()[:2])
        run = tokens_per_second(
            address, random_sequences(lengths, seed=seed), num_clients=num_clients, window=MANY_TOKENS
        )
        rates.setdefault(name, []).append(asyncio.run(run))
        cpu.setdefault(name, []).append((sum(server.cpu_times()[:2]) - used) / num_tokens)

    with teacher(budget) as (address, server):
        bare("warm up", shapes[:2])
        asyncio.run(tokens_per_second(address, random_sequences([64] * 4), num_clients=1, window=MANY_TOKENS))
        for repeat in range(args.repeats):
            for num_clients in (1, 4, 16):
                bare("bare", shapes)
                served(num_clients, seed=100 * repeat + num_clients)
            bare("bare_unsorted", unsorted)
    medians = {name: statistics.median(values) for name, values in rates.items() if name != "warm up"}
    cpu_medians = {name: statistics.median(values) for name, values in cpu.items() if name != "warm up"}
    names = [name for name in medians if name.startswith("served")]
    return {
        "tokens_per_second": medians,
        "over_bare": {name: medians[name] / medians["bare"] for name in names},
        "cpu_milliseconds_per_token": {name: 1e3 * value for name, value in cpu_medians.items()},
        "over_bare_by_cpu_seconds": {name: cpu_medians["bare"] / cpu_medians[name] for name in names},
        "padding_share": 1 - num_tokens / sum(rows * width for rows, width in shapes),
        "padding_share_unsorted": 1 - num_tokens / sum(rows * width for rows, width in unsorted),
        "lengths": f"{args.num_sequences} uniform in 32..{args.max_length}",
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "max_batch_tokens": budget,
        "runs": rates,
    }


def batch_shapes(lengths: list[int], budget: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(rows, width) of the passes that the server makes of these sequences, and of its batches padded as they come."""
    from teacher_server.transformers_backend import PASS_OVERHEAD_TOKENS, split_by_length

    batches: list[list[int]] = [[]]
    for length in lengths:
        if sum(batches[-1]) + length > budget:
            batches.append([])
        batches[-1].append(length)
    passes = [
        (len(one), max(batch[index] for index in one))
        for batch in batches
        for one in split_by_length(batch, pass_overhead_tokens=PASS_OVERHEAD_TOKENS["cpu"], max_padded_tokens=budget)
    ]
    return passes, [(len(batch), max(batch)) for batch in batches]


async def fairness(address: str, *, batch_seconds: float, seconds: float) -> dict[str, Any]:
    """A greedy client with ten times the window of a steady one, both always waiting; a small one, one at a time."""
    stop = time.perf_counter() + seconds
    rng = np.random.default_rng(0)

    async def backlog(client: Client, seed: int) -> None:
        sequences = random_sequences(np.random.default_rng(seed).integers(32, 257, 4000).tolist(), seed=seed)
        with contextlib.suppress(asyncio.CancelledError):
            await client.run(sequences, group=4)

    async def one_at_a_time(client: Client) -> None:
        number = 0
        while time.perf_counter() < stop:
            (one,) = random_sequences([int(rng.integers(32, 257))], seed=number)
            await client.run([one])
            number += 1

    async with (
        Client(address, "greedy", window_tokens=60_000) as greedy,
        Client(address, "steady", window_tokens=6_000) as steady,
        Client(address, "small", window_tokens=6_000) as small,
    ):
        tasks = [asyncio.ensure_future(backlog(client, seed)) for seed, client in enumerate((greedy, steady), 1)]
        await one_at_a_time(small)
        begin = stop - 0.8 * seconds
        taken = {
            name: sum(tokens for when, tokens in client.times if begin < when < stop)
            for name, client in (("greedy", greedy), ("steady", steady), ("small", small))
        }
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    fair = (taken["greedy"] + taken["steady"]) / 2
    latencies = np.array(small.latencies[3:])
    return {
        "tokens_taken": taken,
        "greedy_over_fair_share": taken["greedy"] / fair,
        "offered_ratio": 10,
        "batch_seconds": batch_seconds,
        "small_client_batches_p50": float(np.quantile(latencies, 0.5)) / batch_seconds,
        "small_client_batches_p99": float(np.quantile(latencies, 0.99)) / batch_seconds,
        "small_client_requests": len(latencies),
    }


def measure_fairness(args: argparse.Namespace) -> dict[str, Any]:
    """Shares and latencies at a teacher of 20,000 tokens/s with batches of 2,048 tokens."""
    seconds_per_token, batch_tokens = 5e-5, 2048
    with instant("--seconds-per-token", str(seconds_per_token), "--max-batch-tokens", str(batch_tokens)) as (
        address,
        _,
    ):
        return asyncio.run(fairness(address, batch_seconds=seconds_per_token * batch_tokens, seconds=args.seconds))


PARTS = {
    "teacher": measure_teacher,
    "goodput": measure_goodput,
    "fairness": measure_fairness,
    "memory": measure_memory,
    "soak": measure_soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all but the soak")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-sequences", type=int, default=48, help="of the part `teacher`")
    parser.add_argument("--max-length", type=int, default=256, help="of the part `teacher`")
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="of the part `teacher`")
    parser.add_argument("--num-requests", type=int, default=4000, help="of the part `goodput`")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the parts `fairness` and `memory`")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the part `soak`")
    args = parser.parse_args()
    for part in args.parts or [name for name in PARTS if name != "soak"]:
        print(f"{part}: {PARTS[part].__doc__}", flush=True)
        where = machine("torch", "transformers", "grpcio", "protobuf", "numpy")
        result = PARTS[part](args) | {"machine": where}
        print(json.dumps(result, indent=2), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[part] = result
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
