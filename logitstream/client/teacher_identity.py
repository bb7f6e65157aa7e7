"""Which teacher a run trains from: what each replica describes is checked against it, so that no two are mixed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from logitstream.client.own_tokenizer import OwnTokenizer
from logitstream.errors import FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the student says of itself in the handshake."""

    client_id: str
    vocab_size: int
    tokenizer: OwnTokenizer
    spec: TargetSpec


class KnownTeacher:
    """The first replica's description, or the expected fingerprint, and every version of the weights seen since.

    max_teacher_lag – 0: every target comes from the same weights; n: weights may be replaced while training, and
    targets more than n versions older than the newest served are stale; -1: any version is taken.

    Each server counts its versions from its own start, so they say nothing between servers; what orders weights is
    this client's own numbering of their digests (`_number_of`).
    """

    def __init__(self, student: Identity, *, max_teacher_lag: int = 0, fingerprint: Fingerprint | None = None) -> None:
        self.info: TeacherInfo | None = None
        self.max_teacher_lag = max_teacher_lag
        self._student = student
        self._expected = fingerprint
        self._expected_of = ""
        self._digests: dict[bytes, str] = {}
        self._numbers: dict[bytes, int] = {}
        self._serving: dict[str, TeacherInfo] = {}

    @property
    def is_open(self) -> bool:
        """Whether the first replica will decide which teacher this is."""
        return self._expected is None

    def accept(self, address: str, info: TeacherInfo) -> bytes:
        """The weights' wire digest; FingerprintMismatch where targets of this teacher must not be used."""
        self._check_student(info)
        try:
            wire_digest = _wire_digest(info)
        except ValueError:
            raise FingerprintMismatch(f"expected a hex digest of the weights, got {info.weights_digest!r}") from None
        fingerprint = Fingerprint.of(info, self._student.spec)
        try:
            Fingerprint.from_json(asdict(fingerprint))
        except ValueError as error:
            raise FingerprintMismatch(f"a teacher that describes itself as no teacher can: {error}") from None
        if self._expected is None:
            self._expected, self._expected_of = fingerprint, address
        if differences := teacher_differences(self._expected, fingerprint, max_teacher_lag=self.max_teacher_lag):
            whose = f"{self._expected_of}'s" if self._expected_of else "its"
            raise FingerprintMismatch(f"not the teacher that this run trains from ({whose} value first): {differences}")
        self._digests[wire_digest] = fingerprint.digest
        self._numbers[wire_digest] = self._number_of(wire_digest, info, self._serving.get(address))
        self._serving[address] = info
        self._find_newest()
        return wire_digest

    def left(self, address: str) -> None:
        """A replica is gone; its weights count no more, and a server that starts again counts from zero."""
        self._serving.pop(address, None)
        self._find_newest()

    def fingerprint_digest(self, wire_digest: bytes) -> str | None:
        """Of the weights that answered; None where no replica has described them."""
        return self._digests.get(wire_digest)

    def is_news(self, wire_digest: bytes, described: bytes) -> bool:
        """Whether a replica that described itself so has to do it again, its answers being of later weights."""
        if wire_digest not in self._numbers:
            return True
        return self._numbers[wire_digest] > self._numbers.get(described, self._numbers[wire_digest])

    def weights_to_ask_for(self, info: TeacherInfo) -> str:
        """For the handshake; empty: whatever is served."""
        return info.weights_digest if self.max_teacher_lag == 0 else ""

    def lag(self, wire_digest: bytes) -> int:
        """How many versions older than the newest served; weights that nobody described are older than any."""
        if self.info is None:
            return 0
        oldest = min(self._numbers.values()) - max(self.max_teacher_lag, 0) - 1
        return max(self._numbers[_wire_digest(self.info)] - self._numbers.get(wire_digest, oldest), 0)

    def is_stale(self, wire_digest: bytes) -> bool:
        return 0 < self.max_teacher_lag < self.lag(wire_digest)

    def _number_of(self, wire_digest: bytes, info: TeacherInfo, before: TeacherInfo | None) -> int:
        """Where weights stand among those known, counted in versions.

        Unknown ones are the newest: that is what a server looks for. But those of version 0, where others have replaced
        theirs, are what a server was started with, as old as the others' first. `before`: what the same server served
        last; its own count tells of versions in between that this client never saw.
        """
        step = info.teacher_version - before.teacher_version if before else 0
        counted = [self._numbers[_wire_digest(before)] + step] if before and step > 0 else []
        if (known := self._numbers.get(wire_digest)) is not None:
            return max([known, *counted])
        others = self._serving.values()
        if info.teacher_version == 0 and any(one.teacher_version for one in others):
            return min(self._numbers[_wire_digest(one)] - one.teacher_version for one in others)
        return max([max(self._numbers.values(), default=-1) + 1, *counted])

    def _find_newest(self) -> None:
        """Of what is served; where no replica is left it stays what it was."""
        serving = self._serving.values()
        self.info = max(serving, key=lambda one: self._numbers[_wire_digest(one)], default=self.info)

    def _check_student(self, info: TeacherInfo) -> None:
        mine = self._student
        if mine.vocab_size < info.vocab_size:
            raise FingerprintMismatch(
                f"student's vocabulary of {mine.vocab_size}, the teacher's has {info.vocab_size}; where only padding "
                f"differs, start teacher-server with --vocab_size {mine.vocab_size}"
            )
        mine.tokenizer.digest_for(info)
        if mine.spec.sampler not in info.samplers or mine.spec.codec_version not in info.codec_versions:
            raise FingerprintMismatch(
                f"expected sampler {mine.spec.sampler} and codec version {mine.spec.codec_version}, the teacher offers "
                f"{', '.join(info.samplers)} and versions {', '.join(map(str, info.codec_versions))}"
            )


def teacher_differences(expected: Fingerprint, found: Fingerprint, *, max_teacher_lag: int) -> str:
    """The expected value first; empty where two teachers agree in all that may not change while a student trains."""
    if max_teacher_lag != 0:
        found = replace(found, weights_digest=expected.weights_digest)
    return expected.differences(found)


def _wire_digest(info: TeacherInfo) -> bytes:
    return bytes.fromhex(info.weights_digest)[:8]
