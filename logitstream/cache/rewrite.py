"""Making caches smaller: merge several into one, prune one to a size or to newer draw sets."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstream.cache.manifest import read_manifest
from logitstream.cache.open_shard import OpenShard, recover
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import Record, Spans, encode_batch
from logitstream.cache.shard_file import ShardFile
from logitstream.cache.verify import shard_spans
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
                if key in before or any(key in earlier for earlier in readers[:number]):
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

    Returns how many records and bytes went. Only sealed shards are touched (dead writers' are sealed first); a shard of
    which a part stays is replaced by a new one. Raises CacheError where another prune is under way.
    """
    manifest = read_manifest(directory)
    with _only_one(directory):
        recover(directory, manifest)
        shards = sorted(directory.glob("*.arrow"), key=lambda path: (path.stat().st_mtime, path.name))
        sizes = {path: _shard_bytes(path) for path in shards}
        before, records = sum(sizes.values()), 0
        total = before + sum(path.stat().st_size for path in directory.iterdir() if path.name in _HEAD)
        for path in shards:
            spans, _ = shard_spans(path)
            progress(len(spans))
            if max_bytes is not None and total > max_bytes:
                keep = np.zeros(len(spans), bool)
            else:
                keep = _kept(path, spans, before_draw_set, damaged)
            if keep.all():
                continue
            records += int((~keep).sum())
            total -= sizes[path] - _replace(path, spans[keep], manifest)
        after = sum(_shard_bytes(path) for path in directory.glob("*.arrow"))
    return records, before - after


_HEAD = ("manifest.json", "id_model.bin")


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
    return path, path.with_suffix(".index"), path.with_suffix(".json")


def _kept(path: Path, spans: Spans, before_draw_set: int | None, damaged: bool) -> npt.NDArray[np.bool_]:
    keep = np.ones(len(spans), bool)
    if before_draw_set is not None:
        keep &= spans["draw_set"] >= before_draw_set
    if damaged:
        bad: list[int] = []
        for _ in ShardFile(str(path)).records(spans, bad.append):
            pass
        keep[bad] = False
    return keep


def _replace(path: Path, spans: Spans, manifest: dict[str, object]) -> int:
    """Put the records of these spans into a new shard in the old one's place; its size."""
    sealed: Path | None = None
    if len(spans):
        shard = OpenShard.create(path.parent, path.name.split("-")[0], manifest)
        file = ShardFile(str(path))
        for start in range(0, len(spans), RECORDS_PER_BATCH):
            batch = list(file.records(spans[start : start + RECORDS_PER_BATCH], lambda _: None))
            if batch:
                shard.append(encode_batch(batch, shard.schema))
        sealed = shard.seal()
    for part in _files(path):
        part.unlink(missing_ok=True)
    return _shard_bytes(sealed) if sealed is not None else 0
