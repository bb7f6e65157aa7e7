"""Weights that are replaced while serving: the newest complete checkpoint under a folder, as soon as it is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from logitstream.types import TeacherInfo
from teacher_server.backend import TeacherBackend
from teacher_server.weights import WeightsChanged, is_being_written, is_complete, refuse_adapter

LoadCheckpoint = Callable[[Path], TeacherBackend]
Stamp = tuple[int, int]
"""When the last of a checkpoint's weight files was written, in ns since the epoch, and the bytes of all of them."""
NOTHING: Stamp = (0, 0)
SETTLED_LOOKS = 5
"""Looks through which a checkpoint must lie unchanged: a writer may rest between two files, or in the midst of one."""

log = logging.getLogger(__name__)


def weights_stamp(folder: Path) -> Stamp:
    """Grows when weights are written into the folder, also over others, and not when files are deleted from it."""
    files = [path.stat() for path in folder.glob("*.safetensors")]
    return max((file.st_mtime_ns for file in files), default=0), sum(file.st_size for file in files)


def stamped_checkpoints(folder: Path) -> list[tuple[Stamp, Path]]:
    """`folder`'s subfolders that hold weights, complete or not, the one written last first.

    Hidden ones and those named like temporaries are passed over, as are those that vanish meanwhile.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith((".", "tmp")):
            with contextlib.suppress(OSError):
                found.append((weights_stamp(path), path))
    return sorted((one for one in found if one[0] > NOTHING), reverse=True)


class _Settling:
    """Which checkpoints are still being written, as far as can be told."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[Path, tuple[Stamp, float]] = {}

    def restart(self, path: Path) -> None:
        self._since.pop(path, None)

    def is_settled(self, path: Path, stamp: Stamp) -> bool:
        """Whether its weights were written `seconds` ago, by its time or as seen here, and no one has them open."""
        known, since = self._since.get(path, (NOTHING, 0.0))
        if known != stamp:
            since = time.monotonic() - max(0.0, time.time() - stamp[0] / 1e9)
            self._since[path] = stamp, since
            if time.monotonic() - since < self._seconds:
                log.info("checkpoint %s has just been written to: it is loaded when it has lain still", path)
        return time.monotonic() - since >= self._seconds and not is_being_written(path)


async def watch_checkpoints(
    folder: Path,
    *,
    every_seconds: float,
    load: LoadCheckpoint,
    replace: Callable[[TeacherBackend], None],
    has_looked: asyncio.Event,
) -> None:
    """Load each newer checkpoint in a thread while the old one serves, and hand it to `replace`; until cancelled.

    Newer is what was written after what is served, so the weights never go back when a checkpoint is deleted. One is
    left alone until its weights were last written SETTLED_LOOKS looks ago and no process has them open for writing:
    weights that are written over in place are of the right length all the while. One that cannot be loaded is reported
    once and passed over, as is a folder that cannot be read: the old weights go on. Both lie in memory for a moment.
    has_looked: set once what is there at first has been loaded, so that a server that starts again begins with it.
    """
    served = NOTHING
    settling = _Settling(SETTLED_LOOKS * every_seconds)
    passed_over: set[tuple[Stamp, Path]] = set()
    trouble = ""
    while True:
        newest_first: list[tuple[Stamp, Path]] = []
        try:
            newest_first, trouble = await asyncio.to_thread(stamped_checkpoints, folder), ""
        except Exception as error:
            if str(error) != trouble:
                trouble = str(error)
                log.error("checkpoints cannot be looked for until this is mended: %s", trouble)
        is_waiting = False
        for looked_at in newest_first:
            stamp, path = looked_at
            if stamp <= served:
                break
            try:
                if looked_at in passed_over:
                    continue
                if not await asyncio.to_thread(_is_whole, path):
                    continue
                if not await asyncio.to_thread(settling.is_settled, path, stamp):
                    is_waiting = True
                    continue
                replace(await asyncio.to_thread(_load_unchanged, path, stamp, load))
                served = stamp
                break
            except WeightsChanged as error:
                log.warning("%s; it is loaded again when it is whole", error)
                settling.restart(path)
                is_waiting = True
            except Exception:
                log.exception("checkpoint %s cannot be served, the weights stay as they are", path)
                passed_over.add(looked_at)
        if not is_waiting:
            has_looked.set()
        await asyncio.sleep(every_seconds)


def _is_whole(path: Path) -> bool:
    """Raises ValueError for what will never be a model."""
    refuse_adapter(path)
    return is_complete(path)


def _load_unchanged(path: Path, stamp: Stamp, load: LoadCheckpoint) -> TeacherBackend:
    """Raises WeightsChanged where weights were written into it meanwhile: it may be half the one and half the other."""
    backend = load(path)
    if weights_stamp(path) > stamp or is_being_written(path):
        backend.close()
        raise WeightsChanged(f"{path} was written to while it was loaded")
    return backend


def check_successor(old: TeacherInfo, new: TeacherInfo) -> None:
    """Raises ValueError where open streams could not go on with the new weights."""
    for name in ("vocab_size", "tokenizer_digest", "dtype"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"{name} of the new weights is {getattr(new, name)}, expected {getattr(old, name)}")
