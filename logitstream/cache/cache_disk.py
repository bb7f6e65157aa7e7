"""What a student's run waits for the cache's disk, with a teacher and without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from logitstream.cache import CacheReader
from logitstream.cache.disk import HANGS_SECONDS, DiskThread
from logitstream.cache.remote import is_remote

ALONE_SECONDS = 60.0
"""How long a run that has nothing but the cache waits for a disk that hangs."""
STORE_SECONDS = 600.0
"""How long anybody waits for a store, whose shards are fetched whole and whose failures are tried again."""

T = TypeVar("T")


def cache_disk(directory: str | Path, doing: str, *, alone: bool) -> DiskThread:
    """What waits for a cache's disk, the same for all of a process, which so finds out once that it hangs.

    alone: of a run that cannot go on without it.
    """
    return _cache_disk(str(directory), doing, alone)


@cache
def _cache_disk(directory: str, doing: str, alone: bool) -> DiskThread:
    patience = ALONE_SECONDS if alone else HANGS_SECONDS
    then = "a run without a teacher (targets: cache) cannot go on without it" if alone else "the run goes on without it"
    if is_remote(directory):
        return DiskThread(f"{doing} the cache {directory}", then=then, patience_seconds=STORE_SECONDS)
    return DiskThread(f"the disk, {doing} the cache {directory},", then=then, patience_seconds=patience)


def open_reader(directory: str | Path) -> CacheReader:
    """A reader for a run that has nothing but the cache; DiskHangs where the disk does not answer."""
    return from_disk(directory, lambda: CacheReader(directory))


def from_disk(directory: str | Path, work: Callable[[], T], *, alone: bool = True) -> T:
    """What `work` reads from a cache; DiskHangs where its disk does not answer. alone: as of `cache_disk`."""
    return cache_disk(directory, "reading", alone=alone).call(work)
