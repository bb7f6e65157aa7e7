"""A document's token ids, window by window: the same ids as if it were tokenized whole, in bounded memory.

Tokenizers work from left to right and look a few characters ahead, but where a text may be cut without changing its ids
is theirs to know: a blank line belongs to what stands before or after it, SentencePiece's kind put a space before
whatever they are given, digits are counted in threes from the first. So windows overlap, and one is left for the next
only where both have found the same tokens at the same places all over the middle of the overlap, away from either's
cut, and where these are no monotonous run (of blanks, of one digit), in which two windows may agree by chance. Else the
overlap grows, at last to all that was read so far and as much again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW_CHARS = 1 << 18
"""Of one call to the tokenizer, which takes about 1 kB of memory a character."""
OVERLAP_CHARS = 1 << 12
AGREED_TOKENS = 16
MIN_DISTINCT = 8
"""Of so many agreed tokens before a cut: a run's are one or two."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens of a window: ids, and the characters of the document that each stands for."""

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def between(self, low: int, high: int) -> slice:
        """The tokens that begin there; empty where they do not stand together."""
        index = np.flatnonzero((self.starts >= low) & (self.starts < high))
        if not len(index) or index[-1] - index[0] + 1 != len(index):
            return slice(0, 0)
        return slice(int(index[0]), int(index[-1]) + 1)

    def begins_as(self, other: _Window, number: int) -> bool:
        """Whether so many first tokens are the same, and the one after them, which may differ, begins where it did."""
        begin = slice(number + (number > 0))
        same_ids = np.array_equal(self.ids[:number], other.ids[:number])
        return same_ids and np.array_equal(self.starts[begin], other.starts[begin])


def document_ids(
    document: TextIO,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_chars: int = WINDOW_CHARS,
    overlap_chars: int = OVERLAP_CHARS,
) -> Iterator[list[int]]:
    """The ids of a document without special tokens around it, in parts; equal to the tokenizer's of the whole.

    A tokenizer that does not say where its tokens stand gets the whole document at once. RuntimeError where one
    changes the ids at a text's beginning for what comes far behind: no such tokenizer is known.
    """
    if not tokenizer.is_fast:
        yield list(tokenizer(document.read(), add_special_tokens=False, verbose=False)["input_ids"])
        return
    begin, text = 0, document.read(window_chars)
    window, first = _encode(tokenizer, text, begin), 0
    overlap, num_chars = overlap_chars, window_chars
    while more := document.read(num_chars):
        while overlap < len(text):
            start = begin + len(text) - overlap
            following = _encode(tokenizer, text[-overlap:] + more, start)
            cut = _agreement(window, following, start + overlap // 4, start + overlap - overlap // 4)
            if cut is not None and cut[0] >= first:
                yield window.ids[first : cut[0]].tolist()
                begin, text, window, first = start, text[-overlap:] + more, following, cut[1]
                overlap, num_chars = overlap_chars, window_chars
                break
            overlap *= 4
        else:
            text += more
            overlap, num_chars = max(overlap_chars, len(text) // 4), len(text)  # so that each is seen a few times
            longer = _encode(tokenizer, text, begin)
            if not longer.begins_as(window, first):
                raise RuntimeError("the tokenizer gives other ids to a text's beginning for what comes far behind it")
            window = longer
    yield window.ids[first:].tolist()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, begin: int) -> _Window:
    """The tokens of a text that begins at that character of the document."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2) + begin
    return _Window(np.asarray(encoded["input_ids"], np.int64), offsets[:, 0], offsets[:, 1])


def _agreement(one: _Window, other: _Window, low: int, high: int) -> tuple[int, int] | None:
    """The same token in both, at a character's beginning, among others that are the same; None where some are not."""
    mine, theirs = one.between(low, high), other.between(low, high)
    for name in ("ids", "starts", "ends"):
        if not np.array_equal(getattr(one, name)[mine], getattr(other, name)[theirs]):
            return None
    starts, ends = one.starts[mine], one.ends[mine]
    begins = np.flatnonzero((starts[1:] > starts[:-1]) & (starts[1:] >= ends[:-1])) + 1  # else inside a character
    for place in sorted(begins.tolist(), key=lambda place: abs(2 * place - len(starts))):  # from the middle on
        if place >= AGREED_TOKENS:
            before = one.ids[mine][place - AGREED_TOKENS : place]
            if len(np.unique(before)) >= MIN_DISTINCT:
                return mine.start + place, theirs.start + place
    return None
