"""The server's own cache: what it, or another replica on the same disk, has scored is not scored again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from logitstream import metrics
from logitstream.cache import CacheReader, CacheWriter
from logitstream.cache.open_shard import directory_bytes
from logitstream.errors import CacheError
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo, request_key
from teacher_server.backend import ScoreRequest

log = logging.getLogger(__name__)


class StoredTargets:
    """A cache for each (weights, spec) that is served, DIRECTORY/<fingerprint>: students may read it as well.

    `holds` looks into memory alone; everything else reads or writes files and belongs into a thread. Nothing raises: a
    cache that cannot be used is logged once and passed over.
    """

    def __init__(self, directory: str, *, id_model: bytes = b"", max_bytes: int = 0) -> None:
        self._directory = Path(directory)
        self._id_model = id_model
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._fingerprints: dict[tuple[TargetSpec, str], tuple[str, Fingerprint]] = {}
        self._caches: dict[str, tuple[CacheReader, CacheWriter] | None] = {}

    def open(self, spec: TargetSpec, info: TeacherInfo) -> None:
        """Find what is stored for a spec, so that `holds` knows."""
        self._cache(spec, info)

    def holds(self, request: ScoreRequest, info: TeacherInfo) -> bool:
        """Whether targets of these weights are stored, as far as `open`, `put` and `refresh` have seen."""
        digest, _ = self._fingerprint(request.spec, info)
        cache = self._caches.get(digest)
        return cache is not None and request_key(digest, request.sequence, request.draw_set) in cache[0]

    def get(self, request: ScoreRequest, info: TeacherInfo) -> bytes | None:
        """Encoded targets, or None where they turn out to be damaged."""
        digest, _ = self._fingerprint(request.spec, info)
        cache = self._caches.get(digest)
        payload = cache[0].get(request_key(digest, request.sequence, request.draw_set)) if cache is not None else None
        if payload is not None:
            metrics.TEACHER_CACHE_HITS.inc()
        return payload

    def put(self, scored: Sequence[tuple[ScoreRequest, bytes]], info: TeacherInfo) -> None:
        """Keep what was scored."""
        for request, payload in scored:
            cache = self._cache(request.spec, info)
            if cache is not None:
                sequence, draw_set = request.sequence, request.draw_set
                key = request_key(self._fingerprint(request.spec, info)[0], sequence, draw_set)
                ids, mask, version = sequence.token_ids, sequence.loss_mask, info.teacher_version
                cache[1].put(key, ids, mask, payload, draw_set, teacher_version=version)

    def refresh(self) -> None:
        """Acknowledge what was put, and find what other replicas have written."""
        with self._lock:
            caches = [cache for cache in self._caches.values() if cache is not None]
        for reader, writer in caches:
            writer.flush()
            try:
                reader.refresh()
            except (CacheError, OSError) as error:
                log.warning("the cache %s cannot be looked through: %s", reader.directory, error)

    def close(self) -> None:
        with self._lock:
            caches, self._caches = self._caches, {}
        for cache in caches.values():
            if cache is not None:
                cache[1].close()
                cache[0].close()

    def _fingerprint(self, spec: TargetSpec, info: TeacherInfo) -> tuple[str, Fingerprint]:
        """With its digest; computed once, it reads the whole id model."""
        found = self._fingerprints.get((spec, info.weights_digest))
        if found is None:
            fingerprint = Fingerprint.of(replace(info, id_model=self._id_model), spec)
            found = self._fingerprints[spec, info.weights_digest] = fingerprint.digest, fingerprint
        return found

    def _cache(self, spec: TargetSpec, info: TeacherInfo) -> tuple[CacheReader, CacheWriter] | None:
        digest, fingerprint = self._fingerprint(spec, info)
        with self._lock:
            if digest not in self._caches:
                self._caches[digest] = self._open(fingerprint, info)
            return self._caches[digest]

    def _open(self, fingerprint: Fingerprint, info: TeacherInfo) -> tuple[CacheReader, CacheWriter] | None:
        directory = self._directory / fingerprint.digest[:16]
        try:
            writer = CacheWriter(
                directory,
                fingerprint,
                id_model=self._id_model,
                provenance={"teacher": info.model, "revision": info.revision, "backend": info.backend},
                max_bytes=self._left(directory),
                writer_id="server",
            )
            return CacheReader(directory, fingerprint), writer
        except (CacheError, OSError) as error:
            log.warning("the cache %s is not used: %s", directory, error)
            return None

    def _left(self, directory: Path) -> int:
        """What the bound leaves to one of the caches, as things are now; at least a byte, since 0 means no bound."""
        if not self._max_bytes:
            return 0
        others = [path for path in self._directory.glob("*/") if path != directory]
        return max(1, self._max_bytes - sum(map(directory_bytes, others)))
