"""Who may call: bearer tokens from a file or an environment variable, checked before a message is read."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT (or unix:PATH) can be reached from this machine alone."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class BearerTokens:
    """The tokens that are let in; a file is read again when it changes, so tokens are rotated without a restart."""

    def __init__(self, *, path: Path | None = None, variable: str | None = None) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._tokens: list[bytes] = []
        self._fixed = [os.environ[variable].strip().encode()] if variable else []
        if path is not None:
            self._read(path)
        if not all(self._fixed) or not (self._fixed or self._tokens):
            raise ValueError(f"no token in {path if path is not None else f'environment variable {variable}'}")

    def admits(self, authorization: str | bytes | None) -> bool:
        """Whether an `authorization: Bearer …` header carries a known token; takes the same time for any wrong one."""
        self._refresh()
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = value.partition(b" ")
        matches = [hmac.compare_digest(token, known) for known in [*self._fixed, *self._tokens]]
        return scheme.lower() == b"bearer" and any(matches)

    def _refresh(self) -> None:
        if self._path is None:
            return
        try:
            if _stamp(self._path) != self._stamp:
                self._read(self._path)
                log.info("tokens read again: %d", len(self._tokens))
        except OSError as error:
            log.warning("token file cannot be read, the tokens stay as they were: %s", error)

    def _read(self, path: Path) -> None:
        self._stamp = _stamp(path)
        self._tokens = _lines(path)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino


def _lines(path: Path) -> list[bytes]:
    lines = (line.strip() for line in path.read_bytes().splitlines())
    return [line for line in lines if line and not line.startswith(b"#")]
