"""A server's certificate: served anew when its files change, and when it expires."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import grpc
from cryptography import x509

from logitstream.rpc.channel import TlsFiles

Contents = tuple[bytes, bytes, bytes | None]
"""Private key, certificate chain and, for mTLS, the clients' authority, each as PEM."""
Stamp = tuple[int, int, int]

log = logging.getLogger(__name__)


class ServerCertificates:
    """A server's TLS files, read again when they change."""

    def __init__(self, files: TlsFiles, *, read_file: Callable[[Path], bytes] = Path.read_bytes) -> None:
        if files.certificate is None or files.key is None:
            raise ValueError("a server's TLS needs a certificate and a key")
        self._paths = Path(files.key), Path(files.certificate)
        self._authority = Path(files.authority) if files.authority else None
        self._read_file = read_file
        self._stamps: list[Stamp] = []

    def read(self) -> Contents:
        """The files as they are now; OSError where one cannot be read."""
        stamps = self._look()  # before reading: what is written meanwhile counts as a change at the next look
        key, certificate = map(self._read_file, self._paths)
        authority = self._read_file(self._authority) if self._authority else None
        self._stamps = stamps
        return key, certificate, authority

    def renewed(self) -> Contents | None:
        """The files where they have changed since they were read, else None; also while they are being replaced."""
        try:
            return self.read() if self._look() != self._stamps else None
        except OSError:  # the next handshake looks again
            return None

    def _look(self) -> list[Stamp]:
        return [file_stamp(path) for path in (*self._paths, self._authority) if path]


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """TLS; with an authority, clients must show a certificate that it signed (mTLS).

    Files that change are read again at the next handshake, so certificates are renewed without a restart.
    """
    certificates = ServerCertificates(files)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        contents = certificates.renewed()
        return None if contents is None else _configuration(contents)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(certificates.read()),
        renewed,  # type: ignore[arg-type]  # the stubs do not know that None means no change
        require_client_authentication=files.authority is not None,
    )


def _configuration(contents: Contents) -> grpc.ServerCertificateConfiguration:
    key, certificate, authority = contents
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


def file_stamp(path: Path) -> Stamp:
    """A value that changes when the file is written or replaced; OSError where there is none."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def certificate_expiry(path: str) -> float:
    """Unix time at which the first certificate of a PEM file expires; ValueError where it holds none."""
    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise ValueError(f"{path} holds no certificate: {error}") from None


class CertificateExpiry:
    """`certificate_expiry` for a metric: what is wrong with the file is logged once and the last value stays."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._last = math.nan
        self._trouble = ""

    def __call__(self) -> float:
        try:
            self._last, self._trouble = certificate_expiry(self._path), ""
        except (OSError, ValueError) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("the certificate's expiry cannot be read, its metric stays as it was: %s", error)
        return self._last
