"""The student's view of the cache on disk: look-up by key, and writing of what the teacher sent.

A disk that hangs delays nobody for long: meanwhile targets come from the teacher and are not kept. A run that has no
teacher ends with DiskHangs after a minute.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from logitstream.cache import CacheReader, CacheWriter, has_manifest
from logitstream.cache.disk import DiskThread, cache_disk
from logitstream.client.teacher_client import TeacherClient
from logitstream.errors import CacheError, DiskHangs, FingerprintMismatch
from logitstream.tokenizer import HasVocabulary, Vocabulary
from logitstream.types import Fingerprint, ReceivedTargets, TargetSpec, TokenSequence, request_key

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TargetCache:
    """One directory of targets with one fingerprint; safe from several threads.

    A damaged record counts as missing, and so does everything while the disk hangs. A write that fails never raises:
    the writer warns once and the run goes on. With write=False, for runs without a teacher, reading raises DiskHangs.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: Fingerprint | None = None,
        *,
        id_model: bytes = b"",
        write: bool = True,
        disk: DiskThread | None = None,
        **options: Any,
    ) -> None:
        """Open the directory; fingerprint=None takes the one it holds. Raises FingerprintMismatch or a CacheError.

        With a fingerprint and write=True a disk that hangs raises nothing: it is used from when it answers.
        options: CacheWriter's max_bytes, writer_id and provenance.
        """
        self.directory, self._alone = directory, not write
        self._disk = disk or cache_disk(directory, "using", alone=self._alone)
        self._writer: CacheWriter | None = None
        self._reader: CacheReader | None = None
        self._warned = False
        if fingerprint is None:
            found = self._disk.call(lambda: CacheReader(directory))
            fingerprint, id_model = found.fingerprint, found.id_model
        self.fingerprint, self.id_model = fingerprint, id_model
        self._digest = fingerprint.digest
        self._on_disk(lambda: self._open(options), None)

    @property
    def writable(self) -> bool:
        """True while targets are kept: not while the disk hangs, nor once it or the budget was full."""
        return self._writer is not None and not (self._writer.disabled or self._disk.hangs)

    def key(self, sequence: TokenSequence, draw_set: int) -> bytes:
        return request_key(self._digest, sequence, draw_set)

    def __contains__(self, key: bytes) -> bool:
        """Return True if a look-up is worth it; the record may still turn out damaged."""
        return self._reader is not None and key in self._reader and (self._alone or not self._disk.hangs)

    def get(self, keys: Sequence[bytes]) -> list[ReceivedTargets | None]:
        """Return the targets of each key as they were received, by what the last `refresh` found."""
        reader = self._reader
        nothing: list[bytes | None] = [None] * len(keys)
        payloads = nothing if reader is None else self._on_disk(lambda: [reader.get(key) for key in keys], nothing)
        return [
            None if payload is None else ReceivedTargets(payload=payload, fingerprint=self._digest, from_cache=True)
            for payload in payloads
        ]

    def put(self, key: bytes, sequence: TokenSequence, draw_set: int, received: ReceivedTargets) -> bool:
        """Keep what came over the wire, verbatim, once; false if it is not kept: other weights, a full or hung disk."""
        writer = self._writer
        if writer is None or writer.disabled:
            return False
        if received.fingerprint != self._digest:
            if not self._warned:
                self._warned = True
                logger.warning("the teacher serves other weights now: their targets are not kept in this cache")
            return False
        if key in self and key not in self._reader.damaged:  # type: ignore[union-attr]
            return True
        parts = (key, sequence.token_ids, sequence.loss_mask, received.payload, draw_set)
        return self._on_disk(lambda: writer.put(*parts, teacher_version=received.teacher_version), False)

    def refresh(self) -> None:
        """Write out what was put, and find what others have written since."""
        with contextlib.suppress(DiskHangs):  # whoever looks something up next is told
            self._disk.call(self._refresh)

    def close(self) -> None:
        """Seal what was written. Waits a bounded time for a disk that hangs, and then says what is not on it."""
        writer, reader = self._writer, self._reader
        try:
            self._disk.call(lambda: [opened.close() for opened in (writer, reader) if opened is not None])
        except DiskHangs:
            self._disk.held = (writer, reader)  # their finalizers would wait for the disk too
            if writer is not None:
                logger.warning("cache %s: the last targets are not on the disk, which did not answer", self.directory)
        self._disk.close()

    def _on_disk(self, work: Callable[[], T], otherwise: T) -> T:
        """Return what the disk answers, or `otherwise` while it hangs and there is a teacher."""
        try:
            return self._disk.call(work)
        except DiskHangs:
            if self._alone:
                raise
            return otherwise

    def _open(self, options: dict[str, Any]) -> None:
        """Open for writing and reading; a cache that cannot be written, on a full disk for one, is still read."""
        if not self._alone:
            self._writer = CacheWriter(self.directory, self.fingerprint, id_model=self.id_model, **options)
        try:
            if self._writer is None or not self._writer.disabled or has_manifest(self.directory):
                self._reader = CacheReader(self.directory, self.fingerprint)
        except (CacheError, OSError) as error:
            if self._writer is None or not self._writer.disabled:
                raise
            logger.info("cache %s cannot be read either: %s", self.directory, error)  # the writer has warned

    def _refresh(self) -> None:
        if self._writer is not None:
            self._writer.flush()
        if self._reader is not None:
            self._reader.refresh()


