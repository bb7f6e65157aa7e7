"""Find every damaged byte of a cache, and which sequences must be fetched again."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.heldout import FILE as HELDOUT
from logitstream.cache.heldout import read_heldout
from logitstream.cache.index import Entry, index_path, joined, read_entries, sealed_entries
from logitstream.cache.manifest import ID_MODEL, MANIFEST, VERSIONS, Manifest, caches_in, read_id_model, read_manifest
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import (
    END_OF_STREAM,
    OPEN_SUFFIX,
    SPAN,
    Span,
    Spans,
    head_bytes,
    read_head,
    read_parts,
    shard_schema,
)
from logitstream.errors import CacheError, CorruptRecord

Progress = Callable[[int], object]
"""Told how many bytes were read since the last call."""


@dataclass(slots=True)
class Damage:
    """Findings of `verify`: a sentence a problem or a note; keys of damaged records, and those without a whole copy."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged_keys: set[bytes] = field(default_factory=set)
    lost_keys: list[bytes] = field(default_factory=list)
    whole_records: int = 0


def verify(directory: Path, progress: Progress = lambda _: None) -> Damage:
    """Read every byte of a cache and of those in its `versions` folder; CacheError if there is no cache.

    What cannot be read is named, and the rest is read all the same.
    """
    damage = Damage()
    for folder in caches_in(directory):
        found = Damage()
        try:
            _verify_one(folder, found, progress)
        except OSError as error:
            found.problems.append(f"{folder} cannot be listed: {error}")
        damage.problems += found.problems
        damage.notes += found.notes
        damage.damaged_keys |= found.damaged_keys
        damage.lost_keys += found.lost_keys
        damage.whole_records += found.whole_records
    return damage


def _verify_one(directory: Path, damage: Damage, progress: Progress) -> None:
    names = sorted(path.name for path in directory.iterdir())
    manifest = _check_head(directory, names, damage)
    if manifest is not None:
        for path in [directory / name for name in names if name.endswith((".arrow", OPEN_SUFFIX))]:
            check_shard(path, manifest, damage, progress)
        for shard in missing_shards(directory, manifest):
            damage.problems.append(f"{shard.name} is missing, its index is there")
            damage.damaged_keys.update(_named_in_index(shard, manifest) or ())
    ours = (MANIFEST, ID_MODEL, HELDOUT, VERSIONS)
    for name in names:
        if not name.startswith(".") and name not in ours and not name.endswith((".arrow", OPEN_SUFFIX, ".index")):
            damage.notes.append(f"{name} is no file of a cache: nobody reads it")
    if damage.damaged_keys:
        reader = None
        with suppress(CacheError):  # has been named
            reader = CacheReader(directory)
        damage.lost_keys = sorted(key for key in damage.damaged_keys if reader is None or reader.get(key) is None)


def _check_head(directory: Path, names: list[str], damage: Damage) -> Manifest | None:
    if MANIFEST not in names and not any(name.endswith(".arrow") for name in names):
        raise CacheError(f"{directory} is no cache: expected {MANIFEST} or shards in it")
    try:
        manifest = read_manifest(directory)
    except CacheError as error:
        damage.problems.append(f"{error}; no shard can be checked without it")
        return None
    for read in (lambda: read_id_model(directory, manifest.fingerprint), lambda: read_heldout(directory)):
        try:
            read()
        except (CacheError, OSError) as error:
            damage.problems.append(str(error))
    return manifest


