"""Weights that are replaced while serving: the newest complete checkpoint under a folder, as soon as it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from logitstream.types import TeacherInfo
from teacher_server.backend import TeacherBackend
from teacher_server.weights import is_complete

LoadCheckpoint = Callable[[Path], TeacherBackend]

log = logging.getLogger(__name__)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the latest modification among `folder`'s subfolders; None without one.

    Subfolders that are still being written, hidden or named like temporaries are passed over.
    """
    found = [
        (path.stat().st_mtime_ns, path.name, path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and not path.name.startswith((".", "tmp")) and is_complete(path)
    ]
    return max(found)[2] if found else None


async def watch_checkpoints(
    folder: Path, *, every_seconds: float, load: LoadCheckpoint, replace: Callable[[TeacherBackend], None]
) -> None:
    """Load each newer checkpoint in a thread while the old one serves, and hand it to `replace`; until cancelled.

    One that cannot be loaded is reported and passed over: the old weights go on. Both lie in memory for a moment.
    """
    seen: Path | None = None
    while True:
        newest = await asyncio.to_thread(newest_checkpoint, folder)
        if newest is not None and newest != seen:
            seen = newest
            try:
                replace(await asyncio.to_thread(load, newest))
            except Exception:
                log.exception("checkpoint %s cannot be served, the weights stay as they are", newest)
        await asyncio.sleep(every_seconds)


def check_successor(old: TeacherInfo, new: TeacherInfo) -> None:
    """Raises ValueError where open streams could not go on with the new weights."""
    for name in ("vocab_size", "tokenizer_digest", "dtype"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"{name} of the new weights is {getattr(new, name)}, expected {getattr(old, name)}")
