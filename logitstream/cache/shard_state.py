"""What a shard's file is, whatever became of it: readable or not, whose, and where its records lie."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logitstream.cache.manifest import manifest_fingerprint, read_index
from logitstream.cache.shard import SCHEMAS, SPAN_DTYPE, Spans, scanned_spans, token_width
from logitstream.errors import CacheError


def unreadable(path: Path) -> str:
    """Why a shard's file cannot be opened for reading, in words; empty where it can."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"{path.name} is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    if not stat.S_ISREG(mode):
        return f"{path.name} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}: expected a shard"
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return ""


def shard_spans(path: Path, manifest: dict[str, Any] | None) -> tuple[Spans, str]:
    """The spans of a sealed shard, found again in the shard itself where its index is damaged, and what was wrong.

    Never raises: what cannot be read has no spans.
    """
    digest: str = manifest["fingerprint_digest"] if manifest is not None else ""
    problem = unreadable(path)
    try:
        return read_index(path.with_suffix(".index"), digest, None if problem else path.stat().st_size), problem
    except (CacheError, OSError) as error:
        problem = problem or str(error)
    try:
        if is_foreign(path):
            problem = f"{path.name} is an Arrow file of other columns, no shard: nobody reads it"
        elif not unreadable(path):
            return scanned_spans(path, shard_width(path, manifest)), problem
    except OSError as error:
        problem = f"{problem}; {path.name} cannot be read: {error}"
    return np.zeros(0, SPAN_DTYPE), problem


def other_fingerprint(path: Path, manifest: dict[str, Any]) -> str:
    """Digest of the fingerprint that a shard's head names, if it is whole and not the manifest's; else empty."""
    schema = _head(path)
    try:
        named = json.loads(schema.metadata[b"logitstream"]) if schema is not None else {}
        found = manifest_fingerprint(named, path).digest
    except (CacheError, RecursionError, KeyError, TypeError, ValueError):
        return ""
    return "" if found == manifest["fingerprint_digest"] else found


def is_foreign(path: Path) -> bool:
    """Whether a file that is named like a shard is an Arrow stream of other columns: somebody else's."""
    schema = _head(path)
    return schema is not None and not any(schema.equals(known) for known in SCHEMAS.values())


def _head(path: Path) -> pa.Schema | None:
    """The schema at the head of a file, if one can be read there."""
    if unreadable(path):
        return None
    try:
        with pa.OSFile(str(path)) as file:
            return pa.ipc.read_schema(file)
    except (pa.ArrowException, OSError, EOFError, MemoryError):
        return None


def shard_width(path: Path, manifest: dict[str, Any] | None) -> int:
    """Bytes of a token id, by the manifest or else by the shard's own head."""
    if manifest is not None:
        return token_width(manifest)
    schema = _head(path)
    return next((width for width, known in SCHEMAS.items() if schema is not None and schema.equals(known)), 4)
