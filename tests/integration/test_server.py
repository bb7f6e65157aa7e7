"""The wire contract against a real server: what is refused and how, limits, cancellation, drain, health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from logitstream import codec
from logitstream.errors import RequestError, ScoringFailed
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.types import SparseTargets, TargetSpec
from teacher_server.backend import ScoreRequest
from teacher_server.calls import SERVICE
from teacher_server.scheduler import SLICE
from tests.fakes import FAKE_DIGEST, FakeBackend, fake_targets
from tests.serving import SPEC, WireClient, sequence, serving


class Gated(FakeBackend):
    """Scores once its gate is open."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.gate = threading.Event()
        self.entered = threading.Event()

    def score(self, batch: Sequence[ScoreRequest]) -> list[SparseTargets | RequestError]:
        self.entered.set()
        assert self.gate.wait(20)
        return super().score(batch)


async def until(condition: Callable[[], object], *, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_targets_come_back_as_the_backend_drew_them_and_name_the_weights() -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        info = convert.info_from_message(await client.describe())
        assert (info.vocab_size, info.model, info.teacher_version) == (1000, "fake", 0)
        asked = [
            sequence(*range(number, 2 * number + 1), mask=[i % 3 != 0 for i in range(number + 1)])
            for number in range(1, 40)
        ]
        for one, result in zip(asked, await client.score(*asked, draw_set=3), strict=True):
            expected = fake_targets(ScoreRequest(sequence=one, spec=SPEC, draw_set=3), vocab_size=1000)
            found = codec.decode(result.targets)
            for name in ("row_offsets", "token_ids", "counts"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert result.weights_digest == bytes.fromhex(FAKE_DIGEST)[:8]


def ids(*token_ids: int, loss_mask: bytes = b"") -> pb.Sequence:
    return pb.Sequence(token_bytes=np.array(token_ids, "<u4").tobytes(), loss_mask=loss_mask)


BAD_SEQUENCES = {
    "sequence of 0 tokens: expected 1 to 64": ids(),
    "sequence of 65 tokens: expected 1 to 64": ids(*[1] * 65),
    "token id 1000 is outside the teacher's vocabulary of 1000": ids(1, 1000),
    "token id 4294967295 is outside": ids(2**32 - 1),
    "loss_mask of 2 bytes: expected a bit for each of 2": ids(1, 2, loss_mask=b"\1\1"),
    "loss_mask of 1 bytes: expected a bit for each of 2": ids(1, 2, loss_mask=b"\7"),
    "token_bytes of 5 bytes: expected 4 a token": pb.Sequence(token_bytes=b"\1\0\0\0\2"),
}


async def test_bad_sequences_are_refused_in_band_and_the_others_of_the_call_go_on() -> None:
    async with serving(FakeBackend(), max_sequence_tokens=64) as server, WireClient(server.address) as client:
        results = await client.score(*[one for bad in BAD_SEQUENCES.values() for one in (bad, sequence(1))])
        for text, bad, good in zip(BAD_SEQUENCES, results[::2], results[1::2], strict=True):
            assert bad.error.code == "InvalidSequence"
            assert text in bad.error.message
            assert not bad.error.retryable
            assert codec.decode(good.targets).num_rows == 1


async def test_a_message_over_the_limit_ends_its_call_and_no_other() -> None:
    backend = Gated()
    async with serving(backend, max_message_bytes=64 << 10) as server, WireClient(server.address) as client:
        other = client.call(sequence(1))
        refused = await client.refusal(*[sequence(*[999] * 2000)] * 100)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        backend.gate.set()
        assert [result.index async for result in other] == [0]


async def test_a_call_of_thousands_is_taken_in_turns() -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        scheduler = server.scheduler
        assert scheduler is not None
        largest_step = 0

        async def watch() -> None:
            nonlocal largest_step
            before = 0
            while True:
                before, step = scheduler.num_unfinished, abs(scheduler.num_unfinished - before)
                largest_step = max(largest_step, step)
                await asyncio.sleep(0)

        watching = asyncio.ensure_future(watch())
        results = await client.score(*[ids()] * 4000, *[ids(number % 1000, number // 1000) for number in range(4000)])
        watching.cancel()
        assert [bool(result.targets) for result in results] == [False] * 4000 + [True] * 4000
        assert 0 < largest_step <= 2 * SLICE
        refused = await client.refusal(*[ids()] * 10_000)
        assert (refused.code(), "the limit is 8192" in str(refused.details())) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            True,
        )


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        (
            {"vocab_size": 999},
            grpc.StatusCode.FAILED_PRECONDITION,
            "999 is smaller than the teacher's 1000; if only padding differs, start teacher-server with model.",
        ),
        ({"tokenizer_digest": "ab" * 32}, grpc.StatusCode.FAILED_PRECONDITION, "tokenizer abab"),
        ({"weights_digest": "cd" * 32}, grpc.StatusCode.FAILED_PRECONDITION, f"this server serves {FAKE_DIGEST}"),
        ({"client_id": "x" * 200}, grpc.StatusCode.INVALID_ARGUMENT, "at most 128 printable characters"),
        ({"client_id": "a\nb"}, grpc.StatusCode.INVALID_ARGUMENT, "printable"),
        (
            {"spec": pb.TargetSpec(sampler="x" * 1000)},
            grpc.StatusCode.INVALID_ARGUMENT,
            f"sampler '{'x' * 64}': expected",
        ),
        ({"spec": pb.TargetSpec(sampler="magic")}, grpc.StatusCode.INVALID_ARGUMENT, "unknown sampler 'magic'"),
        ({"spec": pb.TargetSpec(sampler="full")}, grpc.StatusCode.INVALID_ARGUMENT, "codec_version must lie in"),
        ({"spec": pb.TargetSpec(sampler="systematic")}, grpc.StatusCode.INVALID_ARGUMENT, "num_samples must lie in"),
    ],
)
async def test_a_call_that_expects_another_teacher_is_refused_with_what_was_expected(
    fields: dict[str, Any], code: grpc.StatusCode, text: str
) -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        refused = await client.refusal(sequence(1), **fields)
        assert refused.code() is code
        assert text in str(refused.details())


async def test_a_call_beyond_its_client_s_share_is_told_when_to_come_again() -> None:
    backend = Gated()
    async with serving(backend, max_in_flight_tokens=1000) as server, WireClient(server.address) as client:
        first = client.call(*[sequence(*range(number, number + 200)) for number in range(4)])
        await until(lambda: server.scheduler.num_unfinished == 4)
        more = [sequence(*range(number, number + 300)) for number in range(2)]
        refused = await client.refusal(*more)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "800 tokens of this client in flight and 600 more: its share is 1000" in str(refused.details())
        assert 50 <= int(str(_metadata(refused)["retry-after-ms"])) <= 5000
        backend.gate.set()
        assert len([result async for result in first]) == 4
        assert [bool(result.targets) for result in await client.score(*more)] == [True, True]


def _metadata(error: Any) -> dict[str, Any]:
    return dict(error.trailing_metadata())


async def test_calls_one_after_another_are_never_refused() -> None:
    async def ping_pong(address: str, name: str) -> None:
        async with WireClient(address) as client:
            for number in range(200):
                call = client.call(sequence(number, *[1] * 39), client_id=name)
                assert (await call.read()).targets  # its end is not waited for

    async with serving(FakeBackend(), max_in_flight_tokens=64) as server:
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, ping_pong(server.address, f"{n}")) for n in range(4)))


