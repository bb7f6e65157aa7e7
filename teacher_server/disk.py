"""The thread that waits for the cache's disk, so that nobody else waits long and little waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from logitstream import metrics

PATIENCE_SECONDS = 5.0
"""A disk that is busy with one operation for so long is taken to hang: nobody waits for it until it answers."""
MAX_WAITING_BYTES = 64 << 20
"""What may wait to be written; the rest is not kept."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Disk:
    """Runs operations one after the other in a thread of its own; used from one event loop.

    While the disk hangs, nothing is asked of it, and what was offered by then waits. It is warned of once, counted
    (`cache_hangs_total`), and used again as soon as it answers.
    """

    def __init__(
        self, *, patience_seconds: float = PATIENCE_SECONDS, max_waiting_bytes: int = MAX_WAITING_BYTES
    ) -> None:
        self._patience = patience_seconds
        self._max_waiting_bytes = max_waiting_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stored-targets")
        self._busy_since: float | None = None  # with the operation that runs; set by the thread
        self._waiting_bytes = 0
        self._drops = False
        self._warned = False
        self._trouble = ""

    @property
    def hangs(self) -> bool:
        """Whether one operation has kept the thread for longer than patience allows."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > self._patience

    async def ask(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """What the function returns; None where the disk does not answer in time, at once where it hangs, or fails."""
        if self._notices_hanging():
            return None
        future = asyncio.wrap_future(self._submit(function, *arguments))
        done, _ = await asyncio.wait({future}, timeout=self._patience)
        if done:
            return self._outcome(future)
        future.cancel()  # one that has not begun never will
        self._notices_hanging()
        return None

    def offer(self, num_bytes: int, function: Callable[..., None], *arguments: Any) -> bool:
        """Have the function called some time, which holds so many bytes until then; False where too many wait."""
        if self._waiting_bytes and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            self._notices_hanging()
            if not self._drops:
                self._drops = True
                log.warning("the cache's disk does not keep up: what is scored meanwhile is not kept")
            return False
        self._waiting_bytes += num_bytes
        loop = asyncio.get_running_loop()
        self._submit(function, *arguments).add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._has_written, num_bytes, done)
        )
        return True

    def submit(self, function: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        """Run the function after all that waits, however long that takes."""
        return asyncio.wrap_future(self._submit(function, *arguments))

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        return self._thread.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        self._busy_since = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._busy_since = None
            if self._warned:
                self._warned = False
                log.warning("the cache's disk answers again")

    def _has_written(self, num_bytes: int, done: Future[None]) -> None:
        self._waiting_bytes -= num_bytes
        if not self._waiting_bytes and self._drops:
            self._drops = False
            log.warning("the cache's disk keeps up again")
        if not done.cancelled() and (error := done.exception()) is not None:
            self._note(error)

    def _outcome(self, future: asyncio.Future[Result]) -> Result | None:
        """Nobody's answer may depend on the cache: whoever asks it goes on without where it fails."""
        try:
            return future.result()
        except Exception as error:
            self._note(error)
            return None

    def _note(self, error: BaseException) -> None:
        """Log a failure, the same one but once: some are asked for again every second."""
        if repr(error) != self._trouble:
            self._trouble = repr(error)
            log.error("the cache failed", exc_info=error)

    def _notices_hanging(self) -> bool:
        if self.hangs and not self._warned:
            self._warned = True
            metrics.CACHE_HANGS.inc()
            log.warning(
                "the cache's disk has not answered for %g s: the server goes on without its cache until it does",
                self._patience,
            )
        return self.hangs
