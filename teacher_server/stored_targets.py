"""The server's own cache: what it, or another replica on the same disk, has scored is not scored again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from logitstream import metrics
from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.disk import HANGS_SECONDS, DiskThread
from logitstream.cache.manifest import MANIFEST
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


@dataclass(slots=True, eq=False)
class _Cache:
    """One open directory; it has a writer from the first put on. Broken: not used for some time."""

    directory: Path
    fingerprint: Fingerprint
    digest: str
    reader: CacheReader | None = None
    writer: CacheWriter | None = None
    broken: bool = False

    def key(self, request: ScoreRequest) -> bytes:
        return request_key(self.digest, request.sequence, request.draw_set)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.reader is not None:
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
        self._caches: OrderedDict[tuple[TargetSpec, TeacherInfo], _Cache] = OrderedDict()

    def open(self, spec: TargetSpec, info: TeacherInfo, *, for_writing: bool = False) -> _Cache | None:
        """Find what is stored for a spec, so that `holds` knows; create nothing unless it is for writing."""
        cache = self._caches.get((spec, info))
        if cache is None:
            fingerprint = Fingerprint.of(replace(info, id_model=self._id_model), spec)
            digest = fingerprint.digest
            cache = _Cache(self._directory / digest[:16], fingerprint, digest)
            if not for_writing and not (cache.directory / MANIFEST).exists():
                return None
            self._caches[spec, info] = cache
            while len(self._caches) > MAX_OPEN:
                self._caches.popitem(last=False)[1].close()
        self._caches.move_to_end((spec, info))
        if cache.broken:
            return None
        try:
            if for_writing and cache.writer is None:
                cache.writer = CacheWriter(
                    cache.directory,
                    cache.fingerprint,
                    id_model=self._id_model,
                    provenance={"teacher": info.model, "revision": info.revision, "backend": info.backend},
                    max_bytes=self._max_bytes,
                    writer_id="server",
                    disk_label=str(self._directory),
                )
            if cache.reader is None:
                cache.reader = CacheReader(cache.directory, cache.fingerprint)
        except (CacheError, FingerprintMismatch, OSError) as error:
            cache.broken = True
            log.warning("the cache %s is not used: %s", cache.directory, error)
            return None
        return cache

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        """Return whether targets of these weights are stored, as of the last `open`, `put` or `refresh`."""
        cache = self._caches.get((request.spec, info))
        reader = cache.reader if cache is not None else None
        return cache is not None and reader is not None and cache.key(request) in reader

    def get(self, request: ScoreRequest, info: TeacherInfo) -> bytes | None:
        """Return encoded targets; None if they turn out to be damaged or gone."""
        cache = self.open(request.spec, info)
        payload = cache.reader.get(cache.key(request)) if cache is not None and cache.reader is not None else None
        if payload is not None:
            metrics.TEACHER_CACHE_HITS.inc()
        return payload

    def put(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Keep what was scored."""
        for request, payload in scored:
            cache = self.open(request.spec, info, for_writing=True)
            if cache is not None and cache.writer is not None:
                ids, mask, draw_set = request.sequence.token_ids, request.sequence.loss_mask, request.draw_set
                version = info.teacher_version
                cache.writer.put(cache.key(request), ids, mask, payload, draw_set, teacher_version=version)

    def refresh(self) -> None:
        """Acknowledge what was put, and find what other replicas have written."""
        now = self._clock()
        is_time = now - self._retried > RETRY_SECONDS
        self._retried = now if is_time else self._retried
        for key, cache in list(self._caches.items()):
            try:
                if cache.writer is not None:
                    cache.writer.flush()
                if cache.reader is not None:
                    cache.reader.refresh()
            except (CacheError, OSError) as error:
                log.warning("the cache %s cannot be looked through: %s", cache.directory, error)
            if is_time and (cache.broken or (cache.writer is not None and not cache.writer.look_around())):
                self._caches.pop(key).close()

    def close(self) -> None:
        while self._caches:
            self._caches.popitem()[1].close()


class StoredTargets:
    """A cache folder for the event loop: a disk that hangs or fails delays nobody for long and changes no answer."""

    def __init__(self, folder: CacheFolder, *, patience_seconds: float = HANGS_SECONDS) -> None:
        self.folder = folder
        then = "the server goes on without its cache until it does"
        self.disk = DiskThread("the cache's disk", then=then, patience_seconds=patience_seconds)
        self._patience = patience_seconds
        self._writing: set[asyncio.Future[None]] = set()
        self._trouble = ""

    async def ask(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return what one of the folder's methods returns; None if it fails, or if the disk does not answer in time."""
        if not self.disk.hangs:
            future = self._submit(function, *arguments)
            await asyncio.wait({future}, timeout=self._patience)
            if future.done():
                return None if self._has_failed(future) else future.result()
            future.cancel()  # an operation that has not begun never will
        if self.disk.hangs:
            self.disk.warn()
        return None

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        return not self.disk.hangs and self.folder.holds(request, info)

    def keep(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Write what was scored later on, unless the disk hangs or does not keep up."""
        if self.disk.hangs or len(self._writing) >= MAX_WAITING:
            metrics.TEACHER_CACHE_UNKEPT.inc(len(scored))
            return
        writing = self._submit(self.folder.put, scored, info)
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        writing.add_done_callback(self._has_failed)

    async def refresh(self) -> None:
        """Write out what was kept and see what others have, every REFRESH_SECONDS until cancelled."""
        while True:
            await self.ask(self.folder.refresh)
            await asyncio.sleep(REFRESH_SECONDS)

    def close(self) -> asyncio.Future[None]:
        """Begin to close, after everything that waits to be written."""
        closing = self._submit(self.folder.close)
        self.disk.close()
        return closing

    def _submit(self, function: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        return asyncio.wrap_future(self.disk.submit(partial(function, *arguments)))

    def _has_failed(self, done: asyncio.Future[Any]) -> bool:
        """Return True for a failure; log it, unless it is the last one again."""
        error = None if done.cancelled() else done.exception()
        if error is not None and repr(error) != self._trouble:
            self._trouble = repr(error)
            log.error("the cache failed", exc_info=error)
        return error is not None
