"""The shard that a writer appends to, and its recovery when the writer has died."""

from __future__ import annotations

import fcntl
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from logitstream.cache.index import file_head, index_path, pack_entry, parse_index, rebuild_index
from logitstream.cache.manifest import Manifest, remove_leftovers
from logitstream.cache.shard import (
    END_OF_STREAM,
    NO_SPANS,
    OPEN_SUFFIX,
    Spans,
    Stored,
    encode_batch,
    shard_schema,
    spans_of,
)
from logitstream.files import sync_folder

logger = logging.getLogger(__name__)


class OpenShard:
    """A shard that grows by whole record batches; its file is locked, so that nobody takes its writer for dead."""

    def __init__(self, path: Path, fd: int, manifest: Manifest) -> None:
        """path: its sealed name; fd: its file."""
        self.path, self._fd, self._schema = path, fd, shard_schema(manifest)
        self.size = self.index_size = 0
        self._index_fd = os.open(index_path(path), os.O_RDWR | os.O_CREAT, 0o644)

    @classmethod
    def create(cls, directory: Path, name: str, manifest: Manifest) -> OpenShard:
        """Begin the shard `name`-<random>.arrow; others see it once it is locked and has its schema."""
        path = directory / f"{name}-{uuid.uuid4().hex[:8]}.arrow"
        partial = directory / f".{path.name}.{uuid.uuid4().hex}"
        fd, shard = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            shard = cls(path, fd, manifest)
            shard._append(shard._schema.serialize(), NO_SPANS, file_head(manifest))
            partial.rename(f"{path}{OPEN_SUFFIX}")
            sync_folder(directory)
        except OSError:
            partial.unlink(missing_ok=True)
            os.close(fd) if shard is None else shard.discard()
            raise
        return shard

    @property
    def num_bytes(self) -> int:
        """Bytes of the shard and its index once it is sealed."""
        return self.size + self.index_size + len(END_OF_STREAM)

    def append(self, records: Sequence[Stored]) -> None:
        """Append a batch of records or, on an error, none of them."""
        content = encode_batch(records, self._schema)
        self._append(content, spans_of(content, self.size, self._schema))

    def _append(self, content: pa.Buffer, spans: Spans, head: bytes = b"") -> None:
        """Append a message, then its entry: no entry ever names what is not there."""
        entry = head + pack_entry(self.size, content, spans)
        try:
            _write(self._fd, content, self.size)
            _write(self._index_fd, entry, self.index_size)
        except OSError:
            self._truncate()
            raise
        self.size += content.size
        self.index_size += len(entry)

    def _truncate(self) -> None:
        os.ftruncate(self._fd, self.size)
        os.ftruncate(self._index_fd, self.index_size)

    def sync(self) -> None:
        """Wait until what was appended survives a loss of power."""
        os.fdatasync(self._fd)
        os.fdatasync(self._index_fd)

    def seal(self) -> None:
        """End the stream and give the shard its final name."""
        _write(self._fd, END_OF_STREAM, self.size)
        self.sync()
        os.rename(f"{self.path}{OPEN_SUFFIX}", self.path)
        sync_folder(self.path.parent)
        self.abandon()

    def abandon(self) -> None:
        """Let go of the files: the next writer recovers what is in them."""
        os.close(self._fd)
        os.close(self._index_fd)

    def discard(self) -> None:
        """Remove the shard."""
        Path(f"{self.path}{OPEN_SUFFIX}").unlink(missing_ok=True)
        index_path(self.path).unlink(missing_ok=True)
        self.abandon()

    def recover(self, index: bytes) -> None:
        """Seal what a dead writer wrote, without its torn tail; index: what the shard's whole messages make."""
        entries = parse_index(index).entries
        self.size, self.index_size = entries[-1].end, len(index)
        torn = os.fstat(self._fd).st_size - self.size
        if os.pread(self._fd, torn, self.size) not in (b"", END_OF_STREAM):
            logger.warning("%s: cut off a torn tail of %d bytes", self.path, torn)
        _write(self._index_fd, index, 0)  # the same bytes as are there already, unless they were lost or damaged
        self._truncate()
        self.seal() if len(entries) > 1 else self.discard()


def _write(fd: int, content: pa.Buffer | bytes, position: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, position)
        view, position = view[written:], position + written


def recover(directory: Path, manifest: Manifest) -> None:
    """Seal the shards that dead writers left open, without their torn tails; living writers' are left alone."""
    remove_leftovers(directory)
    for path in sorted(directory.glob(f"*.arrow{OPEN_SUFFIX}")):
        with suppress(FileNotFoundError, BlockingIOError):  # sealed meanwhile, or a living writer's
            _recover(path, manifest)


def _recover(path: Path, manifest: Manifest) -> None:
    fd, shard = os.open(path, os.O_RDWR), None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino != os.fstat(fd).st_ino:
            return
        if not (index := rebuild_index(path, manifest)):
            logger.warning("%s is left alone: it is no shard of this cache, or its head is damaged", path)
            return
        shard = OpenShard(path.with_suffix(""), os.dup(fd), manifest)
        shard.recover(index)
    except OSError:
        if shard is not None:
            shard.abandon()  # a lock that is kept would make it look like a living writer's
        raise
    finally:
        os.close(fd)
