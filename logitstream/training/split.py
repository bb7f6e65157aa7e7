"""The held-out sequences, set apart by their content and by the cache, whatever a run's settings.

Sequences stand in the order of a hash of their tokens. The first ones are held out and those after them trained on, so
a run of another length, order or seed on the same text holds out the same. A run with a cache notes the sequences that
it holds out in the cache; every later run on that cache evaluates on those and trains on none of them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from logitstream.cache import CacheReader
from logitstream.cache.disk import from_disk
from logitstream.cache.heldout import add_heldout, read_heldout
from logitstream.data.batches import split_batch
from logitstream.data.corpus import CacheDataset, collate
from logitstream.data.documents import number_documents
from logitstream.errors import DiskHangs
from logitstream.training.distributed import is_main_process, of_main_process
from logitstream.training.target_cache import may_hold_targets
from logitstream.types import TokenSequence, request_key

logger = logging.getLogger(__name__)

T = TypeVar("T")
ROWS_AT_ONCE = 1000
SEEN = "the cache %s holds targets of sequences that are held out from now on: a student trained from it has seen them"


def split_text(
    rows: Dataset, *, heldout_sequences: int, max_sequences: int = 0, cache: str = "", cached_only: bool = False
) -> tuple[Dataset, Dataset]:
    """Return training and held-out rows of a text, the same on every process, and note the held-out ones in the cache.

    cached_only trains on rows that the cache holds targets of. ValueError if none is left, CacheError if the cache's
    note is damaged.
    """

    def split() -> tuple[list[int], list[int]]:
        noted, reader, draw_set = _from_cache(cache, lambda: _look_up(cache), alone=cached_only) or ([], None, 0)
        contents = contents_of(rows)
        order = sorted(range(len(contents)), key=lambda i: sorted(contents[i]))
        apart = {content_of(sequence.token_ids) for sequence in noted}
        distinct = {contents[i]: i for i in reversed(order)}  # of equal rows the first one, and the first row last
        heldout = [i for content, i in reversed(distinct.items()) if content & apart][:heldout_sequences]
        new = [] if heldout else list(reversed(distinct.values()))[:heldout_sequences]
        if reader is not None and any(_is_cached(rows, i, reader, draw_set) for i in new):
            logger.warning(SEEN, cache)
        heldout = heldout or new
        _tell_of_number(len(heldout), heldout_sequences)
        apart.update(*(contents[i] for i in heldout))
        train = [i for i in order if not contents[i] & apart]
        _refuse_nothing(train, len(rows), heldout_sequences)
        if cached_only and reader is not None:
            train = _cached(rows, train, reader, draw_set, max_sequences)
        _note(cache, documents_of(rows, new))
        return train[: max_sequences or None], heldout

    train, heldout = by_main_process(split)
    return rows.select(sorted(train)), rows.select(sorted(heldout))


def split_cache(
    corpus: CacheDataset, *, heldout_sequences: int, max_sequences: int = 0, cache: str = ""
) -> tuple[CacheDataset, Dataset]:
    """Return training and held-out sequences of a cache alone, the same on every process.

    Those that the cache notes are held out; without a note the first by key, which are noted if possible. ValueError if
    none is left to train on, CacheError if the note is damaged.
    """

    def split() -> tuple[list[int], list[TokenSequence]]:
        noted = from_disk(cache, lambda: read_heldout(cache)) if cache else []
        apart = {index for index in map(corpus.find, noted) if index is not None}
        if not noted and heldout_sequences:
            apart = set(range(min(heldout_sequences, len(corpus))))
            noted = sorted((corpus.sequence(index) for index in apart), key=TokenSequence.digest)
            logger.warning(SEEN, cache)
            _note(cache, [one for one in noted if one.num_wanted])
        _tell_of_number(len(noted), heldout_sequences)
        train = [index for index in range(len(corpus)) if index not in apart]
        _refuse_nothing(train, len(corpus), heldout_sequences)
        return train[: max_sequences or None], noted[:heldout_sequences]

    train, heldout = by_main_process(split)
    masks = [np.ones(len(one), bool) if one.loss_mask is None else one.loss_mask for one in heldout]
    columns = {"input_ids": [one.token_ids.tolist() for one in heldout], "loss_mask": [one.tolist() for one in masks]}
    return corpus.select(np.array(train, np.int64)), Dataset.from_dict(columns)


def by_main_process(decide: Callable[[], T]) -> T:
    """Return on every process what the main process decides; raise its error on all, so that none waits for others."""
    decided: Any = None
    if is_main_process():
        try:
            decided = decide()
        except Exception as error:
            decided = error
    decided = of_main_process(decided)
    if isinstance(decided, Exception):
        raise decided
    found: T = decided
    return found


def documents_of(rows: Dataset, indices: Sequence[int]) -> list[TokenSequence]:
    """Return the documents of some rows, with the masks that they are sent with."""
    return [sequence for index in indices for _, sequence in split_batch(collate([rows[int(index)]]))]


def contents_of(rows: Dataset) -> list[frozenset[bytes]]:
    """Return the digests of each row's documents, whichever of their rows count."""
    names = [name for name in ("input_ids", "position_ids") if name in rows.column_names]
    found: list[frozenset[bytes]] = []
    for batch in rows.select_columns(names).with_format("numpy").iter(batch_size=ROWS_AT_ONCE):
        for index, token_ids in enumerate(batch["input_ids"]):
            (numbers,) = number_documents({name: batch[name][index][None] for name in names})
            found.append(frozenset(content_of(token_ids[numbers == n]) for n in range(1, numbers.max() + 1)))
    return found


