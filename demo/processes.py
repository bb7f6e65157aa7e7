"""The demo's child processes: started in groups of their own, logged to files, ended in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from logitstream.processes import tied

STOP_SECONDS = 20.0
Processes = dict[str, tuple[subprocess.Popen[bytes], Path]]
"""By name: the process and its log."""


class ChildFailed(RuntimeError):
    """A child process ended with an error, or too early."""


@contextmanager
def child(
    name: str, arguments: Sequence[str], log: Path, *, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
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
            env=os.environ | (env or {}),
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
    launcher = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
    lines = lines[:launcher] or lines
    return "\n".join(["  " + line for line in lines[-num_lines:]] + [f"  (whole log: {log})"])
