"""The student's use of the cache on disk: look-up by content, write-through of what was received.

A disk that hangs holds up nobody for long: meanwhile targets come from the teacher and are not kept, and a run that has
no teacher ends with DiskHangs after a minute.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from logitstream.cache import CacheReader, CacheWriter, has_manifest
from logitstream.cache.disk import DiskThread, cache_disk
from logitstream.cache.manifest import tree_bytes
from logitstream.cache.remote import is_remote, local_path
from logitstream.client.teacher_client import TeacherClient
from logitstream.errors import CacheError, DiskHangs, FingerprintMismatch
from logitstream.tokenizer import HasVocabulary, Vocabulary
from logitstream.types import Fingerprint, ReceivedTargets, TargetSpec, TokenSequence, request_key

logger = logging.getLogger(__name__)

READ_AT_ONCE = 32

T = TypeVar("T")


class TargetCache:
    """One directory of targets with one fingerprint; safe from several threads.

    A damaged record passes for missing, and so does everything while the disk hangs. A write that fails never raises:
    the writer warns once and the run goes on. With write=False, where no teacher is asked, reading raises DiskHangs.
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
        reads: DiskThread | None = None,
        writes: DiskThread | None = None,
    ) -> None:
        """fingerprint None: the one that the directory holds. Raises FingerprintMismatch, CacheError or DiskHangs.

        With a fingerprint and write=True a disk that hangs raises nothing: what it answers later is used from then on.
        reads, writes: what waits for the disk, if there is such a thread already.
        """
        self._directory = directory
        self._alone = not write
        self._reads = reads if reads is not None else cache_disk(directory, "reading", alone=self._alone)
        self._writes = writes if writes is not None else cache_disk(directory, "writing", alone=False)
        self._writer: CacheWriter | None = None
        self._reader: CacheReader | None = None
        self._not_kept = 0
        self._warned_of_others = False
        if fingerprint is None:
            reader = self._reads.call(lambda: CacheReader(directory))
            fingerprint, id_model = reader.fingerprint, reader.id_model
        self.fingerprint = fingerprint
        self._digest = fingerprint.digest
        self.id_model = id_model
        options: Any = {"max_bytes": max_bytes, "writer_id": writer_id, "provenance": provenance}
        if write:
            self._write(lambda: self._open_writer(options), None)
        self._read(self._open_reader, None)

    def _open_writer(self, options: dict[str, Any]) -> None:
        self._writer = CacheWriter(self._directory, self.fingerprint, id_model=self.id_model, **options)

    def _open_reader(self) -> None:
        """Where nothing can be written, a full disk for one, what is there is read all the same."""
        if self._alone or self.writable:
            self._reader = CacheReader(self._directory, self.fingerprint)
            return
        try:
            self._reader = CacheReader(self._directory, self.fingerprint) if has_manifest(self._directory) else None
        except (CacheError, OSError) as error:
            logger.info("cache %s cannot be read either: %s", self._directory, error)  # the writer has warned

    def _read(self, work: Callable[[], T], otherwise: T) -> T:
        """What reading gives, or `otherwise` while the disk hangs and there is a teacher."""
        try:
            return self._reads.call(work)
        except DiskHangs:
            if self._alone:
                raise
            return otherwise

    def _write(self, work: Callable[[], T], otherwise: T) -> T:
        try:
            return self._writes.call(work)
        except DiskHangs:
            return otherwise

    @property
    def provenance(self) -> dict[str, Any]:
        """What the cache's first writer noted of its origin; empty where nothing can be read."""
        return dict(self._reader.manifest["provenance"]) if self._reader is not None else {}

    @property
    def writable(self) -> bool:
        """Whether what is received lies on disk; false also while that hangs, and once it or the budget was full."""
        return self._writer is not None and not (self._writer.disabled or self._writes.hangs or self._reads.hangs)

    @property
    def hangs(self) -> bool:
        """Whether what lies on disk cannot be had at present."""
        return self._reads.hangs

    def key(self, sequence: TokenSequence, draw_set: int) -> bytes:
        return request_key(self._digest, sequence, draw_set)

    def holds(self, sequence: TokenSequence, draw_set: int) -> bool:
        """Whether a look-up is worth it; the record may still turn out damaged."""
        return self.key(sequence, draw_set) in self

    def __contains__(self, key: bytes) -> bool:
        """As `holds`, of a sequence's `key`."""
        return self._reader is not None and key in self._reader and (self._alone or not self.hangs)

    def is_damaged(self, sequence: TokenSequence, draw_set: int) -> bool:
        """Whether a look-up has found the record damaged."""
        return self._reader is not None and self.key(sequence, draw_set) in self._reader.damaged

    def get(self, sequence: TokenSequence, draw_set: int) -> ReceivedTargets | None:
        """The targets as they were received; what this process has just written is found too."""
        key = self.key(sequence, draw_set)
        if self._reader is None or key not in self._reader:
            self.refresh()
        return next(self.get_many([key]))

    def get_many(self, keys: Sequence[bytes]) -> Iterator[ReceivedTargets | None]:
        """As `get` for each `key`, a few read at a time as they are taken, but of what `refresh` has found alone."""
        for start in range(0, len(keys), READ_AT_ONCE):
            some, reader = keys[start : start + READ_AT_ONCE], self._reader
            nothing: list[bytes | None] = [None] * len(some)
            payloads = self._read(partial(_payloads, reader, some), nothing) if reader is not None else nothing
            for key, payload in zip(some, payloads, strict=True):
                yield None if payload is None else ReceivedTargets(payload=payload, key=key, from_cache=True)

    def put(self, sequence: TokenSequence, draw_set: int, received: ReceivedTargets) -> bool:
        """Keep what came over the wire, verbatim, once; false where it is not: other weights, a full or hung disk."""
        writer = self._writer
        if writer is None or writer.disabled:
            return False
        if received.key != self.key(sequence, draw_set):
            if not self._warned_of_others:
                self._warned_of_others = True
                logger.warning("the teacher serves other weights now: their targets are not kept in this cache")
            return False
        if received.key in self and not self.is_damaged(sequence, draw_set):
            return True
        parts = (received.key, sequence.token_ids, sequence.loss_mask, received.payload, draw_set)
        kept = self._write(lambda: writer.put(*parts, teacher_version=received.teacher_version), None)
        self._not_kept += kept is None
        return bool(kept)

    def refresh(self) -> None:
        """Find what this process and others have written since."""
        if self._writer is not None:
            self._write(self._writer.flush, False)
        reader = self._reader
        with contextlib.suppress(DiskHangs):  # whoever looks something up next is told
            if reader is not None:
                self._reads.call(reader.refresh)
            elif self.writable:  # the disk hung when the cache was opened
                self._reads.call(self._open_reader)

    def close(self) -> None:
        """Seal what was written. Waits for a disk that hangs a bounded time, and says then what is not on it."""
        writer, reader = self._writer, self._reader
        if writer is not None:
            self._write(writer.close, None)
            if not_kept := self._not_kept + (writer.unwritten if self._writes.hangs else 0):
                logger.warning(
                    "cache %s: the targets of %d sequences are not on disk, which did not answer",
                    self._directory,
                    not_kept,
                )
        if reader is not None:
            try:
                self._reads.call(reader.close)
            except DiskHangs:
                self._reads.held = self._writes.held = (writer, reader)
        self._reads.close()
        self._writes.close()


