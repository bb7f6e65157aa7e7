"""The cost of delivery on the student's side: client, stream and decoding, without a model on either end.

    python -m benchmarks.target_stream

`tokens_per_second`: a consumer that only takes batches, from a server process that answers at once and from the cache.
`step_slowdown`: a consumer that computes (one thread of matrix products) at the rate of a real step, over the same
computation on the bare batches, minus one: what the stream's threads take away from training beside them.
Writes benchmarks/results/target_stream.json. Medians of runs in turn; ratios are of neighbours.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.load import VOCAB_SIZE, instant
from benchmarks.machine import machine
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.data.documents import Batch
from logitstream.tokenizer import UNCHECKED_TOKENIZER
from logitstream.training.target_cache import open_target_cache
from logitstream.training.target_stream import TargetStream
from logitstream.types import TargetSpec

RESULTS = Path(__file__).parent / "results" / "target_stream.json"
ROUNDS = 5
NUM_BATCHES, BATCH_SEQUENCES, NUM_TOKENS = 24, 8, 512
STEP_PRODUCTS = 24
"""Products of 1024 x 1024 matrices that stand for one step."""


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "settings": {"batches": NUM_BATCHES, "sequences": BATCH_SEQUENCES, "tokens": NUM_TOKENS, "rounds": ROUNDS},
        "machine": machine("grpcio", "numpy", "numba", "torch"),
    }
    with instant() as (address, _):
        for codec_version in (1, 2):
            spec = TargetSpec(num_samples=50, codec_version=codec_version)
            client = GrpcTeacherClient([address], spec, vocab_size=VOCAB_SIZE, tokenizer=UNCHECKED_TOKENIZER)
            results[f"codec_{codec_version}"] = measure(client, spec)
            client.close()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def measure(client: GrpcTeacherClient, spec: TargetSpec) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shape = (BATCH_SEQUENCES, NUM_TOKENS)
    batches = [{"input_ids": torch.from_numpy(rng.integers(0, VOCAB_SIZE, shape))} for _ in range(NUM_BATCHES)]
    online = TargetStream(batches, client)
    rates: dict[str, list[float]] = {"online": [], "cache": []}
    slowdowns: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = open_target_cache(folder, client, spec)
        list(TargetStream(batches, client, cache=cache, draw_set=0))
        replay = TargetStream(batches, None, cache=cache, mode="cache", draw_set=0)
        for _ in range(ROUNDS):
            for name, stream in (("online", online), ("cache", replay)):
                rates[name].append(BATCH_SEQUENCES * NUM_TOKENS * NUM_BATCHES / timed(stream, compute=False))
            slowdowns.append(timed(online, compute=True) / timed(batches, compute=True) - 1)
        cache.close()
    stats = online.stats
    tokens = stats.batches * BATCH_SEQUENCES * NUM_TOKENS
    return {
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "step_slowdown": statistics.median(slowdowns),
        "step_slowdowns": slowdowns,
        "decoding_seconds_per_million_tokens": 1e6 * stats.decoding_seconds / tokens,
        "payload_bytes_per_token": stats.payload_bytes / tokens,
        "entries_per_token": stats.entries / tokens,
    }


def timed(batches: Iterable[Batch], *, compute: bool) -> float:
    """Seconds of one pass; computing, every batch is followed by a step's worth of products."""
    matrix = torch.ones(1024, 1024)
    started = time.perf_counter()
    for _ in batches:
        for _ in range(STEP_PRODUCTS if compute else 0):
            matrix = matrix @ matrix / 1024
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
