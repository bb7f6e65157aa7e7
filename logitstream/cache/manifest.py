"""What a cache directory holds: one fingerprint, where its targets come from, and one entry for each sealed shard.

Nothing that several writers share is ever rewritten: the manifest is made once, and a shard's entry lies beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from logitstream.cache.shard import FIRST_FORMAT, SPAN_DTYPE, Spans
from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.files import write_whole
from logitstream.types import Fingerprint

FORMAT = "logitstream-cache/2"
MANIFEST = "manifest.json"
ID_MODEL = "id_model.bin"
VERSIONS = "versions"
"""The folder of the caches of newer weights."""
INDEX_HEADER = struct.Struct("<8s3Q32s")
"""Magic, number of records, size of the shard in bytes, XXH3 of the spans, digest of the fingerprint."""
UNKNOWN_FINGERPRINT = bytes(32)
"""Of an index that was written before it named its fingerprint."""
INDEX_MAGIC = b"LSINDEX1"
LEFTOVER = re.compile(r"\.(arrow\.new|[0-9a-f]{32})$")
LEFTOVER_SECONDS = 3600.0


def create_manifest(
    directory: Path, fingerprint: Fingerprint, *, provenance: dict[str, Any], id_model: bytes = b""
) -> dict[str, Any]:
    """Make the directory a cache of this fingerprint, or check that it is one; safe from several processes at once.

    The id model is written where none lies there, or another one than the fingerprint names. Raises FingerprintMismatch
    where the directory holds another fingerprint, ValueError where the id model does not belong to this one.
    """
    Fingerprint.from_json(asdict(fingerprint))  # else nobody could open it again
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(id_model).hexdigest() if id_model else ""
    if id_model and digest != fingerprint.id_model_digest:
        raise ValueError(f"id model of SHA-256 {digest}, the fingerprint names {fingerprint.id_model_digest or 'none'}")
    if not (directory / MANIFEST).exists():
        if fingerprint.id_model_digest and not id_model:
            raise ValueError(
                "a new cache of this fingerprint needs the teacher's id model: pass id_model=info.id_model"
            )
        if id_model:  # before the manifest, so that nobody finds one without its id model
            write_whole(directory / ID_MODEL, id_model, replace=False)
        manifest = {
            "format": FORMAT,
            "fingerprint": asdict(fingerprint),
            "fingerprint_digest": fingerprint.digest,
            "provenance": provenance,
            "versions": {name: version(name) for name in ("logitstream", "pyarrow")},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_whole(directory / MANIFEST, render(manifest), replace=False)
    manifest = read_manifest(directory, fingerprint)
    if id_model and _sha256(directory / ID_MODEL) != digest:  # another first writer's, damaged or gone
        write_whole(directory / ID_MODEL, id_model)
    return manifest


def _sha256(path: Path) -> str:
    """Of a file's content; empty where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def read_manifest(directory: Path, fingerprint: Fingerprint | None = None) -> dict[str, Any]:
    """The manifest, checked; FingerprintMismatch spells out every field that differs from `fingerprint`."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CacheError(f"{directory} is no cache: expected {MANIFEST} in it") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}") from error
    manifest = parse(content, path)
    if manifest.get("format") not in (FORMAT, FIRST_FORMAT):
        raise CacheError(f"{path}: expected format {FORMAT!r} or {FIRST_FORMAT!r}, got {manifest.get('format')!r}")
    if not isinstance(manifest.get("provenance"), dict) or not isinstance(manifest.get("created"), str):
        raise CacheError(f"{path} is damaged: expected an object `provenance` and a text `created` in it")
    found = manifest_fingerprint(manifest, path)
    if fingerprint is not None and found != fingerprint:
        raise FingerprintMismatch(
            f"{directory} holds targets of another fingerprint (wanted against found): {fingerprint.differences(found)}"
        )
    return manifest


def read_id_model(directory: Path, fingerprint: Fingerprint) -> bytes:
    """The id model that decodes this cache's payloads, checked; empty where the fingerprint names none."""
    if not fingerprint.id_model_digest:
        return b""
    path = directory / ID_MODEL
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing: its SHA-256 should be {fingerprint.id_model_digest}") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != fingerprint.id_model_digest:
        raise CacheError(f"{path} is damaged: expected SHA-256 {fingerprint.id_model_digest}, got {found}")
    return content


