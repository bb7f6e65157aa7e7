"""What lets this student in at a teacher: its token, and the certificates of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from logitstream.files import of_setting
from logitstream.rpc.channel import TlsFiles, client_credentials
from logitstream.rpc.tokens import TokenFile, checked_token

TOKEN_VARIABLE = "LOGITSTREAM_TOKEN"


def check_access(tls: TlsFiles | None, *, token: str = "", token_file: str = "") -> Callable[[], str]:
    """What reads the token for a connection, once token and certificates have been found good.

    Raises ValueError, which names the setting, where one of them is none or its file cannot be read.
    """
    if tls is not None:
        with of_setting("tls.ca, tls.cert or tls.key"):
            client_credentials(tls)
    if token_file and not token:
        read = TokenFile(Path(token_file)).read
        with of_setting("token_file"):
            read()
        return read
    known = token or os.environ.get(TOKEN_VARIABLE, "").strip()
    checked_token(known.encode(), "the token" if token else f"${TOKEN_VARIABLE}")
    return lambda: known
