"""Addresses of teachers: HOST:PORT, unix:PATH and unix-abstract:NAME, and which of them stay on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

MAX_PORT = 65535


def is_unix(address: str) -> bool:
    """Return True for a socket of this machine, named by path or abstractly as gRPC spells them."""
    return address.startswith(("unix:", "unix-abstract:"))


def split_address(address: str) -> tuple[str, int]:
    """Return host, without brackets, and port; the host may be empty, the port 0. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > MAX_PORT or (":" in host and bare == host):
        raise ValueError(f"expected HOST:PORT with a port up to {MAX_PORT}, got {address!r}")
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Return True if the address can be reached from this machine alone."""
    host = "localhost" if is_unix(address) else split_address(address)[0]
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(addresses: Sequence[str], *, encrypted: bool, insecure: bool) -> None:
    """Raise ValueError if a client's token and texts would cross a network in plaintext without its leave."""
    exposed = [] if encrypted or insecure else [address for address in addresses if not is_loopback(address)]
    if exposed:
        raise ValueError(
            f"plaintext to {exposed[0]} would show the token and the texts to the network: give tls.ca (its "
            "authority's PEM file, or `system`), or `tls.insecure` if a proxy or a private network protects it"
        )
