"""Make caches smaller: merge several into one, prune one to a size or to newer draw sets.

Both write new shards before they remove old ones, so a kill at any moment loses no record that stays.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logitstream.cache.heldout import add_heldout, read_heldout
from logitstream.cache.index import index_path, shards_in
from logitstream.cache.manifest import MANIFEST, Manifest, file_bytes, read_manifest, tree_bytes
from logitstream.cache.open_shard import OpenShard, recover
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import OPEN_SUFFIX, Spans, age, bound_of_bytes, read_stored
from logitstream.cache.tools import watched
from logitstream.cache.tools.verify import all_shards, check_shard, shard_log
from logitstream.cache.writer import CacheWriter
from logitstream.errors import CacheError, CorruptRecord

BATCH_RECORDS = 64


def merge(sources: Sequence[str | Path], output: str | Path) -> tuple[int, int]:
    """Copy an undamaged record of each key into a cache of their common fingerprint, the oldest cache first.

    Returns how many were written, and how many left out, as duplicates or damaged. `output` may hold records already.
    Raises FingerprintMismatch if the sources differ.
    """
    first = CacheReader(sources[0])
    readers = [first, *(CacheReader(source, first.fingerprint) for source in sources[1:])]
    readers.sort(key=lambda reader: min((age(shard.path) for shard in reader.shards), default=("", "")))
    provenance = {"merged": [{"directory": str(r.source), **r.manifest.provenance} for r in readers]}
    written = 0
    with CacheWriter(
        output, first.fingerprint, id_model=first.id_model, provenance=provenance, writer_id="merge"
    ) as writer:
        known = [CacheReader(output)]
        for reader in watched(readers, "merging"):
            for record in reader.records():
                if not any(record.key in one and one.get(record.key) for one in known):
                    written += writer.put(*record[:5], teacher_version=record.teacher_version)
            known.append(reader)
        if not writer.flush():
            raise CacheError(f"{output}: {writer.disabled}")
    add_heldout(output, (sequence for source in sources for sequence in read_heldout(source)))
    return written, sum(reader.num_records for reader in readers) - written


@dataclass(slots=True)
class Pruned:
    """Result of `prune`: what went, or would go, of how much, and what was left and why."""

    total_bytes: int
    num_bytes: int = 0
    total_records: int = 0
    records: int = 0
    left: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Plan:
    """The fate of one sealed shard: `stays` says which records are kept."""

    path: Path
    spans: Spans
    stays: npt.NDArray[np.bool_]
    is_sound: bool

    @property
    def num_bytes(self) -> int:
        return file_bytes(self.path) + file_bytes(index_path(self.path))

    @property
    def next_bytes(self) -> int:
        """Bound of the bytes that it will take."""
        if self.is_sound and self.stays.all():
            return self.num_bytes
        kept = self.spans[self.stays]
        content = sum(int(kept[f"{part}_bytes"].sum(dtype=np.int64)) for part in ("tokens", "mask", "payload"))
        return min(self.num_bytes, bound_of_bytes(len(kept), content)) if len(kept) else 0


def prune(
    directory: Path,
    *,
    max_bytes: int | None = None,
    before_draw_set: int = 0,
    damaged: bool = False,
    dry_run: bool = False,
) -> Pruned:
    """Drop records of draw sets below `before_draw_set`, damaged ones, and the oldest shards until `max_bytes` hold.

    Bytes are the sizes of all files except shards that are being written. damaged: shards with other damage and damaged
    indexes are made anew too. A file that cannot be read, or is no shard of this cache, is left alone and named.
    dry_run: only say what would go; a bound of its bytes stands for what is written anew. Raises CacheError if another
    prune is under way.
    """
    manifest = read_manifest(directory)
    with _only_one(directory):
        result = Pruned(_bytes_of(directory))
        if not dry_run:
            recover(directory, manifest)
        plans = _plans(directory, manifest, damaged, result.left)
        result.total_records = sum(len(plan.spans) for plan in plans)
        for plan in plans:
            plan.stays &= plan.spans["draw_set"] >= before_draw_set
        total = result.total_bytes - sum(plan.num_bytes - plan.next_bytes for plan in plans)
        for plan in plans:
            if max_bytes is not None and total > max_bytes:
                total -= plan.next_bytes
                plan.stays[:] = plan.is_sound = False
        result.num_bytes = result.total_bytes - total
        for plan in sorted(plans, key=lambda plan: bool(plan.stays.any())):  # whole shards first, to make room
            try:
                if not dry_run:
                    _carry_out(plan, manifest)
                result.records += int(np.count_nonzero(~plan.stays))
            except (OSError, CorruptRecord) as error:
                result.left.append(f"{plan.path.name} was left as it is: {error}")
        if not dry_run:
            result.num_bytes = result.total_bytes - _bytes_of(directory)
        return result


def _plans(directory: Path, manifest: Manifest, damaged: bool, left: list[str]) -> list[_Plan]:
    """Read the sealed shards of a cache, the oldest first; all of their whole records stay as yet."""
    plans = []
    sealed = [path for path, is_sealed in all_shards(directory).items() if is_sealed]
    for path in watched(sealed, "reading"):
        log, problems = shard_log(path, True, manifest), list[str]()
        stays = check_shard(path, True, log, problems) if damaged else np.ones(len(log.spans), bool)
        if os.path.lexists(path) and (not path.is_file() or not log.entries):
            left.append(log.problem or f"{path.name} is no file")
        else:
            plans.append(_Plan(path, log.spans, stays, not problems))
    return plans


def _carry_out(plan: _Plan, manifest: Manifest) -> None:
    """Remove a shard, write it anew or leave it as it is; OSError or CorruptRecord if that cannot be done."""
    if plan.is_sound and plan.stays.all():
        return
    if plan.stays.any():
        new = OpenShard.create(plan.path.parent, plan.path.name.rsplit("-", 1)[0], manifest)
        try:
            with plan.path.open("rb", buffering=0) as file:
                kept = plan.spans[plan.stays]
                for start in range(0, len(kept), BATCH_RECORDS):
                    batch = [read_stored(file.fileno(), one.tobytes()) for one in kept[start : start + BATCH_RECORDS]]
                    new.append(batch)
            new.seal()
        except (OSError, CorruptRecord):
            new.discard()
            raise
    plan.path.unlink(missing_ok=True)  # before its index: a shard without one would be scanned
    index_path(plan.path).unlink(missing_ok=True)


def _bytes_of(directory: Path) -> int:
    """Return the bytes that `max_bytes` bounds: of all files except shards that are being written."""
    written = [path for path, is_sealed in shards_in(directory).items() if not is_sealed]
    return tree_bytes(directory) - sum(
        file_bytes(Path(f"{path}{OPEN_SUFFIX}")) + file_bytes(index_path(path)) for path in written
    )


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Lock the manifest: on a full disk no lock file could be made."""
    with (directory / MANIFEST).open("r+b") as manifest:
        try:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(f"another prune of {directory} is under way") from error
        yield
