"""Which teacher a run trains from: what each replica describes is checked against it, so that no two are mixed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from logitstream.errors import FingerprintMismatch
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the student says of itself in the handshake."""

    client_id: str
    vocab_size: int
    tokenizer_digest: str
    spec: TargetSpec


class KnownTeacher:
    """The first replica's description, or the expected fingerprint, and every version of the weights seen since.

    max_teacher_lag – 0: every target comes from the same weights; n: weights may be replaced while training, and
    targets more than n versions older than the newest seen are stale; -1: any version is taken.
    """

    def __init__(self, student: Identity, *, max_teacher_lag: int = 0, fingerprint: Fingerprint | None = None) -> None:
        self.info: TeacherInfo | None = None
        self.max_teacher_lag = max_teacher_lag
        self._student = student
        self._expected = fingerprint
        self._digests: dict[bytes, str] = {}
        self._serving: dict[str, TeacherInfo] = {}

    def accept(self, address: str, info: TeacherInfo) -> bytes:
        """The weights' wire digest; FingerprintMismatch where targets of this teacher must not be used."""
        self._check_student(info)
        try:
            wire_digest = bytes.fromhex(info.weights_digest)[:8]
        except ValueError:
            raise FingerprintMismatch(f"expected a hex digest of the weights, got {info.weights_digest!r}") from None
        fingerprint = Fingerprint.of(info, self._student.spec)
        if self._expected is None:
            self._expected = fingerprint
        if differences := self._differences(self._expected, fingerprint):
            raise FingerprintMismatch(f"not the teacher that this run trains from (its value first): {differences}")
        self._digests[wire_digest] = fingerprint.digest
        self._serving[address] = info
        self.info = max(self._serving.values(), key=lambda one: one.teacher_version)
        return wire_digest

    def expect(self, fingerprint: Fingerprint) -> bool:
        """Take this teacher alone from now on; false where another one was accepted before, which is then forgotten."""
        before, self._expected = self._expected, fingerprint
        if before is None or not self._differences(fingerprint, before):
            return True
        self.info = None
        self._digests.clear()
        self._serving.clear()
        return False

    def left(self, address: str) -> None:
        """A replica is gone; its version counts no more: a server that starts again counts from zero."""
        self._serving.pop(address, None)

    def fingerprint_digest(self, wire_digest: bytes) -> str | None:
        """Of the weights that answered; None where no replica has described them."""
        return self._digests.get(wire_digest)

    def weights_to_ask_for(self, info: TeacherInfo) -> str:
        """For the handshake; empty: whatever is served."""
        return info.weights_digest if self.max_teacher_lag == 0 else ""

    def lag(self, teacher_version: int, wire_digest: bytes) -> int:
        """How many versions older than the newest one served; 0 for the same weights under another replica's count."""
        if self.info is None or bytes.fromhex(self.info.weights_digest)[:8] == wire_digest:
            return 0
        return max(self.info.teacher_version - teacher_version, 0)

    def is_stale(self, teacher_version: int, wire_digest: bytes) -> bool:
        return 0 < self.max_teacher_lag < self.lag(teacher_version, wire_digest)

    def _differences(self, expected: Fingerprint, found: Fingerprint) -> str:
        """Empty where they agree in all that may not change."""
        if self.max_teacher_lag != 0:
            found = replace(found, weights_digest=expected.weights_digest)
        return expected.differences(found)

    def _check_student(self, info: TeacherInfo) -> None:
        mine = self._student
        if mine.vocab_size < info.vocab_size:
            raise FingerprintMismatch(
                f"student's vocabulary of {mine.vocab_size}, the teacher's has {info.vocab_size}; where only padding "
                f"differs, start teacher-server with --vocab_size {mine.vocab_size}"
            )
        if mine.tokenizer_digest and mine.tokenizer_digest != info.tokenizer_digest:
            raise FingerprintMismatch(
                f"tokenizers differ: the student's {mine.tokenizer_digest}, the teacher's {info.tokenizer_digest}"
            )
        if mine.spec.sampler not in info.samplers or mine.spec.codec_version not in info.codec_versions:
            raise FingerprintMismatch(
                f"expected sampler {mine.spec.sampler} and codec version {mine.spec.codec_version}, the teacher offers "
                f"{', '.join(info.samplers)} and versions {', '.join(map(str, info.codec_versions))}"
            )
