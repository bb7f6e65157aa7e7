"""Finding every damaged byte of a cache directory, and which sequences must be fetched again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logitstream.cache.manifest import MANIFEST, manifest_fingerprint, parse, read_id_model, read_index, read_manifest
from logitstream.cache.open_shard import OPEN_SUFFIX
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import END_OF_STREAM, SPAN_DTYPE, Spans, read_schema, scan
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


def verify(directory: Path, progress: Progress = lambda _: None) -> Damage:
    """Read every byte of every file; CacheError where the directory holds no cache at all."""
    damage = Damage()
    manifest = _check_head(directory, damage)
    for path in sorted(directory.glob("*.arrow")):
        _check_sealed(path, damage, progress)
    for path in sorted(directory.glob(f"*{OPEN_SUFFIX}")):
        _check_open(path, manifest, damage, progress)
    for sidecar in sorted([*directory.glob("*.index"), *directory.glob("*.json")]):
        if sidecar.name != MANIFEST and not sidecar.with_suffix(".arrow").exists():
            damage.problems.append(f"{sidecar.name}: its shard {sidecar.with_suffix('.arrow').name} is missing")
    if damage.damaged_keys:
        reader = CacheReader(directory) if manifest is not None else None
        damage.lost_keys = sorted(key for key in damage.damaged_keys if reader is None or reader.get(key) is None)
    return damage


def shard_spans(path: Path) -> tuple[Spans, str]:
    """A sealed shard's spans, from its index or, where that is damaged, from the shard; and what is wrong with it."""
    try:
        return read_index(path.with_suffix(".index"), path.stat().st_size), ""
    except CacheError as error:
        parts = [message.spans for message in scan(path)]
        return np.concatenate([np.zeros(0, SPAN_DTYPE), *parts]), str(error)


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


def _check_sealed(path: Path, damage: Damage, progress: Progress) -> None:
    spans, problem = shard_spans(path)
    if problem:
        damage.problems.append(problem)
    try:
        entry = parse(path.with_suffix(".json").read_bytes(), path.with_suffix(".json"))
    except (CacheError, FileNotFoundError) as error:
        damage.problems.append(str(error))
        entry = {}
    bad = _check_records(path, spans, damage)
    if bad:
        damage.problems.append(f"{path.name}: {bad} of {len(spans)} records are damaged")
    found = _sha256(path, progress)
    if entry and entry["sha256"] != found and not bad:
        damage.problems.append(f"{path.name}: damaged outside of its records (SHA-256 {found}, not {entry['sha256']})")
    if entry and entry["records"] > len(spans):
        damage.unnamed_records += entry["records"] - len(spans)
        damage.problems.append(f"{path.name}: {entry['records'] - len(spans)} records cannot be named any more")


def _check_open(path: Path, manifest: dict[str, Any] | None, damage: Damage, progress: Progress) -> None:
    """An open shard has no checksum as a whole: between its records only what breaks their layout is found."""
    messages = list(scan(path))
    end = read_schema(path, manifest) if manifest is not None else (messages[0].start if messages else 0)
    for message in messages:
        if message.start != end:
            damage.problems.append(f"{path.name}: bytes {end} to {message.start} cannot be read")
        end = message.start + message.size
        bad = _check_records(path, message.spans, damage)
        if bad:
            damage.problems.append(f"{path.name}: {bad} records of the batch at byte {message.start} are damaged")
    size = path.stat().st_size
    if size > end and path.read_bytes()[end:] != END_OF_STREAM:
        damage.notes.append(f"{path.name}: {size - end} bytes after its last whole batch (a write under way, or torn)")
    progress(size)


def _check_records(path: Path, spans: Spans, damage: Damage) -> int:
    """Read a shard's records; how many are damaged."""
    bad: list[int] = []
    whole = sum(1 for _ in ShardFile(str(path)).records(spans, bad.append))
    damage.damaged_keys.update(spans["key"][row].tobytes() for row in bad)
    damage.whole_records += whole
    return len(bad)


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