def open_target_cache(
    directory: str | Path,
    client: TeacherClient | None,
    spec: TargetSpec,
    *,
    online: bool = False,
    tokenizer: HasVocabulary | Vocabulary | None = None,
    max_bytes: int = 0,
    writer_id: str = "student",
    provenance: dict[str, Any] | None = None,
) -> TargetCache:
    """Open the cache in a directory, or make it for the client's teacher if it is new.

    Without a client nothing is written. The teacher is asked only if it must be: for a new directory, or if `online`
    says that all targets come from it. Raises FingerprintMismatch, which names what differs, if the directory holds
    targets of another teacher, of other weights than it serves now, or of another tokenizer or spec.
    """
    disk = cache_disk(directory, "using", alone=client is None)
    options: Any = {"max_bytes": max_bytes, "writer_id": writer_id, "disk": disk}
    if client is None:
        return _checked(TargetCache(directory, write=False, **options), spec, tokenizer)
    with contextlib.suppress(DiskHangs):  # what is there cannot be known now: the teacher's targets are wanted
        if not online and disk.call(lambda: may_hold_targets(directory)):
            return _checked(TargetCache(directory, **options), spec, tokenizer)
    info = client.info
    facts = {"teacher": info.model, "revision": info.revision, **(provenance or {})}
    return TargetCache(directory, Fingerprint.of(info, spec), id_model=info.id_model, provenance=facts, **options)


def _checked(cache: TargetCache, spec: TargetSpec, tokenizer: HasVocabulary | Vocabulary | None) -> TargetCache:
    """Return the cache if its targets are drawn by the spec and its tokenizer is the student's."""
    found, hint, reader = cache.fingerprint, "", cache._reader
    wanted = replace(found, spec=spec.canonical())
    vocabulary = Vocabulary.of(tokenizer) if tokenizer is not None else None
    if vocabulary is not None and not vocabulary.num_shared(found.tokenizer_digest):
        wanted = replace(wanted, tokenizer_digest=vocabulary.digest)
        named = reader.manifest.provenance.get("tokenizer") if reader is not None else None
        hint = f"; tokenize with the cache's tokenizer, {named or 'that of its teacher'}"
    if wanted == found:
        return cache
    cache.close()
    message = f"{cache.directory} holds targets of another fingerprint (found against wanted)"
    raise FingerprintMismatch(f"{message}: {found.differences(wanted)}{hint}")


def may_hold_targets(directory: str | Path) -> bool:
    """Return True if there is a cache; one out of reach counts as none, and its writer warns of it."""
    try:
        return has_manifest(directory)
    except OSError:
        return False
