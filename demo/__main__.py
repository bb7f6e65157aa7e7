"""The main job on one machine: a teacher server, two student workers, an epoch online, one from the cache, a report."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from demo.assets import MODEL_NAME, TEXT_NAME, teacher_folder, text_file
from logitstream.processes import tied

HERE = Path(__file__).parent
NUM_WORKERS, SEQUENCES_PER_STEP = 2, 8
START_SECONDS, EPOCH_SECONDS, STOP_SECONDS, LINE_SECONDS = 600.0, 1800.0, 20.0, 10.0
Processes = dict[str, tuple[subprocess.Popen[bytes], Path]]
"""By name: the process and its log."""


class ChildFailed(RuntimeError):
    """A child process ended with an error, or too early."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--backend", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--seed", type=int, default=0, help="of the student's start, the data's order and the draws")
    parser.add_argument("--sequences", type=int, default=480, help="to train on, of 128 tokens")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    if options.sequences < SEQUENCES_PER_STEP:
        parser.error(f"--sequences must be at least {SEQUENCES_PER_STEP}, one step's, got {options.sequences}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\nstopped; teacher and students have ended")
        sys.exit(130)
    except ChildFailed as error:
        sys.exit(f"the demo failed: {error}")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> None:
    """Train, evaluate, report; everything that was started has ended when this returns or raises."""
    from demo.report import evaluate_heldout, write_report

    started = time.monotonic()
    teacher, text, output = teacher_folder(), text_file(), options.output
    print(f"teacher: {MODEL_NAME} (Apache-2.0); text: {TEXT_NAME} (PSF-2.0, {text.stat().st_size / 1e6:.1f} MB)")
    if output.exists() and any(output.iterdir()) and not (output / "student.yaml").exists():
        raise ChildFailed(f"{output} is not empty and no earlier demo's: choose another --output")
    shutil.rmtree(output, ignore_errors=True)
    metrics_port = write_settings(options, teacher, text)
    report = train(output, metrics_port, num_steps=options.sequences // SEQUENCES_PER_STEP)
    print("evaluating on held-out text …")
    report |= json.loads((output / "student" / "report.json").read_text())
    report |= evaluate_heldout(output / "student", teacher, output / "cache")
    report |= {"seed": options.seed, "backend": options.backend, "demo_seconds": round(time.monotonic() - started, 1)}
    write_report(report, read_progress(output), output)


def write_settings(options: argparse.Namespace, teacher: Path, text: Path) -> int:
    """Write the two commands' YAML files; return the port of the teacher's metrics."""
    import torch

    output, address, metrics_port = options.output, f"127.0.0.1:{_free_port()}", _free_port()
    given: dict[str, Any] = {
        name: yaml.safe_load((HERE / f"{name}.yaml").read_text()) for name in ("teacher", "student")
    }
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    given["teacher"] |= {
        "model": {"path": str(teacher), "dtype": "bfloat16" if is_fast else "float32"},
        "backend": options.backend,
        "server": {"address": address},
        "id_model": {"text": str(text)},
        "metrics": {"port": metrics_port},
    }
    student = given["student"]
    student["data"] |= {"text": [str(text)], "max_sequences": options.sequences}
    student["targets"]["seed"] = student["training"]["seed"] = options.seed
    student["training"]["output_dir"] = str(output / "student")
    student |= {
        "model": {"config": str(HERE.parent / "docker" / "student-model.json"), "tokenizer": str(teacher)},
        "teacher": {"addresses": [address]},
        "cache": {"path": str(output / "cache")},
    }
    output.mkdir(parents=True)
    for name, settings in given.items():
        (output / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return metrics_port


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def train(output: Path, metrics_port: int, *, num_steps: int) -> dict[str, Any]:
    """Train two epochs of `num_steps`, the second with the teacher stopped; return the teacher's figures."""
    teacher_log, student_log = output / "teacher.log", output / "student.log"
    serve = ["-m", "teacher_server", "--config", str(output / "teacher.yaml")]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_WORKERS}"]
    study = [*launcher, "-m", "student_worker", "--config", str(output / "student.yaml")]
    next_line = time.monotonic() + LINE_SECONDS

    def steps_done() -> int:
        nonlocal next_line
        rows = read_progress(output)
        if rows and time.monotonic() >= next_line:
            next_line = time.monotonic() + LINE_SECONDS
            rate = f"{rows[-1]['tokens_per_second']:,.0f} tokens/s"
            print(f"{rows[-1]['step']}/{2 * num_steps} steps · loss {rows[-1]['loss']:.3f} nats · {rate}", flush=True)
        return int(rows[-1]["step"]) if rows else 0

    with child(serve, teacher_log) as teacher:
        running: Processes = {"teacher server": (teacher, teacher_log)}
        print("loading the teacher …", flush=True)
        serves = "serving on"
        wait_for(lambda: serves in teacher_log.read_text(errors="replace"), running, seconds=START_SECONDS, what=serves)
        with child(study, student_log, OMP_NUM_THREADS="1") as student:
            students: Processes = {"student workers": (student, student_log)}
            end = "the end of the online epoch"
            wait_for(lambda: steps_done() >= num_steps, students | running, seconds=EPOCH_SECONDS, what=end)
            figures = teacher_figures(metrics_port)
            stop(teacher)
            print("teacher stopped; the second epoch comes from the cache", flush=True)
            end = "the end of training"
            wait_for(lambda: bool(steps_done()) and student.poll() == 0, students, seconds=EPOCH_SECONDS, what=end)
            return figures


def read_progress(output: Path) -> list[dict[str, Any]]:
    """Return the rows of the student's progress.jsonl so far."""
    path = output / "student" / "progress.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last piece may be half written
    return [json.loads(line) for line in lines]


def teacher_figures(metrics_port: int) -> dict[str, Any]:
    """Return the teacher's throughput while it scored, from its own metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as response:
        samples = dict(re.findall(r"^logitstream_teacher_(\S+) (\S+)$", response.read().decode(), re.MULTILINE))
    seconds = sum(float(samples[f'stage_seconds_sum{{stage="{stage}"}}']) for stage in ("forward", "draw"))
    tokens = float(samples["tokens_total"])
    return {"teacher_tokens_scored": int(tokens), "teacher_tokens_per_second": tokens / seconds if seconds else None}


@contextmanager
def child(arguments: Sequence[str], log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python ARGUMENTS` with its output in `log`; on exit it and its children are ended, whatever happened.

    The kernel ends it if this process is killed; its own children see to themselves.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            tied(arguments),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the groups in order
            env=os.environ | env,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: SIGTERM, a bounded wait, SIGKILL."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what a child of the child may have left
    process.wait()


def wait_for(ready: Callable[[], bool], processes: Processes, *, seconds: float, what: str) -> None:
    """Poll until `ready()`. Raises ChildFailed with the log's end if a child stops first or time runs out."""
    deadline = time.monotonic() + seconds
    while not ready():
        for name, (process, log) in processes.items():
            if process.poll() is not None and not ready():  # it may have ended as expected meanwhile
                raise ChildFailed(f"{name} ended with status {process.returncode} before {what}:\n{tail(log)}")
        if time.monotonic() > deadline:
            logs = ", ".join(str(log) for _, log in processes.values())
            raise ChildFailed(f"no {what} within {seconds:.0f} s; see {logs}")
        time.sleep(0.2)


def tail(log: Path, num_lines: int = 15) -> str:
    """Return the log's last lines, without what torchrun adds after a worker's own error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = list(itertools.takewhile(lambda line: "torch/distributed/elastic" not in line, lines))
    return "\n".join(["  " + line for line in lines[-num_lines:]] + [f"  (whole log: {log})"])


if __name__ == "__main__":
    main()
