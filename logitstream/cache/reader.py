"""Random access to a cache directory by key: about 20 bytes of RAM a record, no Arrow on the way."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream import metrics
from logitstream.cache.index import KeyIndex
from logitstream.cache.manifest import manifest_fingerprint, read_id_model, read_manifest
from logitstream.cache.open_shard import OPEN_SUFFIX
from logitstream.cache.remote import Mirror, is_remote, local_path
from logitstream.cache.shard import Record, Spans, token_width, unpack_record
from logitstream.cache.shard_file import Row, ShardFile, Span, payloads, read_spans
from logitstream.cache.snapshot import OPEN_PLACE, Snapshot, index_path, survey
from logitstream.errors import CacheError, CacheMiss, CorruptRecord
from logitstream.types import Fingerprint

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128
LOOKED_UP_AT_ONCE = 128
Parts = tuple[Span, bytes, bytes, bytes]
"""A record's span, token bytes, mask bytes and payload."""
NOTHING = (None, None, None, None)


class CacheReader:
    """Reads what writers have sealed and flushed; safe from several threads and over a fork.

    Every record is checked against its checksum before it is used. Raises CacheError where the directory is no cache or
    its manifest is damaged, FingerprintMismatch where it holds other targets than `fingerprint` (None: whatever it
    holds). Damaged records are counted (`cache_corrupt_total`), listed in `damaged` and passed for missing.

    directory: a folder, or an fsspec URL: then shards are fetched into the folder `staging` when they are first read,
    each while the one before it is being read.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: Fingerprint | None = None,
        *,
        staging: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.source = directory
        self._arguments = (directory, staging, storage_options)
        self._mirror: Mirror | None = None
        self.directory = local_path(directory)
        if is_remote(directory):
            self._mirror = Mirror(str(directory), staging=staging, storage_options=storage_options)
            try:
                self._mirror.pull_head()
            except OSError as error:
                raise CacheError(f"{directory} cannot be reached: {error}") from error
            self.directory = self._mirror.staging
        self.manifest = read_manifest(self.directory, fingerprint)
        self.fingerprint = manifest_fingerprint(self.manifest, self.directory)
        self._width = token_width(self.manifest)
        self.id_model = read_id_model(self.directory, self.fingerprint)
        self.damaged: set[bytes] = set()
        self._warned = False
        self._files: dict[str, ShardFile] = {}
        self._lock = threading.Lock()
        self._now = Snapshot()
        self._later: Snapshot | None = None
        self._view: dict[str, Any] | None = None
        self._order: tuple[Snapshot, KeyIndex, npt.NDArray[np.uint32] | None] | None = None
        self.refresh()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _reopen, (*self._arguments, self.fingerprint, self._view)

    def refresh(self) -> None:
        """Find what was written since; cheap where nothing was."""
        with self._lock:
            self._now, self._later = self._survey(), None

    def _survey(self) -> Snapshot:
        remote = None
        if self._mirror is not None:
            self._mirror.list_again()
            remote = self._mirror.shards()
        return survey(self.directory, self.manifest, self._later or self._now, remote=remote)

    def get(self, key: bytes) -> bytes | None:
        """The encoded targets of a key, or None where the cache does not hold them undamaged."""
        found = self._first_whole(self._now, key)
        (metrics.CACHE_MISSES if found is None else metrics.CACHE_HITS).inc()
        return None if found is None else found[3]

    def get_many(self, keys: Sequence[bytes]) -> Iterator[bytes | None]:
        """As `get` for each key in turn, read as they are taken; the more keys the faster, up to LOOKED_UP_AT_ONCE."""
        now = self._now
        for start in range(0, len(keys), LOOKED_UP_AT_ONCE):
            some, hits, misses = keys[start : start + LOOKED_UP_AT_ONCE], 0, 0
            try:
                for key, payload in zip(some, payloads(some, self._locate(now, some)), strict=True):
                    if payload is None:  # another copy may be whole; else it is missing, or its damage is counted
                        payload = (self._first_whole(now, key) or NOTHING)[3]
                    hits, misses = (hits, misses + 1) if payload is None else (hits + 1, misses)
                    if hits + misses == len(some):  # before the last one is taken: nobody may ask for more
                        hits, misses = _count(hits, misses)
                    yield payload
            finally:
                _count(hits, misses)

    def _locate(self, now: Snapshot, keys: Sequence[bytes]) -> list[tuple[ShardFile, Span] | None]:
        """File and span of each key's first record; None where they cannot be had all at once.

        While records are read, what look-ups need would leave the processor's caches again and again.
        """
        try:
            rows = now.rows_of(keys)
            if self._mirror is not None and not all(path in self._files for path, _ in rows):
                return [None] * len(keys)  # each shard is fetched when its first record's turn comes
            files = [self._files.get(path) or self._open(now, path) for path, _ in rows]
            return list(zip(files, read_spans(files, [row for _, row in rows]), strict=True))
        except (KeyError, CorruptRecord, OSError):  # not there, damaged or pruned
            return [None] * len(keys)

    def get_record(self, key: bytes) -> Record:
        """The whole record of a key; CacheMiss where it is not there, CorruptRecord where every copy is damaged."""
        found = self._first_whole(self._now, key)
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
        for _ in range(5):
            now, (index, firsts) = self._now, self._ordered()
            try:
                return now.draw_sets()[_numbers(now, index.place if firsts is None else index.place[firsts])]
            except FileNotFoundError as error:  # pruned
                problem = error
            self.refresh()
        raise CacheError(f"{self.directory}: shards kept disappearing while they were read: {problem}")

    def view(self) -> dict[str, Any]:
        """What is readable as of the last refresh, for `keep_to`: records of each shard, and the keys' digest."""
        return self._view or {"records": self._now.num_records(), "digest": _keys_digest(*self._ordered())}

    def keep_to(self, view: dict[str, Any]) -> None:
        """Be as long, and in the order, of what a reader of this cache saw then, whatever was written since.

        Single keys and `records` are found as before. Raises CacheError, now or after a `refresh`, where some of those
        keys are not there any more.
        """
        self._view, self._order = view, None
        self._ordered()

    def records(self) -> Iterator[Record]:
        """Every copy of every undamaged record, shard by shard in the order of writing.

        Of a shard that was pruned meanwhile what is left, each key once.
        """
        return chain.from_iterable(map(self.records_of, self.shards()))

    def shards(self) -> list[str]:
        """Paths of the shards as of the last refresh, sealed ones first."""
        return [*self._now.shards, *dict(self._now.open_spans())]

    def records_of(self, shard: str) -> Iterator[Record]:
        """As `records`, of one shard."""
        now = self._now
        if shard in now.shards:
            return self._sealed_records(now, now.shards.index(shard))
        return chain.from_iterable(
            self._records(now, shard, spans) for path, spans in now.open_spans() if path == shard
        )

    def _sealed_records(self, now: Snapshot, number: int) -> Iterator[Record]:
        try:
            spans = now.sealed_spans(number)
        except FileNotFoundError:
            return self._moved(now.keys_of(number))
        except OSError as error:
            self._note(now.shards[number], error)
            return iter(())
        return self._records(now, now.shards[number], spans)

    def _records(self, now: Snapshot, path: str, spans: Spans) -> Iterator[Record]:
        try:
            file = self._files.get(path) or self._open(now, path)
        except FileNotFoundError:
            return self._moved(spans["key"].tolist())
        except OSError as error:
            self._note(path, error)
            return iter(())
        if self._mirror is not None:
            return self._staged_records(now, path, spans, file)
        return file.records(spans, partial(self._note_row, path, spans))

    def _staged_records(self, now: Snapshot, path: str, spans: Spans, file: ShardFile) -> Iterator[Record]:
        """As ShardFile.records; those that are damaged here are read again from the store's copy, last."""
        bad: list[int] = []
        yield from file.records(spans, bad.append)
        spans = spans[bad]
        if bad and self._fetched_again(path):
            yield from self._open(now, path).records(spans, partial(self._note_row, path, spans))
            return
        for row in range(len(bad)):
            self._note_row(path, spans, row)

    def _moved(self, keys: Sequence[bytes]) -> Iterator[Record]:
        """The records of a shard that is gone, as far as they lie elsewhere."""
        for key in dict.fromkeys(keys):
            found = self._look_again(key)
            if found is not None:
                yield unpack_record(*found)

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

    def _ordered(self) -> tuple[KeyIndex, npt.NDArray[np.uint32] | None]:
        """Keys in rising order, and the positions of those that count; None: all of them."""
        now, order = self._now, self._order
        if order is None or order[0] is not now:
            index = now.all_keys()
            firsts = index.first_of_each()
            if self._view is not None and _keys_digest(index, firsts) != self._view["digest"]:
                firsts = _viewed(now, index, firsts, self._view["records"])
                if _keys_digest(index, firsts) != self._view["digest"]:
                    raise CacheError(
                        f"{self.directory} does not hold the sequences any more that were found in it before: "
                        f"expected {sum(self._view['records'].values())} records (keys of SHA-256 "
                        f"{self._view['digest'][:16]}), {len(firsts)} keys of them are left: it was pruned, or damaged"
                    )
            order = self._order = (now, index, firsts)
        return order[1:]

    def _first_whole(self, now: Snapshot, key: bytes) -> Parts | None:
        """The first of a key's records that is not damaged."""
        found, is_gone = self._search(now, key)
        return self._look_again(key) if found is None and is_gone else found

    def _look_again(self, key: bytes) -> Parts | None:
        """As `_first_whole`, in what is there now: a shard has been pruned since the last refresh.

        The order of the keys stays as of then.
        """
        later = self._later
        if later is not None:
            found, is_gone = self._search(later, key)
            if not is_gone:
                return found
        with self._lock:
            later = self._later = self._survey()
        return self._search(later, key)[0]

    def _search(self, now: Snapshot, key: bytes) -> tuple[Parts | None, bool]:
        """The first undamaged record of a key, and whether a shard that held one is gone."""
        is_gone = False
        for place in now.places(key):
            path, row = now.row_of(place)
            try:
                try:
                    return self._read(now, path, row, key), False
                except CorruptRecord:
                    if not self._fetched_again(path):
                        raise
                    return self._read(now, path, row, key), False
            except FileNotFoundError:
                is_gone = True
            except CorruptRecord as error:
                if Path(path).exists():
                    self._note(path, error, key)
                else:  # a prune is writing it anew in its own place
                    is_gone = True
            except OSError as error:
                with self._lock:  # opened anew next time: a handle may be stale where the file is not
                    self._files.pop(path, None)
                self._note(path, error, key)
        return None, is_gone

    def _read(self, now: Snapshot, path: str, row: Row, key: bytes) -> Parts:
        file = self._files.get(path) or self._open(now, path)
        span = file.span(row)
        if span[0] != key:
            raise CorruptRecord(f"the index names {span[0].hex()} where it named {key.hex()} before")
        return (span, *file.record(span))

    def _fetched_again(self, path: str) -> bool:
        """Whether a staged shard that is damaged was replaced by the store's."""
        try:
            if self._mirror is None or path.endswith(OPEN_SUFFIX) or not self._mirror.fetch_again(Path(path)):
                return False
        except OSError:
            return False
        with self._lock:
            self._files.pop(path, None)
        return True

    def _note_row(self, path: str, spans: Spans, row: int) -> None:
        key = spans["key"][row].tobytes()
        self._note(path, f"record {key.hex()} does not match its checksum", key)

    def _note(self, path: str, problem: object, key: bytes | None = None) -> None:
        """Count a damaged record; the first one is logged."""
        if not self._warned:
            self._warned = True
            logger.warning("%s: %s; damaged records pass for missing", path, problem)
        metrics.CACHE_CORRUPT.inc()
        if key is not None:
            self.damaged.add(key)

    def _open(self, now: Snapshot, path: str) -> ShardFile:
        if self._mirror is not None and not path.endswith(OPEN_SUFFIX):
            following = now.shards.index(path) + 1
            self._mirror.fetch(Path(path), ahead=Path(now.shards[following]) if following < len(now.shards) else None)
        with self._lock:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.clear()
            file = self._files[path] = _open_file(path, self._width, now.rebuilt.get(path))
            return file


