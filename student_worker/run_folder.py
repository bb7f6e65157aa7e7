"""The folder of a run: locked while it runs, cleared of what a killed run left, filled with settings and student."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from logitstream.errors import LogitstreamError
from logitstream.files import write_whole
from logitstream.training.checkpoints import STAGING
from student_worker.config import StudentConfig

logger = logging.getLogger(__name__)

LOCK = ".lock"


class FolderInUse(LogitstreamError):
    """Another run writes to the output folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the output folder; for the main process alone. Raises FolderInUse.

    The lock is the process's own: it ends with it, however it ends, and no child inherits it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        lock(file.fileno(), folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        yield


def lock(descriptor: int, folder: Path) -> None:
    """Lock an open file for this process, or log that the file system has no locks. Raises FolderInUse."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): start no second run there", folder, error)
            return
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace") or "another process"
        raise FolderInUse(
            f"{folder} is in use by {holder}: wait for it, end it, or choose another --training.output_dir"
        ) from None


def write_resolved(config: StudentConfig, arguments: TrainingArguments) -> None:
    """Write every setting as it is used to config.yaml; the file is a valid --config."""
    folder = Path(str(arguments.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    training: dict[str, Any] = arguments.to_dict()  # type: ignore[no-untyped-call]
    del training["hub_token"]
    settings = asdict(config) | {"training": {name: value for name, value in training.items() if value is not None}}
    write_whole(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False))


def save_student(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the student and its tokenizer, each file whole or as it was."""
    staged = folder / STAGING / "student"
    trainer.save_model(str(staged))
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    tokenizer.save_pretrained(staged)
    for path in staged.iterdir():
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    shutil.rmtree(staged.parent, ignore_errors=True)
