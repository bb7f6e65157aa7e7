"""TLS of both ends: settings, a channel's credentials, and a server's, which follow their files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from logitstream.settings import setting


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


def client_credentials(tls: TlsSettings) -> grpc.ChannelCredentials:
    """Return credentials that check the server's certificate against `ca`.

    Raises OSError or ValueError for files that let nobody in: gRPC itself takes any bytes and fails each handshake.
    """
    authority = system_authorities() if tls.ca == "system" else Path(tls.ca).read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"tls.ca {tls.ca} holds no certificate in PEM: {error}") from None
    key = certificate = None
    if tls.cert:
        key, certificate = Path(tls.key).read_bytes(), Path(tls.cert).read_bytes()
        try:  # an encrypted key must not ask for its password on the terminal
            context.load_cert_chain(tls.cert, tls.key, lambda: b"")
        except ssl.SSLError as error:
            raise ValueError(f"tls.cert {tls.cert} and tls.key {tls.key} do not go together: {error}") from None
    return grpc.ssl_channel_credentials(root_certificates=authority, private_key=key, certificate_chain=certificate)


def system_authorities() -> bytes:
    """Return the certificates, in PEM, that OpenSSL trusts here; $SSL_CERT_FILE and $SSL_CERT_DIR replace them.

    gRPC would take a list of its own, which knows nothing of what an administrator added.
    """
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return Path(paths.cafile).read_bytes()
    files = [path for path in Path(paths.capath or "/nonexistent").glob("*") if path.is_file()]
    return b"\n".join({content for path in files if b"BEGIN CERTIFICATE" in (content := path.read_bytes())})


def server_credentials(tls: TlsSettings) -> grpc.ServerCredentials:
    """Return credentials that read the files at each handshake; with `ca`, clients must show a certificate (mTLS)."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = Path(tls.key).read_bytes(), Path(tls.cert).read_bytes()
        authority = Path(tls.ca).read_bytes() if tls.ca else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        try:
            return configuration()
        except OSError:  # the files are being replaced: the next handshake looks again
            return None

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        renewed,  # type: ignore[arg-type]  # the stubs do not know that None means no change
        require_client_authentication=bool(tls.ca),
    )


def certificate_expiry(path: str) -> float:
    """Return the Unix time at which the first certificate of a PEM file expires. Raises ValueError."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise ValueError(f"{path} holds no certificate: {error}") from None
