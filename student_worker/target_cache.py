"""The student's use of the cache on disk: look-up by content, write-through of what was received."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

from logitstream.cache import CacheReader, CacheWriter, has_manifest
from logitstream.cache.open_shard import tree_bytes
from logitstream.cache.remote import is_remote, local_path
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.tokenizer import HasVocabulary, Vocabulary
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
        self._warned_of_others = False
        self._reader = self._open_reader(directory)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the cache's first writer noted of its origin; empty where nothing can be read."""
        return dict(self._reader.manifest["provenance"]) if self._reader is not None else {}

    @property
    def writable(self) -> bool:
        """Whether what is received is kept; false also once the disk or the budget was full."""
        return self._writer is not None and not self._writer.disabled

    def _open_reader(self, directory: str | Path) -> CacheReader | None:
        """Where nothing can be written, a full disk for one, what is there is read all the same."""
        if self._writer is None or not self._writer.disabled:
            return CacheReader(directory, self.fingerprint)
        try:
            return CacheReader(directory, self.fingerprint) if has_manifest(directory) else None
        except (CacheError, OSError) as error:
            logger.info("cache %s cannot be read either: %s", directory, error)  # the writer has warned
            return None

    def key(self, sequence: TokenSequence, draw_set: int) -> bytes:
        return request_key(self._digest, sequence, draw_set)

    def holds(self, sequence: TokenSequence, draw_set: int) -> bool:
        """Whether a look-up is worth it; the record may still turn out damaged."""
        return self.key(sequence, draw_set) in self

    def __contains__(self, key: bytes) -> bool:
        """As `holds`, of a sequence's `key`."""
        return self._reader is not None and key in self._reader

    def is_damaged(self, sequence: TokenSequence, draw_set: int) -> bool:
        """Whether a look-up has found the record damaged."""
        return self._reader is not None and self.key(sequence, draw_set) in self._reader.damaged

    def get(self, sequence: TokenSequence, draw_set: int) -> ReceivedTargets | None:
        """The targets as they were received; what this process has just written is found too."""
        key = self.key(sequence, draw_set)
        if self._reader is None:
            return None
        if key not in self._reader:
            self.refresh()
        payload = self._reader.get(key)
        return None if payload is None else ReceivedTargets(payload=payload, key=key, from_cache=True)

    def get_many(self, keys: Sequence[bytes]) -> Iterator[ReceivedTargets | None]:
        """As `get` for each `key`, read as they are taken, but of what `refresh` has found alone."""
        payloads = self._reader.get_many(keys) if self._reader is not None else repeat(None)
        for key, payload in zip(keys, payloads, strict=False):
            yield None if payload is None else ReceivedTargets(payload=payload, key=key, from_cache=True)

    def put(self, sequence: TokenSequence, draw_set: int, received: ReceivedTargets) -> bool:
        """Keep what came over the wire, verbatim; false where it is not kept: other weights, a full disk."""
        if self._writer is None or self._writer.disabled:
            return False
        if received.key != self.key(sequence, draw_set):
            if not self._warned_of_others:
                self._warned_of_others = True
                logger.warning("the teacher serves other weights now: their targets are not kept in this cache")
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
        if self._reader is not None:
            self._reader.refresh()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._reader is not None:
            self._reader.close()


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
    options: Any = {"max_bytes": max_bytes, "writer_id": writer_id}
    if client is not None and (online or not may_hold_targets(directory)):
        info = client.info
        fingerprint = Fingerprint.of(info, spec)
        provenance = {"teacher": info.model, "revision": info.revision, **(provenance or {})}
        top, directory = directory, _of_version(directory, fingerprint, info.teacher_version)
        options["max_bytes"] = _left(max_bytes, top, directory)
        return TargetCache(directory, fingerprint, id_model=info.id_model, provenance=provenance, **options)
    cache = TargetCache(directory, write=client is not None, provenance=provenance, **options)
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
