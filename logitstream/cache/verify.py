"""Finding every damaged byte of a cache directory, and which sequences must be fetched again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logitstream.cache.manifest import (
    MANIFEST,
    caches_in,
    manifest_fingerprint,
    parse,
    read_id_model,
    read_index,
    read_manifest,
)
from logitstream.cache.open_shard import OPEN_SUFFIX
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import (
    END_OF_STREAM,
    SCHEMAS,
    SPAN_DTYPE,
    Spans,
    read_schema,
    scan,
    scanned_spans,
    token_width,
)
from logitstream.cache.shard_file import ShardFile
from logitstream.errors import CacheError

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
    """Read every byte of every file, also of the caches of newer weights below; CacheError where there is no cache."""
    damage = Damage()
    for folder in caches_in(directory):
        damage.add(_verify_one(folder, progress))
    return damage


def _verify_one(directory: Path, progress: Progress) -> Damage:
    damage = Damage()
    manifest = _check_head(directory, damage)
    for path in sorted(directory.glob("*.arrow")):
        check_sealed(path, manifest, damage, progress)
    for path in sorted(directory.glob(f"*{OPEN_SUFFIX}")):
        _check_open(path, manifest, damage, progress)
    for shard in missing_shards(directory):
        _check_missing(shard, manifest, damage)
    if damage.damaged_keys:
        reader = CacheReader(directory) if manifest is not None else None
        damage.lost_keys = sorted(key for key in damage.damaged_keys if reader is None or reader.get(key) is None)
    return damage


def shard_spans(path: Path, manifest: dict[str, Any] | None) -> tuple[Spans, str]:
    """A sealed shard's spans, from its index or, where that is damaged, from the shard; and what is wrong with it."""
    digest = manifest["fingerprint_digest"] if manifest is not None else ""
    try:
        return read_index(path.with_suffix(".index"), digest, path.stat().st_size), ""
    except CacheError as error:
        return scanned_spans(path, _width(path, manifest)), str(error)


def other_fingerprint(path: Path, manifest: dict[str, Any]) -> str:
    """Digest of the fingerprint that a shard's head names, if it is whole and not the manifest's; else empty."""
    try:
        with pa.OSFile(str(path)) as file:
            named = json.loads(pa.ipc.read_schema(file).metadata[b"logitstream"])
        found = manifest_fingerprint(named, path).digest
    except (pa.ArrowException, OSError, EOFError, MemoryError, CacheError, KeyError, TypeError, ValueError):
        return ""
    return "" if found == manifest["fingerprint_digest"] else found


def _width(path: Path, manifest: dict[str, Any] | None) -> int:
    """Bytes of a token id, by the manifest or else by the shard's own head."""
    if manifest is not None:
        return token_width(manifest)
    with contextlib.suppress(pa.ArrowException, OSError, EOFError, MemoryError), pa.OSFile(str(path)) as file:
        schema = pa.ipc.read_schema(file)
        return next((width for width, known in SCHEMAS.items() if schema.equals(known)), 4)
    return 4


def missing_shards(directory: Path) -> list[Path]:
    """Sealed shards of which only sidecars are left; one that is about to be sealed has its own already."""
    sidecars = {*directory.glob("*.index"), *directory.glob("*.json")} - {directory / MANIFEST}
    shards = sorted({sidecar.with_suffix(".arrow") for sidecar in sidecars})
    return [path for path in shards if not (path.with_name(path.name + OPEN_SUFFIX).exists() or path.exists())]


def _check_missing(shard: Path, manifest: dict[str, Any] | None, damage: Damage) -> None:
    damage.problems.append(f"{shard.name} is missing, there are sidecars of it")
    try:
        spans = read_index(shard.with_suffix(".index"), manifest["fingerprint_digest"] if manifest is not None else "")
        damage.damaged_keys.update(spans["key"].tolist())
    except CacheError:
        with contextlib.suppress(CacheError, OSError):
            damage.unnamed_records += parse(shard.with_suffix(".json").read_bytes(), shard)["records"]


def _check_head(directory: Path, damage: Damage) -> dict[str, Any] | None:
    if not any(directory.glob("*.arrow*")) and not (directory / MANIFEST).exists():
        raise CacheError(f"{directory} is no cache: expected manifest.json or shards in it")
    try:
        manifest = read_manifest(directory)
        read_id_model(directory, manifest_fingerprint(manifest, directory))
        return manifest
    except CacheError as error:
        damage.problems.append(str(error))
        return None


def check_sealed(
    path: Path, manifest: dict[str, Any] | None, damage: Damage, progress: Progress = lambda _: None
) -> tuple[Spans, list[int]]:
    """The spans of a sealed shard, and which of its records are damaged; none of another fingerprint's."""
    if manifest is not None and (other := other_fingerprint(path, manifest)):
        damage.problems.append(f"{path.name} is a shard of another fingerprint, {other}: nobody reads it, remove it")
        return np.zeros(0, SPAN_DTYPE), []
    spans, problem = shard_spans(path, manifest)
    if problem:
        damage.problems.append(problem)
    try:
        entry = parse(path.with_suffix(".json").read_bytes(), path.with_suffix(".json"))
    except (CacheError, FileNotFoundError) as error:
        damage.problems.append(str(error))
        entry = {}
    bad = _check_records(path, spans, _width(path, manifest), damage)
    if bad:
        damage.problems.append(f"{path.name}: {len(bad)} of {len(spans)} records are damaged")
    found = _sha256(path, progress)
    if entry and entry["sha256"] != found and not bad:
        damage.problems.append(f"{path.name}: damaged outside of its records (SHA-256 {found}, not {entry['sha256']})")
    if entry and entry["records"] > len(spans):
        damage.unnamed_records += entry["records"] - len(spans)
        damage.problems.append(f"{path.name}: {entry['records'] - len(spans)} records cannot be named any more")
    return spans, bad


def _check_open(path: Path, manifest: dict[str, Any] | None, damage: Damage, progress: Progress) -> None:
    """An open shard has no checksum as a whole: between its records only what breaks their layout is found."""
    messages = list(scan(path, width := _width(path, manifest)))
    end = read_schema(path, manifest) if manifest is not None else (messages[0].start if messages else 0)
    for message in messages:
        if message.start != end:
            damage.problems.append(f"{path.name}: bytes {end} to {message.start} cannot be read")
        end = message.start + message.size
        bad = _check_records(path, message.spans, width, damage)
        if bad:
            damage.problems.append(f"{path.name}: {len(bad)} records of the batch at byte {message.start} are damaged")
    size = path.stat().st_size
    if size > end and path.read_bytes()[end:] != END_OF_STREAM:
        damage.notes.append(f"{path.name}: {size - end} bytes after its last whole batch (a write under way, or torn)")
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
