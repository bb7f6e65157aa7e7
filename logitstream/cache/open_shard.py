"""The shard that a writer appends to, and its recovery when the writer has died."""

from __future__ import annotations

import fcntl
import logging
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.index import file_head, index_path, pack_entry, read_entries
from logitstream.cache.manifest import Manifest, remove_leftovers
from logitstream.cache.shard import (
    END_OF_STREAM,
    OPEN_SUFFIX,
    SPAN_DTYPE,
    Message,
    head_bytes,
    scan,
    shard_schema,
    spans_of,
)
from logitstream.errors import CacheError
from logitstream.files import sync_folder

logger = logging.getLogger(__name__)


class OpenShard:
    """A shard that grows by whole record batches; its file is locked, so that nobody takes its writer for dead."""

    def __init__(self, path: Path, fd: int, manifest: Manifest) -> None:
        self.path, self.schema = path, shard_schema(manifest)
        self.rows = self.size = self.index_size = 0
        self._digest = manifest.fingerprint.digest
        self._fd, self._index_fd, self._is_name_synced = fd, -1, False

    @classmethod
    def create(
        cls, directory: Path, writer_id: str, manifest: Manifest, *, milliseconds: int | None = None
    ) -> OpenShard:
        """Begin a shard, as old as `milliseconds`; others see it once it is locked and has its schema."""
        begun = time.time_ns() // 1_000_000 if milliseconds is None else milliseconds
        name = f"{writer_id}-{begun:013d}-{uuid.uuid4().hex[:8]}.arrow"
        partial = directory / f".{name}.{uuid.uuid4().hex}"
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        shard = cls(directory / (name + OPEN_SUFFIX), fd, manifest)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            shard._add(_schema_message(shard.schema.serialize()))
            partial.rename(shard.path)
        except OSError:
            partial.unlink(missing_ok=True)
            shard.discard()
            raise
        return shard

    @property
    def num_bytes(self) -> int:
        """Bytes of the shard and its index once it is sealed."""
        return self.size + self.index_size + len(END_OF_STREAM)

    def append(self, content: pa.Buffer, *, fsync: bool = False) -> None:
        """Append all of a record-batch message or, on an error, none of it."""
        self._add(Message(self.size, content, spans_of(content, self.size, self.schema)))
        if fsync:
            self.sync()

    def _add(self, message: Message, *, is_there: bool = False) -> None:
        """Write a message, unless it is there already, then its entry: no entry ever names what is not there."""
        if self._index_fd < 0:
            self._index_fd = os.open(index_path(self.path), os.O_RDWR | os.O_CREAT, 0o644)
        entry = pack_entry(message) if self.index_size else file_head(self._digest) + pack_entry(message)
        try:
            _write(self._fd, b"" if is_there else message.content, self.size)
            _write(self._index_fd, entry, self.index_size)
        except OSError:
            os.ftruncate(self._fd, self.size)
            os.ftruncate(self._index_fd, self.index_size)
            raise
        self.size, self.index_size = message.start + message.content.size, self.index_size + len(entry)
        self.rows += len(message.spans)

    def sync(self) -> None:
        """Wait until what was appended survives a loss of power."""
        self._sync_files()
        if not self._is_name_synced:
            sync_folder(self.path.parent)
            self._is_name_synced = True

    def _sync_files(self) -> None:
        for fd in (self._fd, self._index_fd):
            if fd >= 0:
                os.fdatasync(fd)

    def seal(self) -> Path | None:
        """End the stream and give the shard its final name, which is returned; remove a shard without records."""
        if not self.rows:
            self.discard()
            return None
        _write(self._fd, END_OF_STREAM, self.size)
        self._sync_files()
        final = self.path.with_suffix("")
        self.path.rename(final)
        sync_folder(final.parent)
        self.abandon()
        return final

    def abandon(self) -> None:
        """Let go of the files: the next writer recovers what is in them."""
        for fd in (self._fd, self._index_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._index_fd = -1

    def discard(self) -> None:
        """Remove the shard."""
        for path in (self.path, self.path.with_suffix(""), index_path(self.path)):
            path.unlink(missing_ok=True)
        self.abandon()

    def resume(self) -> None:
        """Take up the file of a dead writer, without its torn tail."""
        with suppress(FileNotFoundError, CacheError):
            for entry in read_entries(index_path(self.path), self._digest)[0]:
                content = os.pread(self._fd, entry.end - entry.start, entry.start)
                if entry.start != self.size or xxh3(content) != entry.checksum:
                    break
                self.size, self.rows = entry.end, self.rows + len(entry.spans)
                self.index_size = entry.offset + entry.spans.nbytes
        if not self.size:
            schema = os.pread(self._fd, head_bytes(self.path, self.schema), 0)
            self._add(_schema_message(pa.py_buffer(schema)), is_there=True)
        for message in scan(self.path, self.schema, self.size):
            self._add(message, is_there=True)
        size = os.fstat(self._fd).st_size
        if os.pread(self._fd, size - self.size, self.size) not in (b"", END_OF_STREAM):
            logger.warning("%s: cut off a torn tail of %d bytes", self.path, size - self.size)
        os.ftruncate(self._fd, self.size)
        os.truncate(index_path(self.path), self.index_size)


def _schema_message(content: pa.Buffer) -> Message:
    return Message(0, content, np.zeros(0, SPAN_DTYPE))


def _write(fd: int, content: pa.Buffer | bytes, position: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, position)
        view, position = view[written:], position + written


def recover(directory: Path, manifest: Manifest) -> None:
    """Seal the shards that dead writers left open, without their torn tails; living writers' are left alone."""
    remove_leftovers(directory)
    for path in sorted(directory.glob(f"*{OPEN_SUFFIX}")):
        fd = lock_dead(path)
        if fd is None:
            continue
        if not head_bytes(path, shard_schema(manifest)):
            logger.warning("%s is left alone: it is no shard of this cache, or its head is damaged", path)
            os.close(fd)
            continue
        shard = OpenShard(path, fd, manifest)
        try:
            shard.resume()
            shard.seal()
        except BaseException:
            shard.abandon()  # a lock that is kept would make it look like a living writer's
            raise


def lock_dead(path: Path) -> int | None:
    """Return the locked file of a shard that no living process writes; None if one does, or if it is gone."""
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
    """Return whether a living process writes an open shard."""
    try:
        fd = lock_dead(path)
    except OSError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is None and path.exists()


def origin(path: Path) -> tuple[str, int]:
    """Return the writer of a shard and when it was begun, in milliseconds; 0 if its name does not tell."""
    writer_id, milliseconds, _ = (*path.name.removesuffix(OPEN_SUFFIX).rsplit("-", 2), "", "")[:3]
    return writer_id, int(milliseconds) if milliseconds.isdecimal() else 0