def content_of(token_ids: npt.NDArray[Any]) -> bytes:
    """Return 16 bytes that depend on the tokens alone: other masks make no other text."""
    content = np.ascontiguousarray(token_ids, dtype="<i4").tobytes()
    return hashlib.blake2b(content, digest_size=16, person=b"ls-heldout").digest()


def _tell_of_number(found: int, wanted: int) -> None:
    if found < wanted:
        logger.warning("%d sequences are held out, not %d: those that the cache notes", found, wanted)


def _refuse_nothing(train: Sequence[int], num_rows: int, heldout_sequences: int) -> None:
    if not train:
        raise ValueError(f"heldout_sequences = {heldout_sequences} leaves nothing of {num_rows} to train on")


def _cached(rows: Dataset, train: Sequence[int], cache: CacheReader, draw_set: int, max_sequences: int) -> list[int]:
    """Return the rows that can be trained on without a teacher; ValueError if there are none."""
    found = [i for i in train if _is_cached(rows, i, cache, draw_set)]
    if not found:
        raise ValueError(
            f"the cache {cache.source} holds targets of none of the text's {len(train)} sequences: expected the text, "
            "tokenizer and sequence_tokens that it was made with"
        )
    if len(found) < min(len(train), max_sequences or len(train)):
        text = "the cache %s holds targets of %d of the text's %d sequences"
        logger.warning(text, cache.source, len(found), len(train))
    return found


def _is_cached(rows: Dataset, index: int, cache: CacheReader, draw_set: int) -> bool:
    digest = cache.fingerprint.digest
    return all(request_key(digest, one, draw_set) in cache for one in documents_of(rows, [index]))


def _look_up(cache: str) -> tuple[list[TokenSequence], CacheReader | None, int]:
    """Return the held-out sequences that a cache notes, a reader if it holds targets, and its first draw set."""
    noted, reader = read_heldout(cache), CacheReader(cache) if may_hold_targets(cache) else None
    return noted, reader, 0 if reader is None else int(min(reader.draw_sets(), default=0))


def _note(cache: str, sequences: Sequence[TokenSequence]) -> None:
    if sequences:
        _from_cache(cache, lambda: add_heldout(cache, sequences), alone=False)


def _from_cache(cache: str, work: Callable[[], T], *, alone: bool) -> T | None:
    """Return what `work` finds; None without a cache or, with a warning and unless the run has nothing else, a disk."""
    try:
        return from_disk(cache, work, alone=alone) if cache else None
    except (OSError, DiskHangs) as error:
        if alone:
            raise
        logger.warning("cache %s: later runs may train on what this one holds out: %s", cache, error)
        return None
