"""The wire contract against a real server: handshake, refusals in-band, credit, cancellation, drain, health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack

import grpc
import numpy as np
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from logitstream import codec
from logitstream.errors import RequestError, ScoringFailed
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.types import SparseTargets, TargetSpec
from teacher_server.backend import ScoreRequest
from teacher_server.config import TeacherConfig
from teacher_server.interceptors import HEALTH_SERVICE, SERVICE
from teacher_server.scheduler import SLICE
from teacher_server.server import TeacherServer
from teacher_server.stream import ClientStream, CreditChanged
from tests.deaf_client import deaf_call
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


def streams_of(server: TeacherServer) -> list[ClientStream]:
    servicer = server._gate.servicer
    assert servicer is not None
    return list(servicer._streams)


async def test_targets_come_back_as_the_backend_drew_them_and_name_the_weights() -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        info = convert.info_from_message(await client.describe())
        assert (info.vocab_size, info.model, info.teacher_version) == (1000, "fake", 0)
        await client.open()
        asked = {
            number: sequence(*range(number, 2 * number + 1), mask=[i % 3 != 0 for i in range(number + 1)])
            for number in range(1, 40)
        }
        await client.request(asked, draw_set=3)
        results = await client.receive(len(asked))
        for number, one in asked.items():
            expected = fake_targets(ScoreRequest(sequence=one, spec=SPEC, draw_set=3), vocab_size=1000)
            found = codec.decode(results[number].targets)
            for name in ("row_offsets", "token_ids", "counts"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert results[number].weights_digest == bytes.fromhex(FAKE_DIGEST)[:8]


BAD_REQUESTS = {
    1: (pb.TargetRequest(), "sequence of 0 tokens: expected 1 to 64"),
    2: (pb.TargetRequest(token_ids=[1] * 65), "sequence of 65 tokens: expected 1 to 64"),
    3: (pb.TargetRequest(token_ids=[1, 1000]), "token id 1000 is outside the teacher's vocabulary of 1000"),
    4: (pb.TargetRequest(token_ids=[2**32 - 1]), "token id 4294967295 is outside"),
    5: (pb.TargetRequest(token_ids=[1, 2], loss_mask=b"\1\1"), "loss_mask of 2 bytes for 2 tokens"),
    6: (pb.TargetRequest(token_ids=[1, 2], loss_mask=b"\7"), "bits set beyond the sequence's 2 tokens"),
    7: (pb.TargetRequest(token_bytes=b"\1\0\0\0\2"), "token_bytes of 5 bytes: expected 4 a token"),
    8: (pb.TargetRequest(token_bytes=bytes(4 * 65)), "sequence of 65 tokens: expected 1 to 64"),
    9: (pb.TargetRequest(token_bytes=b"\xff" * 4), "token id 4294967295 is outside"),
    10: (pb.TargetRequest(token_bytes=b"\xe8\3\0\0"), "token id 1000 is outside the teacher's vocabulary of 1000"),
    11: (pb.TargetRequest(token_bytes=bytes(4), token_ids=[0]), "token_ids and token_bytes are both set"),
}


async def test_bad_sequences_are_refused_in_band_and_the_others_on_the_stream_go_on() -> None:
    async with serving(FakeBackend(), max_sequence_tokens=64) as server, WireClient(server.address) as client:
        await client.open()
        messages = []
        for number, (message, _) in BAD_REQUESTS.items():
            message.request_id = number
            messages += [message, convert.request_to_message(100 + number, sequence(number))]
        await client.send(messages)
        results = await client.receive(2 * len(BAD_REQUESTS))
        for number, (_, text) in BAD_REQUESTS.items():
            assert results[number].error.code == "InvalidSequence"
            assert text in results[number].error.message
            assert not results[number].error.retryable
            assert codec.decode(results[100 + number].targets).num_rows == 1


async def test_a_message_over_the_limit_ends_its_stream_and_no_other() -> None:
    limit = 64 << 10
    async with (
        serving(FakeBackend(), max_message_bytes=limit) as server,
        WireClient(server.address) as client,
        WireClient(server.address) as other,
    ):
        await client.open()
        await other.open()
        await client.request({number: sequence(*[999] * 2000) for number in range(100)})
        status, _ = await client.finish()
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        await other.request({100: sequence(1)})
        assert (await other.receive(1))[100].targets


async def test_a_message_of_thousands_is_taken_and_answered_in_turns() -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        await client.open()
        (stream,) = streams_of(server)
        largest_step = 0

        async def watch() -> None:
            nonlocal largest_step
            before = 0
            while True:
                before, step = stream.num_unsent, abs(stream.num_unsent - before)
                largest_step = max(largest_step, step)
                await asyncio.sleep(0)

        watching = asyncio.ensure_future(watch())
        bad = [pb.TargetRequest(request_id=number) for number in range(4000)]
        good = [pb.TargetRequest(request_id=4000 + number, token_ids=[number % 1000]) for number in range(4000)]
        await client.send(bad + good)
        await client.receive(8000)
        watching.cancel()
        assert 0 < largest_step <= 2 * SLICE


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        (
            {"vocab_size": 999},
            grpc.StatusCode.FAILED_PRECONDITION,
            "999 is smaller than the teacher's 1000; where only padding differs, start teacher-server with vocab_size",
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
        ({"spec": pb.TargetSpec(sampler="full")}, grpc.StatusCode.INVALID_ARGUMENT, "unknown codec_version 0"),
        ({"spec": pb.TargetSpec(sampler="systematic")}, grpc.StatusCode.INVALID_ARGUMENT, "num_samples must lie in"),
    ],
)
async def test_a_handshake_that_does_not_fit_is_refused_with_what_was_expected(
    fields: dict[str, object], code: grpc.StatusCode, text: str
) -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        hello = pb.Open(**{"vocab_size": 1000, "spec": convert.spec_to_message(SPEC)} | fields)  # type: ignore[arg-type]
        client.call = client.stub.StreamTargets()
        await client.call.write(pb.StreamTargetsRequest(open=hello))
        status, details = await client.finish()
        assert status is code
        assert text in details


@pytest.mark.parametrize(
    "messages",
    [
        [pb.StreamTargetsRequest(cancel=pb.Cancel())],
        [pb.StreamTargetsRequest()],
        [pb.StreamTargetsRequest(requests=pb.TargetRequests(requests=[pb.TargetRequest(token_ids=[1])]))],
        [],
    ],
)
async def test_a_stream_that_does_not_begin_with_open_ends(messages: list[pb.StreamTargetsRequest]) -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        client.call = client.stub.StreamTargets()
        for message in messages:
            await client.call.write(message)
        await client.call.done_writing()
        status, details = await client.finish()
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert "open" in details


async def test_an_id_in_flight_cannot_be_used_again_and_a_finished_one_can() -> None:
    backend = Gated()
    async with serving(backend) as server, WireClient(server.address) as client:
        await client.open()
        await client.request({1: sequence(1)})
        await client.request({1: sequence(2)})
        status, details = await client.finish()
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert "request_id 1 is in flight already" in details
        backend.gate.set()
        async with WireClient(server.address) as other:
            await other.open()
            for _ in range(3):
                other.results.clear()
                await other.request({1: sequence(1)})
                await other.receive(1)


async def test_more_than_the_credit_is_refused_and_may_be_tried_again() -> None:
    backend = Gated()
    async with serving(backend, max_in_flight_tokens=100) as server, WireClient(server.address) as client:
        await client.open()
        await client.request({number: sequence(*range(number, number + 30)) for number in range(4)})
        (result,) = (await client.receive(1)).values()
        assert (result.request_id, result.error.code, result.error.retryable) == (3, "TooManyInFlight", True)
        assert "90 tokens in flight and 30 more: the stream's credit is 100" in result.error.message
        backend.gate.set()
        await client.receive(4)
        await client.request({3: sequence(*range(3, 33))})
        client.results.pop(3)
        assert (await client.receive(4))[3].targets


async def test_streams_share_the_queue_by_credit() -> None:
    async with serving(FakeBackend(), max_queue_tokens=10_000, max_sequence_tokens=100) as server:
        clients = [WireClient(server.address) for _ in range(4)]
        for client in clients:
            await client.open(client_id=str(id(client)))
        await clients[0].request({1: sequence(1)})
        await clients[0].receive(1)
        credits = [notice.credit.max_in_flight_tokens for notice in clients[0].notices]
        assert credits == [5000, 3333, 2500]
        for client in clients:
            await client.__aexit__()


async def test_a_cancelled_request_is_not_answered_and_its_credit_is_free() -> None:
    backend = Gated()
    async with serving(backend, max_in_flight_tokens=100) as server, WireClient(server.address) as client:
        await client.open()
        await client.request({0: sequence(7)})
        await asyncio.to_thread(backend.entered.wait, 5)
        await client.request({number: sequence(*range(number, number + 33)) for number in (1, 2, 3)})
        await client.call.write(pb.StreamTargetsRequest(cancel=pb.Cancel(request_ids=[1, 2, 777])))
        await client.request({4: sequence(*range(4, 37))})
        backend.gate.set()
        results = await client.receive(3)
        assert set(results) == {0, 3, 4}
        assert all(result.targets for result in results.values())


async def test_a_client_that_vanishes_leaves_nothing_in_the_queue() -> None:
    backend = Gated()
    async with serving(backend) as server:
        scheduler = server.scheduler
        assert scheduler is not None
        async with WireClient(server.address) as client:
            await client.open()
            await client.request({0: sequence(999)})
            await asyncio.to_thread(backend.entered.wait, 5)
            await client.request({number: sequence(number) for number in range(1, 50)})
            async with asyncio.timeout(5):
                while scheduler.num_unfinished < 50:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            while scheduler.num_unfinished > 1:  # the running one
                await asyncio.sleep(0.01)
        backend.gate.set()


async def test_a_client_that_does_not_read_holds_back_only_itself() -> None:
    backend = FakeBackend(entries_per_row=500)
    async with (
        serving(backend, max_in_flight_tokens=20_000) as server,
        WireClient(server.address) as slow,
        WireClient(server.address) as quick,
    ):
        await slow.open(client_id="slow")
        for start in range(20):
            await slow.request({start: sequence(*[start] * 1000)})
        await quick.open(client_id="quick")
        for number in range(50):
            await quick.request({number: sequence(number)})
        await quick.receive(50)
        assert len(await slow.receive(20)) == 20


async def test_an_id_and_its_credit_are_free_as_soon_as_the_client_has_the_answer() -> None:
    async def ping_pong(address: str) -> None:
        async with WireClient(address) as client:
            await client.open()
            for _ in range(500):
                await client.request({7: sequence(*[1] * 40)})
                assert not (await client.receive(1)).pop(7).HasField("error")

    async with serving(FakeBackend(), max_in_flight_tokens=64) as server:
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, ping_pong(server.address)) for _ in range(4)))


async def test_refusals_that_nobody_reads_do_not_pile_up() -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        await client.open()
        (stream,) = streams_of(server)
        bad = [[pb.TargetRequest(request_id=4000 * turn + number) for number in range(4000)] for turn in range(50)]

        async def flood() -> None:
            for messages in bad:
                await client.send(messages)

        flooding = asyncio.ensure_future(flood())
        most = 0
        for _ in range(50):
            await asyncio.sleep(0.02)
            most = max(most, stream.num_unsent)
        assert most < 2_000
        await client.receive(200_000, seconds=60)
        await flooding


async def test_credits_that_nobody_reads_do_not_pile_up() -> None:
    hello = pb.Open(client_id="deaf", vocab_size=1000, spec=convert.spec_to_message(SPEC))
    message = pb.StreamTargetsRequest(open=hello).SerializeToString()
    async with serving(FakeBackend(), drain_seconds=0.2) as server:
        with deaf_call(server.address, f"/{SERVICE}/StreamTargets", message, half_close=False):
            async with asyncio.timeout(5):
                while not (streams := streams_of(server)):
                    await asyncio.sleep(0.01)
            for number in range(40):
                streams[0].offer_credit(1000 + number)
            events = await streams[0].next_events()
            assert events == [CreditChanged(1039)]


async def test_what_is_shared_and_what_is_not_read_counts_against_all_streams_of_its_client() -> None:
    settings = {"max_queue_tokens": 2000, "max_in_flight_tokens": 2000, "max_sequence_tokens": 100}
    backend = Gated()
    async with serving(backend, **settings, drain_seconds=0.0) as server, AsyncExitStack() as stack:
        for _ in range(8):
            client = await stack.enter_async_context(WireClient(server.address))
            await client.open(client_id="greedy")
            await client.request({number: sequence(*[number] * 100) for number in range(30)})
        async with asyncio.timeout(5):
            while sum(len(stream._unsent) for stream in streams_of(server)) < 8:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        held = sum(stream._in_flight_tokens for stream in streams_of(server))
        assert 2000 <= held <= 2000 + 8 * 100
        backend.gate.set()


async def test_a_client_that_is_gone_leaves_no_credit_behind() -> None:
    backend = FakeBackend(entries_per_row=500)
    async with serving(backend, max_in_flight_tokens=3000) as server, WireClient(server.address) as staying:
        await staying.open()
        for _ in range(5):
            async with WireClient(server.address) as leaving:
                await leaving.open()
                await leaving.request({number: sequence(*[number] * 500) for number in range(6)})
                await leaving.receive(1)
        (account,) = server._gate.servicer._accounts._accounts.values()  # type: ignore[union-attr]
        async with asyncio.timeout(5):
            while account.num_streams > 1:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (account.num_tokens, account.num_requests) == (0, 0)


async def test_one_client_s_idle_streams_lock_no_other_out() -> None:
    async with serving(FakeBackend(), max_streams=4) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(WireClient(server.address)) for _ in range(4)]
        for client in clients[:2]:
            await client.open(client_id="greedy")
        with pytest.raises(
            (AssertionError, aio.AioRpcError), match="2 streams of client 'greedy' are open: the limit of a client is 2"
        ):
            await clients[2].open(client_id="greedy")
        await clients[3].open(client_id="other")


async def test_a_client_that_vanishes_while_it_is_written_to_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(FakeBackend(entries_per_row=500)) as server:
        for way in ("cancelled", "cut off", "in violation"):
            async with WireClient(server.address) as client:
                await client.open()
                await client.request({number: sequence(*[number] * 500) for number in range(20)})
                await asyncio.sleep(0.2)
                if way == "cut off":
                    await client.channel.close()
                elif way == "in violation":
                    await client.send([pb.TargetRequest(request_id=1, token_ids=[1])] * 2)
                    await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            while streams_of(server):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_sequence_the_backend_fails_on_is_reported_without_the_backend_s_words() -> None:
    def fault(batch: Sequence[ScoreRequest]) -> RequestError | None:
        if any(one.sequence.token_ids[0] == 13 for one in batch):
            raise ValueError("/secret/path token=abc")
        return None

    async with serving(FakeBackend(fault=fault)) as server, WireClient(server.address) as client:
        await client.open()
        await client.request({number: sequence(number) for number in range(20)})
        results = await client.receive(20)
        assert results[13].error.code == ScoringFailed.__name__
        assert "secret" not in results[13].error.message
        assert all(results[number].targets for number in range(20) if number != 13)


async def test_targets_too_large_for_a_message_are_refused_before_or_after_scoring() -> None:
    async with serving(FakeBackend(), max_message_bytes=64 << 10) as server, WireClient(server.address) as client:
        await client.open(TargetSpec(sampler="full", codec_version=1))
        await client.request({1: sequence(*range(300)), 2: sequence(1, 2)})
        results = await client.receive(2)
        assert "300 tokens may give 300000 entries" in results[1].error.message
        assert results[2].targets


async def test_draining_answers_what_is_in_flight_refuses_the_rest_and_ends_the_streams_well() -> None:
    backend = Gated()
    async with serving(backend) as server, WireClient(server.address) as client:
        await client.open()
        await client.request({1: sequence(1)})
        await client.request({2: sequence(2)})
        async with asyncio.timeout(5):
            while server.scheduler is None or server.scheduler.num_unfinished < 2:
                await asyncio.sleep(0.01)
        server.stop()
        response = await client.call.read()
        assert response.draining.grace_seconds == 5.0
        await client.request({3: sequence(3)})
        async with WireClient(server.address) as late:
            late.call = late.stub.StreamTargets()
            await late.call.write(pb.StreamTargetsRequest(open=pb.Open(vocab_size=1000)))
            status, _ = await late.finish()
            assert status is grpc.StatusCode.UNAVAILABLE
        backend.gate.set()
        results = await client.receive(3)
        assert results[1].targets
        assert results[2].targets
        assert (results[3].error.code, results[3].error.retryable) == ("ServerDraining", True)
        status, _ = await client.finish()
        assert status is grpc.StatusCode.OK


async def test_health_is_per_service_and_says_not_serving_while_draining() -> None:
    backend = Gated()
    async with serving(backend) as server, WireClient(server.address) as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        for service in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await client.open()
        await client.request({1: sequence(1)})
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        server.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        backend.gate.set()


async def test_a_watcher_that_does_not_read_holds_up_neither_the_start_nor_the_drain() -> None:
    loaded = threading.Event()

    def load() -> FakeBackend:
        assert loaded.wait(20)
        return FakeBackend()

    server = TeacherServer(TeacherConfig(model="test", address="127.0.0.1:0", drain_seconds=1.0), load)
    running = asyncio.ensure_future(server.run())
    async with asyncio.timeout(10):
        while not server.address:
            await asyncio.sleep(0.01)
        with deaf_call(server.address, f"/{HEALTH_SERVICE}/Watch", b"", half_close=True):
            await asyncio.sleep(0.3)
            loaded.set()
            async with aio.insecure_channel(server.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest()
                while (await stub.Check(request)).status != health_pb2.HealthCheckResponse.SERVING:
                    await asyncio.sleep(0.01)
            server.stop()
            await running
    assert server.scheduler is not None
    assert server.scheduler.is_draining


async def test_reflection_lists_the_service() -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_new_weights_are_named_in_results_and_end_streams_that_wanted_the_old() -> None:
    async with serving(FakeBackend(weights_digest="aa" * 32)) as server:
        scheduler = server.scheduler
        assert scheduler is not None
        async with WireClient(server.address) as free, WireClient(server.address) as pinned:
            await free.open()
            await pinned.open(weights_digest="aa" * 32)
            await free.request({1: sequence(1)})
            assert (await free.receive(1))[1].teacher_version == 0
            scheduler.replace_backend(FakeBackend(weights_digest="bb" * 32))
            await free.request({2: sequence(1)})
            result = (await free.receive(2))[2]
            assert (result.teacher_version, result.weights_digest) == (1, b"\xbb" * 8)
            assert (await free.describe()).weights_digest == "bb" * 32
            await pinned.request({1: sequence(1)})
            status, details = await pinned.finish()
            assert status is grpc.StatusCode.FAILED_PRECONDITION
            assert "wants weights aaaa" in details
