"""Options on which both ends of a connection must agree, and a client's channel."""

from __future__ import annotations

import urllib.request
from collections.abc import Sequence

from grpc import aio

from logitstream.rpc.addresses import is_loopback, split_address
from logitstream.rpc.tls import TlsSettings, client_credentials

Options = list[tuple[str, int | str]]

KEEPALIVE_SECONDS = 20
"""A silent peer (half-open socket, stopped process) is noticed within this plus KEEPALIVE_TIMEOUT_SECONDS."""
KEEPALIVE_TIMEOUT_SECONDS = 10
ENVELOPE_BYTES = 64 << 10
"""Room for ids and field headers around payloads that may be max_message_bytes long."""
MAX_CONNECTION_CALLS = 256
HANDSHAKE_SECONDS = 5.0
"""How long a new connection may take to say anything: TLS and the HTTP/2 preface."""
IDLE_SECONDS = 10.0
"""How long a connection may have no call open: strangers hold no places, and a student's next call reconnects."""


def _keepalive(
    keepalive_seconds: float = KEEPALIVE_SECONDS, keepalive_timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS
) -> Options:
    timeout_ms = round(keepalive_timeout_seconds * 1000)
    return [
        ("grpc.keepalive_time_ms", round(keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),  # without it a lost ping is noticed after a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # otherwise a quiet connection is not watched after two pings
    ]


def server_options(max_message_bytes: int, *, max_connections: int = 1024) -> Options:
    """Return options with which gRPC refuses longer messages before they are parsed (RESOURCE_EXHAUSTED).

    Connections beyond max_connections are closed as they come; silent ones are closed soon to make room.
    """
    return [
        *_keepalive(),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
        ("grpc.max_receive_message_length", max_message_bytes + ENVELOPE_BYTES),
        ("grpc.max_send_message_length", max_message_bytes + ENVELOPE_BYTES),
        ("grpc.max_concurrent_streams", MAX_CONNECTION_CALLS),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.so_reuseport", 0),  # two servers on one port would split a client's calls silently
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_SECONDS * 1000)),
        ("grpc.max_connection_idle_ms", round(IDLE_SECONDS * 1000)),
    ]


def open_channel(
    address: str, *, max_message_bytes: int, tls: TlsSettings | None = None, server_name: str = "", **keepalive: float
) -> aio.Channel:
    """Return a channel that connects lazily; certificates are read anew for each one, so they can be rotated.

    server_name: the name in the server's certificate, if the address is one of several behind that name.
    """
    options: Options = [
        *_keepalive(**keepalive),
        ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, not a broken one shared
        ("grpc.enable_retries", 0),  # the client asks again by itself, elsewhere
        ("grpc.max_receive_message_length", max_message_bytes + 2 * ENVELOPE_BYTES),
        ("grpc.max_send_message_length", 2 * max_message_bytes),
        ("grpc.enable_http_proxy", int(uses_proxy(address, server_name))),
    ]
    if server_name:
        options += [("grpc.ssl_target_name_override", server_name), ("grpc.default_authority", server_name)]
    if tls is None or not tls.ca:
        return aio.insecure_channel(address, options=options)
    return aio.secure_channel(address, client_credentials(tls), options=options)


def uses_proxy(address: str, server_name: str = "") -> bool:
    """Return whether a proxy that the environment names may be used: not within this machine nor against `no_proxy`.

    gRPC looks at the address alone, which is looked up before: it would miss the name in `no_proxy`.
    """
    if is_loopback(address) or not urllib.request.getproxies():
        return False
    hosts = split_address(address)[0], server_name
    return not any(urllib.request.proxy_bypass(host) for host in hosts if host)


def bearer_metadata(token: str | None) -> Sequence[tuple[str, str]]:
    """Return a call's metadata that lets it in; empty without a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()
