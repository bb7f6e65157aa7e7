"""Certificates for tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from logitstream.rpc.tls import TlsSettings


class Authority:
    """A certificate authority and what it issues, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.path = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.path)

    def issue(self, name: str, *, expired: bool = False) -> TlsSettings:
        now = datetime.now(UTC)
        first, last = (now - timedelta(days=9), now - timedelta(days=2)) if expired else (None, now + timedelta(days=9))
        leaf = self.ca.issue_cert("localhost", not_before=first, not_after=last)
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        for path, blobs in ((certificate, leaf.cert_chain_pems), (key, [leaf.private_key_pem])):
            partial = path.with_suffix(".partial")
            partial.write_bytes(b"".join(blob.bytes() for blob in blobs))
            partial.rename(path)
        return TlsSettings(cert=str(certificate), key=str(key), ca=self.path)
