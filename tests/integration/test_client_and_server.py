"""The student's client against the real server: credit, encryption, tokens, draining."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstream import codec
from logitstream.client.connections import Connecting
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.errors import AccessDenied, FingerprintMismatch, InvalidSequence, TeacherUnavailable
from logitstream.rpc.tls import TlsSettings
from logitstream.tokenizer import Vocabulary
from logitstream.types import ReceivedTargets, TargetSpec, TokenSequence
from teacher_server.backend import ScoreRequest
from tests.authority import Authority
from tests.fakes import FakeBackend, fake_targets
from tests.fault_proxy import fault_proxy
from tests.flat_settings import teacher_client
from tests.serving import serving

SPEC = TargetSpec(num_samples=8, codec_version=1)
SECONDS = 60.0


def client_of(address: str, spec: TargetSpec = SPEC, **settings: Any) -> GrpcTeacherClient:
    usual: dict[str, Any] = {"vocab_size": 1000, "tokenizer": "70" * 32, "connect_timeout_seconds": SECONDS}
    return teacher_client([address], spec, **usual | settings)


def ragged(count: int, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 200, count)
    return [TokenSequence(token_ids=rng.integers(0, 1000, length).astype(np.int32)) for length in lengths]


def check_all(
    futures: Sequence[Future[ReceivedTargets]], sequences: Sequence[TokenSequence], spec: TargetSpec = SPEC
) -> None:
    for future, sequence in zip(futures, sequences, strict=True):
        got = codec.decode(future.result(SECONDS).payload)
        want = fake_targets(ScoreRequest(sequence=sequence, spec=spec), vocab_size=1000)
        np.testing.assert_array_equal(got.token_ids, want.token_ids)
        np.testing.assert_array_equal(got.row_offsets, want.row_offsets)


@pytest.mark.parametrize("spec", [SPEC, TargetSpec(sampler="full", codec_version=1)], ids=["systematic", "full"])
def test_several_clients_share_a_server_of_little_credit(spec: TargetSpec) -> None:
    command = [sys.executable, "-m", "tests.fake_backend_server", "--max-in-flight-tokens", "4096"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().removeprefix("serving on ").strip()
            clients = [client_of(address, spec, client_id=f"client {number}") for number in range(3)]
            sequences = [ragged(150, seed) for seed in range(3)]
            futures = [client.submit(mine) for client, mine in zip(clients, sequences, strict=True)]
            for answers, mine in zip(futures, sequences, strict=True):
                check_all(answers, mine, spec)
            for client in clients:
                client.close()
        finally:
            server.terminate()
    assert server.returncode == 0


async def exchange(client: GrpcTeacherClient, count: int = 20) -> None:
    """Ask and check, beside the server's event loop."""
    sequences = ragged(count)
    await asyncio.to_thread(lambda: check_all(client.submit(sequences), sequences))


async def refusal(client: GrpcTeacherClient) -> Exception:
    """Return the error that the handshake raises."""

    def handshake() -> Exception:
        try:
            return AssertionError(f"let in: {client.info}")
        except Exception as error:
            return error

    return await asyncio.to_thread(handshake)


async def close(client: GrpcTeacherClient) -> None:
    await asyncio.to_thread(client.close)


