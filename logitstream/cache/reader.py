"""Looking up records by key, by number or in order, while others write, seal and prune the shards."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream import metrics
from logitstream.cache.index import HALVES, Keys, Shard, Snapshot, index_path, survey
from logitstream.cache.manifest import read_id_model, read_manifest
from logitstream.cache.remote import Mirror, is_remote, local_path
from logitstream.cache.shard import SPAN, Record, Stored, open_shard_file, read_stored, token_dtype
from logitstream.errors import CacheError, CacheMiss, CorruptRecord
from logitstream.types import Fingerprint

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128
PRUNES = 3
"""How often a record is looked for anew because a prune has moved it."""


class CacheReader:
    """Reads what writers have flushed; its methods may be called from any thread and in forked processes.

    Every record is checked against its checksum before it is used. Raises CacheError if the directory is no cache or
    its manifest is damaged, FingerprintMismatch if it holds other targets than `fingerprint` (None: whatever it holds).
    Damaged records are counted (`cache_corrupt_total`), listed in `damaged` and pass for missing.

    directory: a folder or an fsspec URL: then a shard is fetched to the folder `staging` when it is first read.
    More attributes than 12 because single keys and the keys' order follow the writers each at its own time.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: Fingerprint | None = None,
        *,
        staging: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
        view: dict[str, Any] | None = None,
    ) -> None:
        """view: as `keep_to` takes it."""
        self.source, self.directory = directory, local_path(directory)
        self._mirror: Mirror | None = None
        if is_remote(directory):
            self._mirror = Mirror(str(directory), staging=staging, storage_options=storage_options)
            self.directory = self._mirror.staging
            try:
                self._mirror.pull_head()
            except OSError as error:
                raise CacheError(f"{directory} cannot be reached: {error}") from error
        self.manifest = read_manifest(self.directory, fingerprint)
        self.id_model = read_id_model(self.directory, self.fingerprint)
        self.damaged: set[bytes] = set()
        options: Any = {"staging": staging, "storage_options": storage_options}
        self._reopened = partial(CacheReader, directory, self.fingerprint, **options)
        self._open = lru_cache(MAX_OPEN_SHARDS)(partial(_ShardFile, self._mirror))
        self._lock = threading.Lock()
        self._now = self._latest = Snapshot()
        self._order: tuple[Snapshot, Keys] | None = None
        self._view = view
        self.refresh()
        self._ordered()

    @property
    def fingerprint(self) -> Fingerprint:
        return self.manifest.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(self._reopened, view=self._view), ()

    def refresh(self) -> None:
        """Find what was written since; cheap if nothing was."""
        self._now = self._look()

    def _look(self) -> Snapshot:
        """Find where the records lie now. The order of the keys stays."""
        with self._lock:
            if self._mirror is not None:
                self._mirror.list_again()
            remote = self._mirror.shards() if self._mirror is not None else {}
            self._latest = survey(self.directory, self.manifest, self._latest, remote)
            return self._latest

    def get(self, key: bytes) -> bytes | None:
        """Return the encoded targets of a key; None if the cache does not hold them undamaged."""
        found = self._find(key)
        (metrics.CACHE_MISSES if found is None else metrics.CACHE_HITS).inc()
        return None if found is None else found.payload

    def get_record(self, key: bytes) -> Record:
        """Return the whole record of a key; CacheMiss if it is not there, CorruptRecord if every copy is damaged."""
        if (found := self._find(key)) is not None:
            return found.record(token_dtype(self.fingerprint.vocab_size))
        if key in self.damaged:
            raise CorruptRecord(f"{self.directory}: every copy of record {key.hex()} is damaged")
        raise CacheMiss(f"{self.directory} holds no record {key.hex()}")

    def __contains__(self, key: bytes) -> bool:
        return bool(self._latest.places(key))

    def __len__(self) -> int:
        """Return the number of distinct keys as of the last refresh."""
        return len(self._ordered()[0])

    @property
    def num_records(self) -> int:
        """Records as of the last refresh, repeated keys and damaged ones included."""
        return len(self._now.keys[0]) + len(self._now.recent[0])

    def key(self, i: int) -> bytes:
        """Return the i-th key in rising order, which depends on the content alone, not on who wrote it when."""
        return HALVES.pack(*self._ordered()[:2, i].tolist())

    def record(self, i: int) -> Record:
        """Return the record of the i-th key, as get_record does."""
        return self.get_record(self.key(i))

    def records(self) -> Iterator[Record]:
        """Yield an undamaged record of each key, in the order of writing."""
        keys = self._now.distinct()
        for position in np.argsort(keys[2]).tolist():
            with contextlib.suppress(CorruptRecord, CacheMiss):
                yield self.get_record(HALVES.pack(*keys[:2, position].tolist()))

    def draw_sets(self) -> npt.NDArray[np.uint64]:
        """Return the draw set of each key's record, in the order of the keys."""
        draw_sets: npt.NDArray[np.uint64] = self._ordered()[3]
        return draw_sets

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards as of the last refresh."""
        return self._now.shards

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
        self._open.cache_clear()
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ordered(self) -> Keys:
        """Return each key once, in rising order, as of the last refresh or as `keep_to` says."""
        now, order = self._now, self._order
        if order is None or order[0] is not now:
            keys, view = now.distinct(), self._view
            if view is not None and _digest(keys) != view["digest"]:
                keys = now.distinct(view["records"])
                if _digest(keys) != view["digest"]:
                    raise CacheError(
                        f"{self.directory} does not hold the sequences any more that were found in it before: expected "
                        f"keys of SHA-256 {view['digest'][:16]}, {keys.shape[1]} are left: it was pruned, or damaged"
                    )
            order = self._order = (now, keys)
        return order[1]

    def _find(self, key: bytes) -> Stored | None:
        """Read the first undamaged record of a key, wherever it lies by now."""
        for _ in range(PRUNES):
            now, is_gone = self._latest, False
            for place in now.places(key):
                shard, offset = now.shards[place >> 32], place & 0xFFFFFFFF
                try:
                    return self._read(shard, offset, key)
                except FileNotFoundError:
                    is_gone = True
                except (CorruptRecord, OSError) as error:
                    self._open.cache_clear()  # a handle may be stale although the file is not
                    if not self.damaged:
                        logger.warning("%s: %s; damaged records pass for missing", shard.path, error)
                    metrics.CACHE_CORRUPT.inc()
                    self.damaged.add(key)
            if not is_gone:
                return None
            self._look()
        return None

    def _read(self, shard: Shard, offset: int, key: bytes) -> Stored:
        try:
            return self._open(shard.path, shard.rebuilt).read(offset, key)
        except CorruptRecord:
            if self._mirror is None or not self._mirror.fetch(shard.path, again=True):
                raise
            self._open.cache_clear()
            return self._open(shard.path, shard.rebuilt).read(offset, key)


class _ShardFile:
    """A shard and its index, open for reading; closed when it is freed."""

    def __init__(self, mirror: Mirror | None, path: Path, rebuilt: bytes) -> None:
        """rebuilt: the index, if the file is damaged."""
        self._rebuilt, self._fd, self._index_fd = rebuilt, -1, -1
        if mirror is not None:
            mirror.fetch(path)
        self._fd = open_shard_file(path)
        if not rebuilt:
            self._index_fd = os.open(index_path(path), os.O_RDONLY)

    def __del__(self) -> None:
        for fd in (self._fd, self._index_fd):
            if fd >= 0:
                os.close(fd)

    def read(self, offset: int, key: bytes) -> Stored:
        """Read the record of a key, whose span lies at an offset of the index.

        Raises CorruptRecord if it is damaged, OSError if it cannot be read.
        """
        span = self._rebuilt[offset : offset + SPAN.size] or os.pread(self._index_fd, SPAN.size, offset)
        if len(span) != SPAN.size or not span.startswith(key):
            raise CorruptRecord(f"the index is damaged at byte {offset}")
        return read_stored(self._fd, span)


def _digest(keys: Keys) -> str:
    return hashlib.sha256(keys[:2].tobytes()).hexdigest()
