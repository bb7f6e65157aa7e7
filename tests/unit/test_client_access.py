"""Whom a student shows its token and texts to: TLS, plaintext, proxies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from logitstream.rpc.channel import uses_proxy
from logitstream.rpc.tls import TlsSettings, client_credentials
from student_worker.config import StudentConfig
from tests.authority import Authority
from tests.flat_settings import student_config

PROXY = "http://user:secret@proxy.example:3128"


@pytest.mark.parametrize(
    ("no_proxy", "proxied"),
    [
        ("", True),
        ("localhost,127.0.0.1", True),
        ("teacher.cluster.internal", False),
        ("localhost, .cluster.internal", False),
        ("other.cluster.internal", True),
        ("192.0.2.7", False),
        ("*", False),
    ],
)
def test_no_proxy_counts_for_the_name_as_for_the_address(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, proxied: bool
) -> None:
    monkeypatch.setenv("http_proxy", PROXY)
    monkeypatch.setenv("no_proxy", no_proxy)
    assert uses_proxy("192.0.2.7:50051", "teacher.cluster.internal") == proxied
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/socket", "unix-abstract:name"):
        assert not uses_proxy(address)


def student(**changes: Any) -> StudentConfig:
    return student_config(**{"model": "m", "text": ["a.txt"]} | changes)


@pytest.mark.parametrize("name", ["max_sequences", "heldout_sequences", "cache_max_bytes", "overhead_every"])
def test_a_number_of_things_below_none_is_refused(name: str) -> None:
    """As an index it would count from the end: 3 held out of none would be all but 3."""
    with pytest.raises(ValueError, match=f"{name.removeprefix('cache_')} must be at least 0, got -3"):
        student(**{name: -3})


@pytest.mark.parametrize("address", ["teacher.example:1", "192.0.2.7:1", "[2001:db8::1]:1", "0.0.0.0:1"])
def test_plaintext_to_another_machine_needs_the_flag(address: str) -> None:
    with pytest.raises(ValueError, match=r"plaintext to .* give tls.ca .* or `tls.insecure`"):
        student(teacher=["127.0.0.1:1", address])
    student(teacher=[address], insecure=True)
    student(teacher=[address], tls_ca="system")
    student(teacher=[address], targets="cache", cache="c")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/socket", "unix-abstract:name"])
def test_plaintext_on_this_machine_needs_none(address: str) -> None:
    student(teacher=[address])


@pytest.mark.parametrize(
    "files", [{"tls_cert": "c", "tls_key": "k"}, {"tls_cert": "c", "tls_ca": "a"}, {"tls_key": "k"}]
)
def test_a_certificate_is_never_ignored(files: dict[str, str]) -> None:
    with pytest.raises(
        ValueError, match=r"TLS needs tls\.(cert and tls\.key, or neither|ca \(a PEM file, or `system`\))"
    ):
        student(**files)


@pytest.mark.parametrize("address", ["teacher", "teacher:0", ":50051", "teacher:port", "2001:db8::1:1"])
def test_an_address_that_is_none_is_named_before_anything_is_loaded(address: str) -> None:
    with pytest.raises(ValueError, match="expected a teacher address as host:port, got"):
        student(teacher=[address], insecure=True)


def test_certificates_that_let_nobody_in_are_named(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    files, other = ours.issue("client"), ours.issue("other")
    client_credentials(files)
    (tmp_path / "nothing").write_text("# a comment\n")
    with pytest.raises(ValueError, match=r"tls.ca .*nothing holds no certificate in PEM"):
        client_credentials(TlsSettings(ca=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"client.pem and tls.key .*other.key do not go together"):
        client_credentials(TlsSettings(ca=ours.path, cert=files.cert, key=other.key))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        client_credentials(TlsSettings(ca=str(tmp_path / "nowhere")))
