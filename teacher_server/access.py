"""Who may call: bearer tokens from a file or an environment variable, checked before a message is read."""

from __future__ import annotations

import hmac
import logging
import os
from contextvars import ContextVar
from pathlib import Path

from logitstream.files import of_setting
from logitstream.rpc.certificates import Stamp, file_stamp
from logitstream.rpc.tokens import checked_token

caller: ContextVar[str] = ContextVar("caller", default="")
"""Inside a call: the name that goes with its token; empty where none does."""

log = logging.getLogger(__name__)


class BearerTokens:
    """The tokens that are let in; a file is read again when it changes, so tokens are rotated without a restart.

    A line of the file is a token, or a token and the name of the client that it was given to. A changed file that holds
    no token, or one that no header can carry, is logged once, and the last good tokens stay in force.
    """

    def __init__(self, *, path: Path | None = None, variable: str | None = None) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._names: dict[bytes, str] = {}
        self._fixed = b""
        self._trouble = ""
        if path is not None:
            self._read(path)
        if variable:
            where = f"environment variable {variable}"
            self._fixed = os.environb.get(variable.encode(), b"").strip()
            if not checked_token(self._fixed, where):
                raise ValueError(f"no token in {where}")

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
            if file_stamp(self._path) != self._stamp:
                self._read(self._path)
                self._trouble = ""
                log.info("tokens read again: %d", len(self._names))
        except (OSError, ValueError) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("the token file cannot be used, the tokens stay as they were: %s", error)

    def _read(self, path: Path) -> None:
        stamp = file_stamp(path)  # of before: what is written meanwhile is read at the next call
        content = path.read_bytes()
        self._stamp = stamp  # whatever the file holds: it is looked into once
        names: dict[bytes, str] = {}
        for number, line in enumerate(content.splitlines(), start=1):
            words = line.split(None, 1)
            if words and not words[0].startswith(b"#"):
                token = checked_token(words[0], f"line {number} of {path}")
                names[token.encode()] = b"".join(words[1:]).strip().decode(errors="replace")
        if not names:
            raise ValueError(f"no token in {path}")
        self._names = names


def bearer_tokens(token_file: str, token_env: str) -> BearerTokens | None:
    """Of these settings; None where both are empty. ValueError, which names them, where no token is to be had."""
    given = {"token_file": token_file, "token_env": token_env}
    if not any(given.values()):
        return None
    with of_setting(" and ".join(name for name, value in given.items() if value)):
        return BearerTokens(path=Path(token_file) if token_file else None, variable=token_env or None)
