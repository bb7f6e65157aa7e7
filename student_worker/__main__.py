"""`student-worker`: read the settings, train, say how it ended. What is slow to import waits for the settings."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logitstream.errors import LogitstreamError
from logitstream.processes import end_with_parent
from logitstream.settings import SettingsError
from student_worker.config import StudentConfig, parse_student
from student_worker.messages import fail, resuming, starting_over

if TYPE_CHECKING:
    from transformers import TrainingArguments


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # a torchrun that is killed leaves nobody who trains on
    try:
        config, arguments = parse_student(words)
    except SettingsError as error:
        fail(f"{error} (see student-worker --help)", status=2)
    import torch

    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[StderrHandler()],
    )
    train(config, arguments, words)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Threads of a group that is still there when the interpreter ends abort the process now and then (torch 2.13);
        # the trainer, whose model holds the group, is garbage in cycles.
        gc.collect()
        torch.distributed.destroy_process_group()


def train(config: StudentConfig, arguments: TrainingArguments, words: Sequence[str]) -> None:
    """Run, and end with one line if something failed that a user can mend, or if the run was told to end."""
    import torch

    from logitstream.training.checkpoints import ResumeUndecided, checkpoints_in
    from logitstream.training.resumable import Stopped
    from student_worker.run import run

    folder = Path(str(arguments.output_dir))

    def going_on() -> str:
        newest = next(iter(checkpoints_in(folder)), None)
        if newest is None:
            return "no step was saved: the same command starts again"
        return f"the steps so far are in {newest}, to go on: {resuming(words)}"

    try:
        run(config, arguments, words)
    except ResumeUndecided as error:
        fail(f"{error}; to go on from it: {resuming(words)}; to start over: {starting_over(words, folder)}")
    except Stopped as stopped:
        told_elsewhere = not stopped.number or os.environ.get("RANK", "0") != "0"
        status = 128 + stopped.number if stopped.number else 1
        fail(f"{stopped}; {going_on()}", status=status, quiet=told_elsewhere)
    except KeyboardInterrupt:
        fail("stopped before training began", status=130)
    except (LogitstreamError, OSError) as error:
        fail(f"{error}; {going_on()}" if checkpoints_in(folder) else str(error))
    except RuntimeError as error:
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")
        if not isinstance(error, torch.distributed.DistError) and not any(words in str(error) for words in lost):
            raise
        fail(f"another process of this run is gone; {going_on()} ({error})")


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the moment: a live display takes it over, so that log lines appear above it."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)


if __name__ == "__main__":
    main()
