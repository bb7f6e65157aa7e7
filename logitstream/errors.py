"""The exception tree.

LogitstreamError
├── RequestError                 one sequence is refused; others on the stream go on
│   ├── InvalidSequence          empty, too long, a token id outside the vocabulary, a mask of another length
│   ├── InvalidSpec              unknown sampler, a parameter out of bounds, an unknown codec version
│   ├── TooManyInFlight          the client holds as much of the server as it may
│   ├── ServerDraining           the replica is going away and takes no new requests
│   ├── ScoringFailed            the backend failed on this sequence after bounded tries
│   └── NonFiniteLogits          the teacher gave NaN, +inf or an empty row
├── CodecError                   bytes that are no valid encoded targets
├── FingerprintMismatch          teacher, tokenizer, sampler or codec differ from what was expected
├── AccessDenied                 no token, or not one that the server knows
├── ProtocolViolation            messages that no correct client sends: the stream ends
├── TeacherUnavailable           no replica answered within the deadline
├── StaleTeacher                 targets from weights older than the student allows
├── RanksDiffer                  processes that should train one student together do not
└── CacheError
    ├── CorruptRecord            a checksum does not match
    ├── CacheMiss                a sequence that the cache alone should have held
    ├── CacheFull                the disk or the budget is exhausted
    └── DiskHangs                the disk does not answer
"""


class LogitstreamError(Exception):
    """Anything this package raises for an expected failure."""


class RequestError(LogitstreamError):
    """One sequence is refused; `retryable` says whether another try may succeed."""

    retryable = False


class InvalidSequence(RequestError):
    """The token ids or the mask cannot be scored."""


class InvalidSpec(RequestError, ValueError):
    """The target specification names an unknown sampler or a parameter out of bounds."""


class TooManyInFlight(RequestError):
    """The client holds as much of the server as it may; `retry_after_seconds` says when to ask again."""

    retryable = True
    retry_after_seconds = 1.0


class ServerDraining(RequestError):
    """The replica is going away: another one can score the sequence."""

    retryable = True


class ScoringFailed(RequestError):
    """The backend failed on this sequence after bounded tries; `lasting` says whether the same server would again."""

    lasting = True


class NonFiniteLogits(RequestError):
    """The teacher's logits hold NaN or +inf, or a row has no finite entry."""


class CodecError(LogitstreamError):
    """The bytes are not encoded targets, are damaged, or need an id model that is not at hand."""


class FingerprintMismatch(LogitstreamError):
    """Teacher, tokenizer, sampler or codec differ from what was expected."""


class AccessDenied(LogitstreamError):
    """No token came, or none that the server knows."""


class ProtocolViolation(LogitstreamError):
    """Messages that no correct client sends: no `open` first, an id used twice, bytes that are no message."""


class TeacherUnavailable(LogitstreamError):
    """No replica answered within the deadline."""


class StaleTeacher(LogitstreamError):
    """Targets come from weights older than `max_teacher_lag` allows."""


class RanksDiffer(LogitstreamError):
    """The processes of one student hold different parameters, take different numbers of batches, or train alone."""


class CacheError(LogitstreamError):
    """The cache cannot be read or written."""


class CorruptRecord(CacheError):
    """A record's checksum does not match its bytes."""


class CacheMiss(CacheError):
    """The cache does not hold a sequence that it was asked to provide alone."""


class CacheFull(CacheError):
    """The disk or the cache's budget is exhausted."""


class DiskHangs(CacheError):
    """The disk of the cache has not answered in time."""


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


REQUEST_ERRORS: dict[str, type[RequestError]] = {
    cls.__name__: cls
    for cls in (InvalidSequence, InvalidSpec, TooManyInFlight, ServerDraining, ScoringFailed, NonFiniteLogits)
}
"""In-band error codes and the class each one is raised as on the student."""
