"""Looking up records by key, by number or in order, while others write, seal and prune the shards."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream import metrics
from logitstream.cache.index import KeyIndex, index_path
from logitstream.cache.manifest import file_bytes, read_id_model, read_manifest
from logitstream.cache.remote import Mirror, is_remote, local_path
from logitstream.cache.shard import OPEN_SUFFIX, SPAN, Parts, Record, Span, read_parts, token_dtype, unpack_record
from logitstream.cache.snapshot import Shard, Snapshot, survey
from logitstream.errors import CacheError, CacheMiss, CorruptRecord
from logitstream.types import Fingerprint

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128


class CacheReader:
    """Reads what writers have flushed; its methods may be called from any thread and in forked processes.

    Every record is checked against its checksum before it is used. Raises CacheError if the directory is no cache or
    its manifest is damaged, FingerprintMismatch if it holds other targets than `fingerprint` (None: whatever it holds).
    Damaged records are counted (`cache_corrupt_total`), listed in `damaged` and pass for missing.

    directory: a folder or an fsspec URL: then a shard is fetched to the folder `staging` when it is first read, while
    the one before it is being read.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: Fingerprint | None = None,
        *,
        staging: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.directory = local_path(directory)
        self._mirror: Mirror | None = None
        if is_remote(directory):
            self._mirror = Mirror(str(directory), staging=staging, storage_options=storage_options)
            try:
                self._mirror.pull_head()
            except OSError as error:
                raise CacheError(f"{directory} cannot be reached: {error}") from error
            self.directory = self._mirror.staging
        self.manifest = read_manifest(self.directory, fingerprint)
        self.id_model = read_id_model(self.directory, self.fingerprint)
        self.damaged: set[bytes] = set()
        self._reopen = partial(_reopen, directory, staging, storage_options)
        self._files: dict[Path, ShardFile] = {}
        self._lock = threading.Lock()
        self._now = Snapshot()
        self._later: Snapshot | None = None
        self._order: tuple[Snapshot, KeyIndex] | None = None
        self._view: dict[str, Any] | None = None
        self.refresh()

    @property
    def source(self) -> str | Path:
        """The directory as it was given: a folder or a URL."""
        return self._mirror.url if self._mirror is not None else self.directory

    @property
    def fingerprint(self) -> Fingerprint:
        return self.manifest.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, (self.fingerprint, self._view)

    def refresh(self) -> None:
        """Find what was written since; cheap if nothing was."""
        with self._lock:
            self._now, self._later = self._survey(), None

    def _survey(self) -> Snapshot:
        if self._mirror is not None:
            self._mirror.list_again()
        remote = self._mirror.shards() if self._mirror is not None else None
        return survey(self.directory, self.manifest, self._later or self._now, remote=remote)

    def get(self, key: bytes) -> bytes | None:
        """Return the encoded targets of a key; None if the cache does not hold them undamaged."""
        found = self._find(key)
        (metrics.CACHE_MISSES if found is None else metrics.CACHE_HITS).inc()
        return None if found is None else found[1].payload

    def get_record(self, key: bytes) -> Record:
        """Return the whole record of a key; CacheMiss if it is not there, CorruptRecord if every copy is damaged."""
        if (found := self._find(key)) is not None:
            return unpack_record(*found, token_dtype(self.fingerprint.vocab_size))
        if key in self.damaged:
            raise CorruptRecord(f"{self.directory}: every copy of record {key.hex()} is damaged")
        raise CacheMiss(f"{self.directory} holds no record {key.hex()}")

    def __contains__(self, key: bytes) -> bool:
        return bool(self._now.places(key))

    def __len__(self) -> int:
        """Return the number of distinct keys as of the last refresh."""
        return len(self._ordered())

    @property
    def num_records(self) -> int:
        """Records as of the last refresh, repeated keys and damaged ones included."""
        return len(self._now.keys) + len(self._now.recent)

    def key(self, i: int) -> bytes:
        """Return the i-th key in rising order, which depends on the content alone, not on who wrote it when."""
        return self._ordered().key(i)

    def record(self, i: int) -> Record:
        """Return the record of the i-th key, as get_record does."""
        return self.get_record(self.key(i))

    def records(self) -> Iterator[Record]:
        """Yield an undamaged record of each key, in the order of writing."""
        index = self._now.ordered()
        for position in np.argsort(index.place):
            try:
                yield self.get_record(index.key(int(position)))
            except (CorruptRecord, CacheMiss):
                continue

    def draw_sets(self) -> npt.NDArray[np.uint64]:
        """Return the draw set of each key's record, in the order of the keys."""
        for _ in range(5):
            try:
                return self._now.draw_sets(self._ordered())
            except FileNotFoundError as error:  # pruned
                problem = error
            self.refresh()
        raise CacheError(f"{self.directory}: shards kept disappearing while they were read: {problem}")

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards as of the last refresh."""
        return self._now.shards

    def file_sizes(self) -> dict[str, int]:
        """Return the names and sizes of the cache's files, in a store of those that are there."""
        if self._mirror is not None:
            return self._mirror.sizes
        return {path.name: file_bytes(path) for path in self.directory.iterdir()}

    def view(self) -> dict[str, Any]:
        """Return what is readable as of the last refresh, for `keep_to`: the shards' ends and the keys' digest."""
        ends = {shard.path.name: shard.end for shard in self._now.shards}
        return self._view or {"records": ends, "digest": _digest(self._ordered())}

    def keep_to(self, view: dict[str, Any]) -> None:
        """Have the length and the order of what a reader of this cache saw then, whatever was written since.

        Single keys are found as before. Raises CacheError, now or after a `refresh`, if some of the keys are gone.
        """
        self._view, self._order = view, None
        self._ordered()

    def close(self) -> None:
        """Let go of the files; a local reader may be used on."""
        with self._lock:
            self._files.clear()
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ordered(self) -> KeyIndex:
        """Return each key once, in rising order, as of the last refresh or as `keep_to` says."""
        now, order = self._now, self._order
        if order is None or order[0] is not now:
            index = now.ordered()
            if self._view is not None and _digest(index) != self._view["digest"]:
                index = now.ordered(self._view["records"])
                if _digest(index) != self._view["digest"]:
                    raise CacheError(
                        f"{self.directory} does not hold the sequences any more that were found in it before: expected "
                        f"keys of SHA-256 {self._view['digest'][:16]}, {len(index)} are left: it was pruned, or damaged"
                    )
            order = self._order = (now, index)
        return order[1]

    def _find(self, key: bytes) -> tuple[Span, Parts] | None:
        """Read the first undamaged record of a key, wherever it lies by now."""
        found, is_gone = self._search(self._now, key)
        if found is None and is_gone and self._later is not None:
            found, is_gone = self._search(self._later, key)
        if found is None and is_gone:  # a shard was pruned since the last refresh; the order of the keys stays
            with self._lock:
                self._later = self._survey()
            found, _ = self._search(self._later, key)
        return found

    def _search(self, now: Snapshot, key: bytes) -> tuple[tuple[Span, Parts] | None, bool]:
        """Return the first undamaged record of a key, and whether a shard that held one is gone."""
        is_gone = False
        for place in now.places(key):
            number, offset = place >> 32, place & 0xFFFFFFFF
            shard = now.shards[number]
            try:
                return self._read(now, number, offset, key), False
            except FileNotFoundError:
                is_gone = True
            except (CorruptRecord, OSError) as error:
                self._files.pop(shard.path, None)  # a handle may be stale although the file is not
                if not self.damaged:
                    logger.warning("%s: %s; damaged records pass for missing", shard.path, error)
                metrics.CACHE_CORRUPT.inc()
                self.damaged.add(key)
        return None, is_gone

    def _read(self, now: Snapshot, number: int, offset: int, key: bytes) -> tuple[Span, Parts]:
        shard = now.shards[number]
        try:
            return self._open(now, number).read(offset, key)
        except CorruptRecord:
            if self._mirror is None or not shard.is_sealed or not self._mirror.fetch_again(shard.path):
                raise
            self._files.pop(shard.path, None)
            return self._open(now, number).read(offset, key)

    def _open(self, now: Snapshot, number: int) -> ShardFile:
        shard = now.shards[number]
        if (file := self._files.get(shard.path)) is not None:
            return file
        if self._mirror is not None and shard.is_sealed:
            self._mirror.fetch(*(one.path for one in now.shards[number : number + 2] if one.is_sealed))
        with self._lock:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.clear()
            file = self._files[shard.path] = ShardFile(shard)
            return file


