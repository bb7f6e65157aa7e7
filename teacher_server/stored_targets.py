"""The server's own cache: what it, or another replica on the same disk, has scored is not scored again."""

from __future__ import annotations

import asyncio
import logging
import math
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
from logitstream.cache.manifest import MANIFEST, tree_bytes
from logitstream.cache.writer import RECORD_BYTES
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo, request_key
from teacher_server.backend import ScoreRequest

MAX_OPEN = 16
"""Caches that are open at a time; each (weights, spec, seed) has its own, so clients can ask for any number."""
LOOK_SECONDS = 60.0
"""How often the folder is walked: other servers write to it, and people clear it."""
MAX_WAITING_BYTES = 64 << 20
"""Bound of what waits to be written; the rest is not kept."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Cache:
    """One open directory; it has a writer from the first put on. Broken: not used until the folder is walked again."""

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

    `holds` looks into memory alone; everything else reads or writes files and belongs in one thread. Beyond MAX_OPEN
    the least recently used cache is closed. Beyond max_bytes in all of them (0: no bound), which are counted every
    LOOK_SECONDS and estimated in between, nothing more is written.
    """

    def __init__(
        self, directory: str, *, id_model: bytes = b"", max_bytes: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = Path(directory)
        self._id_model, self._max_bytes, self._clock = id_model, max_bytes, clock
        self._looked, self._num_bytes, self._is_full = -math.inf, 0, False
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
        """Keep what was scored, as far as the bound allows."""
        for request, payload in scored:
            ids, mask = request.sequence.token_ids, request.sequence.loss_mask
            if not self._has_room(len(payload) + ids.nbytes + RECORD_BYTES):
                return
            cache = self.open(request.spec, info, for_writing=True)
            if cache is not None and cache.writer is not None:
                draw_set, version = request.draw_set, info.teacher_version
                cache.writer.put(cache.key(request), ids, mask, payload, draw_set, teacher_version=version)

    def refresh(self) -> None:
        """Acknowledge what was put, find what other replicas have written, and now and then walk the folder."""
        if self._clock() - self._looked > LOOK_SECONDS:
            self._look()
        for cache in self._caches.values():
            try:
                if cache.writer is not None:
                    cache.writer.flush()
                if cache.reader is not None:
                    cache.reader.refresh()
            except (CacheError, OSError) as error:
                log.warning("the cache %s cannot be looked through: %s", cache.directory, error)

    def close(self) -> None:
        while self._caches:
            self._caches.popitem()[1].close()

    def _has_room(self, num_bytes: int) -> bool:
        """Count so many bytes more if they keep to the bound; log and count the first that do not."""
        if self._looked == -math.inf:
            self._look()
        if not self._max_bytes or self._num_bytes + num_bytes <= self._max_bytes:
            self._num_bytes += num_bytes
            return True
        if not self._is_full:
            self._is_full = True
            metrics.CACHE_WRITE_ERRORS.inc()
            log.warning("%s reaches cache.max_bytes = %d: no more is written", self._directory, self._max_bytes)
        return False

    def _look(self) -> None:
        """Count all caches' bytes, and forget those that failed (a full disk, a deleted folder) to try them again."""
        self._looked, self._num_bytes = self._clock(), tree_bytes(self._directory)
        metrics.CACHE_BYTES.set(self._num_bytes)
        for key, cache in list(self._caches.items()):
            if cache.broken or (cache.writer is not None and not cache.writer.look_around()):
                self._caches.pop(key).close()


class StoredTargets:
    """A cache folder for the event loop: a disk that hangs or fails delays nobody for long and changes no answer."""

    def __init__(
        self,
        folder: CacheFolder,
        *,
        patience_seconds: float = HANGS_SECONDS,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        then = "the server goes on without its cache until it does"
        self.disk = DiskThread("the cache's disk", then=then, patience_seconds=patience_seconds)
        self._folder, self._patience = folder, patience_seconds
        self._max_waiting_bytes, self._waiting_bytes = max_waiting_bytes, 0
        self._trouble = ""

    async def open(self, spec: TargetSpec, info: TeacherInfo) -> None:
        """Find what is stored for a spec, if the disk answers soon."""
        await self._ask(self._folder.open, spec, info)

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        return not self.disk.hangs and self._folder.holds(request, info)

    async def get(self, request: ScoreRequest, info: TeacherInfo) -> bytes | None:
        """Return encoded targets; None if they are damaged or do not come soon."""
        return await self._ask(self._folder.get, request, info)

    def keep(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Write what was scored later on, unless too much waits already."""
        num_bytes = sum(len(payload) + request.sequence.token_ids.nbytes for request, payload in scored)
        if self._waiting_bytes and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            metrics.TEACHER_CACHE_UNKEPT.inc(len(scored))
            return

        def has_written(done: asyncio.Future[None]) -> None:
            self._waiting_bytes -= num_bytes
            self._outcome(done)

        self._waiting_bytes += num_bytes
        asyncio.wrap_future(self.disk.submit(partial(self._folder.put, scored, info))).add_done_callback(has_written)

    async def refresh(self) -> None:
        """Write out what was kept and see what others have; called now and then."""
        await self._ask(self._folder.refresh)

    def close(self) -> asyncio.Future[None]:
        """Begin to close, after everything that waits to be written."""
        closing = asyncio.wrap_future(self.disk.submit(self._folder.close))
        self.disk.close()
        return closing

    async def _ask(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return what the function returns; None if it fails, or if the disk does not answer in time."""
        if not self.disk.hangs:
            future = asyncio.wrap_future(self.disk.submit(partial(function, *arguments)))
            done, _ = await asyncio.wait({future}, timeout=self._patience)
            if done:
                return self._outcome(future)
            future.cancel()  # an operation that has not begun never will
        if self.disk.hangs:
            self.disk.warn()
        return None

    def _outcome(self, done: asyncio.Future[Result]) -> Result | None:
        """Return the result; log a failure, unless it is the last one again."""
        try:
            return done.result()
        except Exception as error:
            if repr(error) != self._trouble:
                self._trouble = repr(error)
                log.error("the cache failed", exc_info=error)
            return None
