"""A run's checkpoints: which ones are whole, and which one a start goes on from."""

from __future__ import annotations

import difflib
import json
import logging
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from logitstream.errors import LogitstreamError

logger = logging.getLogger(__name__)

STAGING = ".saving"
"""Folder in the output folder where a checkpoint is written before it gets its name."""
RUN_STATE = "logitstream"
"""Our entry among a checkpoint's `stateful_callbacks`: what its run had counted, and its number of processes."""
RUN_FILES = ("teacher.json", "cache_view.json")
"""What a run notes in its folder and reads again when it is resumed; each checkpoint holds a copy."""
NEWEST = ("latest", "true")
NONE = ("", "false", "no", "none")
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.*",
    "pytorch_model*",
    "*/adapter_model.*",
    "global_step*",
)
_ZIPPED = (".pt", ".pth", ".bin")
_HEADER_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound


class ResumeUndecided(LogitstreamError):
    """The output folder holds checkpoints, and the settings do not say whether to go on from them."""


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders named checkpoint-N, the highest N first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """N of a checkpoint-N; -1 where the folder is named otherwise."""
    named = _NAME.fullmatch(checkpoint.name)
    return int(named.group(1)) if named else -1


def choose_checkpoint(folder: Path, named: str | bool | None, *, with_optimizer: bool = True) -> Path | None:
    """What `resume_from_checkpoint` means in this output folder; None: start from the beginning.

    `latest` and `true` are the newest whole checkpoint, None where there is none; those passed over are logged.
    Raises ResumeUndecided where checkpoints lie here and nothing is named, and ValueError where what is named is no
    whole checkpoint.
    """
    word = "" if named is None else str(named)
    if word.lower() in NEWEST:
        return _newest_whole(folder, with_optimizer=with_optimizer)
    if word.lower() in NONE:
        if checkpoints := checkpoints_in(folder):
            raise ResumeUndecided(f"{folder} holds {checkpoints[0].name} of an earlier run")
        return None
    checkpoint = Path(word)
    if not checkpoint.is_dir():
        near = difflib.get_close_matches(word.lower(), NEWEST, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"resume_from_checkpoint: expected `latest`, `true` or the folder of a checkpoint, got {word!r}{hint}"
        )
    if fault := fault_of(checkpoint, with_optimizer=with_optimizer):
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is not whole: {fault}")
    return checkpoint


def _newest_whole(folder: Path, *, with_optimizer: bool) -> Path | None:
    checkpoints = checkpoints_in(folder)
    for checkpoint in checkpoints:
        fault = fault_of(checkpoint, with_optimizer=with_optimizer)
        if not fault:
            return checkpoint
        logger.warning("%s is passed over, it is not whole: %s", checkpoint, fault)
    if checkpoints:
        logger.warning("no checkpoint in %s is whole: starting from the beginning", folder)
    return None


def resumed_state(state: Any, of: object) -> Any:
    """What a callback's `run_state` gave for the checkpoint that a TrainerState comes from; {} where there is none."""
    entry = (state.stateful_callbacks or {}).get(RUN_STATE, {})
    return entry.get(type(of).__name__, {})


def fault_of(checkpoint: Path, *, with_optimizer: bool = True, read_all: bool = True) -> str:
    """What keeps a run from being resumed from here; empty: nothing.

    Its state parses, its weights, optimizer and scheduler are there, each file of a known kind is complete, and each
    process's random numbers are there. with_optimizer: false where checkpoints hold the model alone. read_all: also
    compare the checksums of the files that have any.
    """
    try:
        return next(_faults(checkpoint, with_optimizer=with_optimizer, read_all=read_all), "")
    except (OSError, ValueError, TypeError, AttributeError) as error:  # a state of other types than ours
        return f"it cannot be read: {error!r}"


