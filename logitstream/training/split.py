"""The held-out sequences, set apart by their content and by the cache, whatever a run's settings.

Sequences stand in the order of a hash of their tokens. The first ones are held out and those after them trained on, so
a run of another length, order or seed on the same text holds out the same. A run with a cache notes the sequences that
it holds out in the cache; every later run on that cache evaluates on those and trains on none of them.
"""

from __future__ import annotations

import hashlib
import itertools
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
Contents = list[frozenset[bytes]]
"""Digests of the tokens of each row's documents."""
ROWS_AT_ONCE = 1000
FOLLOWED = "%d sequences are held out, not %d: those that the cache notes"


def split_text(
    rows: Dataset, *, heldout_sequences: int, max_sequences: int = 0, cache: str = "", cached_only: bool = False
) -> tuple[Dataset, Dataset]:
    """Return training and held-out rows of a text, the same on every process, and note the held-out ones in the cache.

    cached_only trains on rows that the cache holds targets of. ValueError if none is left, CacheError if the cache's
    note is damaged.
    """
    train, heldout = _by_main_process(
        lambda: _split_text(rows, heldout_sequences, max_sequences, cache, cached_only=cached_only)
    )
    return rows.select(sorted(train)), rows.select(sorted(heldout))


def split_cache(
    corpus: CacheDataset, *, heldout_sequences: int, max_sequences: int = 0, cache: str = ""
) -> tuple[CacheDataset, Dataset]:
    """Return training and held-out sequences of a cache alone, the same on every process.

    Those that the cache notes are held out; without a note the first by key, which are noted if possible. ValueError if
    none is left to train on, CacheError if the note is damaged.
    """
    train, heldout = _by_main_process(lambda: _split_cache(corpus, heldout_sequences, max_sequences, cache))
    masks = [np.ones(len(one), bool) if one.loss_mask is None else one.loss_mask for one in heldout]
    ids = [one.token_ids.tolist() for one in heldout]
    held_out = Dataset.from_dict({"input_ids": ids, "loss_mask": [mask.tolist() for mask in masks]})
    return corpus.select(np.array(train, np.int64)), held_out


def _by_main_process(decide: Callable[[], T]) -> T:
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


def _split_text(
    rows: Dataset, heldout_sequences: int, max_sequences: int, cache: str, *, cached_only: bool
) -> tuple[list[int], list[int]]:
    noted, reader, draw_sets = _from_cache(cache, lambda: _look_up(cache), alone=cached_only) or (None, None, [])
    contents = contents_of(rows)
    order = sorted(range(len(contents)), key=lambda i: sorted(contents[i]))
    distinct = [next(rows_of_one) for _, rows_of_one in itertools.groupby(order, key=contents.__getitem__)]
    apart = {content_of(sequence.token_ids) for sequence in noted or ()}
    heldout = [i for i in distinct if contents[i] & apart][:heldout_sequences]
    if 0 < len(heldout) < heldout_sequences:
        logger.warning(FOLLOWED, len(heldout), heldout_sequences)
    is_new = not heldout and heldout_sequences > 0
    if is_new:
        heldout = _choose(distinct, heldout_sequences, lambda i: any(_held(rows, i, reader, draw_sets)))
    apart.update(*(contents[i] for i in heldout))
    train = [i for i in order if not contents[i] & apart]
    if not train:
        raise ValueError(f"heldout_sequences = {heldout_sequences} leaves nothing of {len(rows)} to train on")
    if cached_only:
        train = _cached(train, lambda i: all(_held(rows, i, reader, draw_sets[:1])), cache, max_sequences)
    if is_new and noted is not None:
        _note(cache, documents_of(rows, heldout))
    return train[: max_sequences or None], heldout


def _split_cache(
    corpus: CacheDataset, heldout_sequences: int, max_sequences: int, cache: str
) -> tuple[list[int], list[TokenSequence]]:
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
        logger.warning(FOLLOWED, len(heldout), heldout_sequences)
    train = [index for index in range(len(corpus)) if index not in apart][: max_sequences or None]
    if not train:
        raise ValueError(f"heldout_sequences = {heldout_sequences} leaves nothing of {len(corpus)} to train on")
    return train, heldout


