"""What a run shows while it trains: a live line for people, progress.jsonl for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitstream.files import write_whole

PLAIN_LINE_SECONDS = 10.0


class ProgressDisplay(TrainerCallback):
    """On the main process: appends each log to `progress.jsonl` and shows it, live on a terminal, else every 10 s.

    A row holds step, max_steps, epoch, loss [nats/token], tokens, tokens_per_second, waiting_seconds, queue_batches,
    seconds_left.
    """

    def __init__(self, folder: Path, *, has_teacher: bool = True) -> None:
        self.has_teacher = has_teacher
        self.path = folder / "progress.jsonl"
        self.started = self.last_line = time.monotonic()
        self.first_step = 0
        self.console = Console()
        self.bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.started, self.first_step = time.monotonic(), state.global_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(_rows_up_to(state.global_step, self.path)))
        if sys.stdout.isatty():
            text = "step {task.completed:.0f}/{task.total:.0f} · {task.fields[figures]}"
            self.bar = Progress(BarColumn(20), TextColumn(text), console=self.console)
            self.bar.add_task("training", total=state.max_steps, figures="starting")
            self.bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = self._row(state, logs)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=row["step"], figures=self._describe(row))
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            self.say(f"step {row['step']}/{row['max_steps']} · {self._describe(row)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also where training did not come to its end."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, row: dict[str, float]) -> str:
        return describe(row, has_teacher=self.has_teacher)

    def _row(self, state: TrainerState, logs: dict[str, float]) -> dict[str, float]:
        steps_done = max(state.global_step - self.first_step, 1)
        seconds_a_step = (time.monotonic() - self.started) / steps_done
        return {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": float(state.epoch or 0.0),
            "loss": logs["loss"],
            "tokens": logs.get("tokens", 0.0),
            "tokens_per_second": logs.get("tokens_per_second", 0.0),
            "waiting_seconds": logs.get("waiting_seconds", 0.0),
            "queue_batches": logs.get("queue_batches", 0.0),
            "seconds_left": seconds_a_step * (state.max_steps - state.global_step),
        }


def _rows_up_to(step: int, path: Path) -> Iterator[str]:
    """The lines of the steps that a resumed run does not repeat; one that was cut off is none."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError, TypeError):
            continue


def describe(row: dict[str, float], *, has_teacher: bool = True) -> str:
    """One line for people; waiting is the whole run's so far."""
    waited = f"waited {row['waiting_seconds']:.1f} s for the teacher · " if has_teacher else ""
    return (
        f"loss {row['loss']:.3f} nats · {row['tokens_per_second']:,.0f} tokens/s · {waited}"
        f"{row['queue_batches']:.0f} batches ready · {row['seconds_left']:.0f} s left"
    )
