"""Files that appear whole or not at all, and errors that name the setting which led to a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from logitstream.errors import LogitstreamError


def write_whole(path: Path, content: bytes | str, *, replace: bool = True) -> None:
    """Make a file appear with all of its content or not at all, also after a loss of power.

    replace: False keeps an existing file.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        try:
            if not replace:
                os.link(partial, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links: two first writers at the same moment may race here
            replace = not path.exists()
        if replace:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power, if the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Run the block while no other process runs one with this lock file; without waiting if there are no file locks."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def naming(setting: str, name: str = "") -> Iterator[None]:
    """Turn errors of the block into ValueError that names a setting, and its value: a folder or a model on the hub."""
    refuse_missing_folder(setting, name)
    try:
        yield
    except (OSError, ValueError, LogitstreamError) as error:
        raise ValueError(f"{f'{setting} {name}'.strip()}: {error}") from error


def refuse_missing_folder(setting: str, name: str) -> None:
    """Raise ValueError for a value that looks like a path, not like a model on the hub, and does not exist."""
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise ValueError(f"{setting}: there is no folder {name}")
