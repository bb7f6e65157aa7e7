"""The demo's two epochs: a teacher server and two student workers, then the workers alone with their cache."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from demo.processes import child, stop, wait_for
from logitstream.training.report import PLAIN_LINE_SECONDS, describe

NUM_WORKERS = 2
START_SECONDS = 600.0
EPOCH_SECONDS = 1800.0


def train(configs: dict[str, Path], output: Path, *, num_steps: int, console: Console) -> dict[str, Any]:
    """Both epochs of `num_steps` each; the teacher is stopped after the first. Returns the teacher's own figures."""
    teacher_log, student_log = output / "teacher.log", output / "student.log"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_WORKERS}"]
    student_command = [*launcher, "-m", "student_worker", "--config", str(configs["student"])]
    with child("teacher server", ["-m", "teacher_server", "--config", str(configs["teacher"])], teacher_log) as teacher:
        teacher_alone = {"teacher server": (teacher, teacher_log)}
        console.print("loading the teacher …")
        serving = lambda: "serving on" in teacher_log.read_text(errors="replace")  # noqa: E731
        wait_for(serving, teacher_alone, seconds=START_SECONDS, what="serving")
        with child("student workers", student_command, student_log, env={"OMP_NUM_THREADS": "1"}) as student:
            students = {"student workers": (student, student_log)}
            with _display(output / "student", 2 * num_steps, console) as steps_done:
                wait_for(
                    lambda: steps_done() >= num_steps,
                    students | teacher_alone,
                    seconds=EPOCH_SECONDS,
                    what="the end of the online epoch",
                )
                figures = _teacher_figures(configs["teacher"])
                stop(teacher)
                console.print("teacher stopped; the second epoch comes from the cache")
                wait_for(
                    lambda: steps_done() >= 0 and student.poll() == 0,
                    students,
                    seconds=EPOCH_SECONDS,
                    what="the end of training",
                )
            return figures


@contextmanager
def _display(folder: Path, num_steps: int, console: Console) -> Iterator[Any]:
    """Shows the students' progress, live on a terminal, else a line every 10 s; gives a function: steps done so far."""
    text = TextColumn("{task.completed:.0f}/{task.total:.0f} steps · {task.fields[figures]}")
    last_line = time.monotonic()
    with Progress(BarColumn(20), text, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=num_steps, figures="starting")

        def steps_done() -> int:
            nonlocal last_line
            rows = read_progress(folder)
            if not rows:
                return 0
            step, figures = int(rows[-1]["step"]), describe(rows[-1])
            progress.update(task, completed=step, figures=figures)
            if not console.is_terminal and time.monotonic() - last_line >= PLAIN_LINE_SECONDS:
                last_line = time.monotonic()
                console.print(f"{step}/{num_steps} steps · {figures}", highlight=False, soft_wrap=True)
            return step

        yield steps_done


def read_progress(folder: Path) -> list[dict[str, Any]]:
    """The rows of a student's progress.jsonl so far."""
    path = folder / "progress.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last piece may be half written
    return [json.loads(line) for line in lines]


def _teacher_figures(config: Path) -> dict[str, Any]:
    """The teacher's throughput while it scored, from its own metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    port = yaml.safe_load(config.read_text())["metrics"]["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = {(s.name, s.labels.get("stage")): s.value for family in families for s in family.samples}
    stages = ("forward", "draw")
    seconds = sum(samples[("logitstream_teacher_stage_seconds_sum", stage)] for stage in stages)
    tokens = samples[("logitstream_teacher_tokens_total", None)]
    return {"teacher_tokens_scored": int(tokens), "teacher_tokens_per_second": tokens / seconds if seconds else None}
