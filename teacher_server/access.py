"""Who may call: bearer tokens from a file or an environment variable, checked before a message is read."""

from __future__ import annotations

import hmac
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from logitstream import metrics
from logitstream.files import naming
from logitstream.rpc.tokens import LastGood, checked_token
from teacher_server.calls import HEALTH_SERVICE, aborting

REFUSALS_LOG_SECONDS = 10.0
"""Callers without a known token are logged in one line this often, whatever they send."""

caller: ContextVar[str] = ContextVar("caller", default="")
"""Inside a call: the name that goes with its token; empty if it has none."""

log = logging.getLogger(__name__)


class BearerTokens:
    """The tokens that are let in, each with the name of its client or none.

    The file is read at each call, so tokens are rotated without a restart; one that holds no good token changes
    nothing. Raises ValueError or OSError if there is none at first.
    """

    def __init__(self, *, path: Path | None = None, variable: str | None = None) -> None:
        self._fixed: dict[bytes, str] = {}
        if variable:
            where = f"environment variable {variable}"
            token = checked_token(os.environb.get(variable.encode(), b"").strip(), where)
            if not token:
                raise ValueError(f"no token in {where}")
            self._fixed[token.encode()] = ""
        self._file = LastGood(lambda: _named_tokens(path) if path else {}, "the list of tokens")
        self._file.read()

    def name_of(self, authorization: str | bytes | None) -> str | None:
        """Return the name that goes with an `authorization: Bearer …` header; None if the token is not known.

        Takes the same time for any wrong token.
        """
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = value.partition(b" ")
        known = self._file.read() | self._fixed
        matches = [name for one, name in known.items() if hmac.compare_digest(token, one)]
        return matches[0] if matches and scheme.lower() == b"bearer" else None


def _named_tokens(path: Path) -> dict[bytes, str]:
    """Read a file of tokens: a line is a token, or a token and its client's name, or a comment behind #."""
    names: dict[bytes, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        words = line.split(None, 1)
        if words and not words[0].startswith(b"#"):
            token = checked_token(words[0], f"line {number} of {path}")
            names[token.encode()] = b"".join(words[1:]).strip().decode(errors="replace")
    if not names:
        raise ValueError(f"no token in {path}")
    return names


def bearer_tokens(token_file: str, token_env: str) -> BearerTokens | None:
    """Return what these settings name; None if both are empty. Raises ValueError, which names them, without a token."""
    given = {"token_file": token_file, "token_env": token_env}
    if not any(given.values()):
        return None
    with naming(" and ".join(name for name, value in given.items() if value)):
        return BearerTokens(path=Path(token_file) if token_file else None, variable=token_env or None)


class TokenInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Lets calls with a known token through, and health checks without one: probes hold no secrets."""

    def __init__(self, tokens: BearerTokens) -> None:
        self._tokens = tokens
        self._refusals = Refusals()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method.startswith(f"/{HEALTH_SERVICE}/"):
            return await continuation(details)
        authorization = dict(details.invocation_metadata or ()).get("authorization")
        name = self._tokens.name_of(authorization)
        if name is not None:
            caller.set(name)
            return await continuation(details)
        reason = "no token" if authorization is None else "an unknown token"
        return aborting(
            grpc.StatusCode.UNAUTHENTICATED,
            "expected a known bearer token as `authorization` metadata",
            notice=lambda peer: self._refusals.note(peer, reason),
        )


class Refusals:
    """Counts the calls that are not let in, and logs where they come from, a line for all of some seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged = -math.inf
        self._unlogged = 0

    def note(self, peer: str, reason: str) -> None:
        """Count one more; `peer` as gRPC names it: ipv4:ADDRESS:PORT."""
        metrics.TEACHER_UNAUTHENTICATED.inc()
        self._unlogged += 1
        if (now := self._clock()) - self._logged >= REFUSALS_LOG_SECONDS:
            log.warning("refused %d calls without a known token, the last from %s: %s", self._unlogged, peer, reason)
            self._logged, self._unlogged = now, 0
