"""The description of a tokenizer that student and teacher exchange, and differences in words."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from logitstream.client.teacher_identity import OwnTokenizer, TokenizerMismatch
from logitstream.errors import InvalidSequence, ProtocolViolation
from logitstream.tokenizer import (
    MAX_DESCRIPTION_BYTES,
    UNCHECKED_TOKENIZER,
    Vocabulary,
    rule_differences,
    vocabulary_differences,
)
from logitstream.types import TeacherInfo, TokenSequence

WORDS = [f"w{index}" for index in range(20)]


def words(tokens: Sequence[str] = WORDS, *, lower: bool = False, cut: Any = None) -> Any:
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = cut or pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0])


def teacher_of(vocabulary: Vocabulary, *, vocab_size: int = 32) -> TeacherInfo:
    return TeacherInfo(
        model="big/teacher",
        weights_digest="ab" * 32,
        tokenizer_digest=vocabulary.digest,
        tokenizer_rules=vocabulary.rules_digest,
        vocab_size=vocab_size,
        dtype="float32",
        max_sequence_tokens=64,
    )


def sequence(*token_ids: int) -> TokenSequence:
    return TokenSequence(token_ids=np.array(token_ids, np.int32))


def test_a_vocabulary_survives_the_wire() -> None:
    made = Vocabulary.of(words([*WORDS, "é", "\n"], lower=True))
    ours = Vocabulary([*made.pairs, (99, "\ud800 alone")], made.rules)
    found = Vocabulary.from_bytes(ours.to_bytes())
    assert found == ours
    assert (found.digest, found.rules_digest) == (Vocabulary.of(OnlyTokens(ours)).digest, ours.rules_digest)


class OnlyTokens:
    """No more than a vocabulary, as tokenizers written in Python have."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return {token: token_id for token_id, token in self._vocabulary.pairs}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no deflated data",
        zlib.compress(b"no JSON"),
        zlib.compress(b"[" * 100_000),
        zlib.compress(b"[]"),
        zlib.compress(b'{"ids": [0, 1], "tokens": ["a"], "rules": {}}'),
        zlib.compress(b'{"ids": ["0"], "tokens": ["a"], "rules": {}}'),
        zlib.compress(b'{"ids": [-1], "tokens": ["a"], "rules": {}}'),
        zlib.compress(b'{"ids": [0], "tokens": [0], "rules": {}}'),
        zlib.compress(b'{"ids": [0], "tokens": ["a"], "rules": {"model": 1}}'),
        zlib.compress(b'{"ids": [0], "tokens": ["a"], "rules": []}'),
        zlib.compress(b" " * (MAX_DESCRIPTION_BYTES + 1) + b'{"ids": [], "tokens": [], "rules": {}}', level=1),
    ],
)
def test_what_is_no_vocabulary_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="no vocabulary"):
        Vocabulary.from_bytes(content)


def test_added_tokens_leave_what_is_shared() -> None:
    teacher, more = Vocabulary.of(words()), words()
    more.add_tokens(["<tool>", "<result>"], special_tokens=True)
    student = Vocabulary.of(more)
    assert (student.num_shared(teacher.digest), student.num_shared(student.digest)) == (20, 22)
    assert student.rules_digest == teacher.rules_digest
    assert teacher.num_shared(student.digest) == 0
    assert Vocabulary.of(words(["<tool>", *WORDS])).num_shared(teacher.digest) == 0


def test_tokens_of_the_students_own_are_allowed_until_a_sequence_holds_one() -> None:
    """The teacher's head has 32 rows, its tokenizer 20 tokens: an added id falls on a row that was never trained."""
    more = words()
    more.add_tokens(["<tool>", "<result>"], special_tokens=True)
    student, info = OwnTokenizer(more), teacher_of(Vocabulary.of(words()))
    assert student.digest_for(info) == info.tokenizer_digest
    student.check_sequence(sequence(0, 19), info)
    for token_id, token in ((20, "<tool>"), (21, "<result>"), (31, "<result>")):
        with pytest.raises(InvalidSequence, match=rf"token id {token_id} \('{token}'\) was added .* ends below 20"):
            student.check_sequence(sequence(0, token_id), info)
    same = OwnTokenizer(words())
    same.check_sequence(sequence(0, 31), info)  # ids that no tokenizer made are the caller's business


