"""A run's checkpoints: written aside and renamed once they are whole, chosen when a run goes on from one."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from logitstream.errors import LogitstreamError
from logitstream.files import sync_folder

logger = logging.getLogger(__name__)

STAGING = ".saving"
"""Folder in the output folder for what is being written or deleted."""
RUN_STATE = "logitstream"
"""The run's statistics among a checkpoint's `stateful_callbacks`."""
NEWEST = ("latest", "true")
NONE = ("", "false", "no", "none")
_NAME = re.compile(r"checkpoint-(\d+)")


class ResumeUndecided(LogitstreamError):
    """The output folder holds checkpoints, and the settings do not say whether to go on from them."""


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-N, the highest N first."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path in found if found[path]), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def choose_checkpoint(folder: Path, named: str | bool | None, *, with_optimizer: bool = True) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` means in this output folder, None to start anew.

    `latest` and `true` are the newest checkpoint, None without any. Raises ResumeUndecided if checkpoints lie here and
    nothing is named, ValueError if no run can go on from the one named.
    """
    word = "" if named is None else str(named)
    checkpoints = checkpoints_in(folder)
    if word.lower() in NONE:
        if checkpoints:
            raise ResumeUndecided(f"{folder} holds {checkpoints[0].name} of an earlier run")
        return None
    if word.lower() in NEWEST:
        for checkpoint in checkpoints:
            if not (fault := _fault_of(checkpoint, with_optimizer=with_optimizer)):
                return checkpoint
            logger.warning("%s is passed over: %s", checkpoint, fault)
        return None
    if fault := _fault_of(Path(word), with_optimizer=with_optimizer):
        raise ValueError(
            f"resume_from_checkpoint: expected `latest`, `true` or the folder of a checkpoint, got {word!r}: {fault}"
        )
    return Path(word)


def _fault_of(checkpoint: Path, *, with_optimizer: bool) -> str:
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it holds no {TRAINER_STATE_NAME}"
    if with_optimizer and not any(any(checkpoint.glob(name)) for name in ("optimizer*", "global_step*")):
        return "it holds the model alone"
    return ""


def resumed_state(state: Any) -> Any:
    """Return the run's statistics in the checkpoint that a TrainerState comes from, {} if it comes from none."""
    return (state.stateful_callbacks or {}).get(RUN_STATE, {})


def publish(staged: Path, final: Path) -> None:
    """Bring a whole checkpoint to the disk and give it its name, in place of another one that had it."""
    for path in [*staged.rglob("*"), staged]:
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        final.rename(staged.with_name("replaced"))
    staged.rename(final)
    sync_folder(final.parent)


def rotate(folder: Path, *, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond a limit, never the newest or the best; none is left half-deleted."""
    if limit is None or limit <= 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)]
    num_protected = 1 if best is None or found[-1] == Path(best) else 2
    for old in found[: -max(limit, num_protected)]:
        old.rename(folder / STAGING / old.name)
