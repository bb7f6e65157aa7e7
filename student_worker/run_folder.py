"""The folder of a run: locked while it runs, cleared of what a killed one left."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from logitstream.errors import LogitstreamError
from logitstream.files import remove_partial_files
from logitstream.training.checkpoints import STAGING

try:
    import fcntl
except ImportError:  # pragma: no cover  # not a Unix
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


class FolderInUse(LogitstreamError):
    """Another run writes to the output folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the output folder; call it on the main process alone.

    The lock is the process's own: it ends with it, however it ends, and no child inherits it. Where the file system
    knows no locks, a warning says so. Raises FolderInUse.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        lock(file.fileno(), folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        remove_partial_files(folder)
        yield


def lock(descriptor: int, folder: Path) -> None:
    """Lock an open file for this process; FolderInUse where another one has. A warning says where that cannot be."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            logger.warning("%s cannot be locked (%s): start no second run there", folder, error)
            return
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace") or "another process"
        raise FolderInUse(
            f"{folder} is in use by {holder}: wait for it, end it, or choose another --output_dir"
        ) from None
