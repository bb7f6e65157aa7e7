"""`student-worker`: parse, train, say how it ended. What takes seconds to import waits until the settings are read."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from logitstream.errors import LogitstreamError
from logitstream.processes import end_with_parent
from logitstream.settings import SettingsError
from student_worker.config import StudentConfig, parse_student
from student_worker.ending import fail, resuming, starting_over

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
        stream=cast(TextIO, Stderr()),
    )
    train(config, arguments, words)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Threads of a group that is still there when the interpreter ends abort the process now and then (torch 2.13);
        # the trainer, whose model holds the group, is garbage in cycles.
        gc.collect()
        torch.distributed.destroy_process_group()


def train(config: StudentConfig, arguments: TrainingArguments, words: Sequence[str]) -> None:
    """Run, and end with one line where something failed that a user can mend, or where the run was told to end."""
    from logitstream.training.checkpoints import ResumeUndecided, checkpoints_in
    from logitstream.training.resumable import Stopped
    from student_worker.run import run

    folder = Path(str(arguments.output_dir))
    try:
        run(config, arguments, words)
    except ResumeUndecided as error:
        again = f"to go on from it: {resuming(words)}; to start over: {starting_over(words, folder)}"
        fail(f"{error}; {again}")
    except Stopped as stopped:
        told_elsewhere = not stopped.number or os.environ.get("RANK", "0") != "0"
        status = 128 + stopped.number if stopped.number else 1
        fail(f"{stopped}; {_going_on(folder, words)}", status=status, quiet=told_elsewhere)
    except KeyboardInterrupt:
        fail("stopped before training began", status=130)
    except (LogitstreamError, OSError) as error:
        fail(f"{error}; {_going_on(folder, words)}" if checkpoints_in(folder) else str(error))
    except RuntimeError as error:
        if not _is_loss_of_a_process(error):
            raise
        fail(f"another process of this run is gone; {_going_on(folder, words)} ({error})")


class Stderr:
    """Whatever sys.stderr is at the moment: a live display takes it over, so that log lines appear above it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _going_on(folder: Path, words: Sequence[str]) -> str:
    from logitstream.training.checkpoints import checkpoints_in

    newest = next(iter(checkpoints_in(folder)), None)
    if newest is None:
        return "no step was saved: the same command starts again"
    return f"the steps so far are in {newest}, to go on: {resuming(words)}"


def _is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether a process found the others gone while it exchanged something with them."""
    import torch

    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in said)


if __name__ == "__main__":
    main()
