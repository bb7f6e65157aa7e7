"""Finding every damaged byte of a cache directory, and which sequences must be fetched again."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logitstream.cache.heldout import FILE as HELDOUT
from logitstream.cache.heldout import read_heldout
from logitstream.cache.manifest import (
    ID_MODEL,
    MANIFEST,
    VERSIONS,
    caches_in,
    manifest_fingerprint,
    read_entry,
    read_id_model,
    read_index,
    read_manifest,
    summary,
)
from logitstream.cache.open_shard import OPEN_SUFFIX, SHARD_NAME
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import (
    END_OF_STREAM,
    SPAN_DTYPE,
    Spans,
    read_schema,
    scan,
)
from logitstream.cache.shard_file import ShardFile
from logitstream.cache.shard_state import other_fingerprint, shard_spans, shard_width, unreadable
from logitstream.errors import CacheError

SIDECARS = (".index", ".json")
Progress = Callable[[int], object]
"""Told how many bytes were read since the last call."""


@dataclass(slots=True)
class Damage:
    """What `verify` found: one sentence a problem or a note; keys of damaged records, and those without a whole copy.

    unnamed_records: records that a shard's entry counts, but whose keys can no longer be read.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged_keys: set[bytes] = field(default_factory=set)
    lost_keys: list[bytes] = field(default_factory=list)
    unnamed_records: int = 0
    whole_records: int = 0

    def add(self, other: Damage) -> None:
        self.problems += other.problems
        self.notes += other.notes
        self.damaged_keys |= other.damaged_keys
        self.lost_keys += other.lost_keys
        self.unnamed_records += other.unnamed_records
        self.whole_records += other.whole_records


def verify(directory: Path, progress: Progress = lambda _: None) -> Damage:
    """Read every byte of every file, also of the caches of newer weights below; CacheError where there is no cache.

    What cannot be read is named, and the rest is read all the same.
    """
    damage = Damage()
    for folder in caches_in(directory):
        try:
            damage.add(_verify_one(folder, progress))
        except OSError as error:
            damage.problems.append(f"{folder} cannot be listed: {error}")
    return damage


def _verify_one(directory: Path, progress: Progress) -> Damage:
    damage = Damage()
    manifest = _check_head(directory, damage)
    shards = [*sorted(directory.glob("*.arrow")), *sorted(directory.glob(f"*{OPEN_SUFFIX}"))]
    for path in shards:
        try:
            if path.suffix == OPEN_SUFFIX:
                _check_open(path, manifest, damage, progress)
            else:
                check_sealed(path, manifest, damage, progress)
        except FileNotFoundError:  # sealed or pruned while the others were read
            if os.path.lexists(path):
                raise
        except OSError as error:
            damage.problems.append(f"{path.name} cannot be read: {error}")
    for shard in missing_shards(directory):
        _check_missing(shard, manifest, damage)
    damage.notes += [f"{path.name} is no file of a cache: nobody reads it" for path in strangers(directory)]
    if damage.damaged_keys:
        reader = _reader(directory) if manifest is not None else None
        damage.lost_keys = sorted(key for key in damage.damaged_keys if reader is None or reader.get(key) is None)
    return damage


def _reader(directory: Path) -> CacheReader | None:
    try:
        return CacheReader(directory)
    except (CacheError, OSError):  # has been named
        return None


def missing_shards(directory: Path) -> list[Path]:
    """Sealed shards of which only sidecars are left; one that is about to be sealed has its own already."""
    sidecars = {path for suffix in SIDECARS for path in directory.glob(f"*{suffix}") if SHARD_NAME.search(path.stem)}
    shards = sorted({sidecar.with_suffix(".arrow") for sidecar in sidecars})
    return [path for path in shards if not (path.with_name(path.name + OPEN_SUFFIX).exists() or os.path.lexists(path))]


def strangers(directory: Path) -> list[Path]:
    """What lies in a cache's folder and is none of its files."""
    return [path for path in sorted(directory.iterdir()) if not _is_ours(path)]


def _is_ours(path: Path) -> bool:
    if path.name.startswith(".") or path.name in (MANIFEST, ID_MODEL, HELDOUT, VERSIONS):
        return True
    if path.suffix in SIDECARS and (SHARD_NAME.search(path.stem) or os.path.lexists(path.with_suffix(".arrow"))):
        return True
    return path.name.endswith((".arrow", OPEN_SUFFIX))


def _check_missing(shard: Path, manifest: dict[str, Any] | None, damage: Damage) -> None:
    damage.problems.append(f"{shard.name} is missing, there are sidecars of it")
    try:
        spans = read_index(shard.with_suffix(".index"), manifest["fingerprint_digest"] if manifest is not None else "")
        damage.damaged_keys.update(spans["key"].tolist())
    except (CacheError, OSError):
        with contextlib.suppress(CacheError):
            damage.unnamed_records += read_entry(shard)["records"]


