"""Addresses of teacher replicas: a DNS name may stand for many."""

from __future__ import annotations

import asyncio
import socket

from logitstream.rpc.addresses import is_unix, split_address


async def resolve(address: str) -> list[str]:
    """`host:port` to one `ip:port` for each of the host's addresses, sorted; OSError where the look-up fails.

    IPv4 addresses where there are any: a replica with both would otherwise be counted twice.
    """
    if is_unix(address):
        return [address]
    host, port = split_address(address)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    four = sorted({f"{sockaddr[0]!s}:{port}" for family, *_, sockaddr in found if family == socket.AF_INET})
    six = sorted({f"[{sockaddr[0]!s}]:{port}" for family, *_, sockaddr in found if family == socket.AF_INET6})
    return four or six


def teacher_host(address: str) -> str:
    """The name or address that a HOST:PORT is at, or the whole of unix:PATH; ValueError where it is neither."""
    if is_unix(address):
        return address
    try:
        host, port = split_address(address)
    except ValueError:
        host, port = "", 0
    if not host or not port:
        raise ValueError(f"expected a teacher address as host:port, got {address!r}")
    return host
