"""Documents of text -> sequences of equally many token ids, cut from the documents' ids in order."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from datasets import Dataset

from logitstream.data.boundaries import WINDOW_CHARS, document_ids
from logitstream.data.student_limits import StudentLimits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256
MAX_TRIED = 1000
"""Tokens of which one text is looked for that the tokenizer gives an id."""
END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "<|endofdocument|>",
    "</s>",
    "<eos>",
    "<EOS_TOKEN>",
)
"""What models were pretrained with between documents. A chat model's `eos_token` may be its end of turn instead."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """One document; size and time make a changed file another one."""

    path: str
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: str) -> TextFile:
        found = Path(path).stat()
        return cls(path, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids that stand before and after each document."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


Part: TypeAlias = TextFile | Dataset
"""A document, or rows of which each holds one."""


def frame_of(tokenizer: PreTrainedTokenizerBase, *, start: str = "auto", end: str = "auto") -> Frame:
    """What stands around each document; ValueError for a token that the tokenizer does not have.

    auto: what the tokenizer itself puts there, and then the end of text that models of its kind were pretrained with.
    none: nothing. Anything else names one token.
    """
    before, after = _added(tokenizer)
    if start != "auto":
        before = _named(tokenizer, "document_start", start)
    if end != "auto":
        after = _named(tokenizer, "document_end", end)
    elif (separator := _end_of_text(tokenizer)) is not None and after[-1:] != (separator,):
        after = (*after, separator)
    names = ["".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in (before, after)]
    logger.info(
        "each document is packed as %s (document_start: %s, document_end: %s)",
        f"{names[0]}text{names[1]}",
        start,
        end,
    )
    return Frame(before, after)


def pack(
    parts: Sequence[Part],
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_tokens: int,
    frame: Frame,
    limits: StudentLimits,
) -> Iterator[dict[str, Any]]:
    """Rows of `sequence_tokens` ids (int32); what is left at the end is dropped.

    ValueError where the student has no row for an id.
    """
    pending: list[int] = []
    num_sequences = 0
    for some in _all_ids(parts, column, tokenizer, frame):
        pending += some
        whole = len(pending) // sequence_tokens * sequence_tokens
        for start in range(0, whole, sequence_tokens):
            ids = np.asarray(pending[start : start + sequence_tokens], dtype=np.int32)
            limits.check_id(int(ids.max()), int(ids.min()), f"sequence {num_sequences} of the text")
            num_sequences += 1
            yield {"input_ids": ids}
        del pending[:whole]


def _all_ids(
    parts: Sequence[Part], column: str, tokenizer: PreTrainedTokenizerBase, frame: Frame
) -> Iterator[Sequence[int]]:
    for part in parts:
        if isinstance(part, TextFile):
            if part.num_bytes:
                yield from _file_ids(part, tokenizer, frame)
            continue
        for rows in part.iter(batch_size=ROWS_AT_ONCE):
            yield from _row_ids([text for text in rows[column] if text is not None], tokenizer, frame)


def _file_ids(file: TextFile, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> Iterator[Sequence[int]]:
    """As Python reads a text file: UTF-8, without a byte order mark, every line ending a newline."""
    yield frame.start
    try:
        with open(file.path, encoding="utf-8-sig") as document:
            yield from document_ids(document, tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.path}: expected text in UTF-8, got other bytes ({error})") from error
    yield frame.end


def _row_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, frame: Frame) -> Iterator[Sequence[int]]:
    """Short documents many at once, on several threads; a long one window by window."""
    first = 0
    while first < len(texts):
        last, num_chars = first, 0
        while last < len(texts) and num_chars + len(texts[last]) <= WINDOW_CHARS:
            num_chars += len(texts[last])
            last += 1
        if last == first:
            yield frame.start
            yield from document_ids(io.StringIO(texts[first]), tokenizer)
            yield frame.end
            last = first + 1
        else:
            encoded = tokenizer(texts[first:last], add_special_tokens=False, verbose=False)["input_ids"]
            yield from ([*frame.start, *ids, *frame.end] for ids in encoded)
        first = last


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after a text by itself."""
    ordinary = sorted(set(range(min(len(tokenizer), MAX_TRIED))) - set(tokenizer.all_special_ids))
    own = (tokenizer.decode([index]) for index in ordinary)  # for one without letters
    for text in itertools.chain(("a", "1", "."), own):
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer(text)["input_ids"]
        for place in range(len(whole) - len(plain) + 1):
            if plain and whole[place : place + len(plain)] == plain:
                return tuple(whole[:place]), tuple(whole[place + len(plain) :])
    return (), ()


def _named(tokenizer: PreTrainedTokenizerBase, setting: str, token: str) -> tuple[int, ...]:
    if token == "none":
        return ()
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise ValueError(f"{setting}: expected auto, none or one of the tokenizer's tokens, got {token!r}")
    return (vocabulary[token],)


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a document in pretraining; None where the tokenizer has no end at all."""
    eos = tokenizer.eos_token
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    vocabulary = tokenizer.get_vocab()
    if eos not in END_OF_TEXT:
        eos = next((token for token in END_OF_TEXT if token in special and token in vocabulary), eos)
    return None if eos is None else vocabulary.get(str(eos), tokenizer.eos_token_id)
