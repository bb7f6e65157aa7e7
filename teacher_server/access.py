"""Who may call: bearer tokens from a file, checked before a message is read, and the server's certificate."""

from __future__ import annotations

import hmac
import logging
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from logitstream import metrics
from logitstream.files import naming
from logitstream.rpc.tls import TlsSettings
from logitstream.rpc.tokens import LastGood, checked_token
from teacher_server.calls import HEALTH_SERVICE, aborting

REFUSALS_LOG_SECONDS = 10.0
caller: ContextVar[str] = ContextVar("caller", default="")
"""Inside a call: the name that goes with its token; empty if it has none."""

log = logging.getLogger(__name__)


def check_tls(tls: TlsSettings) -> None:
    """Raise ValueError if no student could connect: gRPC takes any key and then fails every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert, tls.key, lambda: b"")
        if tls.ca:
            context.load_verify_locations(tls.ca)
    except OSError as error:
        raise ValueError(f"tls.cert {tls.cert}, tls.key {tls.key}, tls.ca {tls.ca or 'none'}: {error}") from error


class BearerTokens(LastGood[dict[bytes, str]]):
    """A file of tokens that are let in: a line is a token, or a token and its client's name, or a comment behind #.

    It is read at each call, so tokens are rotated without a restart; one that holds no good token changes nothing.
    Raises ValueError if there is none at first.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(lambda: _named_tokens(path), "the list of tokens")
        with naming("token_file"):
            self.read()

    def name_of(self, authorization: str | bytes | None) -> str | None:
        """Return the name that goes with an `authorization: Bearer …` header; None if the token is not known.

        Takes the same time for any wrong token.
        """
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = value.partition(b" ")
        matches = [name for one, name in self.read().items() if hmac.compare_digest(token, one)]
        return matches[0] if matches and scheme.lower() == b"bearer" else None


def _named_tokens(path: Path) -> dict[bytes, str]:
    names: dict[bytes, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        words = line.split(None, 1)
        if words and not words[0].startswith(b"#"):
            token = checked_token(words[0], f"line {number} of {path}")
            names[token.encode()] = b"".join(words[1:]).strip().decode(errors="replace")
    if not names:
        raise ValueError(f"no token in {path}")
    return names


class TokenInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Lets calls with a known token through, and health checks without one: probes hold no secrets."""

    def __init__(self, tokens: BearerTokens, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens, self._clock = tokens, clock
        self._logged, self._unlogged = -math.inf, 0

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method.startswith(f"/{HEALTH_SERVICE}/"):
            return await continuation(details)
        name = self._tokens.name_of(dict(details.invocation_metadata or ()).get("authorization"))
        if name is not None:
            caller.set(name)
            return await continuation(details)
        message = "expected a known bearer token as `authorization` metadata"
        return aborting(grpc.StatusCode.UNAUTHENTICATED, message, notice=self.note_refusal)

    def note_refusal(self, peer: str) -> None:
        """Count a call that is not let in; `peer` as gRPC names it: ipv4:ADDRESS:PORT."""
        metrics.TEACHER_UNAUTHENTICATED.inc()
        self._unlogged += 1
        if (now := self._clock()) - self._logged >= REFUSALS_LOG_SECONDS:
            log.warning("refused %d calls without a known token, the last from %s", self._unlogged, peer)
            self._logged, self._unlogged = now, 0
