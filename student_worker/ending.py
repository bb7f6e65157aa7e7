"""How a run says that it ended: one line for what a user can mend, an exit status, and the command that goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

SECONDS_FOR_THE_FIRST_PROCESS = 5.0
"""How long the other processes of torchrun keep their error back: the first one's ends them meanwhile."""
_RESUME = "--training.resume_from_checkpoint"


def fail(message: str, *, status: int = 1, quiet: bool = False) -> NoReturn:
    """End this process with one line on stderr, and nothing said twice by the processes of one run."""
    line = f"student-worker: {' '.join(message.split())}"
    rank = os.environ.get("RANK", "0")
    sys.stdout.flush()
    if not quiet:
        if rank != "0":
            line = line.replace(":", f" (process {rank}):", 1)
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        print(line, file=sys.stderr, flush=True)
        _tell_torchrun(line)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a process group's threads may abort an interpreter that ends
        os._exit(status)
    raise SystemExit(status)


def command(words: Sequence[str], *more: str) -> str:
    """The command that started this run, to be typed again; `more` in place of what it says of resuming."""
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.split("=")[0].replace("-", "_").lstrip("_")
        if skip or name == _RESUME.lstrip("-"):
            skip = not skip and "=" not in word
            continue
        kept.append(word)
    launcher = "torchrun … -m student_worker" if "TORCHELASTIC_RUN_ID" in os.environ else "student-worker"
    return " ".join([launcher, shlex.join([*kept, *more])])


def resuming(words: Sequence[str]) -> str:
    return command(words, _RESUME, "latest")


def starting_over(words: Sequence[str], folder: Path) -> str:
    return f"rm -r {shlex.quote(str(folder))}/checkpoint-* && {command(words)}"


def _tell_torchrun(line: str) -> None:
    """Where it looks for the reason of a process's end, which it prints in its table."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": line}), encoding="utf-8")