def _check_head(directory: Path, damage: Damage) -> dict[str, Any] | None:
    if not any(directory.glob("*.arrow*")) and not os.path.lexists(directory / MANIFEST):
        raise CacheError(f"{directory} is no cache: expected manifest.json or shards in it")
    try:
        manifest = read_manifest(directory)
    except CacheError as error:
        damage.problems.append(str(error))
        return None
    for read in (
        lambda: read_id_model(directory, manifest_fingerprint(manifest, directory)),
        lambda: read_heldout(directory),
    ):
        try:
            read()
        except (CacheError, OSError) as error:
            damage.problems.append(str(error))
    return manifest


def check_sealed(
    path: Path, manifest: dict[str, Any] | None, damage: Damage, progress: Progress = lambda _: None
) -> tuple[Spans, list[int]]:
    """The spans of a sealed shard, and which of its records are damaged; none of another fingerprint's.

    OSError where the file as a whole cannot be read.
    """
    if not os.path.lexists(path):  # pruned meanwhile
        return np.zeros(0, SPAN_DTYPE), []
    if manifest is not None and (other := other_fingerprint(path, manifest)):
        damage.problems.append(f"{path.name} is a shard of another fingerprint, {other}: nobody reads it, remove it")
        return np.zeros(0, SPAN_DTYPE), []
    spans, problem = shard_spans(path, manifest)
    if problem:
        damage.problems.append(problem)
    if unreadable(path):
        damage.damaged_keys.update(spans["key"].tolist())
        return spans, list(range(len(spans)))
    entry: dict[str, Any] = {}
    try:
        entry = read_entry(path)
    except CacheError as error:
        damage.problems.append(str(error))
    bad = _check_records(path, spans, shard_width(path, manifest), damage)
    if bad:
        damage.problems.append(f"{path.name}: {len(bad)} of {len(spans)} records are damaged or cannot be read")
    lost = _named_elsewhere(path, manifest, spans) if problem else set()
    damage.damaged_keys |= lost
    if lost:
        damage.problems.append(f"{path.name}: {len(lost)} records that its index names are not in it")
    elif entry and entry["records"] > len(spans):
        damage.unnamed_records += entry["records"] - len(spans)
        damage.problems.append(f"{path.name}: {entry['records'] - len(spans)} records cannot be named any more")
    elif entry and entry | summary(spans) | {"bytes": path.stat().st_size} != entry:
        damage.problems.append(f"{path.name}: its entry counts other records than the {len(spans)} that are in it")
    try:
        found = _sha256(path, progress)
    except OSError as error:
        damage.problems.append(f"{path.name} cannot be read: {error}")
        return spans, bad
    if entry and entry["sha256"] != found and not bad:
        damage.problems.append(f"{path.name}: damaged outside of its records (SHA-256 {found}, not {entry['sha256']})")
    return spans, bad


def _named_elsewhere(path: Path, manifest: dict[str, Any] | None, spans: Spans) -> set[bytes]:
    """The keys of a whole index whose shard is not as long as it was, as far as no span is left of them."""
    try:
        named = read_index(path.with_suffix(".index"), manifest["fingerprint_digest"] if manifest is not None else "")
    except (CacheError, OSError):
        return set()
    return set(named["key"].tolist()) - set(spans["key"].tolist())


def _check_open(path: Path, manifest: dict[str, Any] | None, damage: Damage, progress: Progress) -> None:
    """An open shard has no checksum as a whole: between its records only what breaks their layout is found."""
    if problem := unreadable(path):
        damage.problems.append(problem)
        return
    messages = list(scan(path, width := shard_width(path, manifest)))
    end = read_schema(path, manifest) if manifest is not None else (messages[0].start if messages else 0)
    if end == 0:
        damage.problems.append(f"{path.name}: no head of a shard of this cache can be read")
    for message in messages:
        if message.start != end:
            damage.problems.append(f"{path.name}: bytes {end} to {message.start} cannot be read")
        end = message.start + message.size
        bad = _check_records(path, message.spans, width, damage)
        if bad:
            damage.problems.append(f"{path.name}: {len(bad)} records of the batch at byte {message.start} are damaged")
    size = path.stat().st_size
    if size > end:
        with path.open("rb") as file:
            file.seek(end)
            rest = file.read()
        if rest != END_OF_STREAM:
            damage.notes.append(
                f"{path.name}: {size - end} bytes after its last whole batch (a write under way, or torn)"
            )
    progress(size)


def _check_records(path: Path, spans: Spans, width: int, damage: Damage) -> list[int]:
    """Read a shard's records; the rows of the damaged ones."""
    bad: list[int] = []
    whole = sum(1 for _ in ShardFile(str(path), width).records(spans, bad.append))
    damage.damaged_keys.update(spans["key"][row].tobytes() for row in bad)
    damage.whole_records += whole
    return bad


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
