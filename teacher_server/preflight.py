"""Checks before anything is loaded: tokens, certificates, addresses, folders."""

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
    """Raise ValueError or OSError if no student could connect: gRPC takes any key and then fails every handshake."""
    bearer_tokens(config.server.token_file, config.server.token_env)
    tls = config.tls
    if not tls.cert:
        return
    for setting, path in (("tls.cert", tls.cert), ("tls.key", tls.key), ("tls.ca", tls.ca)):
        if path and not Path(path).is_file():
            raise ValueError(f"{setting} {path} is no file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert, tls.key)
    except ssl.SSLError as error:
        raise ValueError(f"tls.cert {tls.cert} and tls.key {tls.key} do not go together: {error}") from error
    try:
        if tls.ca:
            context.load_verify_locations(tls.ca)
    except ssl.SSLError as error:
        raise ValueError(f"tls.ca {tls.ca} holds no certificate: {error}") from error


def check_places(config: TeacherConfig) -> None:
    """Raise ValueError if a port cannot be bound or the watched folder is missing; log a port that is in use."""
    addresses = {"server.address": config.server.address, "server.health_address": config.server.health_address}
    if config.metrics.port >= 0:
        addresses["metrics.address"] = f"{config.metrics.address}:{config.metrics.port}"
    for setting, address in addresses.items():
        if not address or is_unix(address):
            continue
        host, port = split_address(address)
        try:
            family = socket.getaddrinfo(host or None, port, flags=socket.AI_PASSIVE)[0][0]
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"{setting} {address} cannot be served: {error}") from error
            log.warning("%s %s is in use, as by a server that runs already", setting, address)
    if config.watch.folder and not Path(config.watch.folder).is_dir():
        raise ValueError(f"watch.folder {config.watch.folder} is no folder")