def test_a_tokenizer_is_needed_and_no_check_is_spelled_out() -> None:
    info = teacher_of(Vocabulary.of(words()))
    for nothing in ("", None, 7):
        with pytest.raises(
            ValueError, match=r"expected the student's tokenizer or its digest, .*; UNCHECKED_TOKENIZER"
        ):
            OwnTokenizer(nothing)  # type: ignore[arg-type]
    assert OwnTokenizer(UNCHECKED_TOKENIZER).digest_for(info) == ""
    assert OwnTokenizer(info.tokenizer_digest).digest_for(info) == info.tokenizer_digest
    with pytest.raises(TokenizerMismatch, match=f"the student's {'cd' * 32}, the teacher's {info.tokenizer_digest}"):
        OwnTokenizer("cd" * 32).digest_for(info)


@pytest.mark.parametrize(
    ("student", "told"),
    [
        (
            ["w1", "w0", *WORDS[2:]],
            "2 of 20 ids stand for other tokens (0 is 'w1' here and 'w0' there, 1 is 'w0' here and 'w1' there)",
        ),
        (
            WORDS[::-1],
            "20 of 20 ids stand for other tokens (0 is 'w19' here and 'w0' there, 1 is 'w18' here and 'w1' there, "
            "2 is 'w17' here and 'w2' there, 3 is 'w16' here and 'w3' there, 4 is 'w15' here and 'w4' there, …)",
        ),
        (
            WORDS[:18],
            "2 of 20 ids stand for other tokens (18 is None here and 'w18' there, 19 is None here and 'w19' there)",
        ),
        ([*WORDS[:19], "x", "<tool>"], "1 of 20 ids stand for other tokens (19 is 'x' here and 'w19' there)"),
    ],
)
def test_differences_name_the_first_tokens_and_how_many_there_are(student: list[str], told: str) -> None:
    assert vocabulary_differences(Vocabulary.of(words(student)), Vocabulary.of(words())) == told


def test_a_token_of_the_students_in_a_gap_of_the_teachers_ids_is_named() -> None:
    teacher = Vocabulary([(0, "a"), (1, "b"), (5, "z")])
    student = Vocabulary([*teacher.pairs[:2], (3, "<tool>"), (5, "z"), (6, "<more>")])
    assert student.num_shared(teacher.digest) == 0
    assert "1 of 3 ids stand for other tokens (3 is '<tool>' here and None" in vocabulary_differences(student, teacher)


def test_rules_of_cutting_text_are_compared_where_the_tokens_agree() -> None:
    plain, lower = Vocabulary.of(words()), Vocabulary.of(words(lower=True))
    split = Vocabulary.of(words(cut=pre_tokenizers.WhitespaceSplit()))
    assert plain.digest == lower.digest == split.digest
    assert len({plain.rules_digest, lower.rules_digest, split.rules_digest}) == 3
    assert rule_differences(plain, lower) == "normalizer"
    assert rule_differences(split, lower) == "normalizer, pre_tokenizer"
    vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3}
    merges = [
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, [one]))))
        for one in (("a", "b"), ("b", "a"))
    ]
    assert rule_differences(*merges) == "model"
    assert rule_differences(Vocabulary([(0, "a")]), plain) == ""


async def test_the_same_tokens_cut_otherwise_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    theirs = Vocabulary.of(words(lower=True))
    asked = 0

    async def ask() -> Vocabulary:
        nonlocal asked
        asked += 1
        return theirs

    student, info = OwnTokenizer(words()), teacher_of(theirs)
    for _ in range(2):
        await student.compare_rules(ask, info)
    assert asked == 1
    (warning,) = caplog.messages
    assert "cuts text in another way (normalizer)" in warning
    assert "tokenize with its own, that of big/teacher" in warning
    await OwnTokenizer(words(lower=True)).compare_rules(ask, info)
    assert asked == 1


async def test_a_teacher_that_tells_no_tokens_is_told_by_digests() -> None:
    async def ask() -> Vocabulary:
        raise ProtocolViolation("not told")

    student, info = OwnTokenizer(words(WORDS[::-1])), teacher_of(Vocabulary.of(words()))
    told = await student.explain(ask, info)
    assert told == (
        "tokenize with the teacher's tokenizer, that of big/teacher (which tokens differ cannot be told: not told)"
    )
    assert "in place of its digest" in await OwnTokenizer("cd" * 32).explain(ask, info)