async def test_a_server_known_by_name_is_reached_over_tls_with_certificates_on_both_ends(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    server_files, client_files = ours.issue("server"), ours.issue("client")
    files: dict[str, Any] = {"tls_cert": server_files.cert, "tls_key": server_files.key, "tls_ca": ours.path}
    async with serving(FakeBackend(), **files) as server:
        address = f"localhost:{server.address.rsplit(':', 1)[1]}"
        client = client_of(address, tls=client_files)
        await exchange(client)
        await close(client)
        client = client_of(address, tls=TlsSettings(ca=ours.path), connect_timeout_seconds=1.0)
        assert isinstance(await refusal(client), TeacherUnavailable)  # no certificate of its own
        await close(client)
        (tmp_path / "foreign").mkdir()
        foreign = Authority(tmp_path / "foreign").issue("client")
        client = client_of(address, tls=foreign, connect_timeout_seconds=1.0)
        assert "CERTIFICATE_VERIFY_FAILED" in str(await refusal(client))
        await close(client)


async def test_the_systems_authorities_are_those_that_openssl_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Authority(tmp_path)
    files = ours.issue("server")
    async with serving(FakeBackend(), tls_cert=files.cert, tls_key=files.key) as server:
        address = f"localhost:{server.address.rsplit(':', 1)[1]}"
        client = client_of(address, tls=TlsSettings(ca="system"), connect_timeout_seconds=1.0)
        assert "CERTIFICATE_VERIFY_FAILED" in str(await refusal(client))
        await close(client)
        (tmp_path / "store").mkdir()
        (tmp_path / "store/ours.pem").write_bytes(Path(ours.path).read_bytes())
        for variables in (
            {"SSL_CERT_FILE": ours.path},
            {"SSL_CERT_FILE": str(tmp_path / "none"), "SSL_CERT_DIR": str(tmp_path / "store")},
        ):
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            client = client_of(address, tls=TlsSettings(ca="system"))
            await exchange(client)
            await close(client)


@pytest.mark.parametrize("kind", ["unix:{}", "unix://{}", "unix-abstract:{}"])
async def test_a_socket_of_this_machine_is_served_and_named_as_it_was_given(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    address = kind.format(tmp_path / "socket")
    async with serving(FakeBackend(), address=address, address_file=str(tmp_path / "address")) as server:
        assert server.address == address
        assert (tmp_path / "address").read_text() == f"{address}\n"
        assert f"serving on {address}\n" in capfd.readouterr().out
        client = client_of(address)
        await exchange(client)
        await close(client)


async def test_a_connection_that_fails_says_what_it_means_for_the_settings(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    short: dict[str, Any] = {"connect_timeout_seconds": 1.0}
    (tmp_path / "foreign").mkdir()
    files, foreign = ours.issue("server"), Authority(tmp_path / "foreign")
    tls: dict[str, Any] = {"tls_cert": files.cert, "tls_key": files.key}
    mutual: dict[str, Any] = {"tls_ca": ours.path}
    async with (
        serving(FakeBackend()) as plain,
        serving(FakeBackend(), **tls) as encrypted,
        serving(FakeBackend(), **tls, **mutual) as wary,
    ):
        for server, host, files_of_mine, meaning in (
            (encrypted, "127.0.0.1", None, r"as a server does that expects TLS \(tls.ca\)"),
            (plain, "localhost", TlsSettings(ca=ours.path), "it speaks no TLS: leave out tls.ca"),
            (encrypted, "localhost", TlsSettings(ca=foreign.path), "not come from the authority in tls.ca"),
            (encrypted, "127.0.0.1", TlsSettings(ca=ours.path), "its certificate names another host"),
            (wary, "localhost", TlsSettings(ca=ours.path), r"or a certificate \(tls.cert\)"),
        ):
            client = client_of(f"{host}:{server.address.rpartition(':')[2]}", tls=files_of_mine, **short)
            assert re.search(f"failed to connect .*{meaning}", str(await refusal(client)))
            await close(client)


async def test_a_name_in_no_proxy_is_reached_without_the_proxy_and_errors_name_the_proxy_that_was_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server is at an address of this machine that is no loopback, which would never be reached by a proxy."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: it asks for the way out alone
        except OSError:
            pytest.skip("this machine has no address but loopback")
        here = probe.getsockname()[0]

    async def resolve(address: str) -> list[str]:
        return [address.replace("teacher.cluster.internal", here)]

    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    async with serving(FakeBackend(), address=f"{here}:0", insecure=True) as server:
        port = server.address.rpartition(":")[2]
        for no_proxy, host, direct in (
            ("localhost,.cluster.internal", "teacher.cluster.internal", True),
            ("teacher.cluster.internal", "teacher.cluster.internal", True),
            (here, here, True),
            (f"{here}/24", "teacher.cluster.internal", True),
            ("elsewhere.example", "teacher.cluster.internal", False),
            ("", here, False),
        ):
            monkeypatch.setenv("no_proxy", no_proxy)
            client = client_of(
                f"{host}:{port}",
                tls=TlsSettings(insecure=True),
                connecting=Connecting(resolve=resolve),
                connect_timeout_seconds=10.0 if direct else 1.0,
            )
            if direct:
                await exchange(client, count=2)
            else:
                told = str(await refusal(client))
                assert f"{here}:{port} (through the environment's proxy): " in told
                assert "secret" not in told
            await close(client)


async def test_a_tokenizer_that_differs_is_told_token_by_token_and_an_added_one_only_where_it_is_used() -> None:
    pairs = [(index, f"token {index} " + "é" * (index % 7)) for index in range(40_000)]  # more than one message
    theirs = Vocabulary(pairs, {"normalizer": "null"})
    swapped = Vocabulary([*pairs[:-1], (39_999, "other")], theirs.rules)
    added = Vocabulary([*pairs, (40_500, "<tool>")], theirs.rules)
    backend = FakeBackend(vocab_size=41_000, tokenizer_digest=theirs.digest)
    async with serving(backend, vocabulary=theirs) as server:
        client = client_of(server.address, vocab_size=41_000, tokenizer=swapped)
        error = await refusal(client)
        assert isinstance(error, FingerprintMismatch)
        shown = f"1 of 40000 ids stand for other tokens (39999 is 'other' here and {pairs[-1][1]!r} there)"
        assert f"{shown}: tokenize with the teacher's tokenizer, that of fake" in str(error)
        await close(client)
        client = client_of(server.address, vocab_size=41_000, tokenizer=added)
        sequences = [
            TokenSequence(token_ids=np.array(ids, np.int32)) for ids in ([1, 39_999], [1, 40_500], [1, 40_999])
        ]
        futures = client.submit(sequences)
        await asyncio.to_thread(futures[0].result, SECONDS)
        with pytest.raises(InvalidSequence, match=r"token id 40500 \('<tool>'\) was added to the student's tokenizer"):
            await asyncio.to_thread(futures[1].result, SECONDS)
        with pytest.raises(InvalidSequence, match="token id 40999"):
            await asyncio.to_thread(futures[2].result, SECONDS)
        await close(client)


async def test_the_same_tokens_cut_otherwise_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    theirs = Vocabulary([(index, f"w{index}") for index in range(1000)], {"normalizer": '{"type": "Lowercase"}'})
    async with serving(FakeBackend(tokenizer_digest=theirs.digest), vocabulary=theirs) as server:
        for rules in (theirs.rules, {"normalizer": "null"}):
            client = client_of(server.address, tokenizer=Vocabulary(theirs.pairs, rules))
            await exchange(client)
            await close(client)
    (warning,) = [message for message in caplog.messages if "cuts text in another way" in message]
    assert "in another way (normalizer)" in warning


async def test_a_token_is_asked_for_and_a_rotated_one_is_read_again(tmp_path: Path) -> None:
    servers, mine = tmp_path / "tokens", tmp_path / "token"
    servers.write_text("the-first-token-of-this-test\n")
    mine.write_text("the-first-token-of-this-test\n")
    async with serving(FakeBackend(), token_file=str(servers)) as server:
        with fault_proxy(server.address) as proxy:
            client = client_of(proxy.address, token_file=str(mine))
            await exchange(client)
            servers.write_text("the-second-token-of-this-test\n")
            mine.write_text("the-second-token-of-this-test\n")
            proxy.cut()
            await exchange(client)
            await close(client)
        for token in ("", "the-first-token-of-this-test"):
            client = client_of(server.address, token=token)
            error = await refusal(client)
            assert isinstance(error, AccessDenied), error
            sent = "the token that was sent is none of the server's" if token else "no token was sent"
            assert f"({sent}: see teacher.token_file and $LOGITSTREAM_TOKEN)" in str(error)
            assert "token-of-this-test" not in str(error)
            await close(client)


def test_a_missing_token_or_certificate_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token_file: .*no-token"):
        client_of("localhost:1", token_file=str(tmp_path / "no-token"))
    with pytest.raises(ValueError, match=r"tls.ca, tls.cert or tls.key: .*no-ca"):
        client_of("localhost:1", tls=TlsSettings(ca=str(tmp_path / "no-ca")))


async def test_a_server_that_stops_drains_its_client() -> None:
    sequences = ragged(200)
    async with serving(FakeBackend(delay_seconds=0.02), max_batch_tokens=256) as server:
        client = client_of(server.address, deadline_seconds=SECONDS)
        futures = client.submit(sequences[:50])
        await asyncio.to_thread(futures[0].result, SECONDS)
    async with serving(FakeBackend(), address=server.address):
        futures += client.submit(sequences[50:])
        await asyncio.to_thread(check_all, futures, sequences)
        await close(client)


@pytest.mark.parametrize("count", [1, 4])
async def test_teachers_slower_than_expected_are_given_the_time_they_take(count: int) -> None:
    """With one sequence the other replica is idle, with four both are at work."""
    sequences = ragged(count)
    slow = [FakeBackend(delay_seconds=0.8) for _ in range(2)]
    async with serving(slow[0], drain_seconds=0.1) as first, serving(slow[1], drain_seconds=0.1) as second:
        client = GrpcTeacherClient(
            [first.address, second.address],
            SPEC,
            vocab_size=1000,
            tokenizer="70" * 32,
            connecting=Connecting(stalled_seconds=0.2),
        )
        await asyncio.to_thread(check_all, client.submit(sequences), sequences)
        await close(client)
