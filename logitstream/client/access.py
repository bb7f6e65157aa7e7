"""How a student reaches its teachers: the addresses behind names, connections, its token and certificates."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitstream.files import naming
from logitstream.rpc.addresses import check_exposure, is_unix, split_address
from logitstream.rpc.channel import (
    KEEPALIVE_SECONDS,
    KEEPALIVE_TIMEOUT_SECONDS,
    TlsFiles,
    client_credentials,
    open_channel,
)
from logitstream.rpc.proxy import proxy_of
from logitstream.rpc.remote_teacher import RemoteTeacher
from logitstream.rpc.tokens import TokenFile, checked_token
from logitstream.types import MAX_MESSAGE_BYTES

TOKEN_VARIABLE = "LOGITSTREAM_TOKEN"


def check_access(tls: TlsFiles | None, *, token: str = "", token_file: str = "") -> Callable[[], str]:
    """Check token and certificates; return a function that reads the token for a connection.

    Raises ValueError, which names the setting, if one of them is invalid or its file cannot be read.
    """
    if tls is not None:
        with naming("tls.ca, tls.cert or tls.key"):
            client_credentials(tls)
    if token_file and not token:
        read = TokenFile(Path(token_file)).read
        with naming("token_file"):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Connecting:
    """How replicas are found and connected to. describe_seconds: bound of one `Describe`, the first thing asked."""

    describe_seconds: float = 10.0
    keepalive_seconds: float = KEEPALIVE_SECONDS
    keepalive_timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS
    resolve_seconds: float = 15.0
    resolve: Callable[[str], Awaitable[list[str]]] = resolve


class Connector:
    """Finds the replicas behind a teacher's addresses and connects to them."""

    def __init__(
        self,
        addresses: Sequence[str],
        settings: Connecting,
        *,
        tls: TlsFiles | None,
        token: str,
        token_file: str,
        insecure: bool,
    ) -> None:
        """Check all of it; ValueError names what is wrong."""
        if not addresses:
            raise ValueError("expected at least one teacher address, host:port")
        self.settings = settings
        self._names = {address: teacher_host(address) for address in addresses}
        check_exposure(addresses, encrypted=tls is not None, insecure=insecure)
        self._tls, self._read_token = tls, check_access(tls, token=token, token_file=token_file)
        self._resolved: dict[str, list[str]] = {}

    async def look_up(self, failed: Callable[[str, Exception], None]) -> list[str]:
        """Return the replicas' addresses; a name whose look-up fails keeps those that it had."""
        for name in self._names:
            try:
                self._resolved[name] = await self.settings.resolve(name)
            except (OSError, ValueError) as error:  # ValueError: no name at all, as one with an empty label
                failed(name, error)
        return [address for found in self._resolved.values() for address in found]

    def connect(self, address: str) -> RemoteTeacher:
        """Open a channel; token and certificates are read anew, so that they can be rotated."""
        names = (self._names[name] for name, found in self._resolved.items() if address in found and address != name)
        name, token = next(names, ""), self._read_token()  # the name is what a certificate holds
        channel = open_channel(
            address,
            max_message_bytes=MAX_MESSAGE_BYTES,
            tls=self._tls,
            server_name=name,
            keepalive_seconds=self.settings.keepalive_seconds,
            keepalive_timeout_seconds=self.settings.keepalive_timeout_seconds,
        )
        proxy = proxy_of(address, name)
        shown = f"{address} through the proxy {proxy}" if proxy else address
        return RemoteTeacher(channel, address=shown, timeout_seconds=self.settings.describe_seconds, token=token)
