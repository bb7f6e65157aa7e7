"""The server's memory: from 1 to 64 clients, and over a long run with clients that come and go."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from typing import Any

import numpy as np
import psutil

from benchmarks.load import Client, instant, process, random_sequences

TOKENS_IN_FLIGHT = 65_536
"""Of all clients together: the credit of one."""


async def steady_rss(address: str, server: psutil.Process, *, num_clients: int, seconds: float) -> int:
    """The server's resident bytes under full load from that many clients, the median of the last half."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                Client(address, f"client {i}", window_tokens=TOKENS_IN_FLIGHT // num_clients)
            )
            for i in range(num_clients)
        ]
        sequences = random_sequences([256] * 4000, seed=num_clients)
        tasks = [asyncio.ensure_future(client.run(sequences)) for client in clients]
        seen: list[int] = []
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            await asyncio.sleep(seconds / 20)
            seen.append(server.memory_info().rss)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return int(statistics.median(seen[len(seen) // 2 :]))


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Resident bytes from 1 to 64 clients at the same load: of a real teacher, and of the server alone."""
    from demo.assets import teacher_folder

    command = ["-m", "teacher_server", "--model", str(teacher_folder()), "--dtype", "float32", "--device", "cpu"]
    command += ["--address", "127.0.0.1:0", "--address_file", "ADDRESS_FILE", "--max_batch_tokens", "1024"]
    found: dict[str, Any] = {}
    for name, started in (("teacher", process(*command)), ("instant", instant())):
        with started as (address, server):
            asyncio.run(steady_rss(address, server, num_clients=1, seconds=args.seconds / 2))
            rss = {
                str(count): asyncio.run(steady_rss(address, server, num_clients=count, seconds=args.seconds))
                for count in (1, 64)
            }
            found[name] = {"rss_bytes": rss, "growth": rss["64"] / rss["1"] - 1}
    return found


def measure_soak(args: argparse.Namespace) -> dict[str, Any]:
    """Full load with clients that come and go; the slope of the server's memory and its 95 % interval."""

    async def load(address: str, server: psutil.Process) -> list[tuple[float, int]]:
        samples: list[tuple[float, int]] = []
        begin = time.perf_counter()
        lengths = np.random.default_rng(0).integers(16, 513, 64)

        async def come_and_go(number: int) -> None:
            turn = 0
            while time.perf_counter() - begin < args.minutes * 60:
                turn += 1
                async with Client(address, f"client {number} {turn}", window_tokens=16_384) as client:
                    for _ in range(20):
                        await client.run(random_sequences(np.roll(lengths, turn).tolist(), seed=turn))

        async def watch() -> None:
            while time.perf_counter() - begin < args.minutes * 60:
                await asyncio.sleep(1.0)
                samples.append((time.perf_counter() - begin, server.memory_info().rss))

        await asyncio.gather(watch(), *(come_and_go(number) for number in range(4)))
        return samples

    with instant() as (address, server):
        samples = asyncio.run(load(address, server))
    by_minute: dict[int, list[int]] = {}
    for seconds, rss in samples:
        by_minute.setdefault(int(seconds // 60), []).append(rss)
    means = [round(statistics.mean(rss) / 2**20, 2) for rss in by_minute.values()]
    return {"minutes": args.minutes, "samples": len(samples)} | slope(samples) | {"rss_mib_by_minute": means}


def slope(samples: list[tuple[float, int]], *, num_blocks: int = 8) -> dict[str, float]:
    """Least squares through the means of eight blocks after the first fifth (warming up).

    Few blocks, as the allocator's level wanders over minutes: means of shorter ones depend on each other, and their
    interval is too small (two runs with 20 blocks gave -1.0 ± 0.5 and 2.1 ± 0.6 MiB/h).
    """
    kept = np.array(samples[len(samples) // 5 :], dtype=float)
    blocks = np.array([block.mean(axis=0) for block in np.array_split(kept, num_blocks)])
    hours, mib = blocks[:, 0] / 3600, blocks[:, 1] / 2**20
    (rate, start), covariance = np.polyfit(hours, mib, 1, cov=True)
    return {
        "mib_per_hour": float(rate),
        "mib_per_hour_interval": 2.45 * float(np.sqrt(covariance[0, 0])),  # Student's t, 6 degrees of freedom
        "rss_mib": float(start),
    }
