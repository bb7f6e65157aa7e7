"""Put some records of a shard into a new one: how many bytes that will take, and how to do it on a full disk.

Bytes are known beforehand: what a record batch takes beside its buffers depends on the schema alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.cache.manifest import INDEX_HEADER, render, summary
from logitstream.cache.open_shard import OPEN_SUFFIX, OpenShard, origin, shard_name
from logitstream.cache.shard import (
    END_OF_STREAM,
    SCHEMAS,
    SPAN,
    Message,
    Record,
    Spans,
    encode_batch,
    scan,
    shard_schema,
    token_width,
    unpack_record,
)
from logitstream.cache.shard_file import ShardFile
from logitstream.errors import CacheError, CorruptRecord

BATCH_BYTES = 256 << 10
"""Of tokens, masks and payloads in a record batch of a shard that is written anew."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
KEEP_SIZE_PUNCH_HOLE = 0x03
DISK_BLOCK = 4096


class UnreadableRecord(CacheError):
    """The disk fails to read a record that is to be kept."""


def rewritten_bytes(path: Path, spans: Spans, manifest: dict[str, Any], batch_bytes: int = BATCH_BYTES) -> int:
    """Bytes of the shard that takes a shard's place with these of its records, and of its sidecars; 0 without records.

    A record takes 123 to 165 bytes beside its tokens, mask and payload, a record batch of `batch_bytes` some 800.
    """
    if not len(spans):
        return 0
    schema, width = shard_schema(manifest), token_width(manifest)
    starts = _batches(spans, width, batch_bytes)
    counts = np.diff([*starts, len(spans)])
    size = len(memoryview(schema.serialize())) + len(END_OF_STREAM)
    size += int(_body_bytes(counts, *(np.add.reduceat(part, starts) for part in _parts(spans, width))).sum())
    size += len(counts) * _metadata_bytes(width)
    return size + sidecar_bytes(path, spans, size)


def sidecar_bytes(path: Path, spans: Spans, size: int) -> int:
    """Bytes of the sidecars of a shard of these records that is as old as another one."""
    entry = {"shard": shard_name(*origin(path)), "bytes": size, "sha256": "0" * 64} | summary(spans)
    return INDEX_HEADER.size + SPAN.size * len(spans) + len(render(entry))


def newest_within(
    path: Path, spans: Spans, max_bytes: int, manifest: dict[str, Any], batch_bytes: int = BATCH_BYTES
) -> Spans:
    """As many of the last records as fit into so many bytes when they are written anew."""
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high) // 2
        if rewritten_bytes(path, spans[middle:], manifest, batch_bytes) <= max_bytes:
            high = middle
        else:
            low = middle + 1
    return spans[low:]


