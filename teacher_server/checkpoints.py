"""Weights that are replaced while serving: the newest checkpoint of a folder, soon after it is written."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from teacher_server.backend import TeacherBackend
from teacher_server.process import in_own_thread
from teacher_server.weights import Stamp, weights_stamp

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
        self._folder, self._settled_seconds = folder, settled_seconds
        self._first_seen: dict[tuple[Stamp, Path], float] = {}
        self.refused: set[tuple[Stamp, Path]] = set()
        self.served: Stamp = (0, 0)
        self.is_waiting = False

    def newest(self) -> tuple[Stamp, Path] | None:
        """Return the newest checkpoint that has settled and was not refused; None if it is no newer than `served`."""
        found = set()
        for path in self._folder.iterdir():
            if not path.name.startswith((".", "tmp")):
                with contextlib.suppress(OSError):  # it vanishes meanwhile
                    found.add((weights_stamp(path), path))
        now = time.time()
        self._first_seen = {one: self._first_seen.get(one, now) for one in found}
        newer = sorted((one for one in found - self.refused if one[0] > self.served), reverse=True)
        # by its time, or as seen here: another machine's clock may be ahead
        settled = [one for one in newer if now - min(self._first_seen[one], one[0][0] / 1e9) >= self._settled_seconds]
        self.is_waiting = bool(newer) and not settled
        return settled[0] if settled else None


async def watch_checkpoints(
    folder: Path,
    *,
    every_seconds: float,
    load: LoadCheckpoint,
    replace: Callable[[TeacherBackend], Awaitable[None]],
    has_looked: asyncio.Event,
) -> None:
    """Load each newer checkpoint in a thread while the old one serves, and hand it to `replace`; until cancelled.

    One that cannot be loaded is reported and passed over until it is written to again. Both models are in memory for
    a moment. has_looked is set once the first checkpoints are loaded, so that a restarted server begins with them.
    """
    checkpoints = Checkpoints(folder, settled_seconds=SETTLED_LOOKS * every_seconds)
    while True:
        newest = None
        try:
            newest = await asyncio.to_thread(checkpoints.newest)
            if newest is not None:
                await replace(await in_own_thread(partial(load, newest[1])))
                checkpoints.served = newest[0]
            elif not checkpoints.is_waiting:
                has_looked.set()
        except Exception as error:
            where = folder if newest is None else newest[1]
            log.error(
                "%s cannot be served, the weights stay as they are: %s", where, error, exc_info=newest is not None
            )
            if newest is not None:
                checkpoints.refused.add(newest)
        await asyncio.sleep(every_seconds)
