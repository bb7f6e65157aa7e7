"""Bearer tokens as an HTTP header can carry them."""

from __future__ import annotations

import logging
from pathlib import Path

DELETE = 0x7F

log = logging.getLogger(__name__)


def checked_token(token: bytes, where: str) -> str:
    """The token as text; ValueError, which never shows it, where a header cannot carry it."""
    if not token.isascii() or any(byte <= ord(" ") or byte == DELETE for byte in token):
        raise ValueError(f"{where}: expected a token of printable ASCII characters without spaces, got other bytes")
    return token.decode()


class TokenFile:
    """The one token of a client's file, read anew each time; while that fails, the last good one stays in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ""
        self._trouble = ""

    def read(self) -> str:
        """OSError or ValueError where no good token was ever there."""
        try:
            token = self._path.read_bytes().strip()
            if not token:
                raise ValueError(f"no token in {self._path}")
            self._last, self._trouble = checked_token(token, str(self._path)), ""
        except (OSError, ValueError) as error:
            if not self._last:
                raise
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("the token file cannot be used, the token stays as it was: %s", error)
        return self._last
