"""Guard against disks that hang: one thread waits for the disk, and nobody else waits for long."""

from __future__ import annotations

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

    def __init__(self, what: str, *, then: str, patience_seconds: float = HANGS_SECONDS) -> None:
        """what, then: subject of the warning, logged after HANGS_SECONDS at most, and its consequence for the run."""
        self._what, self._then = what, then
        self._patience, self._warn_seconds = patience_seconds, min(HANGS_SECONDS, patience_seconds)
        self.held: object = None
        """Objects that must not be freed while the disk hangs: freeing them would wait for it."""
        self._begin()

    def _begin(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] | None = None
        self._thread_id = 0
        self._stands_since: float | None = None
        self._cpu_seconds, self._warned = 0.0, False

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(DiskThread, self._what, then=self._then, patience_seconds=self._patience), ()

    @property
    def hangs(self) -> bool:
        """True while one operation has made no progress for as long as callers have patience."""
        if self._pid != os.getpid():  # threads stay with the parent when a process forks
            self._begin()
        since = self._stands_since
        return since is not None and time.monotonic() - since >= self._patience

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` after everything submitted before it."""
        if self._pid != os.getpid():
            self._begin()
        future: Future[T] = Future()
        with self._lock:
            if self._jobs is None:
                self._jobs = queue.SimpleQueue()
                threading.Thread(target=self._run, args=(self._jobs,), name="disk", daemon=True).start()
            self._jobs.put((future, work))
        return future

    def call(self, work: Callable[[], T]) -> T:
        """Return or raise what `work` does; raise DiskHangs if the disk hangs, at once if that is known.

        An operation that has begun by then goes on in the thread; one that has not never will.
        """
        future: Future[T] = Future() if self.hangs else self.submit(work)
        while not future.done() and not self.hangs:
            wait([future], timeout=min(LOOK_SECONDS, self._patience / 4))
            self._look()
        if not future.done():
            future.cancel()
            raise DiskHangs(f"{self._what} has not answered for {self._patience:g} s: {self._then}")
        return future.result()

    def warn(self) -> None:
        if not self._warned:
            self._warned = True
            metrics.CACHE_HANGS.inc()
            logger.warning("%s has not answered for %g s: %s", self._what, self._warn_seconds, self._then)

    def _look(self) -> None:
        """Check whether the current operation makes progress; warn, once, if it has stood still for too long."""
        with self._lock:
            if self._stands_since is None:
                return
            cpu_seconds = time.clock_gettime(time.pthread_getcpuclockid(self._thread_id))
            if cpu_seconds != self._cpu_seconds:
                self._cpu_seconds, self._stands_since = cpu_seconds, time.monotonic()
            elif time.monotonic() - self._stands_since >= self._warn_seconds:
                self.warn()

    def _run(self, jobs: queue.SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                self._thread_id, self._stands_since = threading.get_ident(), time.monotonic()
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del job, future, work
            with self._lock:
                self._stands_since = None
                if self._warned:
                    self._warned = False
                    logger.warning("%s answers again", self._what)

    def close(self) -> None:
        """Let the thread end after what was submitted; a later call starts a new one."""
        with self._lock:
            if self._jobs is not None:
                self._jobs.put(None)
                self._jobs = None


@functools.cache
def cache_disk(directory: str | Path, doing: str, *, alone: bool) -> DiskThread:
    """Return the process's guard for a cache's disk; alone: the run has no teacher and cannot go on without it."""
    what, patience = f"the disk, {doing} the cache {directory},", ALONE_SECONDS if alone else HANGS_SECONDS
    if is_remote(directory):
        what, patience = f"{doing} the cache {directory}", STORE_SECONDS
    then = "a run without a teacher (targets: cache) cannot go on without it" if alone else "the run goes on without it"
    return DiskThread(what, then=then, patience_seconds=patience)


def from_disk(directory: str | Path, work: Callable[[], T], *, alone: bool = True) -> T:
    """Return what `work` reads from a cache; raise DiskHangs if its disk does not answer."""
    return cache_disk(directory, "reading", alone=alone).call(work)


def open_reader(directory: str | Path) -> CacheReader:
    """Open a reader for a run that has nothing but the cache; raise DiskHangs if its disk does not answer."""
    return from_disk(directory, lambda: CacheReader(directory))
