"""The server's own cache: what it, or another replica on the same disk, has scored is not scored again."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from logitstream import metrics
from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.manifest import MANIFEST
from logitstream.cache.writer import ENTRY_BYTES, MESSAGE_BYTES, RECORD_BYTES
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo, request_key
from teacher_server.backend import ScoreRequest
from teacher_server.cache_usage import Usage

MAX_OPEN = 16
"""Caches that are open at a time; each (weights, spec, seed) has one of its own, so clients can ask for any number."""
MAX_FINGERPRINTS = 1024
NEW_CACHE_BYTES = 16 << 10
"""More than a cache takes before its first record, its id model apart."""
TOKEN_BYTES = 5  # its id and its bit of the mask
BATCH_BYTES = RECORD_BYTES + 2 * MESSAGE_BYTES + ENTRY_BYTES
"""More than one record takes beside its tokens and payload, be it the first of a batch and of a shard."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Cache:
    """One directory, as far as it is open: the writer from the first put on."""

    reader: CacheReader | None = None
    writer: CacheWriter | None = None
    broken: bool = False

    def may_be_written(self) -> bool:
        """Whether its writer, where it has one, can go on."""
        return self.writer is None or self.writer.look_around()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.reader is not None:
            self.reader.close()


class StoredTargets:
    """A cache for each (weights, spec) that is served, DIRECTORY/<fingerprint>: students may read it as well.

    `holds` looks into memory alone; everything else reads or writes files and belongs into one thread. A cache that
    cannot be used is logged once and passed over. Beyond MAX_OPEN the one used longest ago is closed. All
    caches together keep to max_bytes (0: no bound): beyond it nothing more is written.
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
        self._id_model = id_model
        self._usage = Usage(self._directory, max_bytes, clock=clock)
        self._lock = threading.Lock()
        self._fingerprints: OrderedDict[tuple[TargetSpec, str], tuple[str, Fingerprint]] = OrderedDict()
        self._caches: OrderedDict[str, _Cache] = OrderedDict()

    def open(self, spec: TargetSpec, info: TeacherInfo) -> None:
        """Find what is stored for a spec, so that `holds` knows; makes nothing where there is nothing."""
        digest, _ = self._fingerprint(spec, info)
        if (self._folder(digest) / MANIFEST).exists():
            self._cache(spec, info, for_writing=False)

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        """Whether targets of these weights are stored, as far as `open`, `put` and `refresh` have seen."""
        digest, _ = self._fingerprint(request.spec, info)
        reader = self._reader(digest)
        return reader is not None and request_key(digest, request.sequence, request.draw_set) in reader

    def get(self, request: ScoreRequest, info: TeacherInfo) -> bytes | None:
        """Encoded targets, or None where they turn out to be damaged, or their cache was closed for another."""
        digest, _ = self._fingerprint(request.spec, info)
        reader = self._reader(digest)
        payload = reader.get(request_key(digest, request.sequence, request.draw_set)) if reader is not None else None
        if payload is not None:
            metrics.TEACHER_CACHE_HITS.inc()
        return payload

    def put(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Keep what was scored, as far as the bound allows."""
        for request, payload in scored:
            sequence, draw_set = request.sequence, request.draw_set
            digest, _ = self._fingerprint(request.spec, info)
            with self._lock:
                is_new = (known := self._caches.get(digest)) is None or known.writer is None
            num_bytes = len(payload) + TOKEN_BYTES * len(sequence) + BATCH_BYTES
            if not self._usage.has_room(num_bytes + (NEW_CACHE_BYTES + len(self._id_model)) * is_new):
                continue
            cache = self._cache(request.spec, info, for_writing=True)
            if cache.writer is not None and not cache.broken:
                key = request_key(digest, sequence, draw_set)
                ids, mask, version = sequence.token_ids, sequence.loss_mask, info.teacher_version
                cache.writer.put(key, ids, mask, payload, draw_set, teacher_version=version)
                self._usage.set(cache.writer.directory, cache.writer.num_bytes)

    def refresh(self) -> None:
        """Acknowledge what was put, and find what other replicas have written."""
        if self._usage.look_again():
            self._begin_anew()
        with self._lock:
            caches = list(self._caches.values())
        for cache in caches:
            if cache.writer is not None:
                cache.writer.flush()
                self._usage.set(cache.writer.directory, cache.writer.num_bytes)
            if cache.reader is not None:
                try:
                    cache.reader.refresh()
                except (CacheError, OSError) as error:
                    log.warning("the cache %s cannot be looked through: %s", cache.reader.directory, error)

    def close(self) -> None:
        with self._lock:
            caches, self._caches = self._caches, OrderedDict()
        for cache in caches.values():
            self._close(cache)

    def _close(self, cache: _Cache) -> None:
        cache.close()
        if cache.writer is not None:
            self._usage.set(cache.writer.directory, cache.writer.num_bytes)

    def _begin_anew(self) -> None:
        """Forget the caches that failed, be it for a full disk or a deleted folder, so that they are tried again."""
        with self._lock:
            caches = dict(self._caches)
        failed = [digest for digest, cache in caches.items() if cache.broken or not cache.may_be_written()]
        with self._lock:  # which is never held while the disk is asked
            lost = [self._caches.pop(digest) for digest in failed]
        for cache in lost:
            cache.close()

    def _fingerprint(self, spec: TargetSpec, info: TeacherInfo) -> tuple[str, Fingerprint]:
        """With its digest; remembered, since it reads the whole id model."""
        key = (spec, info.weights_digest)
        with self._lock:
            found = self._fingerprints.get(key)
            if found is None:
                fingerprint = Fingerprint.of(replace(info, id_model=self._id_model), spec)
                found = self._fingerprints[key] = fingerprint.digest, fingerprint
                if len(self._fingerprints) > MAX_FINGERPRINTS:
                    self._fingerprints.popitem(last=False)
            return found

    def _folder(self, digest: str) -> Path:
        return self._directory / digest[:16]

    def _reader(self, digest: str) -> CacheReader | None:
        with self._lock:
            cache = self._caches.get(digest)
            if cache is None:
                return None
            self._caches.move_to_end(digest)
            return cache.reader

    def _cache(self, spec: TargetSpec, info: TeacherInfo, *, for_writing: bool) -> _Cache:
        """The open cache; what is missing of it is opened, and others are closed where there are too many."""
        digest, fingerprint = self._fingerprint(spec, info)
        with self._lock:
            cache = self._caches.setdefault(digest, _Cache())
            self._caches.move_to_end(digest)
            excess = [self._caches.popitem(last=False)[1] for _ in range(len(self._caches) - MAX_OPEN)]
        for old in excess:
            self._close(old)
        if cache.broken:
            return cache
        directory = self._folder(digest)
        try:
            if for_writing and cache.writer is None:
                cache.writer = self._new_writer(directory, fingerprint, info)
            if cache.reader is None:
                cache.reader = CacheReader(directory, fingerprint)
        except (CacheError, FingerprintMismatch, OSError) as error:
            cache.broken = True
            log.warning("the cache %s is not used: %s", directory, error)
        return cache

    def _new_writer(self, directory: Path, fingerprint: Fingerprint, info: TeacherInfo) -> CacheWriter:
        return CacheWriter(
            directory,
            fingerprint,
            id_model=self._id_model,
            provenance={"teacher": info.model, "revision": info.revision, "backend": info.backend},
            writer_id="server",
            disk_label=str(self._directory),
        )
