"""`student-worker`: read the settings, train, say how it ended. What is slow to import waits for the settings."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from logitstream.errors import LogitstreamError
from logitstream.processes import end_with_parent
from logitstream.settings import SettingsError
from student_worker.config import StudentConfig, parse_student

if TYPE_CHECKING:
    from transformers import TrainingArguments

SECONDS_FOR_THE_FIRST_PROCESS = 5.0
"""How long the other processes of torchrun keep their error back: the first one's ends them meanwhile."""


def main(argv: Sequence[str] | None = None) -> None:
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun:
        end_with_parent()  # a torchrun that is killed leaves nobody who trains on
    try:
        config, arguments = parse_student(sys.argv[1:] if argv is None else argv)
    except SettingsError as error:
        fail(f"{error} (see student-worker --help)", status=2)
    import torch

    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[StderrHandler()],
    )
    train(config, arguments)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Threads of a group that is still there when the interpreter ends abort the process now and then (torch 2.13);
        # the trainer, whose model holds the group, is garbage in cycles.
        gc.collect()
        torch.distributed.destroy_process_group()


def train(config: StudentConfig, arguments: TrainingArguments) -> None:
    """Run, and end with one line if something failed that a user can mend, or if the run was told to end."""
    import torch

    from logitstream.training.checkpoints import ResumeUndecided, Stopped, newest_checkpoint
    from student_worker.run import run

    def going_on() -> str:
        newest = newest_checkpoint(Path(str(arguments.output_dir)))
        return f"; to go on from {newest}, add --training.resume_from_checkpoint latest" if newest else ""

    try:
        run(config, arguments)
    except ResumeUndecided as error:
        fail(f"{error}; delete it to start over{going_on()}")
    except Stopped as stopped:
        is_told_elsewhere = not stopped.number or os.environ.get("RANK", "0") != "0"
        status = 128 + stopped.number if stopped.number else 1
        fail(f"{stopped}{going_on()}", status=status, quiet=is_told_elsewhere)
    except KeyboardInterrupt:
        fail("stopped before training began", status=130)
    except (LogitstreamError, OSError, SettingsError) as error:
        fail(f"{error}{going_on()}")
    except RuntimeError as error:
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")
        if not isinstance(error, torch.distributed.DistError) and not any(words in str(error) for words in lost):
            raise
        fail(f"another process of this run is gone ({error}){going_on()}")


def fail(message: str, *, status: int = 1, quiet: bool = False) -> NoReturn:
    """End this process with one line on stderr, which the processes of one run do not repeat."""
    rank = os.environ.get("RANK", "0")
    sys.stdout.flush()
    if not quiet:
        if rank != "0":
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        name = "student-worker" if rank == "0" else f"student-worker (process {rank})"
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a process group's threads may abort an interpreter that ends
        os._exit(status)
    raise SystemExit(status)


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the moment: a live display takes it over, so that log lines appear above it."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)


if __name__ == "__main__":
    main()
