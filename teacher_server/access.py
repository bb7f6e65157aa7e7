"""Who may call: bearer tokens from a file or an environment variable, checked before a message is read."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
from contextvars import ContextVar
from pathlib import Path

MAX_PORT = 65535

caller: ContextVar[str] = ContextVar("caller", default="")
"""Inside a call: the name that goes with its token; empty where none does."""

log = logging.getLogger(__name__)


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port; ValueError where it is no HOST:PORT."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > MAX_PORT or (":" in host and bare == host):
        raise ValueError(f"expected HOST:PORT with a port up to {MAX_PORT}, got {address!r}")
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT (or unix:PATH) can be reached from this machine alone."""
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class BearerTokens:
    """The tokens that are let in; a file is read again when it changes, so tokens are rotated without a restart.

    A line of the file is a token, or a token and the name of the client that it was given to.
    """

    def __init__(self, *, path: Path | None = None, variable: str | None = None) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._names: dict[bytes, str] = {}
        self._fixed = os.environ.get(variable, "").strip().encode() if variable else b""
        if path is not None:
            self._read(path)
        for source, found in ((path, self._names), (variable and f"environment variable {variable}", self._fixed)):
            if source and not found:
                raise ValueError(f"no token in {source}")

    def name_of(self, authorization: str | bytes | None) -> str | None:
        """The name that goes with an `authorization: Bearer …` header, empty without one; None for no known token.

        Takes the same time for any wrong one.
        """
        self._refresh()
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = value.partition(b" ")
        known = self._names | ({self._fixed: ""} if self._fixed else {})
        matches = [name for one, name in known.items() if hmac.compare_digest(token, one)]
        return matches[0] if matches and scheme.lower() == b"bearer" else None

    def _refresh(self) -> None:
        if self._path is None:
            return
        try:
            if _stamp(self._path) != self._stamp:
                self._read(self._path)
                log.info("tokens read again: %d", len(self._names))
        except OSError as error:
            log.warning("token file cannot be read, the tokens stay as they were: %s", error)

    def _read(self, path: Path) -> None:
        stamp = _stamp(path)  # of before: what is written meanwhile is read at the next call
        lines = (line.split(None, 1) for line in path.read_bytes().splitlines())
        words = [line for line in lines if line and not line[0].startswith(b"#")]
        self._names = {token: " ".join(name.decode(errors="replace") for name in names) for token, *names in words}
        self._stamp = stamp


def bearer_tokens(token_file: str, token_env: str) -> BearerTokens | None:
    """Of these settings; None where both are empty. Raises ValueError or OSError where no token is to be had."""
    if not (token_file or token_env):
        return None
    return BearerTokens(path=Path(token_file) if token_file else None, variable=token_env or None)


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
