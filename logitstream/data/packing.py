"""Documents of text -> sequences of equally many token ids, cut from the joined documents.

A long document is tokenized window by window, in bounded memory, to the ids of the whole. Tokenizers work from left to
right and look a few characters ahead, but only they know where a text can be cut without changing its ids: a blank line
belongs to the word before or after it, SentencePiece puts a space before whatever it is given, digits are grouped in
threes from the first. So windows overlap, and two are joined only in the middle of the overlap, away from both cuts,
where both found the same tokens at the same places and these are no monotonous run (of blanks, of one digit), on which
windows may agree by chance. Otherwise the window is doubled.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeAlias

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
AGREED_TOKENS = 16
MIN_DISTINCT = 8
"""Distinct ids among the agreed tokens before a cut; a monotonous run has one or two."""
ROWS_AT_ONCE = 32
MAX_TRIED = 1000
"""Tokens to try in the search for a text that the tokenizer has an id for."""
END_OF_TEXT = (
    *("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "<EOS_TOKEN>"),
    *("<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>"),
)
"""Tokens that stood between documents in pretraining; a chat model's `eos_token` may be its end of turn instead."""

Tokens = npt.NDArray[np.int64]
"""[tokens, 3]: id, first character in the document, character after the last."""


class TextFile(NamedTuple):
    """A file that is one document; its size and time tell a changed file from the old one."""

    path: str
    num_bytes: int
    modified_ns: int


class Frame(NamedTuple):
    """The ids before and after each document."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


Part: TypeAlias = TextFile | Dataset
"""A document, or rows of one document each."""


def pack(
    parts: Sequence[Part],
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
    parts: Sequence[Part], column: str, tokenizer: PreTrainedTokenizerBase, frame: Frame
) -> Iterator[Sequence[int]]:
    """Yield every document's ids, framed: short documents in batches, on several threads, long ones by windows."""
    for part in parts:
        if isinstance(part, TextFile):
            if part.num_bytes:
                yield from itertools.chain((frame.start,), _file_ids(part, tokenizer), (frame.end,))
            continue
        for rows in part.iter(batch_size=ROWS_AT_ONCE):
            texts = [text for text in rows[column] if text is not None]
            short = [text for text in texts if len(text) * ROWS_AT_ONCE <= WINDOW_CHARS]
            encoded = iter(tokenizer(short, add_special_tokens=False, verbose=False)["input_ids"] if short else ())
            for text in texts:
                yield frame.start
                if len(text) * ROWS_AT_ONCE <= WINDOW_CHARS:
                    yield next(encoded)
                else:
                    yield from document_ids(io.StringIO(text), tokenizer)
                yield frame.end


def _file_ids(file: TextFile, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[int]]:
    """Read a file as Python reads text: UTF-8, without a byte order mark, every line end a newline."""
    try:
        with open(file.path, encoding="utf-8-sig") as document:
            yield from document_ids(document, tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.path}: expected text in UTF-8, got other bytes ({error})") from error


