"""Which teacher a run trains from, and with which tokenizer: every replica is checked, so that no two are mixed."""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace

from logitstream.errors import FingerprintMismatch, InvalidSequence, LogitstreamError
from logitstream.rpc.remote_teacher import Caller
from logitstream.tokenizer import (
    UNCHECKED_TOKENIZER,
    HasVocabulary,
    Vocabulary,
    rule_differences,
    vocabulary_differences,
)
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo, TokenSequence

logger = logging.getLogger(__name__)

AskTeacher = Callable[[], Awaitable[Vocabulary]]
"""Fetches a teacher's vocabulary; raises a LogitstreamError if it does not tell it."""


class TokenizerMismatch(FingerprintMismatch):
    """Ids stand for other tokens; `OwnTokenizer.explain` says which."""


class OwnTokenizer:
    """The student's tokenizer, its digest alone, or UNCHECKED_TOKENIZER."""

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
        """Return the digest to show this teacher: its own if the student only adds tokens, empty if nobody checks.

        Raises TokenizerMismatch if ids stand for other tokens.
        """
        if self._digest == UNCHECKED_TOKENIZER:
            return ""
        if self._digest != info.tokenizer_digest and not self._shared_with(info):
            raise TokenizerMismatch(
                f"tokenizers differ: the student's {self._digest}, the teacher's {info.tokenizer_digest}"
            )
        return info.tokenizer_digest

    def check_sequence(self, sequence: TokenSequence, info: TeacherInfo) -> None:
        """Raise InvalidSequence for a token that the student added to the teacher's, whatever row its id falls on."""
        num_shared = self._shared_with(info)
        if self._vocabulary is None or num_shared == len(self._vocabulary.pairs):
            return
        pairs = self._vocabulary.pairs
        first, largest = pairs[num_shared][0], int(sequence.token_ids.max(initial=-1))
        if largest >= first:
            token = pairs[min(bisect.bisect_left(pairs, (largest, "")), len(pairs) - 1)][1]
            raise InvalidSequence(
                f"token id {largest} ({token!r}) was added to the student's tokenizer: the teacher's ends below {first}"
            )

    async def explain(self, ask: AskTeacher, info: TeacherInfo) -> str:
        """Say what differs and what to do."""
        remedy = f"tokenize with the teacher's tokenizer, that of {info.model}"
        if self._vocabulary is None:
            return f"{remedy}; given the student's tokenizer in place of its digest, this message names the tokens"
        try:
            return f"{await asyncio.to_thread(vocabulary_differences, self._vocabulary, await ask())}: {remedy}"
        except LogitstreamError as error:
            return f"{remedy} (which tokens differ cannot be told: {error})"

    async def compare_rules(self, ask: AskTeacher, info: TeacherInfo) -> None:
        """Warn, once for each teacher's tokenizer, if the same text becomes other tokens of the same vocabulary."""
        mine, theirs = self._vocabulary, info.tokenizer_rules
        if mine is None or not mine.rules or theirs in ("", mine.rules_digest, *self._compared_rules):
            return
        self._compared_rules.add(theirs)
        try:
            differences = rule_differences(mine, await ask())
        except LogitstreamError as error:
            differences = f"which rules differ cannot be told: {error}"
        logger.warning(
            "the teacher's tokenizer has the student's tokens but cuts text in another way (%s): the teacher is asked "
            "about text cut as it never saw any; tokenize with its own, that of %s",
            differences,
            info.model,
        )

    def _shared_with(self, info: TeacherInfo) -> int:
        digest = info.tokenizer_digest
        if digest not in self._num_shared:
            self._num_shared[digest] = self._vocabulary.num_shared(digest) if self._vocabulary else 0
        return self._num_shared[digest]


