"""A run's checkpoints: sealed when they are written, checked when a start goes on from one.

A checkpoint's seal lists each file's size and digest, so one that a disk damaged or somebody cut off is noticed.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import xxhash

from logitstream.errors import LogitstreamError

logger = logging.getLogger(__name__)

SEAL = "sealed_files.json"
STAGING = ".saving"
"""Folder in the output folder in which a checkpoint is written before it gets its name."""
RUN_STATE = "logitstream"
"""The run's statistics among a checkpoint's `stateful_callbacks`."""
NOTES = ("teacher.json", "cache_view.json")
"""Files in which a run notes what it trains from; each checkpoint holds a copy, which a resumed run reads."""
NEWEST = ("latest", "true")
NONE = ("", "false", "no", "none")
_NAME = re.compile(r"checkpoint-(\d+)")


class ResumeUndecided(LogitstreamError):
    """The output folder holds checkpoints, and the settings do not say whether to go on from them."""


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-N, the highest N first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return N of a checkpoint-N, -1 for a folder of another name."""
    named = _NAME.fullmatch(checkpoint.name)
    return int(named.group(1)) if named else -1


def choose_checkpoint(folder: Path, named: str | bool | None, *, with_optimizer: bool = True) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` means in this output folder, None to start anew.

    `latest` and `true` are the newest whole checkpoint, None without any; those passed over are logged. Raises
    ResumeUndecided if checkpoints lie here and nothing is named, ValueError if the one named is not whole.
    """
    word = "" if named is None else str(named)
    checkpoints = checkpoints_in(folder)
    if word.lower() in NONE:
        if checkpoints:
            raise ResumeUndecided(f"{folder} holds {checkpoints[0].name} of an earlier run")
        return None
    if word.lower() in NEWEST:
        for checkpoint in checkpoints:
            if not (fault := fault_of(checkpoint, with_optimizer=with_optimizer)):
                return checkpoint
            logger.warning("%s is passed over, it is not whole: %s", checkpoint, fault)
        if checkpoints:
            logger.warning("no checkpoint in %s is whole: starting from the beginning", folder)
        return None
    if not Path(word).is_dir():
        near = difflib.get_close_matches(word.lower(), NEWEST, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"resume_from_checkpoint: expected `latest`, `true` or the folder of a checkpoint, got {word!r}{hint}"
        )
    if fault := fault_of(Path(word), with_optimizer=with_optimizer):
        raise ValueError(f"resume_from_checkpoint: {word} is not whole: {fault}")
    return Path(word)


def resumed_state(state: Any) -> Any:
    """Return the run's statistics in the checkpoint that a TrainerState comes from, {} if it comes from none."""
    return (state.stateful_callbacks or {}).get(RUN_STATE, {})


def seal(checkpoint: Path) -> None:
    """Bring each file to the disk and list it in the seal."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        if path.name not in NOTES:
            files[str(path.relative_to(checkpoint))] = [path.stat().st_size, _digest(path)]
    with (checkpoint / SEAL).open("w", encoding="utf-8") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def fault_of(checkpoint: Path, *, with_optimizer: bool = True, read_all: bool = True) -> str:
    """Return what keeps a run from being resumed from here, empty if nothing does.

    with_optimizer: false if checkpoints hold the model alone. read_all: compare the files' digests, not only sizes.
    """
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        if with_optimizer and not any(name.startswith(("optimizer", "global_step")) for name in files):
            return "it holds the model alone"
        for name, (size, digest) in files.items():
            path = checkpoint / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if read_all and _digest(path) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{SEAL} cannot be read: {error!r}"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = xxhash.xxh3_128()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rotate(folder: Path, *, limit: int | None, kept: set[Path], with_optimizer: bool) -> None:
    """Delete the oldest whole checkpoints beyond a limit, never one of `kept`; those that are not whole do not count.

    Their age is that of their seal, because a run may have gone on from an earlier step.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints_in(folder)
    whole = [path for path in found if not fault_of(path, with_optimizer=with_optimizer, read_all=False)]
    whole.sort(key=lambda path: ((path / SEAL).stat().st_mtime_ns, step_of(path)))
    kept = {path.resolve() for path in kept}
    surplus = max(len(whole) - max(limit, len(kept)), 0)
    for path in [path for path in whole if path.resolve() not in kept][:surplus]:
        shutil.rmtree(path, ignore_errors=True)