def unreadable(path: Path) -> str:
    """Return why a shard's file cannot be opened for reading, in words; empty if it can."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            os.close(os.open(path, os.O_RDONLY))
            return ""
    except FileNotFoundError:
        return f"{path.name} is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return f"{path.name} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}: expected a shard"


def stranger(path: Path, manifest: Manifest) -> str:
    """Return what a file that is named like a shard is instead; empty if it is one of this cache, or damaged."""
    schema, _ = read_head(path)
    expected = shard_schema(manifest)
    if schema is None or schema.equals(expected, check_metadata=True):
        return ""
    if schema.names != expected.names:
        return f"{path.name} is an Arrow file of other columns, no shard: nobody reads it"
    named = (schema.metadata or {}).get(b"logitstream", b"")
    if manifest.fingerprint.digest.encode() in named:
        return ""
    return f"{path.name} is a shard of another fingerprint: nobody reads it, remove it"


def missing_shards(directory: Path, manifest: Manifest) -> list[Path]:
    """Return the shards of which only the index is left, unless it names no record."""
    shards = [path.with_suffix(".arrow") for path in sorted(directory.glob("*.index"))]
    gone = [shard for shard in shards if not os.path.lexists(shard) and not os.path.lexists(f"{shard}{OPEN_SUFFIX}")]
    return [shard for shard in gone if _named_in_index(shard, manifest) != []]


def _named_in_index(shard: Path, manifest: Manifest) -> list[bytes] | None:
    """Return the keys that an index names; None if it cannot be read."""
    with suppress(CacheError, OSError):
        keys: list[bytes] = joined(read_entries(index_path(shard), manifest.fingerprint.digest)[0])["key"].tolist()
        return keys
    return None


def check_shard(
    path: Path, manifest: Manifest, damage: Damage, progress: Progress = lambda _: None
) -> tuple[Spans, npt.NDArray[np.bool_]]:
    """Read all of a shard; return the spans of its records, and which of them are whole."""
    nothing = joined([]), np.zeros(0, bool)
    if problem := unreadable(path):
        damage.problems.append(problem)
        damage.damaged_keys.update(_named_in_index(path, manifest) or ())
        return nothing
    if problem := stranger(path, manifest):
        damage.problems.append(problem)
        return nothing
    entries = list[Entry]()
    try:
        if not path.name.endswith(OPEN_SUFFIX):
            entries, _, problem = sealed_entries(path, manifest)
        elif not head_bytes(path, shard_schema(manifest)) and path.exists():
            problem = f"{path.name}: no head of a shard of this cache can be read"
        else:
            entries = read_entries(index_path(path), manifest.fingerprint.digest)[0]
    except FileNotFoundError:  # sealed or pruned meanwhile
        return nothing
    except (CacheError, OSError) as error:
        problem = str(error)
    if problem:
        damage.problems.append(problem)
        damage.damaged_keys.update(set(_named_in_index(path, manifest) or ()) - set(joined(entries)["key"].tolist()))
    return _check_content(path, manifest, entries, damage, progress)


def _check_content(
    path: Path, manifest: Manifest, entries: list[Entry], damage: Damage, progress: Progress
) -> tuple[Spans, npt.NDArray[np.bool_]]:
    whole, end, problems = [np.zeros(0, bool)], 0, list[str]()
    if entries and entries[0].offset < 0:  # found by a scan, after the head
        end = head_bytes(path, shard_schema(manifest))
    with path.open("rb", buffering=0) as file:
        for entry in entries:
            sound = np.ones(len(entry.spans), bool)
            try:
                content = os.pread(file.fileno(), entry.end - entry.start, entry.start)
                is_whole = entry.start == end and xxh3(content) == entry.checksum
            except OSError:
                is_whole = False
            if not is_whole:
                sound = _sound_records(path, file.fileno(), entry.spans, problems)
                if entry.offset >= 0 and sound.all():
                    problems.append(f"{path.name}: bytes {entry.start} to {entry.end} are damaged outside of records")
            whole.append(sound)
            progress(entry.end - end)
            end = entry.end
        try:
            rest = os.pread(file.fileno(), 1 << 20, end)
        except OSError as error:
            rest = b""
            problems.append(f"{path.name} cannot be read: {error}")
    if path.name.endswith(OPEN_SUFFIX):
        if rest:
            damage.notes.append(f"{path.name}: {len(rest)} bytes after its last whole batch (being written, or torn)")
    elif rest != END_OF_STREAM and entries and not problems:
        problems.append(f"{path.name}: damaged after byte {end}: expected its end")
    spans, mask = joined(entries), np.concatenate(whole)
    if bad := len(mask) - int(mask.sum()):
        problems.append(f"{path.name}: {bad} of {len(mask)} records are damaged or cannot be read")
    damage.problems += dict.fromkeys(problems)
    damage.damaged_keys.update(spans["key"][~mask].tolist())
    damage.whole_records += int(mask.sum())
    return spans, mask


def _sound_records(path: Path, fd: int, spans: Spans, problems: list[str]) -> npt.NDArray[np.bool_]:
    """Read the records one by one; return which of them are whole."""
    sound = np.zeros(len(spans), bool)
    for row in range(len(spans)):
        try:
            read_parts(fd, Span._make(SPAN.unpack(spans[row].tobytes())))
            sound[row] = True
        except CorruptRecord:
            continue
        except OSError as error:
            problems.append(f"{path.name} cannot be read: {error}")
    return sound
