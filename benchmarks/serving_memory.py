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

from benchmarks.load import Client, instant, random_sequences, teacher

TOKENS_IN_FLIGHT = 65_536
"""The tokens of all clients together: the credit of one."""


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
    found: dict[str, Any] = {}
    for name, started in (("teacher", teacher(1024)), ("instant", instant())):
        with started as (address, server):
            asyncio.run(steady_rss(address, server, num_clients=1, seconds=args.seconds / 2))
            rss = {
                str(count): asyncio.run(steady_rss(address, server, num_clients=count, seconds=args.seconds))
                for count in (1, 64)
            }
            found[name] = {"rss_bytes": rss, "growth": rss["64"] / rss["1"] - 1}
    return found


def measure_soak(args: argparse.Namespace) -> dict[str, Any]:
    """Full load with clients that come and go; the drift of the server's memory and its 95 % interval."""

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
    return {"minutes": args.minutes, "samples": len(samples)} | drift(levels_by_minute(samples))


def levels_by_minute(samples: list[tuple[float, int]]) -> list[float]:
    """Resident MiB at the end of each whole minute, the mean of its last five samples."""
    by_minute: dict[int, list[int]] = {}
    for seconds, rss in samples:
        by_minute.setdefault(int(seconds // 60), []).append(rss)
    return [statistics.mean(rss[-5:]) / 2**20 for _, rss in sorted(by_minute.items()) if len(rss) > 50]


def drift(levels: list[float]) -> dict[str, Any]:
    """MiB/h after the first fifth (warming up), as the drift of a random walk, and its 95 % interval.

    An allocator's level moves in steps that stay: levels depend on those before them, so that a straight line through
    them promises too much (three runs of it gave -1.0 ± 0.5, 2.1 ± 0.6 and -1.8 ± 1.5), their changes do not. Of
    random walks as rough as those runs 6 % lie outside the interval; a leak of 6 MiB/h does in three of four.
    """
    changes = np.diff(levels[len(levels) // 5 :])
    error = changes.std(ddof=1) / np.sqrt(len(changes))
    return {
        "mib_per_hour": 60 * float(changes.mean()),
        "mib_per_hour_interval": 60 * 2.07 * float(error),  # Student's t, 23 degrees of freedom: 30 minutes
        "rss_mib_by_minute": [round(level, 2) for level in levels],
    }
