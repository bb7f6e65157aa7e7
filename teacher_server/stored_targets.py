"""The server's own cache: what it, or another replica on the same disk, has scored is not scored again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from logitstream import metrics
from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.disk import HANGS_SECONDS, DiskThread
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo, request_key
from teacher_server.backend import ScoreRequest

MAX_OPEN = 16
"""Caches that are open at a time; each (weights, spec, seed) has its own, so clients can ask for any number."""
REFRESH_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""How often caches that failed (a full disk, a deleted folder) are tried again."""
MAX_WAITING = 256
"""Batches that wait to be written; the rest is not kept."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class _Cache:
    """The open directory of one (weights, spec)."""

    def __init__(self, folder: Path, spec: TargetSpec, info: TeacherInfo, *, id_model: bytes, max_bytes: int) -> None:
        fingerprint = Fingerprint.of(replace(info, id_model=id_model), spec)
        self.digest = fingerprint.digest
        directory = folder / self.digest[:16]
        self.writer = CacheWriter(
            directory,
            fingerprint,
            id_model=id_model,
            provenance={"teacher": info.model, "revision": info.revision, "backend": info.backend},
            max_bytes=max_bytes,
            writer_id="server",
            disk_label=str(folder),
        )
        self.reader = CacheReader(directory, fingerprint)

    def key(self, request: ScoreRequest) -> bytes:
        return request_key(self.digest, request.sequence, request.draw_set)

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


class CacheFolder:
    """A cache for each (weights, spec) that is served, DIRECTORY/<fingerprint>, which students may read as well.

    `holds` looks into memory alone; everything else reads or writes files and belongs in one thread. max_bytes bounds
    each cache (0: no bound). Beyond MAX_OPEN the least recently used one is closed.
    """

    def __init__(
        self, directory: str, *, id_model: bytes = b"", max_bytes: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = Path(directory)
        self._id_model, self._max_bytes, self._clock = id_model, max_bytes, clock
        self._retried = clock()
        self._caches: OrderedDict[tuple[TargetSpec, TeacherInfo], _Cache | None] = OrderedDict()  # None: it failed

    def open(self, spec: TargetSpec, info: TeacherInfo) -> _Cache | None:
        """Find or begin what is stored for a spec, so that `holds` knows; None if it cannot be used."""
        if (spec, info) not in self._caches:
            while len(self._caches) >= MAX_OPEN:
                self._close(next(iter(self._caches)))
            try:
                cache = _Cache(self._directory, spec, info, id_model=self._id_model, max_bytes=self._max_bytes)
            except (CacheError, FingerprintMismatch, OSError) as error:
                log.warning("a cache in %s is not used: %s", self._directory, error)
                self._caches[spec, info] = None
            else:
                self._caches[spec, info] = cache
        self._caches.move_to_end((spec, info))
        return self._caches[spec, info]

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        """Return whether targets of these weights are stored, as of the last `open`, `put` or `refresh`."""
        cache = self._caches.get((request.spec, info))
        return cache is not None and cache.key(request) in cache.reader

    def get(self, request: ScoreRequest, info: TeacherInfo) -> bytes | None:
        """Return encoded targets; None if they turn out to be damaged or gone."""
        cache = self.open(request.spec, info)
        payload = cache.reader.get(cache.key(request)) if cache is not None else None
        if payload is not None:
            metrics.TEACHER_CACHE_HITS.inc()
        return payload

    def put(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Keep what was scored."""
        for request, payload in scored:
            if (cache := self.open(request.spec, info)) is not None:
                ids, mask, draw_set = request.sequence.token_ids, request.sequence.loss_mask, request.draw_set
                version = info.teacher_version
                cache.writer.put(cache.key(request), ids, mask, payload, draw_set, teacher_version=version)

    def refresh(self) -> None:
        """Acknowledge what was put, find what other replicas have written, and now and then drop what failed."""
        is_time = self._clock() - self._retried > RETRY_SECONDS
        if is_time:
            self._retried = self._clock()
        for key, cache in list(self._caches.items()):
            if cache is not None:
                cache.writer.flush()
                try:
                    cache.reader.refresh()
                except (CacheError, OSError) as error:
                    log.warning("a cache in %s cannot be looked through: %s", self._directory, error)
            if is_time and (cache is None or not cache.writer.look_around()):
                self._close(key)

    def close(self) -> None:
        for key in list(self._caches):
            self._close(key)

    def _close(self, key: tuple[TargetSpec, TeacherInfo]) -> None:
        if (cache := self._caches.pop(key)) is not None:
            cache.close()


class StoredTargets:
    """A cache folder for the event loop: a disk that hangs or fails delays nobody for long and changes no answer."""

    def __init__(self, folder: CacheFolder, *, patience_seconds: float = HANGS_SECONDS) -> None:
        self.folder, self._patience = folder, patience_seconds
        then = "the server goes on without its cache until it does"
        self.disk = DiskThread("the cache's disk", then=then, patience_seconds=patience_seconds)
        self._num_waiting = 0

    async def ask(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return what one of the folder's methods returns; None if it fails, or if the disk does not answer in time."""
        if not self.disk.hangs:
            asked = asyncio.wrap_future(self.disk.submit(partial(function, *arguments)))
            await asyncio.wait({asked}, timeout=self._patience)
            if asked.done():
                return None if _has_failed(asked) else asked.result()
            asked.cancel()  # an operation that has not begun never will
        if self.disk.hangs:
            self.disk.warn()
        return None

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        return not self.disk.hangs and self.folder.holds(request, info)

    def keep(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Write what was scored later on, unless the disk hangs or does not keep up."""
        if self.disk.hangs or self._num_waiting >= MAX_WAITING:
            metrics.TEACHER_CACHE_UNKEPT.inc(len(scored))
            return

        def has_written(done: asyncio.Future[None]) -> None:
            self._num_waiting -= 1
            _has_failed(done)

        self._num_waiting += 1
        asyncio.wrap_future(self.disk.submit(partial(self.folder.put, scored, info))).add_done_callback(has_written)

    async def refresh(self) -> None:
        """Write out what was kept and see what others have, every REFRESH_SECONDS until cancelled."""
        while True:
            await self.ask(self.folder.refresh)
            await asyncio.sleep(REFRESH_SECONDS)

    def close(self) -> asyncio.Future[None]:
        """Begin to close, after everything that waits to be written."""
        closing = asyncio.wrap_future(self.disk.submit(self.folder.close))
        self.disk.close()
        return closing


def _has_failed(done: asyncio.Future[Any]) -> bool:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        log.error("the cache failed", exc_info=error)
    return error is not None
