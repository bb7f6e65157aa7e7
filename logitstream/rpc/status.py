"""The one table between this package's errors and gRPC's status codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpc import StatusCode

from logitstream.errors import (
    AccessDenied,
    FingerprintMismatch,
    InvalidSpec,
    LogitstreamError,
    ProtocolViolation,
    ServerDraining,
    TeacherUnavailable,
    TooManyInFlight,
)

STATUS_OF_ERROR: dict[type[LogitstreamError], StatusCode] = {
    AccessDenied: StatusCode.UNAUTHENTICATED,
    FingerprintMismatch: StatusCode.FAILED_PRECONDITION,
    InvalidSpec: StatusCode.INVALID_ARGUMENT,
    ProtocolViolation: StatusCode.INVALID_ARGUMENT,
    TooManyInFlight: StatusCode.RESOURCE_EXHAUSTED,
    ServerDraining: StatusCode.UNAVAILABLE,
    TeacherUnavailable: StatusCode.UNAVAILABLE,
}
ERROR_OF_STATUS: dict[StatusCode, type[LogitstreamError]] = {
    StatusCode.UNAUTHENTICATED: AccessDenied,
    StatusCode.PERMISSION_DENIED: AccessDenied,
    StatusCode.FAILED_PRECONDITION: FingerprintMismatch,
    StatusCode.INVALID_ARGUMENT: ProtocolViolation,
}
RETRYABLE = frozenset(
    (
        StatusCode.UNAVAILABLE,
        StatusCode.DEADLINE_EXCEEDED,
        StatusCode.RESOURCE_EXHAUSTED,
        StatusCode.ABORTED,
        StatusCode.CANCELLED,
        StatusCode.INTERNAL,
        StatusCode.UNKNOWN,
    )
)
"""Statuses after which the same call may succeed, at another replica or later.

HTTP/2 errors of a broken connection arrive as INTERNAL or UNKNOWN.
"""
RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of a call that a live server turned away: when to come again, there or at another replica."""
DRAINING_SECONDS = 1.0
HINTS = {
    "WRONG_VERSION_NUMBER": "it speaks no TLS: leave out tls.ca",
    "CERTIFICATE_VERIFY_FAILED": "its certificate does not come from the authority in tls.ca, or is not valid now",
    "Hostname Verification": "its certificate names another host than the address in `teacher`",
    "Socket closed": "it closed the connection, as a server does that expects TLS (tls.ca) or a certificate (tls.cert)",
}
"""Likely causes of a failed connection, by a part of gRPC's words for it."""


def status_of(error: LogitstreamError) -> StatusCode:
    """Return the status that ends a call for `error`."""
    return next((STATUS_OF_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_OF_ERROR), StatusCode.INTERNAL)


def trailing_metadata(error: LogitstreamError) -> tuple[tuple[str, str], ...]:
    """Return what ends a call for `error` beside its status and details."""
    if isinstance(error, TooManyInFlight):
        return ((RETRY_AFTER, str(round(1000 * error.retry_after_seconds))),)
    if isinstance(error, ServerDraining):  # tells it from a connection that broke
        return ((RETRY_AFTER, str(round(1000 * DRAINING_SECONDS))),)
    return ()


def error_of(code: StatusCode, details: str, trailing: Iterable[Any] | None = None) -> LogitstreamError:
    """Return the error that a client raises for a call that ended with `code`."""
    retry_after = str(dict(trailing or ()).get(RETRY_AFTER, ""))
    if code is StatusCode.RESOURCE_EXHAUSTED and retry_after.isdecimal():
        error = TooManyInFlight(details)
        error.retry_after_seconds = int(retry_after) / 1000
        return error
    if code is StatusCode.UNAVAILABLE and retry_after:
        return ServerDraining(details)
    if code in ERROR_OF_STATUS:
        return ERROR_OF_STATUS[code](details)
    if code in RETRYABLE:
        hint = next((f" ({hint})" for words, hint in HINTS.items() if words in details), "")
        return TeacherUnavailable(f"{code.name}: {details}{hint}")
    return LogitstreamError(f"{code.name}: {details}")
