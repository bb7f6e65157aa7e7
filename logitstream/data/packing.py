"""Documents of text -> sequences of equally many token ids, cut from the joined documents.

A long document is tokenized window by window, to the ids of the whole. Only the tokenizer knows where
a text can be cut without changing its ids: a blank line belongs to the word before or after it, SentencePiece puts a
space before whatever it is given, digits are grouped in threes from the first. So windows overlap, and two are joined
only in the middle of the overlap, away from both cuts, where both found the same tokens at the same places and these
are no monotonous run (of blanks, of one digit), on which windows may agree by chance. Otherwise the window is doubled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from logitstream.data.student_limits import StudentLimits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WINDOW_CHARS = 1 << 18
"""The most characters in one call of the tokenizer, which takes about 1 kB of memory for each."""
OVERLAP_CHARS = 1 << 12
AGREED_TOKENS, MIN_DISTINCT = 16, 8
"""Tokens before a cut on which both windows agree, and distinct ids among them; a monotonous run has one or two."""
ROWS_AT_ONCE = 32
END_OF_TEXT = (
    *("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "<EOS_TOKEN>"),
    *("<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>"),
)
"""Tokens that stood between documents in pretraining; a chat model's `eos_token` may be its end of turn instead."""

Tokens = npt.NDArray[np.int64]
"""[tokens, 3]: id, first character in the document, character after the last."""


class Frame(NamedTuple):
    """The ids before and after each document."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


def pack(
    parts: Sequence[Dataset],
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_tokens: int,
    frame: Frame,
    limits: StudentLimits,
) -> Iterator[dict[str, Any]]:
    """Yield rows of `sequence_tokens` ids (int32) and drop the incomplete last one.

    ValueError if an id is outside the student's embedding.
    """
    pending: list[int] = []
    num_sequences = 0
    for some in _all_ids(parts, column, tokenizer, frame):
        pending += some
        whole = len(pending) // sequence_tokens * sequence_tokens
        for start in range(0, whole, sequence_tokens):
            ids = np.asarray(pending[start : start + sequence_tokens], dtype=np.int32)
            limits.check_ids(ids, f"sequence {num_sequences} of the text")
            num_sequences += 1
            yield {"input_ids": ids}
        del pending[:whole]


def _all_ids(
    parts: Sequence[Dataset], column: str, tokenizer: PreTrainedTokenizerBase, frame: Frame
) -> Iterator[Sequence[int]]:
    """Yield every document's ids, framed: short documents in batches, on several threads, long ones by windows."""
    for part in parts:
        for rows in part.iter(batch_size=ROWS_AT_ONCE):
            texts = [text for text in rows[column] if text is not None]
            short = [text for text in texts if len(text) * ROWS_AT_ONCE <= WINDOW_CHARS]
            encoded = iter(tokenizer(short, add_special_tokens=False, verbose=False)["input_ids"] if short else ())
            for text in texts:
                yield frame.start
                is_short = len(text) * ROWS_AT_ONCE <= WINDOW_CHARS
                yield from (next(encoded),) if is_short else document_ids(text, tokenizer)
                yield frame.end


def document_ids(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_chars: int = WINDOW_CHARS,
    overlap_chars: int = OVERLAP_CHARS,
) -> Iterator[list[int]]:
    """Yield a document's ids in parts, without special tokens; together they are the ids of the whole document.

    A tokenizer that does not tell the places of its tokens gets the whole document at once.
    """
    if not tokenizer.is_fast:
        yield list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return
    begin, done, end, overlap = 0, 0, window_chars, overlap_chars
    tokens = _encode(tokenizer, text, begin, end)
    while end < len(text):
        start = max(begin, end - overlap)
        following = _encode(tokenizer, text, start, end + window_chars)
        quarter = (end - start) // 4
        cut = _agreement(tokens, following, max(done, start + quarter), end - quarter)
        if cut is None:
            end += end - begin
            overlap = max(overlap_chars, (end - begin) // 4)  # so that each character is seen a few times
            tokens = _encode(tokenizer, text, begin, end)
        else:
            yield _between(tokens, done, cut)[:, 0].tolist()
            begin, done, end, overlap, tokens = start, cut, end + window_chars, overlap_chars, following
    yield _between(tokens, done, len(text) + 1)[:, 0].tolist()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, begin: int, end: int) -> Tokens:
    encoded = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2) + begin
    return np.column_stack([np.asarray(encoded["input_ids"], np.int64), offsets])


def _between(tokens: Tokens, low: int, high: int) -> Tokens:
    """Return the tokens that start from character `low` on and before `high`."""
    return tokens[np.searchsorted(tokens[:, 1], low) : np.searchsorted(tokens[:, 1], high)]


def _agreement(one: Tokens, other: Tokens, low: int, high: int) -> int | None:
    """Return a character at which both windows can be cut; None if they differ from `low` to `high`.

    A token begins there, and the tokens before it are varied.
    """
    agreed = _between(one, low, high)
    if not np.array_equal(agreed, _between(other, low, high)):
        return None
    ids, starts, ends = agreed.T
    begins = np.flatnonzero((starts[1:] > starts[:-1]) & (starts[1:] >= ends[:-1])) + 1
    for place in begins[len(begins) // 2 :].tolist():
        if place >= AGREED_TOKENS and len(np.unique(ids[place - AGREED_TOKENS : place])) >= MIN_DISTINCT:
            return int(starts[place])
    return None


def frame_of(tokenizer: PreTrainedTokenizerBase, *, start: str = "auto", end: str = "auto") -> Frame:
    """Return the ids around each document; ValueError for a token that the tokenizer does not have.

    "auto" takes what the tokenizer itself puts there, followed by the end of text that models of its kind were
    pretrained with. "none" takes nothing. Anything else names one token.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    own = np.flatnonzero(np.equal(encoded["special_tokens_mask"], 0))
    ids = tuple(encoded["input_ids"])
    before, after = (ids[: own[0]], ids[own[-1] + 1 :]) if len(own) else ((), ())
    separator = _end_of_text(tokenizer)
    if separator is not None and after[-1:] != (separator,):
        after = (*after, separator)
    frame = Frame(
        before if start == "auto" else _named(tokenizer, "document_start", start),
        after if end == "auto" else _named(tokenizer, "document_end", end),
    )
    names = ["".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in frame]
    message = "each document is packed as %s (document_start: %s, document_end: %s)"
    logger.info(message, f"{names[0]}text{names[1]}", start, end)
    return frame


def _named(tokenizer: PreTrainedTokenizerBase, setting: str, token: str) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    if token != "none" and token not in vocabulary:
        raise ValueError(f"{setting}: expected auto, none or one of the tokenizer's tokens, got {token!r}")
    return () if token == "none" else (vocabulary[token],)


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a document in pretraining; None if the tokenizer has no end at all."""
    eos, vocabulary = tokenizer.eos_token, tokenizer.get_vocab()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    known = [token for token in END_OF_TEXT if token in special and token in vocabulary]
    token = eos if eos in END_OF_TEXT or not known else known[0]
    return None if token is None else vocabulary.get(str(token), tokenizer.eos_token_id)
