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
from logitstream.rpc.channel import KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS, open_channel, uses_proxy
from logitstream.rpc.remote_teacher import RemoteTeacher
from logitstream.rpc.tls import TlsSettings, client_credentials
from logitstream.rpc.tokens import LastGood, checked_token, read_token
from logitstream.settings import setting
from logitstream.types import MAX_MESSAGE_BYTES

TOKEN_VARIABLE = "LOGITSTREAM_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """The teacher's replicas and how long to wait for them."""

    addresses: list[str] = setting(
        "Addresses of teacher replicas, host:port; a DNS name may stand for many.", factory=lambda: ["127.0.0.1:50051"]
    )
    token_file: str = setting("File that holds the bearer token; LOGITSTREAM_TOKEN is used if it is empty.", "")
    client_id: str = setting("Name of this run in the teacher's logs and for its fairness between clients.", "student")
    connect_timeout_seconds: float = setting("Wait this long for a teacher to come up.", 300.0)
    deadline_seconds: float = setting("One sequence's targets must arrive within this time, retries included.", 300.0)
    max_teacher_lag: int = setting(
        "0: all targets come from the same weights; n: the teacher may learn, and targets more than n versions old are "
        "asked for again; -1: any version.",
        0,
    )

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "connect_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


def check_access(tls: TlsSettings, token_file: str, *, token: str = "") -> Callable[[], str]:
    """Check token and certificates; return a function that reads the token for a connection.

    The token wins over its file, which wins over $LOGITSTREAM_TOKEN. Raises ValueError, which names the setting, if one
    of them is invalid or its file cannot be read.
    """
    if tls.ca:
        with naming("tls.ca, tls.cert or tls.key"):
            client_credentials(tls)
    elif tls.cert:
        raise ValueError("TLS needs tls.ca (a PEM file, or `system`) with tls.cert and tls.key")
    if token_file and not token:
        file = LastGood(lambda: read_token(Path(token_file)), "the token")
        with naming("token_file"):
            file.read()
        return file.read
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
    """How replicas are found and watched.

    describe_seconds: bound of one `Describe`, the first thing asked. stalled_seconds: a replica that answers nothing
    for this long while others are ready is given up; one that was slow before gets longer, up to half the deadline.
    """

    describe_seconds: float = 10.0
    keepalive_seconds: float = KEEPALIVE_SECONDS
    keepalive_timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS
    stalled_seconds: float = 60.0
    resolve_seconds: float = 15.0
    resolve: Callable[[str], Awaitable[list[str]]] = resolve


class Connections:
    """Find the replicas behind a teacher's addresses and connect to them. ValueError names a setting that is wrong."""

    def __init__(
        self, addresses: Sequence[str], tls: TlsSettings, read_token: Callable[[], str], connecting: Connecting
    ) -> None:
        if not addresses:
            raise ValueError("expected at least one teacher address, host:port")
        self.connecting = connecting
        self._hosts = {address: teacher_host(address) for address in addresses}
        check_exposure(addresses, encrypted=bool(tls.ca), insecure=tls.insecure)
        self._tls, self._read_token = tls, read_token
        self._resolved: dict[str, list[str]] = {}

    async def look_up(self, failed: Callable[[str, Exception], None]) -> list[str]:
        """Return the replicas' addresses; a name whose look-up fails keeps those that it had."""
        for name in self._hosts:
            try:
                self._resolved[name] = await self.connecting.resolve(name)
            except (OSError, ValueError) as error:  # ValueError: no name at all, as one with an empty label
                failed(name, error)
        return [address for found in self._resolved.values() for address in found]

    def connect(self, address: str) -> RemoteTeacher:
        """Open a channel; token and certificates are read anew, so that they can be rotated."""
        names = (self._hosts[name] for name, found in self._resolved.items() if address in found and address != name)
        name, token = next(names, ""), self._read_token()  # the name is what a certificate holds
        channel = open_channel(
            address,
            max_message_bytes=MAX_MESSAGE_BYTES,
            tls=self._tls,
            server_name=name,
            keepalive_seconds=self.connecting.keepalive_seconds,
            keepalive_timeout_seconds=self.connecting.keepalive_timeout_seconds,
        )
        shown = f"{address} (through the environment's proxy)" if uses_proxy(address, name) else address
        return RemoteTeacher(channel, address=shown, timeout_seconds=self.connecting.describe_seconds, token=token)
