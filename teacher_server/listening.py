"""The addresses a server listens at: ports that nobody else serves, and how many connections each takes."""

from __future__ import annotations

import errno
import logging
import resource
import socket
from typing import Any

import grpc
from grpc import aio

from logitstream.rpc.addresses import is_unix, split_address
from logitstream.rpc.channel import Options, server_options

MAX_HEALTH_CONNECTIONS = 1024
HEALTH_MESSAGE_BYTES = 64 << 10
MANY_FILES = 1 << 20  # Linux's default bound if no limit is set

log = logging.getLogger(__name__)


def raise_file_limit() -> int:
    """Let this process open as many files as it may, a connection being one; return the limit that holds then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit on open files stays at %d: %s", soft, error)
    return file_limit()


def file_limit() -> int:
    """Return how many files this process may have open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MANY_FILES if soft == resource.RLIM_INFINITY else soft


def teacher_options(address: str, max_message_bytes: int, *, max_connections: int) -> Options:
    """Return options of the server that students talk to; max_connections 0: half of the files that may be open."""
    return server_options(max_message_bytes, max_connections=_share(max_connections or file_limit() // 2, address))


def health_options(address: str) -> Options:
    """Return options of the server for health checks alone: whatever fills the teacher's port leaves it its files."""
    return server_options(
        HEALTH_MESSAGE_BYTES, max_connections=_share(min(file_limit() // 8, MAX_HEALTH_CONNECTIONS), address)
    )


def _share(max_connections: int, address: str) -> int:
    """Divide connections between the addresses behind a host name: gRPC counts them apart."""
    try:
        num_places = 1 if is_unix(address) else len(_places(address))
    except OSError:  # `bind` will say so
        num_places = 1
    return max(1, max_connections // num_places)


def _places(address: str) -> list[tuple[int, int, int, str, Any]]:
    host, port = split_address(address)
    return list(socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))


def bind(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Have the server listen at HOST:PORT or unix:PATH; return the address with the port that port 0 became.

    Raises OSError if it cannot, or if anybody listens at one of the host's addresses: gRPC alone would be content with
    those that are left, and would take a socket's path away from the server that owns it.
    """
    try:
        _check_free(address)
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot serve on {address}: {error}") from error
    return address if is_unix(address) else f"{address.rpartition(':')[0]}:{port}"


def _check_free(address: str) -> None:
    if is_unix(address):
        scheme, _, path = address.partition(":")
        path = f"\0{path}" if scheme == "unix-abstract" else path.removeprefix("//")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):  # nobody, or a socket that an ended server left
                return
        raise OSError("another server listens there")
    for family, kind, protocol, _, where in _places(address):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended may be followed
            try:
                probe.bind(where)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:  # what this machine lacks, as ::1 for localhost, is left to gRPC
                    raise
