"""Processes of one student exchange values; they and a resumed run train from one teacher or on one cache."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from logitstream.cache import CacheReader
from logitstream.cache.disk import open_reader
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.client.teacher_identity import teacher_differences
from logitstream.errors import CacheError, FingerprintMismatch, LogitstreamError
from logitstream.files import write_whole
from logitstream.training.checkpoints import NOTES
from logitstream.types import Fingerprint, TargetSpec

TEACHER_NOTE, CACHE_NOTE = NOTES

logger = logging.getLogger(__name__)

T = TypeVar("T")


def expected_teacher(checkpoint: Path | None, spec: TargetSpec) -> Fingerprint | None:
    """Return the teacher of the run that a checkpoint is from, drawing by this spec; None if any will do."""
    path = checkpoint and checkpoint / TEACHER_NOTE
    if path is None or not path.exists():
        return None
    try:
        return replace(Fingerprint.from_json(_read_json(path)), spec=spec.canonical())
    except ValueError as error:
        raise FingerprintMismatch(
            f"{path} does not tell which teacher this run began with ({error}): delete it to take the one served now"
        ) from None


def agree_on_teacher(client: GrpcTeacherClient, spec: TargetSpec, folder: Path) -> None:
    """Wait for the teacher and note in the folder which one all processes have found.

    Call it on every process before the first sequence is asked for. Raises FingerprintMismatch if one of them has found
    another teacher than the main process, or what `client.info` raised on one of them: all raise the same.
    """
    everyones: list[Fingerprint] = []
    for number, found in enumerate(of_all_processes(_found_teacher(client, spec))):
        if isinstance(found, LogitstreamError):
            raise found
        everyones.append(found)
        if differences := teacher_differences(everyones[0], found, max_teacher_lag=client.max_teacher_lag):
            raise FingerprintMismatch(
                f"processes 0 and {number} of this run have found teachers that differ (process 0's value first): "
                f"{differences}"
            )
    if is_main_process():
        write_whole(folder / TEACHER_NOTE, json.dumps(asdict(everyones[0]), indent=1))


def _found_teacher(client: GrpcTeacherClient, spec: TargetSpec) -> Fingerprint | LogitstreamError:
    try:
        return Fingerprint.of(client.info, spec)
    except LogitstreamError as error:  # told to the others, who would wait for this process
        return error


def open_agreed_cache(directory: str, folder: Path, checkpoint: Path | None = None) -> CacheReader:
    """Open a cache as the main process finds it, and note that in the folder, or as a checkpoint's run began with it.

    So processes and parts of a run have the same sequences while somebody writes to the cache. Call it on every
    process. Raises CacheError if some of the sequences are gone.
    """
    view = None
    if is_main_process():
        with open_reader(directory) as cache:
            view = _noted_view(checkpoint) or cache.view()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CACHE_NOTE, json.dumps(view))
    view = of_main_process(view)
    assert view is not None
    cache = open_reader(directory)  # after the main process has looked, so that what it saw is there
    cache.keep_to(view)
    return cache


def _noted_view(checkpoint: Path | None) -> dict[str, Any] | None:
    """Return what CacheReader.view gave to a checkpoint's run, None if it noted nothing."""
    path = checkpoint and checkpoint / CACHE_NOTE
    if path is None or not path.exists():
        return None
    try:
        view = _read_json(path)
        records = view["records"]
        is_whole = view.keys() == {"records", "digest"} and isinstance(view["digest"], str)
        if not is_whole or not all(type(count) is int and count >= 0 for count in records.values()):
            raise ValueError("expected the records of each shard and a digest")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheError(
            f"{path} does not tell which sequences this run began with ({error!r}): delete it to take all there are"
        ) from None
    return dict(view)


def _read_json(path: Path) -> Any:
    """Return a file's JSON; raise ValueError if it holds none, however deep."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def num_processes() -> int:
    """Return how many processes torch.distributed knows of, 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    return num_processes() == 1 or dist.get_rank() == 0


def of_all_processes(value: T) -> list[T]:
    """Return every process's value, by rank."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def of_main_process(value: T) -> T:
    """Return the main process's value on every process."""
    values = [value]
    if num_processes() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
