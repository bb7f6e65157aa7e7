"""Channel and server options, keepalive, TLS and bearer tokens: what both ends of a connection must agree on."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

from logitstream.rpc.addresses import is_loopback, split_address
from logitstream.rpc.proxy import proxy_for
from logitstream.settings import setting

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
"""How long a connection may have no call open; a client that calls again connects again without noticing."""


def _keepalive(seconds: float = KEEPALIVE_SECONDS, timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS) -> Options:
    return [
        ("grpc.keepalive_time_ms", round(seconds * 1000)),
        ("grpc.keepalive_timeout_ms", round(timeout_seconds * 1000)),
        ("grpc.http2.ping_timeout_ms", round(timeout_seconds * 1000)),  # else a lost ping is noticed after a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # otherwise a quiet stream stops being watched after two pings
    ]


def server_options(max_message_bytes: int, *, max_connections: int = 1024) -> Options:
    """A longer message is refused by gRPC itself, before it is parsed: RESOURCE_EXHAUSTED.

    Connections beyond max_connections are closed as they come; silent and idle ones are closed soon to make room.
    """
    return [
        *_keepalive(),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
        ("grpc.max_receive_message_length", max_message_bytes + ENVELOPE_BYTES),
        ("grpc.max_send_message_length", max_message_bytes + ENVELOPE_BYTES),
        ("grpc.max_concurrent_streams", MAX_CONNECTION_CALLS),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.so_reuseport", 0),  # two servers on one port would split a client's streams silently
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_SECONDS * 1000)),
        ("grpc.max_connection_idle_ms", round(IDLE_SECONDS * 1000)),
    ]


def client_options(
    max_message_bytes: int,
    *,
    server_name: str = "",
    keepalive_seconds: float = KEEPALIVE_SECONDS,
    keepalive_timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS,
) -> Options:
    """server_name: what the server's certificate must name where the address is one of several behind that name."""
    named: Options = [("grpc.ssl_target_name_override", server_name), ("grpc.default_authority", server_name)]
    return [
        *_keepalive(keepalive_seconds, keepalive_timeout_seconds),
        *(named if server_name else []),
        ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, not a broken one shared
        ("grpc.enable_retries", 0),  # the client resends by itself, elsewhere
        ("grpc.max_receive_message_length", max_message_bytes + 2 * ENVELOPE_BYTES),
        ("grpc.max_send_message_length", 2 * max_message_bytes),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one end: own certificate chain and key, and the authority that the other end's must come from."""

    certificate: str | None = None
    key: str | None = None
    authority: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("TLS needs the certificate and the key, or neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Encryption of the connections between students and teachers, for the settings of both commands."""

    ca: str = setting(
        "PEM file of the authority that must have signed the other end's certificate. On a student also `system` (this "
        "machine's authorities); empty: plaintext, which only a teacher on this machine gets. On a teacher empty: "
        "students need no certificate.",
        "",
    )
    cert: str = setting("PEM file of this end's certificate chain.", "")
    key: str = setting("PEM file of this end's private key.", "")
    insecure: bool = setting("Allow plaintext between machines, as behind a proxy or in a private network.", False)

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ValueError("TLS needs tls.cert and tls.key, or neither")

    def files(self) -> TlsFiles | None:
        """Return the files for a channel or a server; None: plaintext."""
        if not self.ca and not self.cert:
            return None
        authority = None if self.ca in ("", "system") else self.ca
        return TlsFiles(certificate=self.cert or None, key=self.key or None, authority=authority)


def client_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """TLS; the server's certificate is checked against `authority`, or the system's authorities where it is None.

    Raises OSError or ValueError for files that let nobody in: gRPC itself takes any bytes and fails each handshake.
    """
    authority = Path(files.authority).read_bytes() if files.authority else system_authorities()
    _check_authority(authority, files.authority)
    key = certificate = None
    if files.certificate is not None and files.key is not None:
        key, certificate = Path(files.key).read_bytes(), Path(files.certificate).read_bytes()
        try:  # an encrypted key must not ask for its password on the terminal
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(files.certificate, files.key, lambda: b"")
        except ssl.SSLError as error:
            message = f"the certificate {files.certificate} and the key {files.key} do not go together: {error}"
            raise ValueError(message) from None
    return grpc.ssl_channel_credentials(root_certificates=authority, private_key=key, certificate_chain=certificate)


def _check_authority(content: bytes, path: str | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        where = f"the authority {path}" if path else "this system's store of authorities"
        raise ValueError(f"{where} holds no certificate in PEM: {error}") from None


def system_authorities() -> bytes:
    """The certificates, in PEM, that OpenSSL trusts on this machine; $SSL_CERT_FILE and $SSL_CERT_DIR replace them.

    gRPC would take a list of its own, which knows nothing of what an administrator added.
    """
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return Path(paths.cafile).read_bytes()
    files = sorted(Path(paths.capath).iterdir()) if paths.capath else []
    found = (path.read_bytes() for path in files if path.is_file())
    return b"\n".join(sorted({content for content in found if b"BEGIN CERTIFICATE" in content}))


def open_channel(
    address: str,
    *,
    max_message_bytes: int,
    tls: TlsFiles | None = None,
    server_name: str = "",
    keepalive_seconds: float = KEEPALIVE_SECONDS,
    keepalive_timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS,
) -> aio.Channel:
    """A channel that connects lazily; certificates are read anew for each one, so they can be rotated."""
    options = client_options(
        max_message_bytes,
        server_name=server_name,
        keepalive_seconds=keepalive_seconds,
        keepalive_timeout_seconds=keepalive_timeout_seconds,
    )
    if not proxy_of(address, server_name):
        options.append(("grpc.enable_http_proxy", 0))
    if tls is None:
        return aio.insecure_channel(address, options=options)
    return aio.secure_channel(address, client_credentials(tls), options=options)


def proxy_of(address: str, server_name: str = "") -> str:
    """The proxy that a channel to this address goes through, for messages; empty: none."""
    if is_loopback(address):
        return ""
    host, port = split_address(address)
    return proxy_for(server_name, host, port=port)


def bearer_metadata(token: str | None) -> Sequence[tuple[str, str]]:
    """What a call carries to be let in; empty without a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()
