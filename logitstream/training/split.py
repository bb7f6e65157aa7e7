"""Which sequences are set apart for evaluation: a matter of their content and of the cache, of no run's settings.

Sequences stand in the order of a hash of their tokens. The first ones are held out, those after them trained on, so
that a run of another length, order or seed on the same text holds out the same. What a run with a cache holds out is
noted in the cache, tokens and all; every later run on it evaluates on those, and trains on none of them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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

Indices = npt.NDArray[np.int64]
Contents = list[frozenset[bytes]]
"""Digests of the tokens of each row's documents."""
ROWS_AT_ONCE = 1000


def split_text(
    rows: Dataset, *, heldout_sequences: int, max_sequences: int = 0, cache: str = "", cached_only: bool = False
) -> tuple[Dataset, Dataset]:
    """Training and held-out rows of a text, the same on every process; what is held out is noted in the cache.

    cached_only: rows that the cache lacks are not trained on. ValueError where none is left, CacheError where the
    cache's note is damaged.
    """
    decide = partial(_split_text, rows, heldout_sequences, max_sequences, cache, cached_only)
    train, heldout = _of_main_process(decide)
    return rows.select(train), rows.select(heldout)


def split_cache(
    corpus: CacheDataset, *, heldout_sequences: int, max_sequences: int = 0, cache: str = ""
) -> tuple[CacheDataset, Dataset]:
    """Training and held-out sequences of a cache alone, the same on every process.

    Held out are those that the cache notes; else the first by key, which are noted then where that can be done.
    ValueError where none is left to train on, CacheError where the note is damaged.
    """
    train, heldout = _of_main_process(partial(_split_cache, corpus, heldout_sequences, max_sequences, cache))
    masks = [np.ones(len(one), bool) if one.loss_mask is None else one.loss_mask for one in heldout]
    columns = {"input_ids": [one.token_ids for one in heldout], "loss_mask": masks}
    return corpus.select(train), Dataset.from_dict({name: [row.tolist() for row in c] for name, c in columns.items()})


def _of_main_process(decide: Callable[[], Any]) -> Any:
    """What the main process decides, on every one; an error too, so that none waits for the others."""
    decided: Any = None
    if is_main_process():
        try:
            decided = decide()
        except Exception as error:
            decided = error
    decided = of_main_process(decided)
    if isinstance(decided, Exception):
        raise decided
    return decided


def _split_text(
    rows: Dataset, heldout_sequences: int, max_sequences: int, cache: str, cached_only: bool
) -> tuple[Indices, Indices]:
    noted, reader, draw_sets = _look_up(cache, alone=cached_only)
    cached = CachedRows(rows, reader, draw_sets)
    contents = contents_of(rows)
    order = sorted(range(len(contents)), key=lambda i: sorted(contents[i]))
    apart = {content_of(sequence.token_ids) for sequence in noted or ()}
    heldout = _distinct([i for i in order if contents[i] & apart], contents)[:heldout_sequences]
    if heldout and len(heldout) < heldout_sequences:
        _say_followed(len(heldout), heldout_sequences)
    is_new = not heldout and heldout_sequences > 0
    if is_new:
        heldout = _choose(order, contents, heldout_sequences, cached)
    apart.update(*(contents[i] for i in heldout))
    train = [i for i in order if not contents[i] & apart]
    if not train:
        raise ValueError(f"heldout_sequences = {heldout_sequences} leaves nothing of {len(rows)} to train on")
    if cached_only:
        train = _cached(train, cached, cache, max_sequences)
    if is_new and noted is not None:
        _note(cache, documents_of(rows, heldout))
    return np.sort(np.array(train[: max_sequences or None], np.int64)), np.sort(np.array(heldout, np.int64))


def _split_cache(
    corpus: CacheDataset, heldout_sequences: int, max_sequences: int, cache: str
) -> tuple[Indices, list[TokenSequence]]:
    noted = from_disk(cache, lambda: read_heldout(cache)) if cache else []
    apart = {index for index in map(corpus.find, noted) if index is not None}
    heldout = noted[:heldout_sequences]
    if not noted and heldout_sequences:
        apart = set(range(min(heldout_sequences, len(corpus))))
        heldout = sorted((corpus.sequence(index) for index in apart), key=TokenSequence.digest)
        logger.warning(
            "no run has noted in the cache what it held out: %d of its sequences are from now on, but a student that "
            "was trained from it has seen them",
            len(heldout),
        )
        _note(cache, [one for one in heldout if one.loss_mask is None or one.loss_mask.any()])
    elif len(heldout) < heldout_sequences:
        _say_followed(len(heldout), heldout_sequences)
    train = [index for index in range(len(corpus)) if index not in apart][: max_sequences or None]
    if not train:
        raise ValueError(f"heldout_sequences = {heldout_sequences} leaves nothing of {len(corpus)} to train on")
    return np.array(train, np.int64), heldout


