"""A disk that does not answer: what waits for it does so in a thread of its own, and nobody else waits long."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from logitstream import metrics
from logitstream.errors import DiskHangs

logger = logging.getLogger(__name__)

HANGS_SECONDS = 5.0
"""A disk that moves nothing for so long hangs."""
LOOK_SECONDS = 0.25

T = TypeVar("T")
_Jobs = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class DiskThread:
    """Runs operations on one disk in a daemon thread, one after the other; safe from several threads.

    A frozen file system or a server that is gone keeps a read or a write for ever, and no signal ends it. `call` waits
    for its operation as long as the thread gets on, by its processor time, and then for `patience_seconds`; so a large
    cache may take its time to open. A disk that hangs is warned of once and counted (`cache_hangs_total`), and asked
    again once it has answered what it was asked. The process can end meanwhile as far as Python is concerned.
    """

    def __init__(
        self, what: str, *, then: str, patience_seconds: float = HANGS_SECONDS, hangs_seconds: float = HANGS_SECONDS
    ) -> None:
        """what, then: subject of the warning that comes after hangs_seconds, and what that means for the run.

        patience_seconds: until DiskHangs is raised.
        """
        self._what, self._then = what, then
        self._hangs_seconds = min(hangs_seconds, patience_seconds)
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self.held: object = None
        """What shall not be let go of, since that waits for the disk too: a thread that waits for ever keeps it."""
        self._warned = False
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(DiskThread, **self._arguments()), (self._what,)

    def _arguments(self) -> dict[str, Any]:
        return {
            "then": self._then,
            "patience_seconds": self._patience_seconds,
            "hangs_seconds": self._hangs_seconds,
        }

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._jobs: _Jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.hangs = False

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; DiskHangs where the disk hangs, at once where it is known to.

        An operation that had begun by then goes on in the thread; one that had not never will.
        """
        with self._lock:
            if self._pid != os.getpid():  # threads stay with the parent when a process forks
                self._begin()
            if self.hangs:
                raise self._error()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(self._jobs,), name="disk", daemon=True)
                self._thread.start()
            future: Future[T] = Future()
            self._jobs.put((future, work))
        idle, progress = 0.0, self._progress()
        while idle < self._patience_seconds:
            pause = min(LOOK_SECONDS, self._patience_seconds - idle)
            with contextlib.suppress(TimeoutError):
                future.exception(pause)
            if future.done():
                return future.result()
            before, progress = progress, self._progress()
            idle = idle + pause if progress == before else 0.0
            if idle >= self._hangs_seconds:
                self._warn(future)
        with self._lock:
            if future.done():
                return future.result()
            if not future.cancel():
                future.add_done_callback(self._report)
            self.hangs = True
        raise self._error()

    def _error(self) -> DiskHangs:
        return DiskHangs(f"{self._what} has not answered for {self._patience_seconds:g} s: {self._then}")

    def _progress(self) -> float:
        """Processor seconds of the thread, which stand still while it waits for the disk."""
        with contextlib.suppress(OSError):  # it has ended
            if (thread := self._thread) is not None and thread.ident is not None:
                return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return 0.0

    def _warn(self, future: Future[Any]) -> None:
        with self._lock:
            if not self._warned and not future.done():
                self._warned = True
                metrics.CACHE_HANGS.inc()
                logger.warning("%s has not answered for %g s: %s", self._what, self._hangs_seconds, self._then)

    def _report(self, future: Future[Any]) -> None:
        """What came of an operation that nobody waits for any more."""
        if (error := future.exception()) is not None:
            logger.warning("%s failed once it answered: %s", self._what, error)

    def _run(self, jobs: _Jobs) -> None:
        while (job := jobs.get()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del job, future, work
            self._answered()

    def _answered(self) -> None:
        with self._lock:
            if self._warned:
                logger.warning("%s answers again", self._what)
            self.hangs = self._warned = False

    def close(self) -> None:
        """Let the thread end once it has done what it was asked; later calls begin another one."""
        with self._lock:
            if self._thread is not None and self._pid == os.getpid():
                self._jobs.put(None)
                self._thread, self._jobs = None, queue.SimpleQueue()