def document_ids(
    document: TextIO,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_chars: int = WINDOW_CHARS,
    overlap_chars: int = OVERLAP_CHARS,
) -> Iterator[list[int]]:
    """Yield a document's ids in parts, without special tokens; together they are the ids of the whole document.

    A tokenizer that does not tell the places of its tokens gets the whole document at once. RuntimeError if text far
    behind changes the ids of a text's beginning; no such tokenizer is known.
    """
    if not tokenizer.is_fast:
        yield list(tokenizer(document.read(), add_special_tokens=False, verbose=False)["input_ids"])
        return
    begin, first, text = 0, 0, document.read(window_chars)
    tokens = _encode(tokenizer, text, begin)
    overlap, num_chars = overlap_chars, window_chars
    while more := document.read(num_chars):
        overlapping = text[-overlap:]
        start, quarter = begin + len(text) - len(overlapping), len(overlapping) // 4
        following = _encode(tokenizer, overlapping + more, start)
        cut = _agreement(tokens, following, start + quarter, start + len(overlapping) - quarter)
        if cut is not None and cut[0] >= first:
            yield tokens[first : cut[0], 0].tolist()
            begin, first, text, tokens = start, cut[1], overlapping + more, following
            overlap, num_chars = overlap_chars, window_chars
        else:
            text += more
            overlap, num_chars = max(overlap_chars, len(text) // 4), len(text)  # so each character is seen a few times
            longer = _encode(tokenizer, text, begin)
            if not np.array_equal(longer[:first], tokens[:first]):
                raise RuntimeError("the tokenizer changes the ids of a text's beginning for text far behind it")
            tokens = longer
    yield tokens[first:, 0].tolist()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, begin: int) -> Tokens:
    """Tokenize a text that begins at character `begin` of the document."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2) + begin
    return np.column_stack([np.asarray(encoded["input_ids"], np.int64), offsets])


def _agreement(one: Tokens, other: Tokens, low: int, high: int) -> tuple[int, int] | None:
    """Return the index in each window of one token where both can be cut; None if they differ from `low` to `high`.

    The token begins a character, and the tokens before it are varied.
    """
    mine, theirs = (np.flatnonzero((tokens[:, 1] >= low) & (tokens[:, 1] < high)) for tokens in (one, other))
    is_whole = all((np.diff(index) == 1).all() for index in (mine, theirs))
    if not is_whole or not np.array_equal(one[mine], other[theirs]):
        return None
    ids, starts, ends = one[mine].T
    begins = np.flatnonzero((starts[1:] > starts[:-1]) & (starts[1:] >= ends[:-1])) + 1
    for place in sorted(begins.tolist(), key=lambda place: abs(2 * place - len(ids))):  # the nearest to the middle
        if place >= AGREED_TOKENS and len(np.unique(ids[place - AGREED_TOKENS : place])) >= MIN_DISTINCT:
            return int(mine[place]), int(theirs[place])
    return None


def frame_of(tokenizer: PreTrainedTokenizerBase, *, start: str = "auto", end: str = "auto") -> Frame:
    """Return the ids around each document; ValueError for a token that the tokenizer does not have.

    "auto" takes what the tokenizer itself puts there, followed by the end of text that models of its kind were
    pretrained with. "none" takes nothing. Anything else names one token.
    """
    before, after = _added(tokenizer)
    separator = _end_of_text(tokenizer)
    if separator is not None and after[-1:] != (separator,):
        after = (*after, separator)
    before = before if start == "auto" else _named(tokenizer, "document_start", start)
    after = after if end == "auto" else _named(tokenizer, "document_end", end)
    names = ["".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in (before, after)]
    message = "each document is packed as %s (document_start: %s, document_end: %s)"
    logger.info(message, f"{names[0]}text{names[1]}", start, end)
    return Frame(before, after)


def _added(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return the ids that the tokenizer itself puts around a text: the first text that it has an id for."""
    own = sorted(set(range(min(len(tokenizer), MAX_TRIED))) - set(tokenizer.all_special_ids))
    for text in itertools.chain("a1.", (tokenizer.decode([index]) for index in own)):
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer(text)["input_ids"]
        for place in range(len(whole) - len(plain) + 1):
            if plain and whole[place : place + len(plain)] == plain:
                return Frame(tuple(whole[:place]), tuple(whole[place + len(plain) :]))
    return Frame()


def _named(tokenizer: PreTrainedTokenizerBase, setting: str, token: str) -> tuple[int, ...]:
    if token == "none":
        return ()
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise ValueError(f"{setting}: expected auto, none or one of the tokenizer's tokens, got {token!r}")
    return (vocabulary[token],)


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a document in pretraining; None if the tokenizer has no end at all."""
    eos = tokenizer.eos_token
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    vocabulary = tokenizer.get_vocab()
    if eos not in END_OF_TEXT:
        eos = next((token for token in END_OF_TEXT if token in special and token in vocabulary), eos)
    return None if eos is None else vocabulary.get(str(eos), tokenizer.eos_token_id)
