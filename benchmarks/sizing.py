"""How many teachers for how many students: the share of their time that students wait, against demand over supply.

    python -m benchmarks.sizing

Real servers, clients and target streams; teachers score at a given rate and students train at a given rate, both by
sleeping, so the curve shows queues and balancing and not this machine. Demand is what the students would train on in a
second if they never waited, supply what the teachers score. Writes benchmarks/results/sizing.json.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.load import VOCAB_SIZE, instant
from benchmarks.machine import machine
from logitstream.client.connections import TeacherSettings
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.tokenizer import UNCHECKED_TOKENIZER
from logitstream.training.target_stream import TargetStream
from logitstream.types import TargetSpec

RESULTS = Path(__file__).parent / "results" / "sizing.json"
TEACHER_TOKENS_PER_SECOND = 20_000
STUDENT_TOKENS_PER_SECOND = 5_000
TEACHERS = (1, 2)
DEMAND_OVER_SUPPLY = (0.5, 0.75, 1.0, 1.25, 1.5)
BATCH_SEQUENCES, NUM_TOKENS = 4, 512
STEP_SECONDS = BATCH_SEQUENCES * NUM_TOKENS / STUDENT_TOKENS_PER_SECOND
NUM_STEPS, SKIPPED_STEPS = 40, 16
"""The first steps use up what was prefetched before anybody trained."""


def main() -> None:
    results: dict[str, Any] = {
        "settings": {
            "teacher_tokens_per_second": TEACHER_TOKENS_PER_SECOND,
            "student_tokens_per_second": STUDENT_TOKENS_PER_SECOND,
            "batch": [BATCH_SEQUENCES, NUM_TOKENS],
            "steps": NUM_STEPS,
            "skipped_steps": SKIPPED_STEPS,
        },
        "machine": machine("grpcio", "numpy", "torch"),
        "points": [],
    }
    for num_teachers in TEACHERS:
        with contextlib.ExitStack() as servers:
            slow = ("--seconds-per-token", str(1 / TEACHER_TOKENS_PER_SECOND), "--max-batch-tokens", "2048")
            addresses = [servers.enter_context(instant(*slow))[0] for _ in range(num_teachers)]
            for ratio in DEMAND_OVER_SUPPLY:
                num_students = round(ratio * num_teachers * TEACHER_TOKENS_PER_SECOND / STUDENT_TOKENS_PER_SECOND)
                point = {"teachers": num_teachers, "students": num_students, "demand_over_supply": ratio}
                point["waiting_share"] = waiting_share(addresses, num_students)
                print(point, flush=True)
                results["points"].append(point)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def waiting_share(addresses: Sequence[str], num_students: int) -> float:
    """Mean over the students of waiting over waiting and training, once the first steps are over."""
    with ThreadPoolExecutor(num_students) as pool:
        shares = list(pool.map(lambda number: student(addresses, number), range(num_students)))
    return sum(shares) / num_students


def student(addresses: Sequence[str], number: int) -> float:
    spec = TargetSpec(num_samples=50, codec_version=1)
    rng = np.random.default_rng(number)
    shape = (BATCH_SEQUENCES, NUM_TOKENS)
    batches = [{"input_ids": torch.from_numpy(rng.integers(0, VOCAB_SIZE, shape))} for _ in range(NUM_STEPS)]
    settings = TeacherSettings(addresses=list(addresses), client_id=f"student-{number}")
    client = GrpcTeacherClient(settings, spec, vocab_size=VOCAB_SIZE, tokenizer=UNCHECKED_TOKENIZER)
    waiting = 0.0
    with contextlib.closing(client):
        batch = iter(TargetStream(batches, client))
        for step in range(NUM_STEPS):
            began = time.perf_counter()
            next(batch)
            if step >= SKIPPED_STEPS:
                waiting += time.perf_counter() - began
            time.sleep(STEP_SECONDS)
    return waiting / (waiting + (NUM_STEPS - SKIPPED_STEPS) * STEP_SECONDS)


if __name__ == "__main__":
    main()