@pytest.mark.parametrize("way", ["cancelled", "past its deadline", "cut off"])
async def test_what_waits_for_a_call_that_is_over_is_dropped_before_it_is_scored(way: str) -> None:
    backend = Gated()
    async with serving(backend) as server, WireClient(server.address) as client, WireClient(server.address) as other:
        running = other.call(sequence(999))
        await asyncio.to_thread(backend.entered.wait, 5)
        asked = [sequence(number) for number in range(50)]
        call = client.call(*asked, seconds=1.0 if way == "past its deadline" else 20.0)
        await until(lambda: server.scheduler.num_unfinished == 51)
        if way == "cancelled":
            call.cancel()
        elif way == "cut off":
            await client.channel.close(None)
        await until(lambda: server.scheduler.num_unfinished == 1)
        assert server.admission.num_calls == 1
        backend.gate.set()
        assert len([result async for result in running]) == 1
    assert [len(batch) for batch in backend.batches] == [1]
    assert server.admission.num_tokens == 0


async def test_a_client_that_does_not_read_holds_back_only_itself() -> None:
    backend = FakeBackend(entries_per_row=500)
    async with (
        serving(backend, max_in_flight_tokens=20_000) as server,
        WireClient(server.address) as slow,
        WireClient(server.address) as quick,
    ):
        unread = slow.call(*[sequence(*[start] * 1000) for start in range(20)], client_id="slow")
        await until(lambda: server.scheduler.num_unfinished == 0 and server.admission.num_tokens)
        for number in range(50):
            assert (await quick.score(sequence(number), client_id="quick"))[0].targets
        refused = await quick.refusal(*[sequence(*[1] * 1000)] * 10, client_id="slow")
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # what is not read counts
        assert 10_000 < server.admission.num_tokens <= 20_000
        assert len([result async for result in unread]) == 20


