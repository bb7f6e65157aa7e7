"""The run's figures, from the same metrics that Prometheus sees, by epoch and in all, over every process."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitstream import metrics

COUNTERS = {
    "tokens": "logitstream_student_tokens_total",
    "waiting_seconds": "logitstream_student_waiting_seconds_total",
    "decoding_seconds": "logitstream_student_decoding_seconds_total",
    "computing_seconds": "logitstream_student_computing_seconds_total",
    "received_bytes": "logitstream_student_received_bytes_total",
    "entries": "logitstream_student_entries_total",
    "rows": "logitstream_student_target_rows_total",
    "cache_hits": "logitstream_cache_hits_total",
}
COUNTS = ("tokens", "received_bytes", "entries", "rows", "cache_hits")
OVERHEAD = "logitstream_student_overhead_vs_cross_entropy_ratio"


class RunReport(TrainerCallback):
    """Reads the counters at each epoch's end; `figures()` sums them over the processes."""

    def __init__(self) -> None:
        self.marks: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.marks = [_read()]

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.marks.append(_read())

    def figures(self) -> dict[str, Any]:
        """Call on every process: counts are sums over the processes, seconds are means, overheads the last epoch's."""
        epochs = [_over_processes(_difference(a, b)) for a, b in itertools.pairwise(self.marks)]
        if not epochs:
            return {"epochs": []}
        total = {name: sum(epoch[name] for epoch in epochs) for name in (*COUNTERS, "seconds")}
        return _rates(total) | {
            "tokens_trained": int(total["tokens"]),
            "seconds_waiting_for_targets": total["waiting_seconds"],
            "epochs": [{**epoch, **_rates(epoch)} for epoch in epochs],
        }


def _rates(sums: dict[str, float]) -> dict[str, float | None]:
    """Bytes are over rows received, entries over rows trained on; None where there were none."""
    return {
        "student_tokens_per_second": sums["tokens"] / sums["seconds"],
        "bytes_per_token": sums["received_bytes"] / sums["rows"] if sums["rows"] else None,
        "entries_per_token": sums["entries"] / sums["tokens"] if sums["tokens"] else None,
    }


def _read() -> dict[str, Any]:
    """This process's counters, the overhead's parts and the time now."""
    values = {name: metrics.value(counter) or 0.0 for name, counter in COUNTERS.items()}
    parts = {f"overhead_{part}": metrics.value(OVERHEAD, part=part) for part in metrics.OVERHEAD_PARTS}
    return values | parts | {"seconds": time.perf_counter()}


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value if name.startswith("overhead_") else value - before[name] for name, value in after.items()}


def _over_processes(mine: dict[str, float]) -> dict[str, float]:
    everyone = [mine]
    if dist.is_available() and dist.is_initialized():
        everyone = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    return {name: sum(one[name] for one in everyone) / (1 if name in COUNTS else len(everyone)) for name in mine}
