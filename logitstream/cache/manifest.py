"""A cache folder and its manifest: one fingerprint for all targets, where they come from, and the teacher's id model.

The manifest is written once and never rewritten, so any number of writers share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from logitstream.errors import CacheError, FingerprintMismatch
from logitstream.files import write_whole
from logitstream.types import Fingerprint

FORMAT = "logitstream-cache/3"
MANIFEST = "manifest.json"
ID_MODEL = "id_model.bin"
LEFTOVER = re.compile(r"\.[0-9a-f]{32}$")
LEFTOVER_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of a manifest: fingerprint, the first writer's notes on the targets' origin, time of creation."""

    fingerprint: Fingerprint
    provenance: dict[str, Any]
    created: str


def create_manifest(
    directory: Path, fingerprint: Fingerprint, *, provenance: dict[str, Any], id_model: bytes = b""
) -> Manifest:
    """Make the directory a cache of this fingerprint, or check that it is one; several processes may do so at once.

    An id model that is missing or damaged is written again. Raises FingerprintMismatch if the directory holds another
    fingerprint, ValueError if the id model does not belong to this one.
    """
    Fingerprint.from_json(asdict(fingerprint))  # otherwise nobody could open the cache again
    directory.mkdir(parents=True, exist_ok=True)
    is_new = not (directory / MANIFEST).exists()
    digest = hashlib.sha256(id_model).hexdigest() if id_model else ""
    if digest != fingerprint.id_model_digest and (id_model or is_new):
        expected = f"{fingerprint.id_model_digest or 'none'} as the fingerprint names it, got {digest or 'none'}"
        raise ValueError(f"expected the teacher's id model (id_model=info.id_model) of SHA-256 {expected}")
    if is_new:
        if id_model:  # before the manifest, so that nobody finds one without its id model
            write_whole(directory / ID_MODEL, id_model, replace=False)
        content = {
            "format": FORMAT,
            "fingerprint": asdict(fingerprint),
            "fingerprint_digest": fingerprint.digest,
            "provenance": provenance,
            "versions": {name: version(name) for name in ("logitstream", "pyarrow")},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_whole(directory / MANIFEST, render(content), replace=False)
    manifest = read_manifest(directory, fingerprint)
    if id_model:
        try:
            read_id_model(directory, fingerprint)
        except CacheError:  # damaged, gone, or another first writer's
            write_whole(directory / ID_MODEL, id_model)
    return manifest


def read_manifest(directory: Path, fingerprint: Fingerprint | None = None) -> Manifest:
    """Read and check the manifest; FingerprintMismatch spells out every field that differs from `fingerprint`."""
    path = directory / MANIFEST
    content = parse(_read(path, f"{directory} is no cache: expected {MANIFEST} in it"), path)
    if content.get("format") != FORMAT:
        raise CacheError(f"{path}: expected format {FORMAT!r}, got {content.get('format')!r}")
    provenance, created = content.get("provenance"), content.get("created")
    if not isinstance(provenance, dict) or not isinstance(created, str):
        raise CacheError(f"{path} is damaged: expected an object `provenance` and a text `created` in it")
    try:
        found = Fingerprint.from_json(content["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} holds no fingerprint of ours: {error}") from error
    if fingerprint is not None and found != fingerprint:
        differences = fingerprint.differences(found)
        raise FingerprintMismatch(
            f"{directory} holds targets of another fingerprint (wanted against found): {differences}"
        )
    return Manifest(fingerprint=found, provenance=provenance, created=created)


def read_id_model(directory: Path, fingerprint: Fingerprint) -> bytes:
    """Read and check the id model that decodes the payloads; empty if the fingerprint names none."""
    expected, path = fingerprint.id_model_digest, directory / ID_MODEL
    if not expected:
        return b""
    content = _read(path, f"{path} is missing: its SHA-256 should be {expected}")
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise CacheError(f"{path} is damaged: expected SHA-256 {expected}, got {found}")
    return content


def _read(path: Path, missing: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CacheError(missing) from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}") from error


def render(content: dict[str, Any]) -> bytes:
    """Return JSON with its own SHA-256, in the one form that `parse` accepts, so that any flipped byte is found."""
    body = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    return json.dumps(
        content | {"sha256_of_the_rest": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True
    ).encode()


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """Undo `render`; CacheError if a byte was changed, or if no `render` can have made it."""
    try:
        parsed = json.loads(content)
        rest = {name: value for name, value in parsed.items() if name != "sha256_of_the_rest"}
        rendered = render(rest)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: no JSON object ({error})") from error
    if rendered != content:
        raise CacheError(f"{path} is damaged: its content does not match its own SHA-256")
    return rest


def remove_leftovers(directory: Path) -> None:
    """Remove the partial files of killed processes that nobody has touched for an hour."""
    for path in directory.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if LEFTOVER.search(path.name) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def tree_bytes(directory: Path) -> int:
    """Return the bytes of all files in a folder and below it."""
    return sum(file_bytes(Path(folder, name)) for folder, _, names in os.walk(directory) for name in names)


def file_bytes(path: Path) -> int:
    """Return the size of a regular file; 0 if it is none, or if it was renamed or removed meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