def documents_of(rows: Dataset, indices: Sequence[int]) -> list[TokenSequence]:
    """Return the documents of some rows, with the masks that they are sent with."""
    return [sequence for index in indices for _, sequence in split_batch(collate([rows[int(index)]]))]


def contents_of(rows: Dataset) -> Contents:
    """Return the digests of each row's documents, whichever of their rows count."""
    names = [name for name in ("input_ids", "position_ids") if name in rows.column_names]
    found: Contents = []
    for batch in rows.select_columns(names).with_format("numpy").iter(batch_size=ROWS_AT_ONCE):
        for index, token_ids in enumerate(batch["input_ids"]):
            (numbers,) = number_documents({name: batch[name][index][None] for name in names})
            found.append(frozenset(content_of(token_ids[numbers == n]) for n in range(1, numbers.max() + 1)))
    return found


def content_of(token_ids: npt.NDArray[Any]) -> bytes:
    """Return 16 bytes that depend on the tokens alone: other masks make no other text."""
    content = np.ascontiguousarray(token_ids, dtype="<i4").tobytes()
    return hashlib.blake2b(content, digest_size=16, person=b"ls-heldout").digest()


def _choose(rows: Sequence[int], number: int, is_cached: Callable[[int], bool]) -> list[int]:
    """Return the first rows that are not cached, then others: a student may have been trained on what is cached."""
    chosen = list(itertools.islice((i for i in rows if not is_cached(i)), number))
    fresh = set(chosen)
    seen = [i for i in rows if i not in fresh][: number - len(chosen)]
    if seen:
        logger.warning(
            "the cache holds targets of %d sequences that are held out from now on: a student that was trained from it "
            "has seen them",
            len(seen),
        )
    return chosen + seen


def _cached(rows: Sequence[int], is_cached: Callable[[int], bool], cache: str, max_sequences: int) -> list[int]:
    """Return the rows that can be trained on without a teacher; ValueError if there are none."""
    found = [i for i in rows if is_cached(i)]
    if not found:
        raise ValueError(
            f"the cache {cache} holds targets of none of the text's {len(rows)} sequences: expected the text, "
            "tokenizer and sequence_tokens that it was made with"
        )
    if len(found) < min(len(rows), max_sequences or len(rows)):
        logger.warning("the cache %s holds targets of %d of the text's %d sequences", cache, len(found), len(rows))
    return found


def _held(rows: Dataset, index: int, cache: CacheReader | None, draw_sets: Sequence[int]) -> list[bool]:
    """Tell for each document of a row whether the cache holds targets of it in one of the draw sets."""
    return [
        cache is not None and any(request_key(cache.fingerprint.digest, one, number) in cache for number in draw_sets)
        for one in documents_of(rows, [index])
    ]


def _look_up(cache: str) -> tuple[list[TokenSequence], CacheReader | None, list[int]]:
    """Return the held-out sequences that a cache notes, a reader of it, and its draw sets from the smallest on."""
    if not cache:
        return [], None, []
    noted, reader = read_heldout(cache), CacheReader(cache) if may_hold_targets(cache) else None
    return noted, reader, [] if reader is None else [int(number) for number in np.unique(reader.draw_sets())]


def _note(cache: str, sequences: Sequence[TokenSequence]) -> None:
    if cache:
        _from_cache(cache, lambda: add_heldout(cache, sequences), alone=False)


def _from_cache(cache: str, work: Callable[[], T], *, alone: bool) -> T | None:
    """Return what `work` finds; None with a warning if the cache is out of reach, unless the run has nothing else."""
    try:
        return from_disk(cache, work, alone=alone) if cache else work()
    except (OSError, DiskHangs) as error:
        if alone:
            raise
        logger.warning("cache %s: later runs may train on what this one holds out: %s", cache, error)
        return None