def _payloads(reader: CacheReader, keys: Sequence[bytes]) -> list[bytes | None]:
    return [reader.get(key) for key in keys]


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
    """The cache in a directory, made for the client's teacher where it is new.

    Without a client nothing is written. The teacher is asked only where it must be: for a new directory, or where
    `online` says that all targets come from it. Raises FingerprintMismatch, which spells out what differs, where the
    directory holds targets of another teacher, tokenizer or spec.
    """
    reads = cache_disk(directory, "reading", alone=client is None)
    options: Any = {"max_bytes": max_bytes, "writer_id": writer_id, "provenance": provenance, "reads": reads}
    try:
        if client is None or not (online or not reads.call(lambda: may_hold_targets(directory))):
            return _open_found(directory, spec, tokenizer, write=client is not None, options=options)
    except DiskHangs:  # what is there cannot be known now: the teacher's targets are what is wanted
        if client is None:
            raise
    return _open_for_teacher(directory, client, spec, options)


def _open_found(
    directory: str | Path,
    spec: TargetSpec,
    tokenizer: HasVocabulary | Vocabulary | None,
    *,
    write: bool,
    options: dict[str, Any],
) -> TargetCache:
    cache = TargetCache(directory, write=write, **options)
    found = cache.fingerprint
    vocabulary = Vocabulary.of(tokenizer) if tokenizer is not None else None
    wanted = replace(found, spec=spec.canonical())
    if vocabulary is not None and not vocabulary.num_shared(found.tokenizer_digest):
        wanted = replace(wanted, tokenizer_digest=vocabulary.digest)
    if wanted == found:
        return cache
    cache.close()
    told = f"{directory} holds targets of another fingerprint (found against wanted): {found.differences(wanted)}"
    if wanted.tokenizer_digest != found.tokenizer_digest:
        told += f"; tokenize with the cache's tokenizer, {cache.provenance.get('tokenizer', 'that of its teacher')}"
    raise FingerprintMismatch(told)


def _open_for_teacher(
    directory: str | Path, client: TeacherClient, spec: TargetSpec, options: dict[str, Any]
) -> TargetCache:
    info, top, reads = client.info, directory, options["reads"]
    fingerprint = Fingerprint.of(info, spec)
    with contextlib.suppress(DiskHangs):
        directory = reads.call(lambda: _of_version(top, fingerprint, info.teacher_version))
        options = options | {"max_bytes": reads.call(lambda: _left(options["max_bytes"], top, directory))}
    provenance = {"teacher": info.model, "revision": info.revision, **(options["provenance"] or {})}
    return TargetCache(directory, fingerprint, id_model=info.id_model, **options | {"provenance": provenance})


def may_hold_targets(directory: str | Path) -> bool:
    """Whether there is a cache; what is out of reach counts as none, and its writer warns of it."""
    try:
        return has_manifest(directory)
    except OSError:
        return False


def _of_version(directory: str | Path, fingerprint: Fingerprint, teacher_version: int) -> str | Path:
    """The directory, or a cache of its own in it for newer weights of a teacher that replaced them while serving."""
    if teacher_version == 0 or not may_hold_targets(directory):
        return directory
    found = CacheReader(directory).fingerprint
    same_line = replace(found, weights_digest=fingerprint.weights_digest) == fingerprint
    if found == fingerprint or not same_line:
        return directory
    return f"{str(directory).rstrip('/')}/versions/{fingerprint.digest[:16]}"


def _left(max_bytes: int, top: str | Path, directory: str | Path) -> int:
    """What the bound of the top folder leaves to a cache in it as things are; at least a byte: 0 means no bound."""
    if not max_bytes or directory == top or is_remote(top):
        return max_bytes
    others = tree_bytes(local_path(top)) - tree_bytes(local_path(directory))
    return max(1, max_bytes - others)
