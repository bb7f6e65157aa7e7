"""Guard against disks that hang: one thread waits for the disk, and nobody else waits for long."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from logitstream import metrics
from logitstream.cache.reader import CacheReader
from logitstream.cache.remote import is_remote
from logitstream.errors import DiskHangs

logger = logging.getLogger(__name__)

HANGS_SECONDS = 5.0
"""A disk whose thread makes no progress for this long hangs."""
ALONE_SECONDS = 60.0
"""Patience of a run that has nothing but the cache."""
STORE_SECONDS = 600.0
"""Patience with an object store, whose shards are fetched whole and whose failures are retried."""
LOOK_SECONDS = 0.25

T = TypeVar("T")
Job = tuple[Future[Any], Callable[[], Any]]


class DiskThread:
    """A daemon thread that runs operations on one disk in order; its methods may be called from any thread.

    A frozen file system or a dead server blocks a read or a write for ever, and no signal ends it. Callers wait only
    while the thread makes progress, measured by its processor time, plus `patience_seconds`. A disk that hangs is
    warned of once, counted (`cache_hangs_total`) and used again as soon as it answers.
    """

    def __init__(
        self, what: str, *, then: str, patience_seconds: float = HANGS_SECONDS, hangs_seconds: float = HANGS_SECONDS
    ) -> None:
        """what, then: subject of the warning, logged after hangs_seconds, and its consequence for the run."""
        self._what, self._then = what, then
        self._patience, self._warn_seconds = patience_seconds, min(hangs_seconds, patience_seconds)
        self._lock = threading.Lock()
        self._warned = False
        self.held: object = None
        """Objects that must not be freed while the disk hangs: freeing them would wait for it."""
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        build = functools.partial(
            DiskThread, then=self._then, patience_seconds=self._patience, hangs_seconds=self._warn_seconds
        )
        return build, (self._what,)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._idle_since: float | None = None
        self._cpu_seconds = 0.0

    @property
    def hangs(self) -> bool:
        """True while one operation has made no progress for as long as callers have patience."""
        since = self._idle_since
        return since is not None and time.monotonic() - since >= self._patience

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` after everything submitted before it."""
        future: Future[T] = Future()
        with self._lock:
            if self._pid != os.getpid():  # threads stay with the parent when a process forks
                self._begin()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(self._jobs,), name="disk", daemon=True)
                self._thread.start()
            self._jobs.put((future, work))
        return future

    def call(self, work: Callable[[], T]) -> T:
        """Return or raise what `work` does; raise DiskHangs if the disk hangs, at once if that is known.

        An operation that has begun by then goes on in the thread; one that has not never will.
        """
        if self.hangs and self._pid == os.getpid():
            raise self.error()
        future = self.submit(work)
        while not self.hangs:
            wait([future], timeout=min(LOOK_SECONDS, self._patience / 4))
            if future.done():
                return future.result()
            self.look()
        if not future.cancel():
            if future.done():
                return future.result()
            future.add_done_callback(self._report)
        raise self.error()

    def error(self) -> DiskHangs:
        return DiskHangs(f"{self._what} has not answered for {self._patience:g} s: {self._then}")

    def look(self) -> None:
        """Check whether the current operation makes progress; warn, once, if it has stood still for too long."""
        with self._lock:
            since, thread, cpu_seconds = self._idle_since, self._thread, 0.0
            with contextlib.suppress(OSError):  # the thread has ended
                if thread is not None and thread.ident is not None:
                    cpu_seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            if since is None:
                return
            if cpu_seconds != self._cpu_seconds:
                self._cpu_seconds, self._idle_since = cpu_seconds, time.monotonic()
            elif time.monotonic() - since >= self._warn_seconds:
                self.warn()

    def warn(self) -> None:
        if not self._warned:
            self._warned = True
            metrics.CACHE_HANGS.inc()
            logger.warning("%s has not answered for %g s: %s", self._what, self._warn_seconds, self._then)

    def _report(self, future: Future[Any]) -> None:
        """Log the failure of an operation that nobody waits for any more."""
        if (error := future.exception()) is not None:
            logger.warning("%s failed once it answered: %s", self._what, error)

    def _run(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                self._idle_since = time.monotonic()
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del job, future, work
            with self._lock:
                self._idle_since = None
                if self._warned:
                    self._warned = False
                    logger.warning("%s answers again", self._what)

    def close(self) -> None:
        """Let the thread end after what was submitted; a later call starts a new one."""
        with self._lock:
            if self._thread is not None and self._pid == os.getpid():
                self._jobs.put(None)
                self._thread, self._jobs = None, queue.SimpleQueue()


@functools.cache
def _disk_of(directory: str, doing: str, alone: bool) -> DiskThread:
    if is_remote(directory):
        what, patience = f"{doing} the cache {directory}", STORE_SECONDS
    else:
        what, patience = f"the disk, {doing} the cache {directory},", ALONE_SECONDS if alone else HANGS_SECONDS
    then = "a run without a teacher (targets: cache) cannot go on without it" if alone else "the run goes on without it"
    return DiskThread(what, then=then, patience_seconds=patience)


def cache_disk(directory: str | Path, doing: str, *, alone: bool) -> DiskThread:
    """Return the process's guard for a cache's disk; alone: the run has no teacher and cannot go on without it."""
    return _disk_of(str(directory), doing, alone)


def from_disk(directory: str | Path, work: Callable[[], T], *, alone: bool = True) -> T:
    """Return what `work` reads from a cache; raise DiskHangs if its disk does not answer."""
    return cache_disk(directory, "reading", alone=alone).call(work)


def open_reader(directory: str | Path) -> CacheReader:
    """Open a reader for a run that has nothing but the cache; raise DiskHangs if its disk does not answer."""
    return from_disk(directory, lambda: CacheReader(directory))
