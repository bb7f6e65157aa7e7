"""How a student reaches its teachers: addresses behind names, its token, and the certificates of both."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

from logitstream.files import of_setting
from logitstream.rpc.addresses import is_unix, split_address
from logitstream.rpc.channel import TlsFiles, client_credentials
from logitstream.rpc.tokens import TokenFile, checked_token

TOKEN_VARIABLE = "LOGITSTREAM_TOKEN"


def check_access(tls: TlsFiles | None, *, token: str = "", token_file: str = "") -> Callable[[], str]:
    """Check token and certificates; return a function that reads the token for a connection.

    Raises ValueError, which names the setting, if one of them is invalid or its file cannot be read.
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


async def resolve(address: str) -> list[str]:
    """Look up `host:port`: one `ip:port` for each of the host's addresses, sorted. Raises OSError if that fails.

    IPv4 addresses if there are any: a replica with both would otherwise be counted twice.
    """
    if is_unix(address):
        return [address]
    host, port = split_address(address)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    four = sorted({f"{sockaddr[0]!s}:{port}" for family, *_, sockaddr in found if family == socket.AF_INET})
    six = sorted({f"[{sockaddr[0]!s}]:{port}" for family, *_, sockaddr in found if family == socket.AF_INET6})
    return four or six


def teacher_host(address: str) -> str:
    """Return the host of a HOST:PORT, or the whole of unix:PATH; raise ValueError if it is neither."""
    if is_unix(address):
        return address
    try:
        host, port = split_address(address)
    except ValueError:
        host, port = "", 0
    if not host or not port:
        raise ValueError(f"expected a teacher address as host:port, got {address!r}")
    return host