def _faults(checkpoint: Path, *, with_optimizer: bool, read_all: bool) -> Iterator[str]:
    """Every fault, found as it is asked for; the cheapest to find first."""
    state, fault = _read_object(checkpoint / "trainer_state.json")
    if fault:
        yield fault
        return
    step, number = state.get("global_step"), step_of(checkpoint)
    if not isinstance(step, int) or number not in (-1, step):
        yield f"trainer_state.json is of step {step}"
    if not any(next(checkpoint.glob(pattern), None) for pattern in _WEIGHTS):
        yield "it holds no weights"
    if with_optimizer:
        yield from _missing_parts(checkpoint, state)
    for path in sorted(checkpoint.rglob("*")):
        if path.name in RUN_FILES:  # a copy: what cannot be read of it is looked for elsewhere
            continue
        if path.is_file() and (fault := _fault_of_any_file(path, read_all=read_all)):
            yield f"{path.relative_to(checkpoint)} {fault}"


def _missing_parts(checkpoint: Path, state: dict[str, Any]) -> Iterator[str]:
    is_deepspeed = any(checkpoint.glob("global_step*"))
    for name in ("optimizer", "scheduler"):
        if not is_deepspeed and not any(checkpoint.glob(f"{name}*")):
            yield f"the {name} is missing"
    ours = (state.get("stateful_callbacks") or {}).get(RUN_STATE) or {}
    num_processes = int(ours.get("num_processes", 0))
    single = num_processes == 1 or (num_processes == 0 and (checkpoint / "rng_state.pth").exists())
    expected = ["rng_state.pth"] if single else [f"rng_state_{rank}.pth" for rank in range(max(num_processes, 1))]
    for name in expected:
        if not (checkpoint / name).exists():
            yield f"{name} is missing"


def _fault_of_any_file(path: Path, *, read_all: bool) -> str:
    try:
        return _fault_of_file(path, read_all=read_all)
    except Exception as error:  # any: damaged bytes may claim whatever a parser stumbles over
        return f"is cut off or damaged: {error!r}"


def _fault_of_file(path: Path, *, read_all: bool) -> str:
    """What is wrong with one file; empty where nothing is, or its kind says nothing about that."""
    if path.suffix == ".safetensors":
        return _fault_of_safetensors(path)
    if path.suffix in _ZIPPED:
        return _fault_of_zip(path, read_all=read_all)
    if path.suffix == ".distcp" and not (path.parent / ".metadata").exists():
        return "has no .metadata beside it"
    if path.suffix != ".json":
        return ""
    content, fault = _read_object(path)
    shards = set(content.get("weight_map", {}).values()) if path.name.endswith(".index.json") else set()
    missing = sorted(str(shard) for shard in shards if not (path.parent / str(shard)).exists())
    return fault.removeprefix(f"{path.name} ") or (f"names {missing[0]}, which is missing" if missing else "")


def _fault_of_safetensors(path: Path) -> str:
    """A safetensors file says in its header how long it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _HEADER_BYTES else size
        if length > min(size - _HEADER_BYTES, _MAX_HEADER_BYTES):
            return f"is cut off: {size} bytes"
        header = json.loads(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    expected = _HEADER_BYTES + length + max(ends, default=0)
    return "" if size == expected else f"has {size} bytes, expected {expected}"


def _fault_of_zip(path: Path, *, read_all: bool) -> str:
    """What torch.save writes is a zip file, whose directory comes last and holds checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if read_all else None
    except zipfile.BadZipFile as error:
        return f"is cut off or damaged: {error}"
    return f"is damaged: {damaged}" if damaged else ""


def _read_object(path: Path) -> tuple[dict[str, Any], str]:
    """A file's JSON object and an empty text, or an empty object and what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except ValueError as error:
        return {}, f"{path.name} is cut off or damaged: {error}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} holds no JSON object")


def rotate(folder: Path, *, limit: int | None, kept: set[Path], with_optimizer: bool) -> None:
    """Delete the oldest whole checkpoints beyond a limit, never one of `kept`; those that are not whole do not count.

    Oldest by the time at which they were written, as a run may have gone on from an earlier step.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints_in(folder)
    whole = [path for path in found if not fault_of(path, with_optimizer=with_optimizer, read_all=False)]
    whole.sort(key=lambda path: ((path / "trainer_state.json").stat().st_mtime_ns, step_of(path)))
    kept = {path.resolve() for path in kept}
    surplus = len(whole) - max(limit, len(kept))
    for path in [path for path in whole if path.resolve() not in kept][: max(surplus, 0)]:
        shutil.rmtree(path, ignore_errors=True)
