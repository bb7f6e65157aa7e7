"""Bearer tokens as an HTTP header can carry them, and values of files that are read anew each time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class LastGood(Generic[T]):
    """A value that is read anew each time; while that fails, which is logged once, the last good one stays."""

    def __init__(self, read: Callable[[], T], what: str, *, default: T | None = None) -> None:
        self._read, self._what, self._last, self._trouble = read, what, default, ""

    def read(self) -> T:
        """Return the value. Raises OSError or ValueError if there never was a good one."""
        try:
            self._last, self._trouble = self._read(), ""
        except (OSError, ValueError) as error:
            if self._last is None:
                raise
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("%s cannot be read and stays as it was: %s", self._what, error)
        return self._last


def read_token(path: Path) -> str:
    """Return the one token of a client's file. Raises OSError or ValueError."""
    token = path.read_bytes().strip()
    if not token:
        raise ValueError(f"no token in {path}")
    return checked_token(token, str(path))


def checked_token(token: bytes, where: str) -> str:
    """Return the token as text. Raises ValueError, which never shows it, if a header cannot carry it."""
    if token and not (token.isascii() and token.decode().isprintable() and b" " not in token):
        raise ValueError(f"{where}: expected a token of printable ASCII characters without spaces, got other bytes")
    return token.decode()
