"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from logitstream.errors import LogitstreamError

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}")


def write_whole(path: Path, content: bytes | str, *, replace: bool = True, sync: bool = True) -> None:
    """Make a file appear with all of its content or not at all; without `replace` keep an existing one.

    The file survives a loss of power; without `sync` only once its folder is synced.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            _link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power, if the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed `write_whole` left in the folder; for a folder that nobody else writes to."""
    for path in folder.glob(".*"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Run the block while no other process runs one with this lock file; without waiting if there are no file locks."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def naming(setting: str, name: str) -> Iterator[None]:
    """Turn errors of the block into ValueError that names a setting and its value, a folder or a model on the hub."""
    refuse_missing_folder(setting, name)
    try:
        yield
    except (OSError, ValueError) as error:
        missing = "there is no such folder, and as the hub's: " if name and not Path(name).exists() else ""
        raise ValueError(f"{setting} {name}: {missing}{error}") from error


@contextlib.contextmanager
def of_setting(names: str) -> Iterator[None]:
    """Turn errors of the block about a file into ValueError that names the settings which hold its path."""
    try:
        yield
    except (OSError, ValueError, LogitstreamError) as error:
        raise ValueError(f"{names}: {error}") from error


def refuse_missing_folder(setting: str, name: str) -> None:
    """Raise ValueError for a value that looks like a path, not like a model on the hub, and does not exist."""
    looks_like_a_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_like_a_path and not Path(name).exists():
        raise ValueError(f"{setting}: there is no folder {name}")


def _link(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: two first writers at the same moment may race here
        if not path.exists():
            partial.rename(path)
