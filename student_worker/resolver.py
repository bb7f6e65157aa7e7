"""Addresses of teacher replicas: a DNS name may stand for many."""

from __future__ import annotations

import asyncio
import socket


async def resolve(address: str) -> list[str]:
    """`host:port` to one `ip:port` for each of the host's addresses, sorted; OSError where the look-up fails.

    IPv4 addresses where there are any: a replica with both would otherwise be counted twice.
    """
    if address.startswith("unix:"):
        return [address]
    host, port = split_address(address)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    four = sorted({f"{sockaddr[0]!s}:{port}" for family, *_, sockaddr in found if family == socket.AF_INET})
    six = sorted({f"[{sockaddr[0]!s}]:{port}" for family, *_, sockaddr in found if family == socket.AF_INET6})
    return four or six


def split_address(address: str) -> tuple[str, int]:
    """Raises ValueError where the address is not host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"expected a teacher address as host:port, got {address!r}")
    return host.strip("[]"), int(port)
