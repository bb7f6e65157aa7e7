"""Who is let in and what they are told: TLS, mTLS, expired and foreign certificates, bearer tokens, exposure."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from logitstream import metrics
from logitstream.rpc.addresses import is_loopback
from logitstream.rpc.tls import TlsSettings, certificate_expiry
from logitstream.rpc.tokens import LastGood, read_token
from logitstream.rpc.v1 import teacher_pb2 as pb
from teacher_server.access import REFUSALS_LOG_SECONDS, BearerTokens, TokenInterceptor
from teacher_server.server import Served, TeacherServer, serve
from tests.authority import Authority
from tests.fakes import FakeBackend
from tests.flat_settings import teacher_client, teacher_config
from tests.serving import SPEC, WireClient, sequence, serving

SECRET = "correct-horse-battery-staple"


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    (tmp_path / "ours").mkdir()
    return Authority(tmp_path / "ours")


@pytest.fixture
def foreign(tmp_path: Path) -> Authority:
    (tmp_path / "foreign").mkdir()
    return Authority(tmp_path / "foreign")


@asynccontextmanager
async def serving_tls(files: TlsSettings, *, mutual: bool = False, **settings: Any) -> AsyncIterator[TeacherServer]:
    client_ca = files.ca if mutual else ""
    tls: dict[str, Any] = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": client_ca}
    async with serving(FakeBackend(), address="localhost:0", **tls, **settings) as server:
        yield server


async def works(address: str, **options: Any) -> bool:
    """Return whether a call gets its targets."""
    async with WireClient(address, **options) as client:
        return bool((await client.score(sequence(1, 2, 3)))[0].targets)


async def refusal(address: str, *, seconds: float = 15.0, **options: Any) -> grpc.StatusCode:
    """Return the status of a Describe; that and a Score must both fail, and tell nothing."""
    async with WireClient(address, **options) as client:
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.Describe(pb.DescribeRequest(), metadata=client.metadata, timeout=seconds)
        details = str(caught.value.details())
        assert "fake" not in details
        assert SECRET not in details
        assert (await client.refusal(sequence(1), seconds=seconds)).code() is caught.value.code()
        return caught.value.code()


async def test_tls_serves_those_who_trust_its_authority_and_nobody_else(ours: Authority, foreign: Authority) -> None:
    async with serving_tls(ours.issue("server")) as server:
        assert await works(server.address, tls=TlsSettings(ca=ours.path))
        assert await refusal(server.address, tls=TlsSettings(ca=foreign.path)) is grpc.StatusCode.UNAVAILABLE
        assert await refusal(server.address) is grpc.StatusCode.UNAVAILABLE  # plaintext to a TLS port


async def test_mutual_tls_asks_for_a_certificate_of_its_authority(ours: Authority, foreign: Authority) -> None:
    async with serving_tls(ours.issue("server"), mutual=True) as server:
        assert await works(server.address, tls=ours.issue("client"))
        impostor = foreign.issue("client")
        for tls in (
            TlsSettings(ca=ours.path),
            TlsSettings(ca=ours.path, cert=impostor.cert, key=impostor.key),
            ours.issue("expired", expired=True),
        ):
            assert await refusal(server.address, tls=tls) is grpc.StatusCode.UNAVAILABLE


async def test_a_client_refuses_a_server_whose_certificate_has_expired(ours: Authority) -> None:
    async with serving_tls(ours.issue("server", expired=True)) as server:
        assert await refusal(server.address, tls=TlsSettings(ca=ours.path)) is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_served_without_a_restart(ours: Authority) -> None:
    async with serving_tls(ours.issue("server", expired=True)) as server:
        assert await refusal(server.address, tls=TlsSettings(ca=ours.path)) is grpc.StatusCode.UNAVAILABLE
        ours.issue("server")
        assert await works(server.address, tls=TlsSettings(ca=ours.path))


async def test_metrics_are_served_whatever_becomes_of_the_certificate(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    files = ours.issue("server")
    assert files.cert is not None
    certificate = Path(files.cert)
    expected = certificate_expiry(files.cert)
    port = metrics.serve(0, side="teacher", address="127.0.0.1")

    def exported() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            text = response.read().decode()
        (value,) = re.findall(r"^logitstream_teacher_certificate_expiry_timestamp_seconds (\S+)$", text, re.MULTILINE)
        return float(value)

    async with serving_tls(files):
        assert exported() == expected
        for content in (b"", b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n", b"\xff\xfe", None):
            certificate.unlink() if content is None else certificate.write_bytes(content)
            assert [exported(), exported()] == [expected, expected]
        warnings = [record for record in caplog.records if "expiry cannot be read" in record.getMessage()]
        assert 1 <= len(warnings) <= 4
        renewed = ours.issue("server").cert
        assert renewed is not None
        assert exported() == certificate_expiry(renewed)


def test_the_expiry_of_a_certificate_is_read_from_it(ours: Authority) -> None:
    files = ours.issue("server")
    expected = datetime.now(UTC) + timedelta(days=9)
    assert files.cert is not None
    assert abs(certificate_expiry(files.cert) - expected.timestamp()) < 60


async def test_without_the_token_nothing_is_served_but_health(tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text(f"# students\n{SECRET}\n\nanother\n")
    async with serving(FakeBackend(), token_file=str(token_file)) as server:
        for token in (None, "wrong", SECRET[:-1], SECRET + "x", "# students"):
            assert await refusal(server.address, token=token) is grpc.StatusCode.UNAUTHENTICATED
        assert await works(server.address, token=SECRET)
        assert await works(server.address, token="another")
        async with WireClient(server.address) as client:
            answer = await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_changed_token_file_counts_at_once_and_a_vanished_one_changes_nothing(tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text("old")
    async with serving(FakeBackend(), token_file=str(token_file)) as server:
        assert await works(server.address, token="old")
        partial = tmp_path / "tokens.partial"
        partial.write_text("new")
        partial.rename(token_file)
        assert await works(server.address, token="new")
        assert await refusal(server.address, token="old") is grpc.StatusCode.UNAUTHENTICATED
        token_file.unlink()
        assert await works(server.address, token="new")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"good\nodd\xff\xfe\n", "line 2 of .*tokens: expected a token of printable ASCII"),
        ("\ufeffgood\n".encode(), "line 1 of .*tokens: expected a token of printable ASCII"),
        ("good".encode("utf-16"), "line 1 of .*tokens: expected a token of printable ASCII"),
        ("señal\n".encode(), "line 1 of .*tokens: expected a token of printable ASCII"),
        (b"one\x00two\n", "line 1 of .*tokens: expected a token of printable ASCII"),
        (b"", "no token in .*tokens"),
    ],
)
def test_a_token_file_that_no_client_could_match_is_an_error_at_first_and_changes_nothing_later(
    content: bytes, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        BearerTokens(token_file)
    assert "good" not in str(caught.value)
    with pytest.raises(SystemExit, match=f"^teacher-server: token_file: {text}"):
        serve(
            teacher_config(model="m", address="127.0.0.1:0", token_file=str(token_file)), lambda: Served(FakeBackend())
        )
    token_file.write_text("first team a\n")
    tokens, client = BearerTokens(token_file), LastGood(lambda: read_token(tmp_path / "token"), "the token")
    (tmp_path / "token").write_text("first\n")
    assert client.read() == "first"
    token_file.write_bytes(content)
    (tmp_path / "token").write_bytes(content)
    for _ in range(3):
        assert tokens.name_of("Bearer first") == "team a"
        assert tokens.name_of(b"Bearer " + content.strip()) is None
        assert client.read() == "first"
    assert re.search(text, caplog.text)
    assert len(caplog.records) == 2  # one of each side, however often it is looked at
    token_file.write_text("second\n")
    (tmp_path / "token").write_text("second")
    assert (tokens.name_of("Bearer first"), tokens.name_of("Bearer second"), client.read()) == (None, "", "second")


def test_a_student_says_at_once_that_its_token_cannot_be_sent(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"odd\xff\n")
    for options in ({"token_file": str(tmp_path / "token")}, {"token": "two words"}, {"token": "señal"}):
        with pytest.raises(ValueError, match="printable ASCII characters without spaces") as caught:
            teacher_client(["127.0.0.1:1"], SPEC, vocab_size=1000, tokenizer="70" * 32, **options)
        assert "two" not in str(caught.value)


async def test_callers_without_a_known_token_are_counted_and_named_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text(SECRET)
    before = metrics.value("logitstream_teacher_unauthenticated_total")
    assert before is not None
    async with serving(FakeBackend(), token_file=str(token_file)) as server:
        for token in ("first-wrong", "second-wrong", None):
            await refusal(server.address, token=token)
        assert await works(server.address, token=SECRET)
    assert metrics.value("logitstream_teacher_unauthenticated_total") == before + 6
    (line,) = [record.getMessage() for record in caplog.records if "without a known token" in record.getMessage()]
    assert re.search(r"refused 1 calls .* from ipv4:127\.0\.0\.1:\d+$", line)
    assert "wrong" not in caplog.text


def test_refusals_that_were_not_logged_are_counted_in_the_next_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    (tmp_path / "tokens").write_text("a")
    interceptor = TokenInterceptor(BearerTokens(tmp_path / "tokens"), clock=lambda: now)
    for _ in range(1000):
        interceptor.note_refusal("ipv4:10.0.0.1:1")
    now += REFUSALS_LOG_SECONDS
    interceptor.note_refusal("ipv4:10.0.0.2:1")
    assert [record.getMessage() for record in caplog.records] == [
        "refused 1 calls without a known token, the last from ipv4:10.0.0.1:1",
        "refused 1000 calls without a known token, the last from ipv4:10.0.0.2:1",
    ]


def test_a_token_file_that_could_not_be_read_once_is_read_again(tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text("old")
    tokens = BearerTokens(token_file)
    partial = tmp_path / "tokens.partial"
    partial.write_text("new")
    partial.rename(token_file)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, files[1]))
    try:
        assert tokens.name_of("Bearer old") == ""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert tokens.name_of("Bearer new") == ""
    assert tokens.name_of("Bearer old") is None


def test_a_token_file_that_grows_within_one_tick_of_the_clock_is_read_again(tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text("begun")
    written = token_file.stat().st_mtime_ns
    tokens = BearerTokens(token_file)
    token_file.write_text("begun and done\nsecond")
    os.utime(token_file, ns=(written, written))
    assert tokens.name_of("Bearer second") == ""


async def test_a_token_with_a_name_makes_one_client_of_whatever_its_holder_calls_itself(tmp_path: Path) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text("one team a\ntwo\n")
    async with (
        serving(FakeBackend(delay_seconds=0.5), token_file=str(token_file), max_in_flight_tokens=1600) as server,
        WireClient(server.address, token="one") as team,
        WireClient(server.address, token="two") as other,
    ):
        calls = [team.call(sequence(number), client_id=f"self-made {number}") for number in range(3)]
        while server.admission.num_calls < 3:
            await asyncio.sleep(0.005)
        assert (await team.refusal(sequence(9), client_id="b")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await other.score(sequence(9), client_id="b"))[0].targets
        assert [(await call.read()).index for call in calls] == [0, 0, 0]


async def test_tokens_never_reach_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token_file = tmp_path / "tokens"
    token_file.write_text(SECRET)
    async with serving(FakeBackend(), token_file=str(token_file)) as server:
        assert await works(server.address, token=SECRET)
        await refusal(server.address, token=SECRET + "x")
        token_file.write_text(SECRET + "\nmore")
        assert await works(server.address, token="more")
    assert SECRET not in caplog.text


def test_a_token_source_without_a_token_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing yet\n")
    with pytest.raises(ValueError, match="no token in"):
        BearerTokens(tmp_path / "empty")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.9.9.9:0", "unix:/tmp/x", "unix-abstract:x"]
)
def test_addresses_of_this_machine_alone_may_be_plaintext(address: str) -> None:
    assert is_loopback(address)
    teacher_config(model="m", address=address)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "teacher.example:1", ":1"])
def test_plaintext_elsewhere_needs_the_flag(address: str) -> None:
    with pytest.raises(ValueError, match=r"--tls\.insecure"):
        teacher_config(model="m", address=address)
    teacher_config(model="m", address=address, insecure=True)
