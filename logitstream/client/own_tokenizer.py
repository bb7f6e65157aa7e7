"""The student's tokenizer against a teacher's: whether ids mean the same, which are the student's own, what differs."""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections.abc import Awaitable, Callable

from logitstream.errors import FingerprintMismatch, InvalidSequence, LogitstreamError
from logitstream.tokenizer import (
    UNCHECKED_TOKENIZER,
    HasVocabulary,
    Vocabulary,
    rule_differences,
    vocabulary_differences,
)
from logitstream.types import TeacherInfo, TokenSequence

logger = logging.getLogger(__name__)

AskTeacher = Callable[[], Awaitable[Vocabulary]]
"""A teacher's vocabulary over its connection; raises a LogitstreamError where it does not tell it."""


class TokenizerMismatch(FingerprintMismatch):
    """Ids stand for other tokens; `OwnTokenizer.explain` says which."""


class OwnTokenizer:
    """What the caller gave: a tokenizer, the digest of one, or UNCHECKED_TOKENIZER."""

    def __init__(self, tokenizer: HasVocabulary | Vocabulary | str) -> None:
        if not tokenizer or not (isinstance(tokenizer, (str, Vocabulary)) or hasattr(tokenizer, "get_vocab")):
            raise ValueError(
                f"expected the student's tokenizer or its digest, got {str(tokenizer)[:64]!r}; UNCHECKED_TOKENIZER "
                "where you vouch that ids mean the same to the teacher"
            )
        self._vocabulary = None if isinstance(tokenizer, str) else Vocabulary.of(tokenizer)
        self._digest = tokenizer if isinstance(tokenizer, str) else Vocabulary.of(tokenizer).digest
        self._num_shared: dict[str, int] = {}
        self._compared_rules: set[str] = set()

    def digest_for(self, info: TeacherInfo) -> str:
        """The digest to show this teacher: its own where the student only adds tokens, empty where nobody checks.

        Raises TokenizerMismatch where ids stand for other tokens.
        """
        if self._digest == UNCHECKED_TOKENIZER:
            return ""
        if self._digest != info.tokenizer_digest and not self._shared_with(info):
            raise TokenizerMismatch(
                f"tokenizers differ: the student's {self._digest}, the teacher's {info.tokenizer_digest}"
            )
        return info.tokenizer_digest

    def check_sequence(self, sequence: TokenSequence, info: TeacherInfo) -> None:
        """Raises InvalidSequence for a token that the student added to the teacher's, whatever row its id falls on."""
        num_shared = self._shared_with(info)
        if self._vocabulary is None or num_shared == len(self._vocabulary.pairs):
            return
        first, _ = self._vocabulary.pairs[num_shared]
        largest = int(sequence.token_ids.max(initial=-1))
        if largest >= first:
            place = min(bisect.bisect_left(self._vocabulary.pairs, (largest, "")), len(self._vocabulary.pairs) - 1)
            token = self._vocabulary.pairs[place][1]
            raise InvalidSequence(
                f"token id {largest} ({token!r}) was added to the student's tokenizer: the teacher's ends below {first}"
            )

    async def explain(self, ask: AskTeacher, info: TeacherInfo) -> str:
        """What differs and what to do."""
        remedy = f"tokenize with the teacher's tokenizer, that of {info.model}"
        if self._vocabulary is None:
            return f"{remedy}; given the student's tokenizer in place of its digest, this message names the tokens"
        try:
            theirs = await ask()
            differences = await asyncio.to_thread(vocabulary_differences, self._vocabulary, theirs)
        except LogitstreamError as error:
            return f"{remedy} (which tokens differ cannot be told: {error})"
        return f"{differences}: {remedy}"

    async def compare_rules(self, ask: AskTeacher, info: TeacherInfo) -> None:
        """Warn, once for each teacher's tokenizer, where the same text becomes other tokens of the same vocabulary."""
        if self._vocabulary is None or not self._vocabulary.rules or not info.tokenizer_rules:
            return
        if info.tokenizer_rules in (self._vocabulary.rules_digest, *self._compared_rules):
            return
        self._compared_rules.add(info.tokenizer_rules)
        try:
            theirs = await ask()
        except LogitstreamError as error:
            differences = f"which rules differ cannot be told: {error}"
        else:
            differences = rule_differences(self._vocabulary, theirs)
        logger.warning(
            "the teacher's tokenizer has the student's tokens but cuts text in another way (%s): the teacher is asked "
            "about text cut as it never saw any; tokenize with its own, that of %s",
            differences,
            info.model,
        )

    def _shared_with(self, info: TeacherInfo) -> int:
        if self._vocabulary is None:
            return 0
        digest = info.tokenizer_digest
        if digest not in self._num_shared:
            self._num_shared[digest] = self._vocabulary.num_shared(digest)
        return self._num_shared[digest]
