"""The one table between this package's errors and gRPC's status codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from logitstream.errors import (
    AccessDenied,
    FingerprintMismatch,
    InvalidSequence,
    InvalidSpec,
    LogitstreamError,
    ProtocolViolation,
    ServerDraining,
    TeacherUnavailable,
    TooManyInFlight,
)

STATUS_OF_ERROR: dict[type[LogitstreamError], grpc.StatusCode] = {
    AccessDenied: grpc.StatusCode.UNAUTHENTICATED,
    FingerprintMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    InvalidSpec: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidSequence: grpc.StatusCode.INVALID_ARGUMENT,
    ProtocolViolation: grpc.StatusCode.INVALID_ARGUMENT,
    TooManyInFlight: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ServerDraining: grpc.StatusCode.UNAVAILABLE,
    TeacherUnavailable: grpc.StatusCode.UNAVAILABLE,
}

ERROR_OF_STATUS: dict[grpc.StatusCode, type[LogitstreamError]] = {
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.FAILED_PRECONDITION: FingerprintMismatch,
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolViolation,
}
RETRYABLE = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    )
)
"""Statuses after which the same call may succeed, at another replica or later.

HTTP/2 errors of a broken connection arrive as INTERNAL or UNKNOWN.
"""
CANNOT_CONNECT = "failed to connect to all addresses; last error: "
HINTS = {
    "WRONG_VERSION_NUMBER": "it speaks no TLS: leave out tls.ca",
    "CERTIFICATE_VERIFY_FAILED": "its certificate does not come from the authority in tls.ca, or is not valid now",
    "Hostname Verification": "its certificate names another host than the address in `teacher`",
    "Socket closed": "it closed the connection, as a server does that expects TLS (tls.ca) or a certificate (tls.cert)",
}
"""Likely causes of a failed connection, by a part of gRPC's words for it."""


def status_of(error: LogitstreamError) -> grpc.StatusCode:
    """Return the status that ends a call for `error`."""
    return next(
        (STATUS_OF_ERROR[cls] for cls in type(error).__mro__ if cls in STATUS_OF_ERROR), grpc.StatusCode.INTERNAL
    )


RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of a call that a live server turned away: when to come again, there or at another replica."""
DRAINING_SECONDS = 1.0


def trailing_metadata(error: LogitstreamError) -> tuple[tuple[str, str], ...]:
    """Return what ends a call for `error` beside its status and details."""
    if isinstance(error, TooManyInFlight):
        return ((RETRY_AFTER, str(round(1000 * error.retry_after_seconds))),)
    if isinstance(error, ServerDraining):  # tells it from a connection that broke
        return ((RETRY_AFTER, str(round(1000 * DRAINING_SECONDS))),)
    return ()


def error_of(code: grpc.StatusCode, details: str, trailing: Iterable[Any] | None = None) -> LogitstreamError:
    """Return the error that a client raises for a call that ended with `code`."""
    retry_after = str(dict(trailing or ()).get(RETRY_AFTER, ""))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after.isdecimal():
        error = TooManyInFlight(details)
        error.retry_after_seconds = int(retry_after) / 1000
        return error
    if code is grpc.StatusCode.UNAVAILABLE and retry_after:
        return ServerDraining(details)
    if code in ERROR_OF_STATUS:
        return ERROR_OF_STATUS[code](details)
    if code in RETRYABLE:
        return TeacherUnavailable(f"{code.name}: {_explained(details)}")
    return LogitstreamError(f"{code.name}: {details}")


def _explained(details: str) -> str:
    """Add what a failed connection means for the settings."""
    if CANNOT_CONNECT not in details:
        return details
    reason = details.replace(CANNOT_CONNECT, "cannot connect: ")
    hint = next((hint for words, hint in HINTS.items() if words in details), "")
    return f"{reason} ({hint})" if hint else reason
