"""Channel and server options, keepalive, TLS and bearer tokens, on which both ends of a connection must agree."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

from logitstream.rpc.proxy import proxy_of
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

    Connections beyond max_connections are closed as they come; silent and idle ones are closed soon to make room.
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
    """Return credentials that check the server's certificate against `authority`, or the system's authorities if None.

    Raises OSError or ValueError for files that let nobody in: gRPC itself takes any bytes and fails each handshake.
    """
    authority = Path(files.authority).read_bytes() if files.authority else system_authorities()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        where = f"the authority {files.authority}" if files.authority else "this system's store of authorities"
        raise ValueError(f"{where} holds no certificate in PEM: {error}") from None
    key = certificate = None
    if files.certificate is not None and files.key is not None:
        key, certificate = Path(files.key).read_bytes(), Path(files.certificate).read_bytes()
        try:  # an encrypted key must not ask for its password on the terminal
            context.load_cert_chain(files.certificate, files.key, lambda: b"")
        except ssl.SSLError as error:
            message = f"the certificate {files.certificate} and the key {files.key} do not go together: {error}"
            raise ValueError(message) from None
    return grpc.ssl_channel_credentials(root_certificates=authority, private_key=key, certificate_chain=certificate)


def system_authorities() -> bytes:
    """Return the certificates, in PEM, that OpenSSL trusts here; $SSL_CERT_FILE and $SSL_CERT_DIR replace them.

    gRPC would take a list of its own, which knows nothing of what an administrator added.
    """
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return Path(paths.cafile).read_bytes()
    files = sorted(Path(paths.capath).iterdir()) if paths.capath else []
    found = (path.read_bytes() for path in files if path.is_file())
    return b"\n".join(sorted({content for content in found if b"BEGIN CERTIFICATE" in content}))


def open_channel(
    address: str, *, max_message_bytes: int, tls: TlsFiles | None = None, server_name: str = "", **keepalive: float
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
    ]
    if server_name:
        options += [("grpc.ssl_target_name_override", server_name), ("grpc.default_authority", server_name)]
    if not proxy_of(address, server_name):
        options.append(("grpc.enable_http_proxy", 0))
    if tls is None:
        return aio.insecure_channel(address, options=options)
    return aio.secure_channel(address, client_credentials(tls), options=options)


def bearer_metadata(token: str | None) -> Sequence[tuple[str, str]]:
    """Return a call's metadata that lets it in; empty without a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()
