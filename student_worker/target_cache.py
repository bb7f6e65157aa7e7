"""The student's use of the cache on disk: look-up by content, write-through of what was received."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from logitstream.cache import CacheReader, CacheWriter
from logitstream.errors import FingerprintMismatch
from logitstream.types import Fingerprint, ReceivedTargets, TargetSpec, TokenSequence, request_key
from student_worker.teacher_client import TeacherClient

logger = logging.getLogger(__name__)


class TargetCache:
    """One directory of targets with one fingerprint; safe from several threads.

    A damaged record passes for missing. A write that fails never raises: the writer warns once and the run goes on.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: Fingerprint | None = None,
        *,
        id_model: bytes = b"",
        write: bool = True,
        max_bytes: int = 0,
        writer_id: str = "student",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """fingerprint None: the one that the directory holds. Raises FingerprintMismatch or CacheError."""
        self._writer: CacheWriter | None = None
        if fingerprint is None:
            reader = CacheReader(directory)
            fingerprint, id_model = reader.fingerprint, reader.id_model
        if write:
            self._writer = CacheWriter(
                directory,
                fingerprint,
                id_model=id_model,
                max_bytes=max_bytes,
                writer_id=writer_id,
                provenance=provenance,
            )
        self.fingerprint = fingerprint
        self._digest = fingerprint.digest
        self.id_model = id_model
        self._reader = CacheReader(directory, fingerprint)

    @property
    def writable(self) -> bool:
        """Whether what is received is kept; false also once the disk or the budget was full."""
        return self._writer is not None and not self._writer.disabled

    def key(self, sequence: TokenSequence, draw_set: int) -> bytes:
        return request_key(self._digest, sequence, draw_set)

    def holds(self, sequence: TokenSequence, draw_set: int) -> bool:
        """Whether a look-up is worth it; the record may still turn out damaged."""
        return self.key(sequence, draw_set) in self._reader

    def get(self, sequence: TokenSequence, draw_set: int) -> ReceivedTargets | None:
        """The targets as they were received; what this process has just written is found too."""
        key = self.key(sequence, draw_set)
        if key not in self._reader:
            self.refresh()
        payload = self._reader.get(key)
        return None if payload is None else ReceivedTargets(payload=payload, key=key, from_cache=True)

    def put(self, sequence: TokenSequence, draw_set: int, received: ReceivedTargets) -> bool:
        """Keep what came over the wire, verbatim; false where it is not kept: other weights, a full disk."""
        if self._writer is None or received.key != self.key(sequence, draw_set):
            return False
        return self._writer.put(
            received.key,
            sequence.token_ids,
            sequence.loss_mask,
            received.payload,
            draw_set,
            teacher_version=received.teacher_version,
        )

    def refresh(self) -> None:
        """Find what this process and others have written since."""
        if self._writer is not None:
            self._writer.flush()
        self._reader.refresh()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader.close()


def open_target_cache(
    directory: str | Path,
    client: TeacherClient | None,
    spec: TargetSpec,
    *,
    max_bytes: int = 0,
    writer_id: str = "student",
    provenance: dict[str, Any] | None = None,
) -> TargetCache:
    """The cache in a directory, made for the client's teacher where it is new; the teacher is asked only then.

    Without a client nothing is written. Raises FingerprintMismatch where it holds targets drawn by another spec.
    """
    if client is None or (Path(directory) / "manifest.json").exists():
        cache = TargetCache(
            directory, write=client is not None, max_bytes=max_bytes, writer_id=writer_id, provenance=provenance
        )
        if cache.fingerprint.spec != spec.canonical():
            cache.close()
            raise FingerprintMismatch(
                f"{directory} holds targets drawn by {cache.fingerprint.spec}, this run asks for {spec.canonical()}"
            )
        return cache
    info = client.info
    return TargetCache(
        directory,
        Fingerprint.of(info, spec),
        id_model=info.id_model,
        max_bytes=max_bytes,
        writer_id=writer_id,
        provenance={"teacher": info.model, "revision": info.revision, **(provenance or {})},
    )
