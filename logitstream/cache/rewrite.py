"""Making caches smaller: merge several into one, prune one to a size or to newer draw sets."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from logitstream.cache.heldout import add_heldout, read_heldout
from logitstream.cache.index import KeyIndex
from logitstream.cache.manifest import MANIFEST, caches_in, file_bytes, read_manifest
from logitstream.cache.open_shard import OPEN_SUFFIX, is_written, lock_dead, origin, recover
from logitstream.cache.pruned_shard import Pruned, PrunedShard
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import Record
from logitstream.cache.shard_rewrite import NO_SPACE, remove
from logitstream.cache.shard_state import is_foreign, other_fingerprint, unreadable
from logitstream.cache.verify import missing_shards
from logitstream.cache.writer import CacheWriter
from logitstream.errors import CacheError

Progress = Callable[[int], object]
"""Told how many records were read since the last call."""


def merge(sources: Sequence[Path], output: str | Path, progress: Progress = lambda _: None) -> tuple[int, int, int]:
    """Copy each key's first undamaged record into a cache of their common fingerprint, in the order of writing.

    Returns how many were written, left out as duplicates and left out as damaged everywhere. `output` may hold records
    already. Raises FingerprintMismatch where the sources differ.
    """
    first = CacheReader(sources[0])
    readers = [first, *(CacheReader(source, first.fingerprint) for source in sources[1:])]
    provenance = {"merged": [{"directory": str(r.directory), **r.manifest["provenance"]} for r in readers]}
    copies = sum(reader.num_records for reader in readers)
    seen = _Seen(readers)
    written = 0
    with CacheWriter(
        output,
        first.fingerprint,
        id_model=first.id_model,
        provenance=provenance,
        writer_id="merge",
        batch_bytes=1 << 20,
    ) as writer:
        before = CacheReader(output)
        for record in _by_age(readers):
            if not seen.add(record.key):
                continue
            progress(1)
            if before.get(record.key) is None:
                written += writer.put(*record[:5], teacher_version=record.teacher_version)
        if not writer.flush():
            raise CacheError(f"{output}: {writer.disabled}")
    damaged = seen.num_missing
    add_heldout(output, (sequence for source in sources for sequence in read_heldout(source)))
    return written, copies - written - damaged, damaged


def _by_age(readers: Sequence[CacheReader]) -> Iterator[Record]:
    """The undamaged records of several caches, those of the shard that was begun first first."""
    shards = [
        (origin(Path(path))[1], Path(path).name, n, path) for n, one in enumerate(readers) for path in one.shards()
    ]
    for *_, number, path in sorted(shards):
        yield from readers[number].records_of(path)


class _Seen:
    """Which keys of several caches were seen: 20 bytes and a flag a record."""

    def __init__(self, readers: Sequence[CacheReader]) -> None:
        keys = [np.frombuffer(b"".join(map(reader.key, range(len(reader)))), "V16") for reader in readers]
        self._index = KeyIndex.empty().extended(keys, 0)
        self._seen = np.zeros(len(self._index.high), bool)
        firsts = self._index.first_of_each()
        self._num_keys = len(self._index.high) if firsts is None else len(firsts)
        self._num_seen = 0

    def add(self, key: bytes) -> bool:
        """Whether the key was not seen before."""
        place = self._index.find(key)[0]
        is_new = not self._seen[place]
        self._seen[place] = True
        self._num_seen += is_new
        return bool(is_new)

    @property
    def num_missing(self) -> int:
        """Keys that were not seen yet."""
        return self._num_keys - self._num_seen


def prune(
    directory: Path,
    *,
    max_bytes: int | None = None,
    before_draw_set: int | None = None,
    damaged: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda _: None,
) -> Pruned:
    """Drop records of draw sets below `before_draw_set`, damaged ones, and the oldest records until `max_bytes` hold.

    All of it also in the caches of newer weights below the folder. Bytes are the sizes of all files but the shards that
    are being written. The oldest are those of the shard that was begun first, in the order of writing, and no more of
    them go than must: the next one would not fit in again. damaged: sidecars and shards that are damaged elsewhere than
    in a record are made anew too. What cannot be read as a whole, and what belongs to others, is left alone and named.
    dry_run: only say what would go. Raises CacheError where another prune is under way.

    Shards that go as a whole go first; others are written anew, on a full disk in the place of what goes.
    """
    folders = caches_in(directory)
    manifests = {folder: read_manifest(folder) for folder in folders}
    with _only_one(directory), ExitStack() as locks:
        result = Pruned(total_bytes=sum(map(_folder_bytes, folders)))
        shards, held = _oldest_first(manifests, locks, result), set[bytes]()
        for shard in shards:
            shard.choose(before_draw_set, damaged, result)
            shard.leave_out(held)
            progress(len(shard.spans))
        result.total_records = sum(len(shard.spans) for shard in shards)
        if max_bytes is not None:
            _bound(shards, max_bytes, result.total_bytes)
        if dry_run:
            result.records = sum(len(shard.spans) - len(shard.kept()) for shard in shards)
            result.num_bytes = sum(shard.num_bytes - shard.next_bytes() for shard in shards)
            return result
        for shard in sorted(shards, key=lambda one: len(one.kept()) > 0):
            shard.carry_out(drop_unreadable=damaged, result=result)
        locks.close()
        for folder in folders:
            _clear_up(folder, manifests[folder], damaged, result)
        result.num_bytes = result.total_bytes - sum(map(_folder_bytes, folders))
        return result


def _clear_up(folder: Path, manifest: dict[str, Any], damaged: bool, result: Pruned) -> None:
    """Seal what dead writers left, as far as there is room, and remove sidecars of shards that are gone."""
    for shard in missing_shards(folder) if damaged else []:
        remove(shard)
    try:
        recover(folder, manifest)
    except OSError as error:
        if error.errno not in NO_SPACE:
            result.left.append(f"{folder}: shards of dead writers stay as they are: {error}")


def _folder_bytes(directory: Path) -> int:
    """Of what `max_bytes` bounds: all but the shards that are being written."""
    return sum(file_bytes(path) for path in directory.iterdir() if path.suffix != OPEN_SUFFIX or not is_written(path))


def _oldest_first(manifests: dict[Path, dict[str, Any]], locks: ExitStack, result: Pruned) -> list[PrunedShard]:
    """The shards of some caches by when they were begun, but those that are being written; dead writers' get locked."""
    shards = []
    for folder, manifest in manifests.items():
        for path in sorted([*folder.glob("*.arrow"), *folder.glob(f"*{OPEN_SUFFIX}")]):
            fd = None
            try:
                if problem := unreadable(path):
                    if path.suffix == OPEN_SUFFIX or not path.with_suffix(".index").exists() or not path.is_file():
                        result.left.append(problem)
                        continue
                elif other_fingerprint(path, manifest) or is_foreign(path):
                    result.notes.append(f"{path.name} is no shard of this cache, and was left alone")
                    continue
                elif path.suffix == OPEN_SUFFIX:
                    if (fd := lock_dead(path)) is None:
                        continue
                    locks.callback(os.close, fd)
                shards.append(PrunedShard(path, manifest, fd))
            except OSError as error:
                result.left.append(f"{path.name} cannot be read: {error}")
    return sorted(shards, key=lambda shard: (origin(shard.path)[1], shard.path.name))


def _bound(shards: Sequence[PrunedShard], max_bytes: int, total_bytes: int) -> None:
    """Let go of the oldest records until the rest fits."""
    total = total_bytes - sum(shard.num_bytes - shard.next_bytes() for shard in shards)
    for shard in shards:
        if total <= max_bytes:
            return
        others = total - shard.next_bytes()
        shard.limit(max(max_bytes - others, 0))
        total = others + shard.next_bytes()


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """The manifest is what is locked: on a full disk no file can be made for it."""
    fd = os.open(directory / MANIFEST, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CacheError(f"another prune of {directory} is under way") from error
    finally:
        os.close(fd)