class ShardFile:
    """A shard and its index, open for reading; closed when it is freed."""

    def __init__(self, shard: Shard) -> None:
        self._fd = self._index_fd = -1
        self._scanned = shard.content() if shard.scanned is not None else None
        try:
            self._fd = os.open(shard.path if shard.is_sealed else f"{shard.path}{OPEN_SUFFIX}", os.O_RDONLY)
        except FileNotFoundError:  # an open shard may be sealed by now: the same bytes
            self._fd = os.open(shard.path, os.O_RDONLY)
        if self._scanned is None:
            self._index_fd = os.open(index_path(shard.path), os.O_RDONLY)

    def __del__(self) -> None:
        for fd in (self._fd, self._index_fd):
            if fd >= 0:
                os.close(fd)

    def read(self, offset: int, key: bytes) -> tuple[Span, Parts]:
        """Read the record of a key, whose span lies at an offset of the index.

        Raises CorruptRecord if it is damaged, OSError if it cannot be read.
        """
        if self._scanned is not None:
            content = self._scanned[offset : offset + SPAN.size]
        else:
            content = os.pread(self._index_fd, SPAN.size, offset)
        if len(content) != SPAN.size or content[: len(key)] != key:
            raise CorruptRecord(f"the index is damaged at byte {offset}")
        span = Span._make(SPAN.unpack(content))
        return span, read_parts(self._fd, span)


def _digest(index: KeyIndex) -> str:
    return hashlib.sha256(index.high.tobytes() + index.low.tobytes()).hexdigest()


def _reopen(
    directory: str | Path,
    staging: str | Path | None,
    storage_options: dict[str, Any] | None,
    fingerprint: Fingerprint,
    view: dict[str, Any] | None,
) -> CacheReader:
    reader = CacheReader(directory, fingerprint, staging=staging, storage_options=storage_options)
    if view is not None:
        reader.keep_to(view)
    return reader
