"""Making caches smaller: merge several into one, prune one to a size or to newer draw sets."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.cache.manifest import caches_in, read_manifest
from logitstream.cache.open_shard import OPEN_SUFFIX, OpenShard, origin, recover
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import Record, Spans, encode_batch, token_width
from logitstream.cache.shard_file import ShardFile
from logitstream.cache.verify import Damage, check_sealed, missing_shards, other_fingerprint, shard_spans
from logitstream.cache.writer import CacheWriter
from logitstream.errors import CacheError, CorruptRecord

Progress = Callable[[int], object]
"""Told how many records were read since the last call."""
LOCK = ".prune.lock"
RECORDS_PER_BATCH = 64


def merge(sources: Sequence[Path], output: str | Path, progress: Progress = lambda _: None) -> tuple[int, int, int]:
    """Copy each key's first undamaged record into a cache of their common fingerprint.

    Returns how many were written, left out as duplicates and left out as damaged everywhere. `output` may hold records
    already. Raises FingerprintMismatch where the sources differ.
    """
    first = CacheReader(sources[0])
    readers = [first, *(CacheReader(source, first.fingerprint) for source in sources[1:])]
    provenance = {"merged": [{"directory": str(r.directory), **r.manifest["provenance"]} for r in readers]}
    written = damaged = copies = 0
    with CacheWriter(
        output,
        first.fingerprint,
        id_model=first.id_model,
        provenance=provenance,
        writer_id="merge",
        batch_bytes=1 << 20,
    ) as writer:
        before = CacheReader(output)
        for number, reader in enumerate(readers):
            copies += reader.num_records
            for i in range(len(reader)):
                key = reader.key(i)
                progress(1)
                if before.get(key) is not None or any(key in earlier for earlier in readers[:number]):
                    continue
                record = _first_whole(key, readers[number:])
                if record is None:
                    damaged += 1
                    continue
                written += writer.put(*record[:5], teacher_version=record.teacher_version)
        if not writer.flush():
            raise CacheError(f"{output}: {writer.disabled}")
    return written, copies - written - damaged, damaged


def _first_whole(key: bytes, readers: Sequence[CacheReader]) -> Record | None:
    for reader in readers:
        try:
            if key in reader:
                return reader.get_record(key)
        except CorruptRecord:
            continue
    return None


def prune(
    directory: Path,
    *,
    max_bytes: int | None = None,
    before_draw_set: int | None = None,
    damaged: bool = False,
    progress: Progress = lambda _: None,
) -> tuple[int, int]:
    """Drop records of draw sets below `before_draw_set`, damaged ones, and the oldest shards until `max_bytes` hold.

    All of it also in the caches of newer weights below the folder. damaged: sidecars and shards that are damaged
    elsewhere than in a record are made anew too. Returns how many records and bytes went. Only sealed shards are
    touched (dead writers' are sealed first), none of another fingerprint; a shard of which a part stays is replaced by
    a new one. Raises CacheError where another prune is under way.
    """
    folders = caches_in(directory)
    manifests = {folder: read_manifest(folder) for folder in folders}
    with _only_one(directory):
        for folder in folders:
            recover(folder, manifests[folder])
        before, records = sum(map(_folder_bytes, folders)), 0
        total = before
        for path in _oldest_first(manifests):
            size, manifest = _shard_bytes(path), manifests[path.parent]
            spans, keep, sound = _kept(path, manifest, before_draw_set, damaged)
            progress(len(spans))
            if max_bytes is not None and total > max_bytes:
                keep, sound = np.zeros(len(spans), bool), False
            if keep.all() and sound:
                continue
            records += int((~keep).sum())
            total -= size - _replace(path, spans[keep], manifest)
        if damaged:
            for shard in (shard for folder in folders for shard in missing_shards(folder)):
                _remove(*_files(shard)[1:])
        after = sum(map(_folder_bytes, folders))
    return records, before - after


def _folder_bytes(directory: Path) -> int:
    """Of what `max_bytes` bounds: all but the shards that are being written."""
    files = [path for path in directory.iterdir() if path.is_file() and path.suffix != OPEN_SUFFIX]
    return sum(path.stat().st_size for path in files)


def _oldest_first(manifests: dict[Path, dict[str, Any]]) -> list[Path]:
    """The sealed shards of some caches by when they were begun."""
    shards = [
        path
        for folder, manifest in manifests.items()
        for path in folder.glob("*.arrow")
        if not other_fingerprint(path, manifest)
    ]
    return sorted(shards, key=lambda path: (origin(path)[1], path.name))


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CacheError(f"another prune of {directory} is under way") from error
    finally:
        os.close(fd)


def _shard_bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in _files(path) if part.exists())


def _files(path: Path) -> tuple[Path, Path, Path]:
    """A shard and its sidecars; the shard first: nobody shall find one without its index."""
    return path, path.with_suffix(".index"), path.with_suffix(".json")


def _kept(
    path: Path, manifest: dict[str, Any], before_draw_set: int | None, damaged: bool
) -> tuple[Spans, npt.NDArray[np.bool_], bool]:
    """A shard's spans, which of them stay, and whether its files can."""
    damage = Damage()
    spans, bad = check_sealed(path, manifest, damage) if damaged else (shard_spans(path, manifest)[0], [])
    keep = np.ones(len(spans), bool)
    if before_draw_set is not None:
        keep &= spans["draw_set"] >= before_draw_set
    keep[bad] = False
    return spans, keep, not damage.problems


def _replace(path: Path, spans: Spans, manifest: dict[str, Any]) -> int:
    """Put the records of these spans into a new shard, as old as the one whose place it takes; its size."""
    sealed: Path | None = None
    if len(spans):
        writer_id, milliseconds = origin(path)
        shard = OpenShard.create(path.parent, writer_id, manifest, milliseconds=milliseconds)
        file = ShardFile(str(path), token_width(manifest))
        for start in range(0, len(spans), RECORDS_PER_BATCH):
            batch = list(file.records(spans[start : start + RECORDS_PER_BATCH], lambda _: None))
            if batch:
                shard.append(encode_batch(batch, shard.schema))
        sealed = shard.seal()
    _remove(*_files(path))
    return _shard_bytes(sealed) if sealed is not None else 0


def _remove(*files: Path) -> None:
    for path in files:
        path.unlink(missing_ok=True)
