"""Find every damaged byte of a cache, and which sequences must be fetched again."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.heldout import read_heldout
from logitstream.cache.index import Log, read_index, sealed_index
from logitstream.cache.manifest import Manifest, read_id_model, read_manifest
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import END_OF_STREAM, Spans, age, open_shard_file, read_stored
from logitstream.cache.snapshot import shards_in
from logitstream.errors import CacheError, CorruptRecord

Progress = Callable[[int], object]
"""Told how many bytes were read since the last call."""


@dataclass(slots=True)
class Damage:
    """Findings of `verify`: a sentence a problem; keys of damaged records, and those without a whole copy."""

    problems: list[str] = field(default_factory=list)
    damaged_keys: set[bytes] = field(default_factory=set)
    lost_keys: list[bytes] = field(default_factory=list)
    whole_records: int = 0


def verify(directory: Path, progress: Progress = lambda _: None) -> Damage:
    """Read every byte of a cache; CacheError if there is none.

    A file that cannot be read is named, and the rest is read all the same.
    """
    damage, shards = Damage(), all_shards(directory)
    try:
        manifest = read_manifest(directory)
    except CacheError as error:
        if not shards:
            raise
        damage.problems.append(f"{error}; no shard can be checked without it")
        return damage
    for read in (lambda: read_id_model(directory, manifest.fingerprint), lambda: read_heldout(directory)):
        try:
            read()
        except (CacheError, OSError) as error:
            damage.problems.append(str(error))
    for path, is_sealed in shards.items():
        spans, is_whole = check_shard(path, is_sealed, manifest, damage.problems, progress)
        damage.damaged_keys.update(spans["key"][~is_whole].tolist())
        damage.whole_records += int(is_whole.sum())
    damage.lost_keys = sorted(damage.damaged_keys)
    with suppress(CacheError):  # has been named
        reader = CacheReader(directory)
        damage.lost_keys = [key for key in damage.lost_keys if reader.get(key) is None]
    return damage


def all_shards(directory: Path) -> dict[Path, bool]:
    """Return the shards in a folder, the oldest first, and if they are sealed; also if only the index is left."""
    found = {path.with_suffix(".arrow"): True for path in directory.glob("*.index")} | shards_in(directory)
    return {path: found[path] for path in sorted(found, key=age)}


def shard_log(path: Path, is_sealed: bool, manifest: Manifest) -> Log:
    """Read a shard's index, or what the shard makes of it, as far as possible; whatever is wrong is in `problem`."""
    log, problem = Log([], 0), ""
    try:
        log = read_index(path, manifest)
    except (CacheError, OSError) as error:
        problem = f"{path.name}: {error}"
    try:
        return sealed_index(path, manifest) if is_sealed else log._replace(problem=problem)
    except OSError as error:
        return log._replace(problem=f"{path.name} cannot be read: {error}")


def check_shard(
    path: Path, is_sealed: bool, manifest: Manifest, problems: list[str], progress: Progress = lambda _: None
) -> tuple[Spans, npt.NDArray[np.bool_]]:
    """Read all of a shard, say what is wrong with it, and return the spans of its records and which are whole."""
    log, found = shard_log(path, is_sealed, manifest), list[str]()
    spans, is_whole = log.spans, np.zeros(len(log.spans), bool)
    try:
        fd = open_shard_file(path)
        try:
            is_whole = _check_content(fd, log, found, progress)
            end = log.entries[-1].end if log.entries else 0
            if is_sealed and os.pread(fd, 9, end) != END_OF_STREAM:
                found.append(f"is damaged after byte {end}: expected its end")
        finally:
            os.close(fd)
    except OSError as error:
        found.append(f"cannot be read: {error}")
    if damaged := int(np.count_nonzero(~is_whole)):
        found.append(f"holds {len(is_whole)} records, of which {damaged} are damaged or cannot be read")
    problems += [log.problem] if log.problem else []
    problems += [f"{path.name} {one}" for one in dict.fromkeys(found)]
    return spans, is_whole


def _check_content(fd: int, log: Log, found: list[str], progress: Progress) -> npt.NDArray[np.bool_]:
    """Return which records of a shard are whole."""
    parts = [np.zeros(0, bool)]
    for entry in log.entries:
        is_sound = False
        try:
            is_sound = xxh3(os.pread(fd, entry.end - entry.start, entry.start)) == entry.checksum
        except OSError as error:
            found.append(f"cannot be read: {error}")
        is_whole = np.array([_is_whole(fd, span.tobytes()) for span in entry.spans], bool)
        if not is_sound and is_whole.all():
            found.append(f"is damaged outside of records at bytes {entry.start} to {entry.end}")
        parts.append(is_whole)
        progress(entry.end - entry.start)
    return np.concatenate(parts)


def _is_whole(fd: int, span: bytes) -> bool:
    try:
        read_stored(fd, span)
    except (CorruptRecord, OSError):
        return False
    return True
