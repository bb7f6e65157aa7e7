"""The gRPC client against teacher processes that answer, die, drain, change their weights or fall silent."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from logitstream import codec
from logitstream.client.connections import Connecting, resolve, teacher_host
from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.errors import (
    FingerprintMismatch,
    InvalidSequence,
    ScoringFailed,
    TeacherUnavailable,
)
from logitstream.rpc.tls import TlsSettings
from logitstream.training.target_stream import TargetStream
from logitstream.types import Fingerprint, ReceivedTargets, TokenSequence
from tests.fake_teacher import (
    FATAL_ID,
    FLAKY_ID,
    POISON_ID,
    SPEC,
    TOKENIZER_DIGEST,
    VOCAB_SIZE,
    Started,
    expected_targets,
    fake_info,
    fake_teacher,
    weights_digest,
)
from tests.fault_proxy import fault_proxy
from tests.flat_settings import teacher_client

SECONDS = 60.0
"""The time limit of anything that must not hang."""
PLAINTEXT = TlsSettings(insecure=True)


@contextlib.contextmanager
def connected(*addresses: str, **settings: Any) -> Iterator[GrpcTeacherClient]:
    options: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "tokenizer": TOKENIZER_DIGEST,
        "deadline_seconds": SECONDS,
        "connect_timeout_seconds": SECONDS,
    } | settings
    client = teacher_client(addresses, SPEC, **options)
    try:
        yield client
    finally:
        client.close()


def make_sequences(count: int, *, num_tokens: int = 32, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    return [TokenSequence(token_ids=rng.integers(0, 990, num_tokens).astype(np.int32)) for _ in range(count)]


def with_id(token_id: int) -> TokenSequence:
    return TokenSequence(token_ids=np.array([1, token_id, 2], np.int32))


def submit_all(client: GrpcTeacherClient, sequences: Sequence[TokenSequence]) -> list[Future[ReceivedTargets]]:
    return [client.submit([sequence], priority=step)[0] for step, sequence in enumerate(sequences)]


def check_all(futures: Sequence[Future[ReceivedTargets]], sequences: Sequence[TokenSequence]) -> list[ReceivedTargets]:
    received = [future.result(SECONDS) for future in futures]
    for one, sequence in zip(received, sequences, strict=True):
        want = expected_targets(sequence, 0, version=one.teacher_version)
        np.testing.assert_array_equal(codec.decode(one.payload).token_ids, want.token_ids)
    return received


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def versions(received: Sequence[ReceivedTargets]) -> set[int]:
    return {one.teacher_version for one in received}


def test_answers_belong_to_their_sequences_and_name_the_teachers_fingerprint() -> None:
    mask = np.array([True, False] * 16)
    sequences = [*make_sequences(50), TokenSequence(token_ids=np.arange(32, dtype=np.int32), loss_mask=mask)]
    with fake_teacher() as (_, address), connected(address) as client:
        received = check_all(submit_all(client, sequences), sequences)
        digest = Fingerprint.of(client.info, SPEC).digest
        assert {one.fingerprint for one in received} == {digest}
        later = client.submit([sequences[0]], draw_set=3)[0].result(SECONDS)
        want = expected_targets(sequences[0], 3)
        np.testing.assert_array_equal(codec.decode(later.payload).token_ids, want.token_ids)


def test_load_is_spread_over_replicas_by_how_fast_they_answer() -> None:
    sequences = make_sequences(200)
    credit = ("--credit", "4096")
    with (
        fake_teacher("--seconds", "0.001", *credit) as (_, quick),
        fake_teacher("--version", "1", "--seconds", "0.03", *credit) as (_, slow),
        connected(quick, slow, max_teacher_lag=-1) as client,
    ):
        received = check_all(submit_all(client, sequences), sequences)
    by_slow = sum(one.teacher_version for one in received)
    assert 0 < by_slow < 60


def test_a_killed_replica_loses_nothing_and_is_used_again_once_it_is_back() -> None:
    sequences = make_sequences(300)
    port = free_port()
    with fake_teacher("--seconds", "0.002") as (_, steady):
        killed = Started("--version", "1", "--seconds", "0.002", port=port)
        try:
            with connected(steady, killed.address(), max_teacher_lag=-1) as client:
                futures = submit_all(client, sequences)
                wait_until(lambda: sum(future.done() for future in futures) > 50)
                killed.stop()
                check_all(futures, sequences)
                killed = Started("--version", "2", port=port)
                for _ in itertools.count():
                    received = check_all(submit_all(client, sequences[:20]), sequences[:20])
                    if 2 in versions(received):
                        break
        finally:
            killed.stop()


def test_a_draining_replica_finishes_what_it_has_and_gets_nothing_new() -> None:
    sequences = make_sequences(400)
    with (
        fake_teacher("--seconds", "0.002") as (_, steady),
        fake_teacher("--version", "1", "--seconds", "0.002") as (draining, leaving),
        connected(steady, leaving, max_teacher_lag=-1) as client,
    ):
        wait_until(lambda: versions(check_all(submit_all(client, sequences[:8]), sequences[:8])) == {0, 1})
        futures = submit_all(client, sequences[:100])
        draining.send_signal(signal.SIGTERM)
        futures += submit_all(client, sequences[100:])
        check_all(futures, sequences)
        assert draining.exit_status(SECONDS) == 0
        assert versions(check_all(submit_all(client, sequences[:20]), sequences[:20])) == {0}


def test_replicas_that_appear_behind_a_name_are_used_and_vanished_ones_are_not() -> None:
    sequences = make_sequences(20)
    with fake_teacher() as (_, first), fake_teacher("--version", "1") as (_, second):
        behind = [first]

        async def look_up(name: str) -> list[str]:
            assert name == "teachers:50051"
            return list(behind)

        with connected(
            "teachers:50051",
            connecting=Connecting(resolve=look_up, resolve_seconds=0.05),
            max_teacher_lag=-1,
            tls=PLAINTEXT,
        ) as client:
            assert versions(check_all(submit_all(client, sequences), sequences)) == {0}
            behind.append(second)
            wait_until(lambda: 1 in versions(check_all(submit_all(client, sequences), sequences)))
            behind.remove(first)
            wait_until(lambda: versions(check_all(submit_all(client, sequences), sequences)) == {1})


async def test_a_name_stands_for_all_its_addresses_once() -> None:
    assert await resolve("localhost:1234") == ["127.0.0.1:1234"]
    assert await resolve("127.0.0.1:1") == ["127.0.0.1:1"]
    assert await resolve("[::1]:5") == ["[::1]:5"]
    with pytest.raises(OSError, match=r"(?i)name|address"):
        await resolve("no-such-host.invalid:1")
    for wrong in ("nowhere", ":1", "host:", "host:port", "host:70000"):
        with pytest.raises(ValueError, match=re.escape(f"host:port, got '{wrong}'")):
            teacher_host(wrong)


def test_a_replica_with_other_weights_is_refused_and_not_mixed_in(caplog: pytest.LogCaptureFixture) -> None:
    sequences = make_sequences(100)
    with fake_teacher() as (_, address), connected(address) as client:
        client.info  # noqa: B018  # the first replica decides
        with fake_teacher("--weights", "b") as (_, other), connected(other, fingerprint=None) as second:
            other_weights = second.info.weights_digest
        ours = client.info.weights_digest
    with fake_teacher() as (_, address), fake_teacher("--weights", "b") as (_, other), caplog.at_level(logging.WARNING):
        expected = Fingerprint.of(fake_info(), SPEC)
        with connected(other, address, fingerprint=expected) as client:
            received = check_all(submit_all(client, sequences), sequences)
            assert {one.weights_digest.hex() for one in received} == {ours[:16]}
            wait_until(lambda: f"weights_digest: '{ours}' against '{other_weights}'" in caplog.text)
        with connected(other, fingerprint=expected) as client, pytest.raises(FingerprintMismatch, match=other_weights):
            client.info  # noqa: B018
        with connected(other, fingerprint=expected) as client:
            error = client.submit([sequences[0]])[0].exception(SECONDS)
            assert isinstance(error, FingerprintMismatch)


@pytest.mark.parametrize("behind_one_name", [False, True])
def test_unlike_replicas_are_an_error_before_anything_is_asked_whoever_answers_first(behind_one_name: bool) -> None:
    with fake_teacher("--describe_seconds", "1") as (_, slow), fake_teacher("--weights", "b") as (_, quick):

        async def look_up(name: str) -> list[str]:
            return [slow, quick] if name == "teachers:1" else [name]

        addresses = ["teachers:1"] if behind_one_name else [slow, quick]
        with connected(*addresses, connecting=Connecting(resolve=look_up), tls=PLAINTEXT) as client:
            future = client.submit(make_sequences(1))[0]
            with pytest.raises(FingerprintMismatch) as caught:
                client.info  # noqa: B018
            digests = f"'{weights_digest('b', 0)}' against '{weights_digest('a', 0)}'"
            assert f"the replicas {quick} and {slow} differ" in str(caught.value)
            assert f"({quick}'s value first): weights_digest: {digests}" in str(caught.value)
            assert str(future.exception(SECONDS)) == str(caught.value)
        with connected(*addresses, connecting=Connecting(resolve=look_up), tls=PLAINTEXT, max_teacher_lag=-1) as client:
            check_all(submit_all(client, make_sequences(4)), make_sequences(4))


def test_a_replica_of_another_tokenizer_beside_one_that_fits_is_an_error_at_the_start() -> None:
    with fake_teacher() as (_, fits), fake_teacher("--tokenizer", "cd" * 32) as (_, other):
        with connected(other, fits) as client, pytest.raises(FingerprintMismatch) as caught:
            client.info  # noqa: B018
        assert f"the replicas {fits} and {other} differ" in str(caught.value)
        assert f"tokenizers differ: the student's {TOKENIZER_DIGEST}, the teacher's {'cd' * 32}" in str(caught.value)


def test_a_replica_that_does_not_answer_holds_the_start_up_no_longer_than_a_handshake() -> None:
    sequences = make_sequences(4)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        fake_teacher() as (_, up),
        connected(f"127.0.0.1:{silent.getsockname()[1]}", up, connecting=Connecting(describe_seconds=1.0)) as client,
    ):
        check_all(submit_all(client, sequences), sequences)


def test_an_unlike_replica_that_was_down_at_the_start_is_left_alone_when_it_comes_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sequences, port = make_sequences(30), free_port()
    with fake_teacher() as (_, up), connected(up, f"127.0.0.1:{port}") as client:
        check_all(submit_all(client, sequences), sequences)
        with fake_teacher("--weights", "b", port=port) as (_, late):
            wait_until(
                lambda: f"teacher {late} refused: not the teacher that this run trains from ({up}'s" in caplog.text
            )
            received = check_all(submit_all(client, sequences), sequences)
    assert {one.weights_digest for one in received} == {bytes.fromhex(weights_digest("a", 0))[:8]}


def test_a_student_of_another_vocabulary_or_tokenizer_is_refused_at_once() -> None:
    with fake_teacher() as (_, address):
        with connected(address, vocab_size=999) as client, pytest.raises(FingerprintMismatch, match=r"999.* 1000"):
            client.info  # noqa: B018
        with connected(address, tokenizer="ab" * 32) as client:
            error = client.submit(make_sequences(1))[0].exception(SECONDS)
        assert re.search(f"tokenizers differ: the student's {'ab' * 32}, the teacher's {TOKENIZER_DIGEST}", str(error))


def test_weights_replaced_while_serving_end_a_run_that_wants_one_teacher() -> None:
    sequences = make_sequences(10)
    with fake_teacher() as (teacher, address), connected(address) as client:
        check_all(submit_all(client, sequences), sequences)
        teacher.send_signal(signal.SIGUSR1)
        wait_until(lambda: isinstance(client.submit([sequences[0]])[0].exception(SECONDS), FingerprintMismatch))


def test_targets_name_the_version_that_made_them_while_the_teacher_learns() -> None:
    sequences = make_sequences(10)
    with fake_teacher() as (teacher, address), connected(address, max_teacher_lag=2) as client:
        for version in range(4):
            wait_until(
                lambda version=version: client.submit([sequences[0]])[0].result(SECONDS).teacher_version == version
            )
            received = check_all(submit_all(client, sequences), sequences)
            assert versions(received) == {version}
            digest = Fingerprint.of(fake_info(version=version), SPEC).digest
            assert {one.fingerprint for one in received} == {digest}
            assert client.info.teacher_version == version
            teacher.send_signal(signal.SIGUSR1)


def test_targets_of_weights_too_old_are_asked_for_elsewhere() -> None:
    sequences = make_sequences(40)
    with (
        fake_teacher() as (_, old),
        fake_teacher("--seconds", "0.002") as (teacher, new),
        connected(old, new, max_teacher_lag=3) as client,
    ):
        for version in range(1, 5):
            check_all(submit_all(client, sequences), sequences)
            teacher.send_signal(signal.SIGUSR1)
            wait_until(lambda version=version: version in versions(check_all(submit_all(client, sequences), sequences)))
        assert versions(check_all(submit_all(client, sequences), sequences)) == {4}


def test_a_server_that_has_started_again_is_not_taken_for_an_old_one() -> None:
    """It has the newest weights as its first version, the other is still at its tenth."""
    sequences = make_sequences(40)
    with (
        fake_teacher("--version", "10", "--seconds", "0.03") as (_, long_up),
        fake_teacher("--weights", "newest", "--version", "1") as (_, restarted),
        connected(long_up, restarted, max_teacher_lag=2) as client,
    ):
        wait_until(lambda: 1 in versions(check_all(submit_all(client, sequences), sequences)))


def test_a_replica_that_falls_behind_is_used_again_once_it_has_caught_up() -> None:
    sequences = make_sequences(40)
    with (
        fake_teacher("--version", "1") as (behind, first),
        fake_teacher("--version", "1", "--seconds", "0.002") as (ahead, second),
        connected(first, second, max_teacher_lag=1) as client,
    ):
        wait_until(lambda: len(client.serving) == 2)
        for version in (2, 3):
            ahead.send_signal(signal.SIGUSR1)
            wait_until(lambda version=version: version in versions(check_all(submit_all(client, sequences), sequences)))
        assert versions(check_all(submit_all(client, sequences), sequences)) == {3}
        for version in (2, 3):
            behind.send_signal(signal.SIGUSR1)
            while client.serving[first].teacher_version != version:
                check_all(submit_all(client, sequences), sequences)


def test_a_cancelled_request_frees_its_place() -> None:
    blockers, wanted = make_sequences(400), make_sequences(1, seed=1)
    with fake_teacher("--seconds", "0.2", "--credit", "1024") as (_, address), connected(address) as client:
        futures = submit_all(client, blockers)  # 80 s of work, two at a time
        wait_until(lambda: futures[0].done())
        for future in futures:
            future.cancel()
        check_all(submit_all(client, wanted), wanted)


def test_what_is_wrong_with_one_sequence_stops_no_other() -> None:
    good = make_sequences(50)
    bad = [
        (with_id(POISON_ID), ScoringFailed, "told to fail"),
        (with_id(VOCAB_SIZE), InvalidSequence, "token id 1000 is outside the teacher's vocabulary of 1000"),
        (with_id(-1), InvalidSequence, "token id -1"),
        (TokenSequence(token_ids=np.zeros(0, np.int32)), InvalidSequence, "sequence of 0 tokens"),
        (TokenSequence(token_ids=np.zeros(4097, np.int32)), InvalidSequence, "4097 tokens: expected 1 to 4096"),
    ]
    with fake_teacher() as (_, address), connected(address) as client:
        futures = submit_all(client, good[:25])
        refused = client.submit([sequence for sequence, _, _ in bad])
        futures += submit_all(client, good[25:])
        check_all(futures, good)
        for future, (_, error, message) in zip(refused, bad, strict=True):
            with pytest.raises(error, match=message):
                future.result(SECONDS)


def test_a_retryable_refusal_is_tried_again_a_bounded_number_of_times() -> None:
    sequences = [with_id(FLAKY_ID)]
    with fake_teacher("--flaky", "3") as (_, address), connected(address) as client:
        check_all(submit_all(client, sequences), sequences)
    with fake_teacher("--flaky", "1000") as (_, address), connected(address) as client:
        error = client.submit([sequences[0]])[0].exception(SECONDS)
        assert isinstance(error, ScoringFailed)


def test_a_retryable_refusal_goes_to_another_replica() -> None:
    sequences = [with_id(FLAKY_ID)] * 20
    with (
        fake_teacher("--flaky", "1000") as (_, flaky),
        fake_teacher("--version", "1", "--seconds", "0.001") as (_, sound),
        connected(flaky, sound, max_teacher_lag=-1) as client,
    ):
        assert versions(check_all(submit_all(client, sequences), sequences)) == {1}


def test_a_sequence_that_kills_every_server_is_found_and_the_others_are_answered() -> None:
    port, done = free_port(), threading.Event()
    started: list[Started] = []

    def keep_alive() -> None:
        while not done.is_set():
            started.append(Started("--seconds", "0.001", port=port))
            while started[-1].exit_status() is None and not done.is_set():
                done.wait(0.02)
            started[-1].stop()

    keeping = threading.Thread(target=keep_alive)
    keeping.start()
    sequences = make_sequences(60)
    try:
        with connected(f"127.0.0.1:{port}") as client:
            futures = submit_all(client, sequences[:30])
            fatal = client.submit([with_id(FATAL_ID)], priority=30)[0]
            futures += submit_all(client, sequences[30:])
            with pytest.raises(ScoringFailed, match=r"connections broke while this sequence was being scored"):
                fatal.result(SECONDS)
            check_all(futures, sequences)
    finally:
        done.set()
        keeping.join()
    assert sum(teacher.exit_status() == 13 for teacher in started) <= 9


def test_without_a_teacher_requests_and_the_handshake_end_with_the_address_and_the_cause() -> None:
    port = free_port()
    with connected(f"127.0.0.1:{port}", deadline_seconds=0.5, connect_timeout_seconds=0.5) as client:
        with pytest.raises(
            TeacherUnavailable, match=rf"within 0\.5 s at 127\.0\.0\.1:{port}; last error: .*UNAVAILABLE"
        ):
            client.info  # noqa: B018
        with pytest.raises(TeacherUnavailable, match=rf"no targets within 0\.5 s .*127\.0\.0\.1:{port}"):
            client.submit(make_sequences(1))[0].result(SECONDS)


@pytest.mark.parametrize("name", ["no-such-host.invalid:1", "teacher..svc:1", f"{'x' * 64}.svc:1"])
def test_a_name_that_cannot_be_resolved_is_named(name: str) -> None:
    cause = pytest.raises(TeacherUnavailable, match=re.escape(f"cannot resolve {name}: "))
    with connected(name, connect_timeout_seconds=0.5, tls=PLAINTEXT) as client, cause:
        client.info  # noqa: B018


def test_a_client_that_starts_before_its_teacher_waits_for_it() -> None:
    port, sequences = free_port(), make_sequences(5)
    with connected(f"127.0.0.1:{port}") as client:
        futures = submit_all(client, sequences)
        wait(futures, 0.3)
        with fake_teacher(port=port):
            check_all(futures, sequences)


def test_a_half_open_connection_is_noticed_and_its_requests_go_elsewhere() -> None:
    sequences = make_sequences(100)
    with (
        fake_teacher("--seconds", "0.002") as (_, silent),
        fake_teacher("--version", "1", "--seconds", "0.002") as (_, steady),
        fault_proxy(silent) as proxy,
        connected(
            proxy.address,
            steady,
            max_teacher_lag=-1,
            connecting=Connecting(keepalive_seconds=0.2, keepalive_timeout_seconds=0.3),
        ) as client,
    ):
        wait_until(lambda: 0 in versions(check_all(submit_all(client, sequences[:5]), sequences[:5])))
        proxy.silent = True
        check_all(submit_all(client, sequences), sequences)
        proxy.silent = False
        wait_until(lambda: 0 in versions(check_all(submit_all(client, sequences[:20]), sequences[:20])))


def test_a_stopped_replica_does_not_hold_its_requests_for_ever() -> None:
    sequences = make_sequences(100)
    with (
        fake_teacher("--seconds", "0.002") as (stopped, first),
        fake_teacher("--version", "1", "--seconds", "0.002") as (_, steady),
        connected(
            first, steady, max_teacher_lag=-1, connecting=Connecting(keepalive_seconds=30.0, stalled_seconds=0.5)
        ) as client,
    ):
        wait_until(lambda: 0 in versions(check_all(submit_all(client, sequences[:5]), sequences[:5])))
        stopped.send_signal(signal.SIGSTOP)
        check_all(submit_all(client, sequences), sequences)
        stopped.send_signal(signal.SIGCONT)
        wait_until(lambda: 0 in versions(check_all(submit_all(client, sequences[:20]), sequences[:20])))


def test_connections_that_are_cut_again_and_again_lose_nothing() -> None:
    sequences = make_sequences(300)
    with (
        fake_teacher("--seconds", "0.002") as (_, address),
        fault_proxy(address) as proxy,
        connected(proxy.address) as client,
    ):
        futures = submit_all(client, sequences)
        for done in (40, 100, 160, 220):
            wait_until(lambda done=done: sum(future.done() for future in futures) >= done)
            proxy.cut()
        check_all(futures, sequences)
        assert proxy.num_connections >= 5


def test_a_dataloader_forks_its_workers_beside_a_connected_client() -> None:
    sequences = make_sequences(48)
    rows = [{"input_ids": torch.from_numpy(sequence.token_ids.astype(np.int64))} for sequence in sequences]
    with fake_teacher() as (_, address), connected(address) as client:
        check_all(submit_all(client, sequences), sequences)
        loader: DataLoader[Any] = DataLoader(rows, batch_size=8, num_workers=2)  # type: ignore[arg-type]
        stream = TargetStream(loader, client, prefetch_batches=2)
        for epoch in range(3):
            got = [batch["targets"] for batch in stream]
            want = [expected_targets(sequence, epoch).token_ids for sequence in sequences]
            np.testing.assert_array_equal(np.concatenate([targets.token_ids for targets in got]), np.concatenate(want))


def test_closing_cancels_what_is_in_flight_and_is_idempotent() -> None:
    with fake_teacher("--seconds", "30") as (_, address):
        client = GrpcTeacherClient([address], SPEC, vocab_size=VOCAB_SIZE, tokenizer=TOKENIZER_DIGEST)
        futures = submit_all(client, make_sequences(5))
        client.close()
        client.close()
        assert all(future.cancelled() for future in futures)
        with pytest.raises(TeacherUnavailable, match="closed"):
            client.submit(make_sequences(1))[0]


def test_a_client_left_open_does_not_keep_the_process_alive_and_needs_no_proxy_to_its_own_machine() -> None:
    script = (
        "from logitstream.tokenizer import UNCHECKED_TOKENIZER\n"
        "from logitstream.client.teacher_client import GrpcTeacherClient\n"
        "from tests.fake_teacher import SPEC, VOCAB_SIZE\n"
        "import sys\n"
        "client = GrpcTeacherClient([sys.argv[1]], SPEC, vocab_size=VOCAB_SIZE, tokenizer=UNCHECKED_TOKENIZER)\n"
        "print(client.info.model)\n"
    )
    with fake_teacher() as (_, address):
        command = [sys.executable, "-c", script, address]
        proxied = os.environ | {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": ""}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=proxied)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fake\n", "")
