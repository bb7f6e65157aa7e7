"""Make caches smaller: merge several into one, prune one to a size or to newer draw sets.

Both write new shards before they remove old ones, so a kill at any moment loses no record that stays.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstream.cache.heldout import add_heldout, read_heldout
from logitstream.cache.index import ENTRY_BYTES, FILE_HEAD, index_path, joined, sealed_entries
from logitstream.cache.manifest import MANIFEST, Manifest, caches_in, file_bytes, read_manifest
from logitstream.cache.open_shard import OpenShard, is_written, origin, recover
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import (
    END_OF_STREAM,
    OPEN_SUFFIX,
    SPAN,
    Record,
    Span,
    Spans,
    encode_batch,
    read_parts,
    shard_schema,
    token_dtype,
    unpack_record,
)
from logitstream.cache.tools.verify import Damage, check_shard, missing_shards, stranger, unreadable
from logitstream.cache.writer import CacheWriter
from logitstream.errors import CacheError, CorruptRecord

Progress = Callable[[int], object]
"""Told how many records were read since the last call."""
BATCH_BYTES = 256 << 10
RECORD_BYTES = SPAN.size + 52
"""What a record takes beside its tokens, mask and payload: its span, and its fixed columns and offsets."""
MESSAGE_BYTES = 640
"""Bound of what a record batch takes beside its records."""


def merge(
    sources: Sequence[str | Path], output: str | Path, progress: Progress = lambda _: None
) -> tuple[int, int, int]:
    """Copy an undamaged record of each key into a cache of their common fingerprint, the oldest cache first.

    Returns how many were written, left out as duplicates and left out as damaged everywhere. `output` may hold records
    already. Raises FingerprintMismatch if the sources differ.
    """
    first = CacheReader(sources[0])
    readers = [first, *(CacheReader(source, first.fingerprint) for source in sources[1:])]
    readers.sort(key=lambda reader: min((origin(shard.path)[1] for shard in reader.shards), default=0))
    provenance = {"merged": [{"directory": str(r.source), **r.manifest.provenance} for r in readers]}
    written = 0
    with CacheWriter(
        output, first.fingerprint, id_model=first.id_model, provenance=provenance, writer_id="merge"
    ) as writer:
        before = CacheReader(output)
        for number, reader in enumerate(readers):
            for record in reader.records():
                progress(1)
                if not any(record.key in one and one.get(record.key) for one in (before, *readers[:number])):
                    written += writer.put(*record[:5], teacher_version=record.teacher_version)
        if not writer.flush():
            raise CacheError(f"{output}: {writer.disabled}")
    suspects = set().union(*(reader.damaged for reader in readers))
    damaged = sum(all(reader.get(key) is None for reader in readers) for key in suspects)
    add_heldout(output, (sequence for source in sources for sequence in read_heldout(source)))
    return written, sum(reader.num_records for reader in readers) - written - damaged, damaged


@dataclass(slots=True, kw_only=True)
class Pruned:
    """Result of `prune`: what went, or would go, of how much; `left`: what stays and why, `notes`: others' files."""

    total_bytes: int
    num_bytes: int = 0
    total_records: int = 0
    records: int = 0
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Plan:
    """The fate of one sealed shard: `stays` says which records are kept."""

    path: Path
    manifest: Manifest
    spans: Spans
    stays: npt.NDArray[np.bool_]
    num_bytes: int
    is_sound: bool

    @property
    def next_bytes(self) -> int:
        """Bound of the bytes that it will take."""
        if self.is_sound and self.stays.all():
            return self.num_bytes
        return int(self._bytes_of_newest()[self.stays.sum()])

    def _bytes_of_newest(self) -> npt.NDArray[np.int64]:
        """Return the bound of bytes of a shard with the newest 0, 1, 2, … of the records that stay."""
        spans = self.spans[self.stays][::-1]
        sizes = spans["tokens_bytes"].astype(np.int64) + spans["mask_bytes"] + spans["payload_bytes"]
        parts = np.concatenate([[0], np.cumsum(sizes)])
        batches = 2 * parts // BATCH_BYTES + 1
        head = shard_schema(self.manifest).serialize().size + FILE_HEAD.size + ENTRY_BYTES + len(END_OF_STREAM)
        bounds: npt.NDArray[np.int64] = head + parts + RECORD_BYTES * np.arange(len(parts))
        bounds += (MESSAGE_BYTES + ENTRY_BYTES) * batches
        bounds[0] = 0
        return bounds

    def limit(self, max_bytes: int) -> None:
        """Let the oldest records go until the rest takes no more."""
        num_kept = int(np.flatnonzero(self._bytes_of_newest() <= max(max_bytes, 0))[-1])
        staying = np.flatnonzero(self.stays)
        self.stays[staying[: len(staying) - num_kept]] = False
        self.is_sound = False  # the bound holds for a shard that is written anew


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

    Also prunes the caches of newer weights in the folder. Bytes are the sizes of all files except shards that are being
    written. The oldest records are those of the shard that was begun first. damaged: shards with other damage and
    damaged indexes are made anew too. What cannot be read as a whole, and what belongs to others, is left alone and
    named. dry_run: only say what would go. Raises CacheError if another prune is under way.

    Shards that go as a whole go first, to make room for those that are written anew.
    """
    folders = caches_in(directory)
    manifests = {folder: read_manifest(folder) for folder in folders}
    with _only_one(directory):
        result = Pruned(total_bytes=sum(map(_folder_bytes, folders)))
        if not dry_run:
            for folder in folders:
                _recover(folder, manifests[folder], result)
        plans = _plans(manifests, damaged, result, progress)
        result.total_records = sum(len(plan.spans) for plan in plans)
        for plan in plans if before_draw_set is not None else []:
            plan.stays &= plan.spans["draw_set"] >= before_draw_set
        total = result.total_bytes - sum(plan.num_bytes - plan.next_bytes for plan in plans)
        for plan in plans:
            if max_bytes is not None and total > max_bytes:
                total -= plan.next_bytes
                plan.limit(max_bytes - total)
                total += plan.next_bytes
        if dry_run:
            result.records = sum(len(plan.spans) - int(plan.stays.sum()) for plan in plans)
            result.num_bytes = result.total_bytes - total
            return result
        for plan in sorted(plans, key=lambda plan: bool(plan.stays.any())):
            _carry_out(plan, damaged, result)
        for folder in folders if damaged else []:
            for shard in missing_shards(folder, manifests[folder]):
                remove(shard)
        result.num_bytes = result.total_bytes - sum(map(_folder_bytes, folders))
        return result


def _recover(folder: Path, manifest: Manifest, result: Pruned) -> None:
    try:
        recover(folder, manifest)
    except OSError as error:
        result.left.append(f"{folder}: shards of dead writers stay as they are: {error}")


def _plans(manifests: dict[Path, Manifest], damaged: bool, result: Pruned, progress: Progress) -> list[_Plan]:
    """Read the sealed shards of some caches, ordered by when they were begun; all of their records stay as yet."""
    found = [(path, manifest) for folder, manifest in manifests.items() for path in folder.glob("*.arrow")]
    plans = []
    for path, manifest in sorted(found, key=lambda one: (origin(one[0])[1], one[0].name)):
        if problem := unreadable(path):
            result.left.append(problem)
            continue
        if problem := stranger(path, manifest):
            result.notes.append(f"{problem}; it was left alone")
            continue
        damage, stays = Damage(), None
        if damaged:
            spans, stays = check_shard(path, manifest, damage)
        else:
            spans = joined(sealed_entries(path, manifest)[0])
        if not len(spans) and not origin(path)[1]:
            result.left.append(f"{path.name} holds no records that can be read, and is not named like a shard")
            continue
        plan = _Plan(
            path=path,
            manifest=manifest,
            spans=spans,
            stays=np.ones(len(spans), bool) if stays is None else stays,
            num_bytes=file_bytes(path) + file_bytes(index_path(path)),
            is_sound=not damage.problems,
        )
        plans.append(plan)
        progress(len(spans))
    return plans


def _carry_out(plan: _Plan, damaged: bool, result: Pruned) -> None:
    """Remove a shard or write it anew; on an error leave it as it is and say so."""
    if plan.is_sound and plan.stays.all():
        return
    try:
        lost = _rewrite(plan, drop_unreadable=damaged) if plan.stays.any() else 0
        remove(plan.path)
        result.records += len(plan.spans) - int(plan.stays.sum()) + lost
    except (OSError, CacheError) as error:
        result.left.append(f"{plan.path.name} was left as it is: {error}")


def _rewrite(plan: _Plan, *, drop_unreadable: bool) -> int:
    """Write the records that stay into a new shard, as old as this one; return how many turned out to be damaged.

    Raises OSError if there is no room or, unless drop_unreadable, if the disk fails to read one.
    """
    manifest, lost = plan.manifest, 0
    writer_id, milliseconds = origin(plan.path)
    new = OpenShard.create(plan.path.parent, writer_id, manifest, milliseconds=milliseconds)
    try:
        with plan.path.open("rb", buffering=0) as file:
            batch, batch_bytes = list[Record](), 0
            for row in np.flatnonzero(plan.stays):
                span = Span._make(SPAN.unpack(plan.spans[row].tobytes()))
                try:
                    parts = read_parts(file.fileno(), span)
                except (CorruptRecord, OSError) as error:
                    if isinstance(error, OSError) and not drop_unreadable:
                        raise
                    lost += 1
                    continue
                size = sum(map(len, parts))
                if batch and batch_bytes + size > BATCH_BYTES:
                    new.append(encode_batch(batch, new.schema))
                    batch, batch_bytes = [], 0
                batch.append(unpack_record(span, parts, token_dtype(manifest.fingerprint.vocab_size)))
                batch_bytes += size
            if batch:
                new.append(encode_batch(batch, new.schema))
        new.seal()
    except OSError:
        new.discard()
        raise
    return lost


def remove(shard: Path) -> None:
    """Remove a shard, before its index: a shard without one would be scanned."""
    shard.unlink(missing_ok=True)
    index_path(shard).unlink(missing_ok=True)


def _folder_bytes(directory: Path) -> int:
    """Return the bytes that `max_bytes` bounds: of all files except shards that are being written."""
    written = [path for path in directory.glob(f"*{OPEN_SUFFIX}") if is_written(path)]
    live = {*written, *map(index_path, written)}
    return sum(file_bytes(path) for path in directory.iterdir() if path not in live)


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Lock the manifest: on a full disk no lock file could be made."""
    fd = os.open(directory / MANIFEST, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CacheError(f"another prune of {directory} is under way") from error
    finally:
        os.close(fd)