class TeacherIdentity:
    """The first replica's description, or the expected fingerprint, and every version of the weights seen since.

    max_teacher_lag – 0: every target comes from the same weights; n: weights may be replaced while training, and
    targets more than n versions older than the newest served are stale; -1: any version is taken.

    Servers count their versions from their own start, so their numbers cannot be compared. Weights are ordered by this
    client's own numbering of their digests (`_number_of`).
    """

    def __init__(
        self,
        spec: TargetSpec,
        *,
        vocab_size: int,
        tokenizer: OwnTokenizer,
        client_id: str = "student",
        max_teacher_lag: int = 0,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.spec, self.vocab_size, self.tokenizer, self.client_id = spec, vocab_size, tokenizer, client_id
        self.info: TeacherInfo | None = None
        self.max_teacher_lag = max_teacher_lag
        self.is_named = fingerprint is not None  # else the first replica decides
        self._expected, self._expected_of = fingerprint, "its"
        self._fingerprints: dict[bytes, str] = {}
        self._numbers: dict[bytes, int] = {}
        self._serving: dict[str, TeacherInfo] = {}

    def accept(self, address: str, info: TeacherInfo) -> None:
        """Note what a replica serves; raise FingerprintMismatch if its targets must not be used."""
        self._check_student(info)
        fingerprint = Fingerprint.of(info, self.spec)
        try:
            Fingerprint.from_json(asdict(fingerprint))
        except ValueError as error:
            raise FingerprintMismatch(f"a teacher that describes itself as no teacher can: {error}") from None
        if self._expected is None:
            self._expected, self._expected_of = fingerprint, f"{address}'s"
        if differences := teacher_differences(self._expected, fingerprint, max_teacher_lag=self.max_teacher_lag):
            raise FingerprintMismatch(
                f"not the teacher that this run trains from ({self._expected_of} value first): {differences}"
            )
        digest = info.short_weights_digest
        self._fingerprints[digest] = fingerprint.digest
        self._numbers[digest] = self._number_of(digest, info, self._serving.get(address))
        self._serving[address] = info
        self._find_newest()

    def left(self, address: str) -> None:
        """Forget what a replica serves: its weights count no more, and a server that restarts counts from zero."""
        self._serving.pop(address, None)
        self._find_newest()

    def caller(self, info: TeacherInfo) -> Caller:
        """Return what every call says of the student, and what it expects of this teacher."""
        return Caller(
            client_id=self.client_id,
            vocab_size=self.vocab_size,
            tokenizer_digest=self.tokenizer.digest_for(info),
            weights_digest=info.weights_digest if self.max_teacher_lag == 0 else "",
        )

    def fingerprint_digest(self, digest: bytes) -> str | None:
        """Return that of the weights that answered; None if no replica has described them."""
        return self._fingerprints.get(digest)

    def is_news(self, digest: bytes, described: bytes) -> bool:
        """Return True if a replica must be described again because its answers come from later weights."""
        if digest not in self._numbers:
            return True
        return self._numbers[digest] > self._numbers.get(described, self._numbers[digest])

    def lag(self, digest: bytes) -> int:
        """Return how many versions older than the newest served; weights that nobody described are older than any."""
        if self.info is None:
            return 0
        oldest = min(self._numbers.values()) - max(self.max_teacher_lag, 0) - 1
        return max(self._numbers[self.info.short_weights_digest] - self._numbers.get(digest, oldest), 0)

    def is_stale(self, digest: bytes) -> bool:
        return 0 < self.max_teacher_lag < self.lag(digest)

    def _number_of(self, digest: bytes, info: TeacherInfo, before: TeacherInfo | None) -> int:
        """Rank weights among those known, counted in versions.

        Unknown weights are the newest, as servers load ever newer ones. A server's initial weights (version 0) rank as
        old as its peers' initial weights once a peer has replaced its own. `before`: what the same server served last;
        its own count reveals versions in between that this client never saw.
        """
        step = info.teacher_version - before.teacher_version if before else 0
        counted = [self._numbers[before.short_weights_digest] + step] if before and step > 0 else []
        if (known := self._numbers.get(digest)) is not None:
            return max([known, *counted])
        others = self._serving.values()
        if info.teacher_version == 0 and any(one.teacher_version for one in others):
            return min(self._numbers[one.short_weights_digest] - one.teacher_version for one in others)
        return max([max(self._numbers.values(), default=-1) + 1, *counted])

    def _find_newest(self) -> None:
        """Describe the teacher by the newest weights served; it stays what it was when no replica is left."""
        serving = self._serving.values()
        self.info = max(serving, key=lambda one: self._numbers[one.short_weights_digest], default=self.info)

    def _check_student(self, info: TeacherInfo) -> None:
        if self.vocab_size < info.vocab_size:
            raise FingerprintMismatch(
                f"student's vocabulary of {self.vocab_size}, the teacher's has {info.vocab_size}; where only padding "
                f"differs, start teacher-server with --vocab_size {self.vocab_size}"
            )
        self.tokenizer.digest_for(info)
        if self.spec.sampler not in info.samplers or self.spec.codec_version not in info.codec_versions:
            raise FingerprintMismatch(
                f"expected sampler {self.spec.sampler} and codec version {self.spec.codec_version}, the teacher offers "
                f"{', '.join(info.samplers)} and versions {', '.join(map(str, info.codec_versions))}"
            )


def teacher_differences(expected: Fingerprint, found: Fingerprint, *, max_teacher_lag: int) -> str:
    """Name what differs, the expected value first, beside what may change while a student trains; empty: nothing."""
    if max_teacher_lag != 0:
        found = replace(found, weights_digest=expected.weights_digest)
    return expected.differences(found)
