"""The server's own cache: what it, or another replica on the same disk, has scored is not scored again."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from logitstream import metrics
from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.manifest import MANIFEST, tree_bytes
from logitstream.cache.writer import MESSAGE_BYTES, RECORD_BYTES
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo, request_key
from teacher_server.backend import ScoreRequest

MAX_OPEN = 16
"""Caches that are open at a time; each (weights, spec, seed) has its own, so clients can ask for any number."""
MAX_FINGERPRINTS = 1024
NEW_CACHE_BYTES = 16 << 10
"""Bound of what a cache takes before its first record, without its id model."""
TOKEN_BYTES = 5  # an id and its bit of the mask
LOOK_SECONDS = 60.0
"""How often the folder is walked: other servers write to it, and people clear it."""
ROOM_AGAIN = 0.9
"""Share of the bound below which reaching it again is worth another warning."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Cache:
    """One open directory; it has a writer from the first put on. Broken: not used until the folder is walked again."""

    reader: CacheReader | None = None
    writer: CacheWriter | None = None
    broken: bool = False


class StoredTargets:
    """A cache for each (weights, spec) that is served, DIRECTORY/<fingerprint>, which students may read as well.

    `holds` looks into memory alone; everything else reads or writes files and belongs in one thread. A cache that
    cannot be used is logged once and passed over. Beyond MAX_OPEN the least recently used one is closed. All caches
    together keep to max_bytes (0: no bound): beyond it nothing more is written.
    """

    def __init__(
        self,
        directory: str,
        *,
        id_model: bytes = b"",
        max_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = Path(directory)
        self._id_model, self._max_bytes, self._clock = id_model, max_bytes, clock
        self._looked, self._is_full = clock(), False
        self._bytes: dict[Path, int] | None = None  # not counted yet
        self._lock = threading.Lock()  # never held while the disk is asked
        self._caches: OrderedDict[str, _Cache] = OrderedDict()

        @lru_cache(MAX_FINGERPRINTS)  # since it hashes the whole id model
        def fingerprint_of(spec: TargetSpec, info: TeacherInfo) -> tuple[str, Fingerprint]:
            fingerprint = Fingerprint.of(replace(info, id_model=id_model), spec)
            return fingerprint.digest, fingerprint

        self._fingerprint_of = fingerprint_of

    def open(self, spec: TargetSpec, info: TeacherInfo) -> None:
        """Find what is stored for a spec, so that `holds` knows; create nothing."""
        digest, _ = self._fingerprint_of(spec, info)
        if (self._directory / digest[:16] / MANIFEST).exists():
            self._open(spec, info, for_writing=False)

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        """Return whether targets of these weights are stored, as of the last `open`, `put` or `refresh`."""
        reader, key = self._located(request, info)
        return reader is not None and key in reader

    def get(self, request: ScoreRequest, info: TeacherInfo) -> bytes | None:
        """Return encoded targets; None if they turn out to be damaged, or if their cache was closed for another."""
        reader, key = self._located(request, info)
        payload = reader.get(key) if reader is not None else None
        if payload is not None:
            metrics.TEACHER_CACHE_HITS.inc()
        return payload

    def put(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Keep what was scored, as far as the bound allows."""
        for request, payload in scored:
            sequence, draw_set = request.sequence, request.draw_set
            digest, _ = self._fingerprint_of(request.spec, info)
            with self._lock:
                is_new = (known := self._caches.get(digest)) is None or known.writer is None
            num_bytes = len(payload) + TOKEN_BYTES * len(sequence) + RECORD_BYTES + 3 * MESSAGE_BYTES
            if not self._has_room(num_bytes + (NEW_CACHE_BYTES + len(self._id_model)) * is_new):
                continue
            cache = self._open(request.spec, info, for_writing=True)
            if cache.writer is not None and not cache.broken:
                key = request_key(digest, sequence, draw_set)
                ids, mask, version = sequence.token_ids, sequence.loss_mask, info.teacher_version
                cache.writer.put(key, ids, mask, payload, draw_set, teacher_version=version)
                self._count(cache)

    def refresh(self) -> None:
        """Acknowledge what was put, and find what other replicas have written."""
        if self._clock() - self._looked > LOOK_SECONDS:
            self._walk()
            self._close_broken()
        with self._lock:
            caches = list(self._caches.values())
        for cache in caches:
            if cache.writer is not None:
                cache.writer.flush()
                self._count(cache)
            if cache.reader is not None:
                try:
                    cache.reader.refresh()
                except (CacheError, OSError) as error:
                    log.warning("the cache %s cannot be looked through: %s", cache.reader.directory, error)

    def close(self) -> None:
        with self._lock:
            caches, self._caches = self._caches, OrderedDict()
        self._close(*caches.values())

    def _close(self, *caches: _Cache) -> None:
        for cache in caches:
            if cache.writer is not None:
                cache.writer.close()
                self._count(cache)
            if cache.reader is not None:
                cache.reader.close()

    def _close_broken(self) -> None:
        """Forget the caches that failed, for a full disk or a deleted folder, so that they are tried again."""
        with self._lock:
            caches = dict(self._caches)
        failed = [
            digest
            for digest, cache in caches.items()
            if cache.broken or (cache.writer is not None and not cache.writer.look_around())
        ]
        with self._lock:
            lost = [self._caches.pop(digest) for digest in failed]
        self._close(*lost)

    def _located(self, request: ScoreRequest, info: TeacherInfo) -> tuple[CacheReader | None, bytes]:
        """Return the open reader that may hold a request, and its key there."""
        digest, _ = self._fingerprint_of(request.spec, info)
        with self._lock:
            cache = self._caches.get(digest)
            if cache is not None:
                self._caches.move_to_end(digest)
        reader = cache.reader if cache is not None else None
        return reader, request_key(digest, request.sequence, request.draw_set)

    def _open(self, spec: TargetSpec, info: TeacherInfo, *, for_writing: bool) -> _Cache:
        """Return the open cache; open what is missing of it, and close others if there are too many."""
        digest, fingerprint = self._fingerprint_of(spec, info)
        with self._lock:
            cache = self._caches.setdefault(digest, _Cache())
            self._caches.move_to_end(digest)
            excess = [self._caches.popitem(last=False)[1] for _ in range(len(self._caches) - MAX_OPEN)]
        self._close(*excess)
        if cache.broken:
            return cache
        directory = self._directory / digest[:16]
        try:
            if for_writing and cache.writer is None:
                cache.writer = CacheWriter(
                    directory,
                    fingerprint,
                    id_model=self._id_model,
                    provenance={"teacher": info.model, "revision": info.revision, "backend": info.backend},
                    writer_id="server",
                    disk_label=str(self._directory),
                )
            if cache.reader is None:
                cache.reader = CacheReader(directory, fingerprint)
        except (CacheError, FingerprintMismatch, OSError) as error:
            cache.broken = True
            log.warning("the cache %s is not used: %s", directory, error)
        return cache

    def _has_room(self, num_bytes: int) -> bool:
        """Return whether so many more bytes keep to the bound; log and count the first time that they do not."""
        if self._bytes is None:
            self._walk()
        is_full = bool(self._max_bytes) and self._total_bytes() + num_bytes > self._max_bytes
        if is_full and not self._is_full:
            self._is_full = True
            metrics.CACHE_WRITE_ERRORS.inc()
            log.warning(
                "the caches in %s reach cache.max_bytes = %d: nothing more is written until some are pruned or deleted",
                self._directory,
                self._max_bytes,
            )
        return not is_full

    def _total_bytes(self) -> int:
        return sum((self._bytes or {}).values())

    def _count(self, cache: _Cache) -> None:
        """Note the bytes of one cache as its writer knows them."""
        if cache.writer is not None:
            self._bytes = self._bytes or {}
            self._bytes[cache.writer.directory] = cache.writer.num_bytes
            metrics.CACHE_BYTES.set(self._total_bytes())

    def _walk(self) -> None:
        """Count the bytes of all caches."""
        self._looked, self._bytes = self._clock(), self._bytes or {}
        try:
            self._bytes = {path: tree_bytes(path) for path in self._directory.iterdir() if path.is_dir()}
        except OSError:  # none yet, or the writers say what is wrong
            return
        self._is_full = self._is_full and self._total_bytes() > ROOM_AGAIN * self._max_bytes
        metrics.CACHE_BYTES.set(self._total_bytes())
