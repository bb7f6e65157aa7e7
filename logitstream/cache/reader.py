"""Random access to a cache directory by key: about 20 bytes of RAM a record, no Arrow on the way."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream import metrics
from logitstream.cache.index import KeyIndex
from logitstream.cache.manifest import manifest_fingerprint, read_id_model, read_manifest
from logitstream.cache.shard import SPAN, Record, read_record, unpack_record
from logitstream.cache.snapshot import OPEN_PLACE, Snapshot, index_position, survey
from logitstream.errors import CacheMiss, CorruptRecord
from logitstream.types import Fingerprint

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 128
Parts = tuple[tuple[Any, ...], bytes, bytes, bytes]
"""A record's span (SPAN's fields in order), token bytes, mask bytes and payload."""


class CacheReader:
    """Reads what writers have sealed and flushed; safe from several threads and over a fork.

    Every record is checked against its checksum before it is used. Raises CacheError where the directory is no cache or
    its manifest is damaged, FingerprintMismatch where it holds other targets than `fingerprint` (None: whatever it
    holds). Damaged records are counted (`cache_corrupt_total`), listed in `damaged` and passed for missing.
    """

    def __init__(self, directory: str | Path, fingerprint: Fingerprint | None = None) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory, fingerprint)
        self.fingerprint = manifest_fingerprint(self.manifest, self.directory)
        self.id_model = read_id_model(self.directory, self.fingerprint)
        self.damaged: set[bytes] = set()
        self._warned = False
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._now = Snapshot()
        self._order: tuple[Snapshot, KeyIndex, npt.NDArray[np.uint32] | None] | None = None
        self.refresh()

    def __reduce__(self) -> tuple[type[CacheReader], tuple[Path, Fingerprint]]:
        return CacheReader, (self.directory, self.fingerprint)

    def refresh(self) -> None:
        """Find what was written since; cheap where nothing was."""
        with self._lock:
            self._now = survey(self.directory, self.manifest, self._now)

    def get(self, key: bytes) -> bytes | None:
        """The encoded targets of a key, or None where the cache does not hold them undamaged."""
        found = self._first_whole(key)
        (metrics.CACHE_MISSES if found is None else metrics.CACHE_HITS).inc()
        return None if found is None else found[3]

    def get_record(self, key: bytes) -> Record:
        """The whole record of a key; CacheMiss where it is not there, CorruptRecord where every copy is damaged."""
        found = self._first_whole(key)
        if found is not None:
            return unpack_record(*found)
        if key in self.damaged:
            raise CorruptRecord(f"{self.directory}: every copy of record {key.hex()} is damaged")
        raise CacheMiss(f"{self.directory} holds no record {key.hex()}")

    def __contains__(self, key: bytes) -> bool:
        return bool(self._now.places(key))

    def __len__(self) -> int:
        """Distinct keys as of the last refresh."""
        index, firsts = self._ordered()
        return len(index.high) if firsts is None else len(firsts)

    @property
    def num_records(self) -> int:
        """Records as of the last refresh, repeated keys and damaged ones included."""
        return self._now.num_sealed + self._now.num_open

    def key(self, i: int) -> bytes:
        """The i-th key in rising order: it depends on the content alone, not on who wrote it when."""
        index, firsts = self._ordered()
        return index.key(i if firsts is None else int(firsts[i]))

    def record(self, i: int) -> Record:
        """The record of the i-th key; CorruptRecord where every copy of it is damaged."""
        return self.get_record(self.key(i))

    def draw_sets(self) -> npt.NDArray[np.uint64]:
        """uint64 [len(self)]: the draw set of each key's record."""
        now, (index, firsts) = self._now, self._ordered()
        by_place = now.draw_sets()
        places = (index.place if firsts is None else index.place[firsts]).astype(np.int64)
        return by_place[np.where(places < OPEN_PLACE, places, places - OPEN_PLACE + now.num_sealed)]

    def records(self) -> Iterator[Record]:
        """Every copy of every undamaged record, shard by shard in the order of writing."""
        now = self._now
        for place in (*range(now.num_sealed), *range(OPEN_PLACE, OPEN_PLACE + now.num_open)):
            found = self._load(now, place)
            if found is not None:
                yield unpack_record(*found)

    def close(self) -> None:
        """Let go of the files; the reader may be used on."""
        with self._lock:
            self._files.clear()

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ordered(self) -> tuple[KeyIndex, npt.NDArray[np.uint32] | None]:
        now, order = self._now, self._order
        if order is None or order[0] is not now:
            index = now.all_keys()
            order = self._order = (now, index, index.first_of_each())
        return order[1:]

    def _first_whole(self, key: bytes) -> Parts | None:
        now = self._now
        for place in now.places(key):
            found = self._load(now, place, key)
            if found is not None:
                return found
        return None

    def _load(self, now: Snapshot, place: int, key: bytes | None = None) -> Parts | None:
        """A place's record, or None where it is damaged, another key's or in a shard that was pruned."""
        path: Path | None = None
        try:
            path, span = self._span(now, place)
            if key is not None and span[0] != key:
                raise CorruptRecord(f"the index names {span[0].hex()} where it named {key.hex()} before")
            return (span, *read_record(self._file(path).fd, span))
        except FileNotFoundError:
            return None
        except (CorruptRecord, OSError) as error:
            if not self._warned:
                self._warned = True
                logger.warning("%s: %s; damaged records pass for missing", path or self.directory, error)
            metrics.CACHE_CORRUPT.inc()
            if key is not None:
                self.damaged.add(key)
            return None

    def _span(self, now: Snapshot, place: int) -> tuple[Path, tuple[Any, ...]]:
        if place >= OPEN_PLACE:
            return now.open_rows[place - OPEN_PLACE]
        path, row = now.shard_of(place)
        if path in now.rebuilt:
            return path, SPAN.unpack(now.rebuilt[path][row].tobytes())
        content = os.pread(self._file(path.with_suffix(".index")).fd, SPAN.size, index_position(row))
        if len(content) != SPAN.size:
            raise CorruptRecord(f"the index of {path} is cut off")
        return path, SPAN.unpack(content)

    def _file(self, path: Path) -> _File:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path)
                while len(self._files) > MAX_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return file


class _File:
    """A file open for reading, closed once nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
