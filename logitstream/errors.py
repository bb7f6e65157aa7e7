"""The exception tree: RequestError is about one sequence, CacheError about the cache, the others about a run."""


class LogitstreamError(Exception):
    """Base of everything that this package raises for an expected failure."""


class RequestError(LogitstreamError):
    """One sequence is refused, the others of its batch go on; `retryable`: another try may succeed."""

    retryable = False


class InvalidSequence(RequestError):
    """The sequence is empty or too long, a token id is outside the vocabulary, or the mask does not fit."""


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
    """The backend failed on this sequence after bounded tries."""


class NonFiniteLogits(RequestError):
    """The teacher's logits hold NaN or +inf, or a row has no finite entry."""


REQUEST_ERRORS: dict[str, type[RequestError]] = {cls.__name__: cls for cls in RequestError.__subclasses__()}
"""In-band error codes, and the class that the student raises for each."""


class CodecError(LogitstreamError):
    """The bytes are no encoded targets, are damaged, or need an id model that is missing."""


class FingerprintMismatch(LogitstreamError):
    """Teacher, tokenizer, sampler or codec differ from what was expected."""


class AccessDenied(LogitstreamError):
    """The call brought no token, or one that the server does not know."""


class ProtocolViolation(LogitstreamError):
    """Messages that no correct client sends: no `open` first, an id used twice, bytes that are no message."""


class TeacherUnavailable(LogitstreamError):
    """No replica answered within the deadline."""


class StaleTeacher(LogitstreamError):
    """The targets come from weights older than `max_teacher_lag` allows."""


class RanksDiffer(LogitstreamError):
    """The processes of one student hold different parameters or take different numbers of batches."""


class CacheError(LogitstreamError):
    """The cache cannot be read or written."""


class CorruptRecord(CacheError):
    """A record's checksum does not match its bytes."""


class CacheMiss(CacheError):
    """The cache lacks a sequence, and no teacher may be asked."""


class DiskHangs(CacheError):
    """The disk of the cache has not answered in time."""


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, or the name of its class if there is none."""
    return " ".join(str(error).split()) or type(error).__name__
