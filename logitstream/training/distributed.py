"""All processes of one student, and a run that is resumed, train from the same teacher or on the same cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
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
from logitstream.training.checkpoints import RUN_FILES, checkpoints_in
from logitstream.types import Fingerprint, TargetSpec

FILE, CORPUS_FILE = RUN_FILES

logger = logging.getLogger(__name__)

T = TypeVar("T")


def expected_teacher(folder: Path, spec: TargetSpec, *, resumes: bool) -> Fingerprint | None:
    """The teacher that a resumed run began with, drawing as this one asks it to; None where any will do."""
    noted = _noted(folder, FILE, _noted_teacher) if resumes else None
    return replace(noted, spec=spec.canonical()) if noted is not None else None


def agree_on_teacher(client: GrpcTeacherClient, spec: TargetSpec, folder: Path) -> None:
    """Note in the folder which teacher all processes have found; waits for a replica to come up.

    Call it on every process before the first sequence is asked for. Raises FingerprintMismatch where one of them has
    found another teacher than the main process, or what `client.info` raised on one of them: all raise the same.
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
        write_whole(folder / FILE, json.dumps(asdict(everyones[0]), indent=1))


def _found_teacher(client: GrpcTeacherClient, spec: TargetSpec) -> Fingerprint | LogitstreamError:
    try:
        return Fingerprint.of(client.info, spec)
    except LogitstreamError as error:  # told to the others, who would wait for this process
        return error


def open_agreed_cache(directory: str, folder: Path, *, resumes: bool) -> CacheReader:
    """A cache as the main process finds it, which notes that in the folder, or as a resumed run began with it.

    So neither processes nor parts of a run differ in their sequences while somebody writes to the cache. Call it on
    every process. Raises CacheError where some of the sequences are gone.
    """
    view = None
    if is_main_process():
        with open_reader(directory) as cache:
            view = (_noted(folder, CORPUS_FILE, _noted_view) if resumes else None) or cache.view()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CORPUS_FILE, json.dumps(view))
    view = of_main_process(view)
    assert view is not None
    cache = open_reader(directory)  # after the main process has looked, so that what it saw is there
    cache.keep_to(view)
    return cache


def _noted(folder: Path, name: str, read: Callable[[Path], T]) -> T | None:
    """What a file of the run says, or its copy in the newest checkpoint that holds a readable one; None: no file.

    Raises what `read` raises for the first of them where none can be read.
    """
    first_error: LogitstreamError | None = None
    for path in [folder / name, *(checkpoint / name for checkpoint in checkpoints_in(folder))]:
        if not path.exists():
            continue
        try:
            found = read(path)
        except LogitstreamError as error:
            first_error = first_error or error
            continue
        if first_error is not None:
            logger.warning("%s is read instead: %s", path, first_error)
        return found
    if first_error is not None:
        raise first_error
    return None


def _noted_teacher(path: Path) -> Fingerprint:
    try:
        return Fingerprint.from_json(_read_json(path))
    except ValueError as error:
        raise FingerprintMismatch(
            f"{path} does not tell which teacher this run began with ({error}): delete it to take the one served now"
        ) from None


def _noted_view(path: Path) -> dict[str, Any]:
    """Of CacheReader.view, as an earlier start of this run wrote it; CacheError where it is none."""
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
    """Raises ValueError where the file holds no JSON, however deep."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def is_main_process() -> bool:
    return not _is_distributed() or dist.get_rank() == 0


def of_all_processes(value: T) -> list[T]:
    """Every process's value, by rank."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_main_process(value: T) -> T:
    """The main process's value on every process."""
    values = [value]
    if _is_distributed():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
