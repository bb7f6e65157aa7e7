"""Progress of a run while it trains (progress.jsonl and a live line) and the report at its end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from logitstream.files import write_whole
from logitstream.training.stats import RunStats, overhead_in, total_of

PLAIN_LINE_SECONDS = 10.0


def report(stats: RunStats) -> dict[str, Any]:
    """Return the run's statistics, the same on every process: counts are sums over the processes, the rest means.

    Overheads are those of the last epoch that measured one and received targets from a teacher and, as `offline_…`, of
    the last one that measured one and received none; `replay_over_online_throughput` compares the last epoch of either
    kind. bytes_per_token is over the rows received, entries_per_token over the tokens trained on.
    """
    resumed = {"resumed_at_step": stats.first_step} if stats.first_step else {}
    epochs: list[dict[str, Any]] = [epoch | _rates(epoch) for epoch in stats.of_all_processes() if epoch["steps"]]
    if not epochs:
        return resumed | {"epochs": []}
    total = total_of(epochs)
    found = resumed | _rates(total) | {"tokens_trained": int(total["tokens"])}
    found["seconds_waiting_for_targets"] = total["waiting_seconds"]
    online = [epoch for epoch in epochs if epoch["received_bytes"]]
    offline = [epoch for epoch in epochs if not epoch["received_bytes"]]
    found |= _last_overhead(online)
    found |= {f"offline_{name}": value for name, value in _last_overhead(offline).items()}
    if online and offline:
        found["replay_over_online_throughput"] = (
            offline[-1]["student_tokens_per_second"] / online[-1]["student_tokens_per_second"]
        )
    return found | {"epochs": epochs}


def _last_overhead(epochs: list[dict[str, Any]]) -> dict[str, float]:
    return next((found for epoch in reversed(epochs) if (found := overhead_in(epoch))), {})


def _rates(sums: dict[str, float]) -> dict[str, Any]:
    return {
        "student_tokens_per_second": sums["tokens"] / (sums["waiting_seconds"] + sums["computing_seconds"]),
        "bytes_per_token": sums["received_bytes"] / sums["received_rows"] if sums["received_rows"] else None,
        "entries_per_token": sums["entries"] / sums["tokens"] if sums["tokens"] else None,
    }


class ProgressDisplay(TrainerCallback):
    """Writes the Trainer's log of each step to progress.jsonl and shows it: live on a terminal, else every 10 s."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.jsonl"
        self.console = Console()
        self._live = self.console.status("starting")
        self._last_line = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._last_line = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in state.log_history if "loss" in row]  # a resumed run's checkpoint holds the earlier ones
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._live.start()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if not state.is_world_process_zero or "loss" not in row:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        line = (
            f"step {row['step']}/{state.max_steps} · loss {row['loss']:.3f} nats · "
            f"{row['tokens_per_second']:,.0f} tokens/s · waited {row['waiting_seconds']:.1f} s for targets · "
            f"{row['queue_batches']:.0f} batches ready · {row['seconds_left']:.0f} s left"
        )
        self._live.update(line)
        if not self.console.is_terminal and time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also if training ended early."""
        self._live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
