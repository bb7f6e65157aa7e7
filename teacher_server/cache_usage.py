"""What all caches below one folder take on disk, and whether they may take more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from logitstream import metrics
from logitstream.cache.manifest import tree_bytes

LOOK_SECONDS = 60.0
"""How often the folder is walked: other servers write into it, and it is cleared by hand."""
ROOM_AGAIN = 0.9
"""Share of the bound below which reaching it again is worth another warning."""

log = logging.getLogger(__name__)


class Usage:
    """Bytes of each cache, so that one more costs the same however many there are; used from one thread.

    max_bytes 0: no bound.
    """

    def __init__(self, directory: Path, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._clock = clock
        self._bytes: dict[Path, int] = {}
        self._total = 0
        self._looked = clock()
        self._is_known = False
        self._is_full = False

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes more keep to the bound; the first time that they do not is logged and counted."""
        if not self._is_known:
            self._look()
        is_full = bool(self._max_bytes) and self._total + num_bytes > self._max_bytes
        if is_full and not self._is_full:
            self._is_full = True
            metrics.CACHE_WRITE_ERRORS.inc()
            log.warning(
                "the caches in %s reach cache.max_bytes = %d: nothing more is written until some are pruned or deleted",
                self._directory,
                self._max_bytes,
            )
        return not is_full

    def set(self, cache: Path, num_bytes: int) -> None:
        """Bytes of one cache as its writer knows them."""
        self._total += num_bytes - self._bytes.get(cache, 0)
        self._bytes[cache] = num_bytes
        metrics.CACHE_BYTES.set(self._total)

    def look_again(self) -> bool:
        """Walk the folder where that was long ago; whether it was."""
        if self._clock() - self._looked <= LOOK_SECONDS:
            return False
        self._look()
        return True

    def _look(self) -> None:
        self._looked, self._is_known = self._clock(), True
        try:
            found = {path: tree_bytes(path) for path in self._directory.iterdir() if path.is_dir()}
        except OSError:  # none yet, or the writers say what is wrong
            return
        self._bytes, self._total = found, sum(found.values())
        self._is_full = self._is_full and self._total > ROOM_AGAIN * self._max_bytes
        metrics.CACHE_BYTES.set(self._total)
