"""The shard that a writer is appending to, and what becomes of it when the writer dies."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logitstream.cache.manifest import file_bytes, remove_leftovers, write_entry
from logitstream.cache.shard import (
    END_OF_STREAM,
    Message,
    Spans,
    read_schema,
    scan,
    shard_schema,
    spans_of,
    token_width,
)
from logitstream.files import sync_folder

logger = logging.getLogger(__name__)

OPEN_SUFFIX = ".open"
SHARD_NAME = re.compile(r"-\d{13}-[0-9a-f]{8}$")
"""How the names of shards that writers make end, without their suffixes."""


class OpenShard:
    """A shard that grows by whole messages; its file is locked, so that nobody else takes it for a dead writer's."""

    def __init__(self, path: Path, fd: int, *, size: int, spans: list[Spans], manifest: dict[str, Any]) -> None:
        self.path, self.size, self.rows = path, size, sum(map(len, spans))
        self.schema = shard_schema(manifest)
        self._width = token_width(manifest)
        self._fingerprint_digest: str = manifest["fingerprint_digest"]
        self._fd, self._spans = fd, spans
        self._is_name_synced = False

    @classmethod
    def create(
        cls, directory: Path, writer_id: str, manifest: dict[str, Any], *, milliseconds: int | None = None
    ) -> OpenShard:
        """A new shard with nothing but its schema, visible to others once it is locked; as old as `milliseconds`."""
        begun = time.time_ns() // 1_000_000 if milliseconds is None else milliseconds
        name = shard_name(writer_id, begun, uuid.uuid4().hex[:8]) + OPEN_SUFFIX
        partial = directory / f".{name.removesuffix(OPEN_SUFFIX)}.new"
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        shard = cls(directory / name, fd, size=0, spans=[], manifest=manifest)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            shard._write(memoryview(shard.schema.serialize()))
            partial.rename(shard.path)
        except OSError:
            shard.abandon()
            partial.unlink(missing_ok=True)
            raise
        return shard

    def append(self, message: pa.Buffer, *, fsync: bool = False) -> None:
        """All of a record-batch message or, on an error, none of it."""
        spans = spans_of(message, self.size, self._width)
        self._write(memoryview(message))
        if fsync:
            self.sync()
        self._spans.append(spans)
        self.rows += len(spans)

    def sync(self) -> None:
        """Wait until what was appended survives a loss of power."""
        os.fdatasync(self._fd)
        if not self._is_name_synced:
            sync_folder(self.path.parent)
            self._is_name_synced = True

    def _write(self, content: memoryview) -> None:
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(self._fd, content[written:], self.size + written)
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += len(content)

    def seal(self) -> Path | None:
        """End the stream, write the sidecars and give the shard its final name; an empty one disappears."""
        if not self.rows:
            self.path.unlink()
            self.abandon()
            return None
        self._write(memoryview(END_OF_STREAM))
        os.fsync(self._fd)
        final = self.path.with_suffix("")
        digest, spans = self._fingerprint_digest, np.concatenate(self._spans)
        write_entry(final, fingerprint_digest=digest, sha256=self._sha256(), size=self.size, spans=spans)
        self.path.rename(final)
        sync_folder(final.parent)
        self.abandon()
        return final

    def _sha256(self) -> str:
        digest, position = hashlib.sha256(), 0
        while chunk := os.pread(self._fd, 1 << 20, position):
            digest.update(chunk)
            position += len(chunk)
        return digest.hexdigest()

    def abandon(self) -> None:
        """Let go of the file: what is in it is for the next writer to recover."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def recover(directory: Path, manifest: dict[str, Any]) -> list[Path]:
    """Seal the shards that dead writers left open, without their torn tails; live writers' shards are left alone."""
    remove_leftovers(directory)
    sealed = [_recover_one(path, manifest) for path in sorted(directory.glob(f"*{OPEN_SUFFIX}"))]
    return [path for path in sealed if path is not None]


def _recover_one(path: Path, manifest: dict[str, Any]) -> Path | None:
    fd = lock_dead(path)
    if fd is None:
        return None
    try:
        return _seal_dead(path, fd, manifest)
    except BaseException:
        os.close(fd)  # a lock that is kept would make it look like a living writer's
        raise


def _seal_dead(path: Path, fd: int, manifest: dict[str, Any]) -> Path | None:
    size = os.fstat(fd).st_size
    first, messages = read_schema(path, manifest), list(scan(path, token_width(manifest)))
    whole = messages[-1].start + messages[-1].size if messages else first
    if sum(message.size for message in messages) + first == whole and first:
        if os.pread(fd, size - whole, whole) not in (b"", END_OF_STREAM):
            logger.warning("%s: cut off a torn tail of %d bytes", path, size - whole)
        os.ftruncate(fd, whole)
        spans = [message.spans for message in messages]
        return OpenShard(path, fd, size=whole, spans=spans, manifest=manifest).seal()
    sealed = _rewrite(path, fd, messages, manifest)
    os.close(fd)
    return sealed


def lock_dead(path: Path) -> int | None:
    """The locked file of a shard that no living process writes, or None."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def is_written(path: Path) -> bool:
    """Whether a living process writes an open shard."""
    try:
        fd = lock_dead(path)
    except OSError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is None and path.exists()


def _rewrite(path: Path, fd: int, messages: list[Message], manifest: dict[str, Any]) -> Path | None:
    """The readable batches of a shard that is damaged elsewhere than at its end, as a new shard."""
    logger.warning("%s: damaged; its %d readable batches were kept", path, len(messages))
    writer_id, milliseconds = origin(path)
    shard = OpenShard.create(path.parent, writer_id, manifest, milliseconds=milliseconds)
    for message in messages:
        shard.append(pa.py_buffer(os.pread(fd, message.size, message.start)))
    sealed = shard.seal()
    path.unlink()
    return sealed


def shard_name(writer_id: str, milliseconds: int, random: str = "0" * 8) -> str:
    """Name of a sealed shard, by its writer, when it was begun, and 8 hex digits that nobody else has."""
    return f"{writer_id}-{milliseconds:013d}-{random}.arrow"


def origin(path: Path) -> tuple[str, int]:
    """Writer of a shard and when it was begun, in milliseconds: by its name, else by its file."""
    writer_id, milliseconds, _ = (*path.name.removesuffix(OPEN_SUFFIX).rsplit("-", 2), "", "")[:3]
    return writer_id, int(milliseconds) if milliseconds.isdecimal() else path.stat().st_mtime_ns // 1_000_000


def directory_bytes(directory: Path) -> int:
    """Bytes of a cache's own files, without those of the caches below it."""
    return sum(map(file_bytes, directory.iterdir()))


def shard_bytes(shard: Path) -> int:
    """Bytes of a sealed shard and its sidecars."""
    return sum(map(file_bytes, (shard, shard.with_suffix(".index"), shard.with_suffix(".json"))))