def _parts(spans: Spans, width: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Bytes of each record's tokens, mask and payload."""
    units = {"tokens": width, "mask": 1, "payload": 1}
    return tuple(unit * spans[f"{part}_count"].astype(np.int64) for part, unit in units.items())


def _batches(spans: Spans, width: int, batch_bytes: int) -> list[int]:
    """First rows of record batches: as many records as hold no more than `batch_bytes`, but one at least."""
    ends = np.cumsum(sum(_parts(spans, width)))
    starts, start = [], 0
    while start < len(spans):
        starts.append(start)
        before = int(ends[start - 1]) if start else 0
        start = max(start + 1, int(np.searchsorted(ends, before + batch_bytes, side="right")))
    return starts


def _body_bytes(
    counts: npt.NDArray[Any], tokens: npt.NDArray[Any], masks: npt.NDArray[Any], payloads: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """Of record batches with so many records and bytes: key, three columns of offsets and data, three of numbers."""
    padded = [-(-size // 8) * 8 for size in (tokens, masks, payloads, 4 * (counts + 1))]
    body: npt.NDArray[np.int64] = padded[0] + padded[1] + padded[2] + 3 * padded[3] + (16 + 3 * 8) * counts
    return body


@cache
def _metadata_bytes(width: int) -> int:
    """What a record-batch message takes beside its buffers."""
    one = np.ones(1, np.int64)
    message = encode_batch([Record(bytes(16), np.zeros(1, np.int32), None, b"x", 0)], SCHEMAS[width])
    return int(message.size - _body_bytes(one, width * one, 0 * one, one)[0])


def rewrite(path: Path, spans: Spans, manifest: dict[str, Any], *, drop_unreadable: bool = False) -> int:
    """Put the records of these spans into a new shard, as old as the one whose place it takes; how many were damaged.

    Those are left out. Raises UnreadableRecord, and leaves everything as it was, where the disk fails to read one,
    unless drop_unreadable counts it as damaged; OSError where there is no room.
    """
    writer_id, milliseconds = origin(path)
    file, damaged = ShardFile(str(path), token_width(manifest)), 0
    new = OpenShard.create(path.parent, writer_id, manifest, milliseconds=milliseconds)
    try:
        for start, stop in _ranges(spans, token_width(manifest), BATCH_BYTES):
            records = list(_read(file, spans[start:stop], drop_unreadable))
            damaged += stop - start - len(records)
            if records:
                new.append(encode_batch(records, new.schema))
        new.seal()
    except (OSError, UnreadableRecord):
        discard(new)
        raise
    remove(path)
    return damaged


def rewrite_within(path: Path, fd: int, spans: Spans, manifest: dict[str, Any], batch_bytes: int) -> int:
    """As `rewrite`, on a full disk: what is dropped or copied is cut out of the old shard as it goes.

    fd: of the old shard, open for writing and locked. Meanwhile that is an open shard that nobody writes: whenever this
    is killed, each record is in the old shard or in the new one, and the next writer recovers both. Raises CacheError
    where the file system cannot free parts of a file or the shard is damaged, OSError where there is no room even so;
    what was copied by then stays.
    """
    width = token_width(manifest)
    cut = _Cut(path, fd, spans, width)
    _punch(fd, os.fstat(fd).st_size, DISK_BLOCK)  # beyond the end: finds out whether that is possible
    file, damaged = ShardFile(str(path), width), 0
    writer_id, milliseconds = origin(path)
    path = _as_open(path)
    cut.before(0)
    new = OpenShard.create(path.parent, writer_id, manifest, milliseconds=milliseconds)
    try:
        ranges = _ranges(spans, width, batch_bytes)
        while ranges:
            start, stop = ranges.pop(0)
            records = list(_read(file, spans[start:stop], drop_unreadable=False))
            damaged += stop - start - len(records)
            try:
                if records:
                    new.append(encode_batch(records, new.schema), fsync=True)
            except OSError as error:
                if error.errno not in NO_SPACE or stop - start == 1:
                    raise
                middle = (start + stop) // 2
                ranges[:0] = [(start, middle), (middle, stop)]
                continue
            cut.before(stop)
        path.unlink()
        new.seal()
    except BaseException:
        new.abandon()
        raise
    return damaged


class _Cut:
    """Frees a shard's bytes from its first batch on, up to a record that is still needed."""

    def __init__(self, path: Path, fd: int, spans: Spans, width: int) -> None:
        """spans: of the records that are needed. CacheError where the shard's batches do not hold all of them."""
        self._fd, self._spans = fd, spans
        self._messages: list[Message] = list(scan(path, width))
        batch_of = {span.tobytes(): number for number, one in enumerate(self._messages) for span in one.spans}
        batches = [batch_of.get(span.tobytes(), -1) for span in spans]
        if min(batches) < 0 or batches != sorted(batches):
            raise CacheError(f"{path.name} is damaged, and not written anew while the disk is full: make some room")
        self._batches = [*batches, len(self._messages)]
        self._start = self._messages[0].start

    def before(self, row: int) -> None:
        """The batches before that of the row-th needed record, and the tokens and payloads before it in its own."""
        batch = self._batches[row]
        end = self._messages[batch].start if batch < len(self._messages) else os.fstat(self._fd).st_size
        _punch(self._fd, self._start, end - self._start)
        self._start = max(self._start, end // DISK_BLOCK * DISK_BLOCK)  # a block that two batches share
        if row < len(self._spans):
            first = self._messages[batch].spans[0]
            for part in ("tokens_start", "payload_start"):
                _punch(self._fd, int(first[part]), int(self._spans[row][part]) - int(first[part]))


def _as_open(path: Path) -> Path:
    """Make a shard an open one again, a millisecond younger: what is copied out of it is older than the rest."""
    if path.suffix != OPEN_SUFFIX:
        opened = path.with_name(path.name + OPEN_SUFFIX)
        path.rename(opened)
        for sidecar in sidecars(path):
            sidecar.unlink(missing_ok=True)
        path = opened
    writer_id, milliseconds = origin(path)
    younger = path.with_name(shard_name(writer_id, milliseconds + 1, uuid.uuid4().hex[:8]) + OPEN_SUFFIX)
    path.rename(younger)
    return younger


def _ranges(spans: Spans, width: int, batch_bytes: int) -> list[tuple[int, int]]:
    starts = _batches(spans, width, batch_bytes)
    return list(zip(starts, [*starts[1:], len(spans)], strict=True))


def _read(file: ShardFile, spans: Spans, drop_unreadable: bool) -> Iterator[Record]:
    """The undamaged records of some spans."""
    for packed in spans:
        span = SPAN.unpack(packed.tobytes())
        try:
            yield unpack_record(span, *file.record(span))
        except CorruptRecord:
            continue
        except OSError as error:
            if not drop_unreadable:
                raise UnreadableRecord(f"record {span[0].hex()} cannot be read: {error}") from error


def sidecars(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".index"), path.with_suffix(".json")


def remove(path: Path) -> None:
    """Remove a shard, before its sidecars: nobody shall find one without its index."""
    for part in (path, *(sidecars(path) if path.suffix != OPEN_SUFFIX else ())):
        part.unlink(missing_ok=True)


def discard(shard: OpenShard) -> None:
    """Remove a shard that was begun in vain."""
    shard.path.unlink(missing_ok=True)
    for sidecar in sidecars(shard.path.with_suffix("")):
        sidecar.unlink(missing_ok=True)
    shard.abandon()


def lock(path: Path) -> int:
    """A descriptor of a shard for writing, locked like a writer's own."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _punch(fd: int, start: int, size: int) -> None:
    """Free the whole blocks of a range, which reads as zeros then."""
    if size <= 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, KEEP_SIZE_PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        raise CacheError(
            f"the disk is full, and its file system cannot free parts of a file ({os.strerror(number)}): make some room"
        )
