"""A server's TLS files: served anew when they change, and when the certificate expires."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
from cryptography import x509

from logitstream.rpc.channel import TlsFiles

Contents = tuple[bytes, bytes, bytes | None]
"""Private key, certificate chain and, for mTLS, the clients' authority, each as PEM."""


class ServerCertificates:
    """A server's TLS files, compared with what was served last at each handshake."""

    def __init__(self, files: TlsFiles, *, read_file: Callable[[Path], bytes] = Path.read_bytes) -> None:
        if files.certificate is None or files.key is None:
            raise ValueError("a server's TLS needs a certificate and a key")
        self._key, self._certificate = Path(files.key), Path(files.certificate)
        self._authority = Path(files.authority) if files.authority else None
        self._read_file = read_file
        self._served: Contents | None = None

    def renewed(self) -> Contents | None:
        """Return the files' contents if they have changed since the last call. Raises OSError."""
        key, certificate = self._read_file(self._key), self._read_file(self._certificate)
        contents = key, certificate, self._read_file(self._authority) if self._authority else None
        if contents == self._served:
            return None
        self._served = contents
        return contents


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return credentials that follow the files; with an authority, clients must show a certificate it signed (mTLS)."""
    certificates = ServerCertificates(files)

    def configuration() -> grpc.ServerCertificateConfiguration | None:
        contents = certificates.renewed()
        if contents is None:
            return None
        key, certificate, authority = contents
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        try:
            return configuration()
        except OSError:  # the files are being replaced: the next handshake looks again
            return None

    return grpc.dynamic_ssl_server_credentials(
        configuration(),  # type: ignore[arg-type]  # the first one is there
        renewed,  # type: ignore[arg-type]  # the stubs do not know that None means no change
        require_client_authentication=files.authority is not None,
    )


def certificate_expiry(path: str) -> float:
    """Return the Unix time at which the first certificate of a PEM file expires. Raises ValueError."""
    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise ValueError(f"{path} holds no certificate: {error}") from None
