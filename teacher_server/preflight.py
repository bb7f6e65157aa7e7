"""What can be known to be wrong before anything is loaded: tokens, certificates, addresses, folders."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from pathlib import Path

from logitstream.rpc.addresses import is_unix, split_address
from teacher_server.access import bearer_tokens
from teacher_server.config import TeacherConfig

log = logging.getLogger(__name__)


def check_access(config: TeacherConfig) -> None:
    """Raises ValueError or OSError where nobody could be let in: gRPC itself takes any key and fails each handshake."""
    bearer_tokens(config.server.token_file, config.server.token_env)
    if not config.tls.cert:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for setting, path in (
        ("tls.cert", config.tls.cert),
        ("tls.key", config.tls.key),
        ("tls.ca", config.tls.ca),
    ):
        if path and not Path(path).is_file():
            raise ValueError(f"{setting} {path} is no file")
    try:
        context.load_cert_chain(config.tls.cert, config.tls.key)
    except ssl.SSLError as error:
        raise ValueError(
            f"tls.cert {config.tls.cert} and tls.key {config.tls.key} do not go together: {error}"
        ) from error
    try:
        if config.tls.ca:
            context.load_verify_locations(config.tls.ca)
    except ssl.SSLError as error:
        raise ValueError(f"tls.ca {config.tls.ca} holds no certificate: {error}") from error


def check_places(config: TeacherConfig) -> None:
    """Raises ValueError where a port cannot be bound or the watched folder is missing; a port in use is only noted."""
    addresses = {"server.address": config.server.address, "server.health_address": config.server.health_address}
    if config.metrics.port >= 0:
        addresses["metrics.address"] = f"{config.metrics.address}:{config.metrics.port}"
    for setting, address in addresses.items():
        if address and not is_unix(address):
            _bind(setting, address)
    if config.watch.folder and not Path(config.watch.folder).is_dir():
        raise ValueError(f"watch.folder {config.watch.folder} is no folder")


def _bind(setting: str, address: str) -> None:
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # else a server that has just ended is in the way
            probe.bind(where)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ValueError(f"{setting} {address} cannot be served: {error}") from error
        log.warning("%s %s is in use, as by a server that runs already", setting, address)
