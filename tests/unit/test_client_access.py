"""Whom a student shows its token and texts to: TLS, plaintext, proxies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from logitstream.rpc.channel import TlsFiles, client_credentials
from logitstream.rpc.proxy import EXCEPTION_VARIABLES, PROXY_VARIABLES, proxy_of
from student_worker.config import StudentConfig
from tests.authority import Authority
from tests.flat_settings import student_config

PROXY = "http://user:secret@proxy.example:3128"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*PROXY_VARIABLES, *EXCEPTION_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("no_proxy", "direct"),
    [
        ("", False),
        ("localhost,127.0.0.1", False),
        ("teacher.cluster.internal", True),
        ("localhost, .cluster.internal", True),
        ("*.cluster.internal", True),
        ("CLUSTER.Internal", True),
        ("other.cluster.internal", False),
        ("192.0.2.7", True),
        ("192.0.2.0/24,10.0.0.0/8", True),
        ("192.0.3.0/24", False),
        ("2001:db8::/32", False),
        ("*", True),
        (" , ", False),
        ("localhost teacher.cluster.internal", True),
        ("teacher.cluster.internal:50051", True),
        (".internal:443, 192.0.2.7:443", False),
        ("192.0.2.0/24:50051", True),
        ("::/0", False),
    ],
)
def test_no_proxy_counts_for_the_name_as_for_the_address(
    environment: pytest.MonkeyPatch, no_proxy: str, direct: bool
) -> None:
    environment.setenv("http_proxy", PROXY)
    environment.setenv("no_proxy", no_proxy)
    found = proxy_of("192.0.2.7:50051", "teacher.cluster.internal")
    assert found == ("" if direct else "http://proxy.example:3128 ($http_proxy)")


def test_the_proxy_is_the_one_that_grpc_would_take_and_none_to_this_machine(environment: pytest.MonkeyPatch) -> None:
    assert proxy_of("192.0.2.7:1") == ""
    environment.setenv("http_proxy", "http://a:1")
    environment.setenv("https_proxy", "http://b:1")
    assert proxy_of("192.0.2.7:1") == "http://b:1 ($https_proxy)"
    environment.setenv("no_proxy", "192.0.2.7")
    environment.setenv("no_grpc_proxy", "elsewhere")
    assert proxy_of("192.0.2.7:1") == "http://b:1 ($https_proxy)"
    assert proxy_of("[2001:db8::1]:1") == "http://b:1 ($https_proxy)"
    environment.setenv("no_grpc_proxy", "2001:db8::/32")
    assert proxy_of("[2001:db8::1]:1") == ""
    for excepted, direct in (("2001:db8::1", True), ("[2001:db8::1]", True), ("[2001:db8::1]:2", False)):
        environment.setenv("no_grpc_proxy", excepted)
        assert (proxy_of("[2001:db8::1]:1") == "") == direct
    assert proxy_of("198.51.100.1:1", "teacher.example.") != ""
    environment.setenv("no_grpc_proxy", ".example")
    assert proxy_of("198.51.100.1:1", "teacher.example.") == ""
    environment.setenv("grpc_proxy", "")
    environment.delenv("no_grpc_proxy")
    assert proxy_of("198.51.100.1:1") == ""
    environment.setenv("grpc_proxy", "http://c:1")
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/socket", "unix-abstract:name"):
        assert proxy_of(address) == ""


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
    assert student(teacher=[address]).tls.files() is None


@pytest.mark.parametrize(
    "files", [{"tls_cert": "c", "tls_key": "k"}, {"tls_cert": "c", "tls_ca": "a"}, {"tls_key": "k"}]
)
def test_a_certificate_is_never_ignored(files: dict[str, str]) -> None:
    with pytest.raises(
        ValueError, match=r"TLS needs tls\.(cert and tls\.key, or neither|ca \(a PEM file, or `system`\))"
    ):
        student(**files)


def test_the_authority_is_a_file_or_the_systems() -> None:
    assert student(tls_ca="/ca.pem").tls.files() == TlsFiles(authority="/ca.pem")
    mine = student(tls_ca="system", tls_cert="c", tls_key="k").tls.files()
    assert mine == TlsFiles(authority=None, certificate="c", key="k")


@pytest.mark.parametrize("address", ["teacher", "teacher:0", ":50051", "teacher:port", "2001:db8::1:1"])
def test_an_address_that_is_none_is_named_before_anything_is_loaded(address: str) -> None:
    with pytest.raises(ValueError, match="expected a teacher address as host:port, got"):
        student(teacher=[address], insecure=True)


def test_certificates_that_let_nobody_in_are_named(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    files, other = ours.issue("client"), ours.issue("other")
    client_credentials(files)
    (tmp_path / "nothing").write_text("# a comment\n")
    with pytest.raises(ValueError, match=r"the authority .*nothing holds no certificate in PEM"):
        client_credentials(TlsFiles(authority=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"client.pem and the key .*other.key do not go together"):
        client_credentials(TlsFiles(authority=ours.path, certificate=files.certificate, key=other.key))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        client_credentials(TlsFiles(authority=str(tmp_path / "nowhere")))
