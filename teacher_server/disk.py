"""The server's asyncio side of the thread that waits for the cache's disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from logitstream.cache.disk import HANGS_SECONDS, DiskThread

MAX_WAITING_BYTES = 64 << 20
"""Bound of what waits to be written; the rest is not kept."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Disk:
    """Operations on the cache's disk for one event loop: a disk that hangs or fails delays nobody for long."""

    def __init__(self, *, patience_seconds: float = HANGS_SECONDS, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        then = "the server goes on without its cache until it does"
        self._thread = DiskThread("the cache's disk", then=then, patience_seconds=patience_seconds)
        self._patience = patience_seconds
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._drops = False
        self._trouble = ""

    @property
    def hangs(self) -> bool:
        """True while one operation has kept the thread for longer than patience allows."""
        return self._thread.hangs

    async def ask(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return what the function returns; None if it fails, or if the disk does not answer in time."""
        if not self.hangs:
            future = self.submit(function, *arguments)
            done, _ = await asyncio.wait({future}, timeout=self._patience)
            if done:
                return self._outcome(future)
            future.cancel()  # an operation that has not begun never will
        self._warn_if_hanging()
        return None

    def offer(self, num_bytes: int, function: Callable[..., object], *arguments: Any) -> bool:
        """Call the function later, keeping num_bytes in memory until then; False if too much waits already."""
        if self._waiting_bytes and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            self._warn_if_hanging()
            if not self._drops:
                self._drops = True
                log.warning("the cache's disk does not keep up: what is scored meanwhile is not kept")
            return False
        self._waiting_bytes += num_bytes
        loop = asyncio.get_running_loop()
        self._thread.submit(partial(function, *arguments)).add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._has_written, num_bytes, done)
        )
        return True

    def submit(self, function: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        """Run the function after everything that waits, however long that takes."""
        return asyncio.wrap_future(self._thread.submit(partial(function, *arguments)))

    def shutdown(self) -> None:
        self._thread.close()

    def _has_written(self, num_bytes: int, done: Future[Any]) -> None:
        self._waiting_bytes -= num_bytes
        if not self._waiting_bytes and self._drops:
            self._drops = False
            log.warning("the cache's disk keeps up again")
        self._outcome(done)

    def _outcome(self, done: Future[Result] | asyncio.Future[Result]) -> Result | None:
        """Return the result; log a failure, unless it is the last one again: no answer may depend on the cache."""
        try:
            return done.result()
        except Exception as error:
            if repr(error) != self._trouble:
                self._trouble = repr(error)
                log.error("the cache failed", exc_info=error)
            return None

    def _warn_if_hanging(self) -> None:
        if self.hangs:
            self._thread.warn()