class CachedRows:
    """Which rows of a text a cache holds targets of; none where there is no cache."""

    def __init__(self, rows: Dataset, cache: CacheReader | None, draw_sets: Sequence[int]) -> None:
        """draw_sets: of the cache's records, the smallest first."""
        self._rows, self._cache, self._draw_sets = rows, cache, draw_sets

    def __call__(self, index: int) -> bool:
        """Whether there are targets of one of the row's documents, of any draw set."""
        return any(self._holds(sequence, self._draw_sets) for sequence in documents_of(self._rows, [index]))

    def wholly(self, index: int) -> bool:
        """Whether there are targets of all of the row's documents, of the first draw set."""
        return all(self._holds(sequence, self._draw_sets[:1]) for sequence in documents_of(self._rows, [index]))

    def _holds(self, sequence: TokenSequence, draw_sets: Sequence[int]) -> bool:
        if self._cache is None:
            return False
        digest = self._cache.fingerprint.digest
        return any(request_key(digest, sequence, draw_set) in self._cache for draw_set in draw_sets)


def documents_of(rows: Dataset, indices: Sequence[int]) -> list[TokenSequence]:
    """The documents of some rows, with the masks that they are sent with."""
    return [sequence for index in indices for _, sequence in split_batch(collate([rows[int(index)]]))]


def contents_of(rows: Dataset) -> Contents:
    """What each row holds, whatever counts of it."""
    names = [name for name in ("input_ids", "position_ids") if name in rows.column_names]
    found: Contents = []
    for batch in rows.select_columns(names).with_format("numpy").iter(batch_size=ROWS_AT_ONCE):
        for index, token_ids in enumerate(batch["input_ids"]):
            if "position_ids" not in names:
                found.append(frozenset([content_of(token_ids)]))
                continue
            packed = {"input_ids": token_ids[None], "position_ids": batch["position_ids"][index][None]}
            (numbers,) = number_documents(packed)
            found.append(frozenset(content_of(token_ids[numbers == n]) for n in range(1, numbers.max() + 1)))
    return found


def content_of(token_ids: npt.NDArray[Any]) -> bytes:
    """16 bytes that depend on the tokens alone: other masks make no other text."""
    content = np.ascontiguousarray(token_ids, dtype="<i4").tobytes()
    return hashlib.blake2b(content, digest_size=16, person=b"ls-heldout").digest()


def _distinct(indices: Sequence[int], contents: Contents) -> list[int]:
    """The first row of each content."""
    first: dict[frozenset[bytes], int] = {}
    for i in indices:
        first.setdefault(contents[i], i)
    return list(first.values())


def _choose(order: Sequence[int], contents: Contents, number: int, is_cached: Callable[[int], bool]) -> list[int]:
    """The first rows that are not cached, then others: on what is cached a student may have been trained."""
    chosen: list[int] = []
    cached: list[int] = []
    for i in _distinct(order, contents):
        (cached if is_cached(i) else chosen).append(i)
        if len(chosen) == number:
            break
    missing = cached[: number - len(chosen)]
    if missing:
        logger.warning(
            "the cache holds targets of %d sequences that are held out from now on: a student that was trained from it "
            "has seen them",
            len(missing),
        )
    return chosen + missing


def _cached(rows: Sequence[int], cached: CachedRows, cache: str, max_sequences: int) -> list[int]:
    """Those of a text's rows that can be trained on without a teacher; ValueError where there is none."""
    found = [i for i in rows if cached.wholly(i)]
    if not found:
        raise ValueError(
            f"the cache {cache} holds targets of none of the text's {len(rows)} sequences: expected the text, "
            "tokenizer and sequence_tokens that it was made with"
        )
    if len(found) < min(len(rows), max_sequences or len(rows)):
        logger.warning("the cache %s holds targets of %d of the text's %d sequences", cache, len(found), len(rows))
    return found


def _look_up(cache: str, *, alone: bool) -> tuple[list[TokenSequence] | None, CacheReader | None, list[int]]:
    """What a cache holds out, how to look up what is in it, its draw sets; None where there is none or out of reach.

    alone: of a run without a teacher, which cannot go on without it.
    """
    if not cache:
        return [], None, []
    try:
        return from_disk(cache, lambda: (read_heldout(cache), *_reader(cache)), alone=alone)
    except (OSError, DiskHangs) as error:
        if alone:
            raise
        logger.warning("cache %s: later runs may train on what this one holds out: %s", cache, error)
        return None, None, []


def _reader(cache: str) -> tuple[CacheReader | None, list[int]]:
    if not may_hold_targets(cache):
        return None, []
    reader = CacheReader(cache)
    return reader, [int(number) for number in np.unique(reader.draw_sets())]


def _note(cache: str, sequences: Sequence[TokenSequence]) -> None:
    if not cache:
        return
    try:
        from_disk(cache, lambda: add_heldout(cache, sequences), alone=False)
    except (OSError, DiskHangs) as error:
        logger.warning("cache %s: later runs may train on what this one holds out: %s", cache, error)


def _say_followed(found: int, wanted: int) -> None:
    logger.warning("%d sequences are held out, not %d: those that the cache notes", found, wanted)
