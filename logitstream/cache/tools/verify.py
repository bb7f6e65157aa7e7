"""Read through a cache: find every damaged byte, and count what it holds."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest as xxh3

from logitstream.cache.heldout import read_heldout
from logitstream.cache.index import Log, read_index, sealed_index, shards_in
from logitstream.cache.manifest import Manifest, read_id_model, read_manifest
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import END_OF_STREAM, age, open_shard_file, read_stored, token_dtype
from logitstream.cache.tools import watched
from logitstream.errors import CacheError, CorruptRecord


def verify(directory: Path) -> tuple[list[str], int]:
    """Read every byte of a cache; CacheError if there is none.

    Returns a sentence for each piece of damage, and how many records are whole.
    """
    shards = all_shards(directory)
    try:
        manifest = read_manifest(directory)
    except CacheError as error:
        if not shards:
            raise
        return [f"{error}; no shard can be checked without it"], 0
    problems, whole_records = list[str](), 0
    for read in (lambda: read_id_model(directory, manifest.fingerprint), lambda: read_heldout(directory)):
        try:
            read()
        except (CacheError, OSError) as error:
            problems.append(str(error))
    for path, is_sealed in watched(list(shards.items()), "verifying"):
        log = shard_log(path, is_sealed, manifest)
        whole_records += int(check_shard(path, is_sealed, log, problems).sum())
    return problems, whole_records


def all_shards(directory: Path) -> dict[Path, bool]:
    """Return the shards in a folder, the oldest first, and if they are sealed; also if only the index is left."""
    found = {path.with_suffix(".arrow"): True for path in directory.glob("*.index")} | shards_in(directory)
    return {path: found[path] for path in sorted(found, key=age)}


def shard_log(path: Path, is_sealed: bool, manifest: Manifest) -> Log:
    """Read a shard's index, or what the shard makes of it, as far as possible; whatever is wrong is in `problem`."""
    log = Log([], 0)
    try:
        log = read_index(path, manifest)._replace(problem="")
    except (CacheError, OSError) as error:
        log = log._replace(problem=f"{path.name}: {error}")
    try:
        return sealed_index(path, manifest) if is_sealed else log
    except OSError as error:
        return log._replace(problem=f"{path.name} cannot be read: {error}")


def check_shard(path: Path, is_sealed: bool, log: Log, problems: list[str]) -> npt.NDArray[np.bool_]:
    """Read all of a shard, say what is wrong with it, and return which of its records are whole."""
    is_whole, found = np.zeros(len(log.spans), bool), list[str]()
    try:
        fd = open_shard_file(path)
        try:
            is_whole = _check_content(fd, log, found)
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
    return is_whole


def _check_content(fd: int, log: Log, found: list[str]) -> npt.NDArray[np.bool_]:
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
    return np.concatenate(parts)


def _is_whole(fd: int, span: bytes) -> bool:
    try:
        read_stored(fd, span)
    except (CorruptRecord, OSError):
        return False
    return True


def describe(reader: CacheReader) -> dict[str, Any]:
    """Return figures of a cache and where it comes from.

    bytes counts the shards and their indexes, which grow with the records. Figures a token are None without tokens.
    """
    manifest, fingerprint = reader.manifest, reader.fingerprint
    num_bytes, part_bytes = 0, Counter[str]()
    for shard in reader.shards:
        log = shard_log(shard.path, shard.is_sealed, manifest)
        num_bytes += log.end + max((entry.end for entry in log.entries), default=0)
        num_bytes += len(END_OF_STREAM) if shard.is_sealed else 0
        for part in ("tokens", "payload"):
            part_bytes[part] += int(log.spans[f"{part}_bytes"].sum(dtype=np.int64))
    tokens = part_bytes["tokens"] // token_dtype(fingerprint.vocab_size).itemsize
    draw_sets, counts = np.unique(reader.draw_sets(), return_counts=True)
    sealed = sum(shard.is_sealed for shard in reader.shards)
    return {
        "records": reader.num_records,
        "distinct_keys": len(reader),
        "tokens": tokens,
        "bytes": num_bytes,
        "payload_bytes_per_token": round(part_bytes["payload"] / tokens, 3) if tokens else None,
        "bytes_per_token": round(num_bytes / tokens, 3) if tokens else None,
        "shards": {"sealed": sealed, "open": len(reader.shards) - sealed},
        "distinct_keys_by_draw_set": dict(zip(map(str, draw_sets.tolist()), counts.tolist(), strict=True)),
        "fingerprint_digest": fingerprint.digest,
        "fingerprint": asdict(fingerprint),
        "provenance": manifest.provenance,
        "created": manifest.created,
    }
