"""A student, a student of two processes under torchrun's agent, and a teacher, run in a process forked for it.

Audit hooks see what a process does to the files of its run, so that it can be killed at the n-th such event.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.launcher.api
import torch.distributed.run  # torchrun's: what its agent needs is imported

import teacher_server.server
import teacher_server.transformers_backend  # noqa: F401
from student_worker.__main__ import main as student_main
from teacher_server.__main__ import main as teacher_main

EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copyfile", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, kw_only=True)
class KillPoint:
    """Before the n-th time that a process changes something in a folder, or some seconds after.

    rank: of the process that is killed, of those of a run; None: torchrun's agent, by its worker of rank 0.
    """

    folder: Path
    number: int
    seconds_after: float = 0.0
    rank: int | None = 0


def watch(point: KillPoint) -> None:
    """Kill this process, or its parent, at the point: SIGKILL, or SIGALRM's default, which nobody handles either."""
    folder, count = str(point.folder), 0
    victim = os.getppid() if point.rank is None else os.getpid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in EVENTS or not str(args[0]).startswith(folder):
            return
        if event == "open" and not (args[2] & WRITING):
            return
        count += 1
        if count != point.number:
            return
        if point.seconds_after and point.rank is not None:
            signal.setitimer(signal.ITIMER_REAL, point.seconds_after)  # in the midst of what C++ or Rust writes too
        else:
            os.kill(victim, signal.SIGKILL)

    sys.addaudithook(hook)


def log_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR1, file=descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def run_student(words: list[str], log: Path, point: KillPoint | None) -> None:
    """One process, or a rank of torchrun's agent where that has set RANK."""
    log_to(log)
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "chaos")  # ends with the process that forked it
    rank = int(os.environ.get("RANK", "0"))
    if point is not None and rank == (point.rank or 0):
        watch(point)
    student_main(words)


def run_student_of_two(words: list[str], log: Path, point: KillPoint | None) -> None:
    log_to(log)
    launch_two(run_student, words, log, point)


def launch_two(function: Callable[..., None], *arguments: Any) -> None:
    """Torchrun's own agent with two workers, which it forks instead of starting a Python for each."""
    config = torch.distributed.launcher.api.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="chaos",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="fork",
        monitor_interval=0.05,
        max_restarts=0,  # as torchrun itself
    )
    torch.distributed.launcher.api.elastic_launch(config, function)(*arguments)


def run_teacher(words: list[str], log: Path) -> None:
    log_to(log)
    torch.set_num_threads(1)
    teacher_main(words)
