"""Weights that are replaced while serving: the newest complete checkpoint of a folder, soon after it is written."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from teacher_server.backend import TeacherBackend
from teacher_server.weights import (
    Stamp,
    WeightsChanged,
    is_being_written,
    is_complete,
    loading_unchanged,
    refuse_adapter,
    weights_stamp,
)

LoadCheckpoint = Callable[[Path], TeacherBackend]
SETTLED_LOOKS = 5
"""Looks for which a checkpoint must lie unchanged: a writer may pause between two files, or in the middle of one."""

log = logging.getLogger(__name__)


class Checkpoints:
    """The subfolders of a folder that hold weights, except hidden ones and those named tmp….

    served: the stamp of the weights that are served. Only weights written later are newer, so deleting a checkpoint
    never brings an older one back. is_waiting: a newer one is still being written.
    """

    def __init__(self, folder: Path, *, settled_seconds: float) -> None:
        self._folder = folder
        self._settled_seconds = settled_seconds
        self._first_seen: dict[Path, tuple[Stamp, float]] = {}
        self._refused: set[tuple[Stamp, Path]] = set()
        self.served: Stamp = (0, 0)
        self.is_waiting = False

    def newest(self) -> tuple[Stamp, Path] | None:
        """Return the newest checkpoint that can be served, None if none is newer than the one that is."""
        self.is_waiting = False
        found = []
        for path in self._folder.iterdir():
            if not path.name.startswith((".", "tmp")):
                with contextlib.suppress(OSError):  # it vanishes meanwhile
                    found.append((weights_stamp(path), path))
        for stamp, path in sorted(found, reverse=True):
            if stamp <= self.served:
                break
            if (stamp, path) in self._refused:
                continue
            try:
                refuse_adapter(path)
                if not is_complete(path):
                    continue
            except ValueError:
                self.refuse(stamp, path)
                continue
            if self.is_settled(path, stamp):
                return stamp, path
            self.is_waiting = True
        return None

    def refuse(self, stamp: Stamp, path: Path) -> None:
        """Report the error being handled and pass over this checkpoint from now on."""
        log.exception("checkpoint %s cannot be served, the weights stay as they are", path)
        self._refused.add((stamp, path))

    def is_settled(self, path: Path, stamp: Stamp) -> bool:
        """Return True if the weights are old enough, by their time or as seen here, and no one has them open."""
        if self._first_seen.get(path, (None, 0.0))[0] != stamp:
            self._first_seen[path] = stamp, time.time()
        written = min(self._first_seen[path][1], stamp[0] / 1e9)  # another machine's clock may be ahead
        return time.time() - written >= self._settled_seconds and not is_being_written(path)


async def watch_checkpoints(
    folder: Path,
    *,
    every_seconds: float,
    load: LoadCheckpoint,
    replace: Callable[[TeacherBackend], Awaitable[None]],
    has_looked: asyncio.Event,
) -> None:
    """Load each newer checkpoint in a thread while the old one serves, and hand it to `replace`; until cancelled.

    One that cannot be loaded is reported once and passed over. Both models are in memory for a moment. has_looked is
    set once the first checkpoints are loaded, so that a restarted server begins with them.
    """
    checkpoints = Checkpoints(folder, settled_seconds=SETTLED_LOOKS * every_seconds)
    trouble = ""
    while True:
        newest = None
        try:
            newest, trouble = await asyncio.to_thread(checkpoints.newest), ""
        except OSError as error:
            if str(error) != trouble:
                trouble = str(error)
                log.error("checkpoints cannot be looked for until this is mended: %s", trouble)
        if newest is not None:
            try:
                await replace(await asyncio.to_thread(_load, newest[1], load))
                checkpoints.served = newest[0]
            except WeightsChanged as error:
                log.warning("%s", error)
            except Exception:
                checkpoints.refuse(*newest)
        elif not checkpoints.is_waiting:
            has_looked.set()
        await asyncio.sleep(every_seconds)


def _load(path: Path, load: LoadCheckpoint) -> TeacherBackend:
    with loading_unchanged(path):
        return load(path)