def manifest_fingerprint(manifest: dict[str, Any], path: Path) -> Fingerprint:
    """The fingerprint of a manifest or shard, each part of it checked, whose own digest must agree."""
    try:
        fingerprint = Fingerprint.from_json(manifest["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} holds no fingerprint of ours: {error}") from error
    if fingerprint.digest != manifest.get("fingerprint_digest"):
        raise CacheError(
            f"{path} is damaged: its fingerprint {asdict(fingerprint)} has digest {fingerprint.digest}, "
            f"it names {manifest.get('fingerprint_digest')!r}"
        )
    return fingerprint


def render(content: dict[str, Any]) -> bytes:
    """JSON with its own SHA-256, in the one form that `parse` accepts, so that any flipped byte is found."""
    body = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    return json.dumps(
        content | {"sha256_of_the_rest": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True
    ).encode()


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """The inverse of `render`; CacheError where a byte was changed, or where no `render` can have made it."""
    try:
        parsed = json.loads(content)
        rest = {name: value for name, value in parsed.items() if name != "sha256_of_the_rest"}
        rendered = render(rest)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: no JSON object ({error})") from error
    if rendered != content:
        raise CacheError(f"{path} is damaged: its content does not match its own SHA-256")
    return rest


def read_entry(shard: Path) -> dict[str, Any]:
    """A sealed shard's entry, checked; CacheError where it is missing, damaged or not one."""
    path = shard.with_suffix(".json")
    try:
        entry = parse(path.read_bytes(), path)
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}") from error
    draw_sets, sha256 = entry.get("draw_sets"), entry.get("sha256")
    if isinstance(draw_sets, dict) and isinstance(sha256, str):
        numbers = [entry.get(name) for name in ("bytes", "records", "tokens", "payload_bytes")]
        are_numbers = all(type(n) is int and n >= 0 for n in [*numbers, *draw_sets.values()])
        if are_numbers and all(re.fullmatch(r"[0-9]{1,20}", name) for name in draw_sets):
            return entry
    raise CacheError(f"{path} is damaged: it is no entry of a shard")


def write_entry(shard: Path, *, fingerprint_digest: str, sha256: str, size: int, spans: Spans) -> None:
    """The sidecars of a shard that is about to be sealed: the index, and its entry in the manifest."""
    body = spans.tobytes()
    header = _index_header(body, size, bytes.fromhex(fingerprint_digest))
    write_whole(shard.with_suffix(".index"), header + body, sync=False)  # the shard's name, which comes next, is synced
    entry = {"shard": shard.name, "bytes": size, "sha256": sha256} | summary(spans)
    write_whole(shard.with_suffix(".json"), render(entry), sync=False)


def summary(spans: Spans) -> dict[str, Any]:
    """What a shard's entry says of its records."""
    draw_sets, counts = np.unique(spans["draw_set"], return_counts=True)
    return {
        "records": len(spans),
        "tokens": int(spans["tokens_count"].sum(dtype=np.int64)),
        "payload_bytes": int(spans["payload_count"].sum(dtype=np.int64)),
        "draw_sets": {str(draw_set): int(count) for draw_set, count in zip(draw_sets, counts, strict=True)},
    }


def read_index(path: Path, fingerprint_digest: str, shard_bytes: int | None = None) -> Spans:
    """The spans of a shard of this size (None: of any); CacheError where they are missing or damaged.

    Also where the index names another fingerprint than `fingerprint_digest` (empty: any).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing") from error
    header, body = content[: INDEX_HEADER.size], memoryview(content)[INDEX_HEADER.size :]
    if len(header) == INDEX_HEADER.size:
        _, _, named_bytes, _, named_fingerprint = INDEX_HEADER.unpack(header)
        shard_bytes = named_bytes if shard_bytes is None else shard_bytes
        is_whole = header == _index_header(body, shard_bytes, named_fingerprint)
        if is_whole and len(body) % SPAN_DTYPE.itemsize == 0:
            if fingerprint_digest and named_fingerprint not in (bytes.fromhex(fingerprint_digest), UNKNOWN_FINGERPRINT):
                raise CacheError(f"{path} belongs to targets of another fingerprint, {named_fingerprint.hex()}")
            return np.frombuffer(body, SPAN_DTYPE)
    raise CacheError(f"{path} is damaged, or does not belong to a shard of {shard_bytes} bytes")


def _index_header(body: bytes | memoryview, shard_bytes: int, fingerprint: bytes) -> bytes:
    records = len(body) // SPAN_DTYPE.itemsize
    return INDEX_HEADER.pack(INDEX_MAGIC, records, shard_bytes, xxhash.xxh3_64_intdigest(body), fingerprint)


def caches_in(directory: Path) -> list[Path]:
    """The folder of a cache and those of newer weights below it."""
    return [directory, *sorted(path.parent for path in directory.glob(f"{VERSIONS}/*/{MANIFEST}"))]


def remove_leftovers(directory: Path) -> None:
    """Drop what killed processes had begun to write or to download and nobody has touched for an hour."""
    for path in directory.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if LEFTOVER.search(path.name) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def tree_bytes(directory: Path) -> int:
    """Bytes of a cache and of those below it: newer weights have theirs in `versions`."""
    return sum(file_bytes(Path(folder, name)) for folder, _, names in os.walk(directory) for name in names)


def file_bytes(path: Path) -> int:
    """Of a regular file; 0 where it is none, or was renamed or removed meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
