"""The sequences that no student of a cache may train on: a file beside its manifest that every later run follows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import fsspec
import numpy as np

from logitstream.cache.manifest import parse, render
from logitstream.cache.remote import is_remote, local_path
from logitstream.errors import CacheError, InvalidSequence
from logitstream.files import alone, write_whole
from logitstream.types import MAX_VOCAB_SIZE, TokenSequence

FILE = "heldout.lst"
LOCK = ".heldout.lock"


def read_heldout(directory: str | Path) -> list[TokenSequence]:
    """Return what earlier runs held out, in the order of the digests; empty if no run has.

    Raises OSError if it cannot be read, CacheError if it is damaged.
    """
    path = f"{str(directory).rstrip('/')}/{FILE}"
    try:
        content = _in_store(path) if is_remote(directory) else local_path(path).read_bytes()
    except FileNotFoundError:
        return []
    try:
        found = [_sequence(**entry) for entry in parse(content, Path(path))["sequences"]]
    except (KeyError, TypeError, ValueError, OverflowError, InvalidSequence) as error:
        raise CacheError(f"{path} is damaged: expected a list of sequences ({error})") from error
    return sorted(found, key=TokenSequence.digest)


def add_heldout(directory: str | Path, sequences: Iterable[TokenSequence]) -> None:
    """Hold out more sequences; the folder need not be a cache yet. Raises OSError or CacheError.

    Several runs may do so at once, except in a store, which knows no locks.
    """
    more, path = {sequence.digest(): sequence for sequence in sequences}, f"{str(directory).rstrip('/')}/{FILE}"
    if more.keys() <= {sequence.digest() for sequence in read_heldout(directory)}:
        return
    with contextlib.nullcontext() if is_remote(directory) else alone(local_path(directory) / LOCK):
        added = {sequence.digest(): sequence for sequence in read_heldout(directory)} | more
        content = render({"sequences": [_entry(added[digest]) for digest in sorted(added)]})
        if is_remote(directory):
            _in_store(path, content)
        else:
            write_whole(local_path(path), content)


def _in_store(path: str, content: bytes | None = None) -> bytes:
    """Read a file in a store, or write it; whatever the store raises becomes OSError."""
    try:
        with fsspec.open(path, "rb" if content is None else "wb") as file:
            return bytes(file.read()) if content is None else bytes(file.write(content))
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {error}") from error


def _entry(sequence: TokenSequence) -> dict[str, list[int]]:
    mask = {} if sequence.loss_mask is None else {"loss_mask": sequence.loss_mask.astype(int).tolist()}
    return {"token_ids": sequence.token_ids.tolist()} | mask


def _sequence(token_ids: list[int], loss_mask: list[int] | None = None) -> TokenSequence:
    mask = None if loss_mask is None else np.asarray(loss_mask, np.int64).astype(bool)
    found = TokenSequence(token_ids=np.asarray(token_ids, np.int32), loss_mask=mask)
    found.validate(vocab_size=MAX_VOCAB_SIZE, max_sequence_tokens=1 << 24)
    return found