async def test_a_client_that_vanishes_while_it_is_written_to_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(FakeBackend(entries_per_row=500)) as server:
        for way in ("cancelled", "cut off"):
            async with WireClient(server.address) as client:
                call = client.call(*[sequence(*[number] * 500) for number in range(20)])
                await call.read()
                if way == "cut off":
                    await client.channel.close(None)
                else:
                    call.cancel()
        await until(lambda: not server.admission.num_calls)
        await asyncio.sleep(0.1)
        assert server.admission.num_tokens == 0
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_sequence_the_backend_fails_on_is_reported_without_the_backend_s_words() -> None:
    def fault(batch: Sequence[ScoreRequest]) -> RequestError | None:
        if any(one.sequence.token_ids[0] == 13 for one in batch):
            raise ValueError("/secret/path token=abc")
        return None

    async with serving(FakeBackend(fault=fault)) as server, WireClient(server.address) as client:
        results = await client.score(*[sequence(number) for number in range(20)])
        assert results[13].error.code == ScoringFailed.__name__
        assert "secret" not in results[13].error.message
        assert all(results[number].targets for number in range(20) if number != 13)


async def test_targets_too_large_for_a_message_are_refused_before_or_after_scoring() -> None:
    async with serving(FakeBackend(), max_message_bytes=64 << 10) as server, WireClient(server.address) as client:
        full = TargetSpec(sampler="full", codec_version=1)
        large, small = await client.score(sequence(*range(300)), sequence(1, 2), spec=full)
        assert "300 tokens may give 300000 entries" in large.error.message
        assert small.targets


async def test_draining_answers_what_is_in_flight_and_refuses_the_rest() -> None:
    backend = Gated()
    async with serving(backend) as server, WireClient(server.address) as client:
        call = client.call(sequence(1), sequence(2))
        await until(lambda: server.scheduler.num_unfinished == 2)
        server.stop()
        await until(lambda: server.scheduler.is_draining)
        async with WireClient(server.address) as late:
            assert (await late.refusal(sequence(3))).code() is grpc.StatusCode.UNAVAILABLE
        assert (await client.refusal(sequence(3))).code() is grpc.StatusCode.UNAVAILABLE
        backend.gate.set()
        assert sorted([result.index async for result in call if result.targets]) == [0, 1]
        assert await call.code() is grpc.StatusCode.OK


async def test_health_is_per_service_and_says_not_serving_while_draining() -> None:
    backend = Gated()
    async with serving(backend) as server, WireClient(server.address) as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        for service in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = client.call(sequence(1))
        await until(lambda: server.scheduler.num_unfinished == 1)
        server.stop()
        await until(lambda: server.scheduler.is_draining)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        backend.gate.set()
        assert (await call.read()).targets


async def test_new_weights_are_named_in_results_and_end_calls_that_expected_the_old() -> None:
    old = Gated(weights_digest="aa" * 32)
    async with serving(old) as server, WireClient(server.address) as client:
        free = client.call(sequence(1), sequence(2))
        await asyncio.to_thread(old.entered.wait, 5)
        pinned = client.call(sequence(3), weights_digest="aa" * 32)
        await until(lambda: server.scheduler.num_unfinished == 3)
        replacing = asyncio.ensure_future(server.scheduler.replace_backend(FakeBackend(weights_digest="bb" * 32)))
        await asyncio.sleep(0)
        old.gate.set()
        assert {(result.teacher_version, result.weights_digest) async for result in free} == {(0, b"\xaa" * 8)}
        await replacing
        (result,) = await client.score(sequence(1))
        assert (result.teacher_version, result.weights_digest) == (1, b"\xbb" * 8)
        assert (await client.describe()).weights_digest == "bb" * 32
        with pytest.raises(aio.AioRpcError, match="wants weights aaaa") as ended:
            await pinned.read()
        assert ended.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        refused = await client.refusal(sequence(3), weights_digest="aa" * 32)
        assert refused.code() is grpc.StatusCode.FAILED_PRECONDITION