def _open_file(path: str, width: int, rebuilt: Spans | None) -> ShardFile:
    if not path.endswith(OPEN_SUFFIX):
        return ShardFile(path, width, index=index_path(path), spans=rebuilt)
    try:
        return ShardFile(path, width)
    except FileNotFoundError:  # sealed since it was found: the same bytes
        return ShardFile(path.removesuffix(OPEN_SUFFIX), width)


def _keys_digest(index: KeyIndex, firsts: npt.NDArray[np.uint32] | None) -> str:
    digest = hashlib.sha256()
    for half in (index.high, index.low):
        digest.update(np.ascontiguousarray(half if firsts is None else half[firsts]).data)
    return digest.hexdigest()


def _numbers(now: Snapshot, places: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Where places lie among all sealed records, then all open ones."""
    numbers = places.astype(np.int64)
    return np.where(numbers < OPEN_PLACE, numbers, numbers - OPEN_PLACE + now.num_sealed)


def _viewed(
    now: Snapshot, index: KeyIndex, firsts: npt.NDArray[np.uint32] | None, num_records: dict[str, int]
) -> npt.NDArray[np.uint32]:
    """Positions of the keys of which a record is among each shard's first `num_records`."""
    viewed = now.among(num_records)[_numbers(now, index.place)]
    if firsts is None:
        return np.flatnonzero(viewed).astype(np.uint32)
    return firsts[np.logical_or.reduceat(viewed, firsts)] if len(firsts) else firsts


def _count(hits: int, misses: int) -> tuple[int, int]:
    """Add to the metrics; what is left to add."""
    if hits:
        metrics.CACHE_HITS.inc(hits)
    if misses:
        metrics.CACHE_MISSES.inc(misses)
    return 0, 0


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
