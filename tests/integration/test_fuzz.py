"""More than 100,000 malformed or hostile requests: each is refused for what it is, and nobody else notices.

Four kinds: bytes that are no message, messages in an order no client sends, requests that cannot be scored among good
ones, and good ones of several specs that are cancelled while they wait, run or are on their way back. Statuses are
those of bad input, never INTERNAL or UNKNOWN, and a bystander's stream goes on throughout.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import numpy as np

from logitstream import codec
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.types import TargetSpec
from teacher_server.interceptors import SERVICE
from tests.fakes import FakeBackend
from tests.serving import SPEC, WireClient, sequence, serving

VOCAB_SIZE = 1000
REFUSALS = {"InvalidSequence", "TooManyInFlight"}
BAD_INPUT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def hostile_request(rng: np.random.Generator, request_id: int) -> tuple[pb.TargetRequest, bool]:
    """A request and whether it can be scored."""
    kind = int(rng.integers(9))
    as_bytes = kind == 8 or bool(rng.integers(2))
    message = pb.TargetRequest(
        request_id=request_id, draw_set=int(rng.integers(1 << 62)) * 4 + 3, priority=int(rng.integers(1 << 62)) * 4 + 3
    )
    if kind == 0:
        return message, False
    ids = rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 20))).tolist()
    if kind in (1, 4):
        ids.append(int(rng.integers(VOCAB_SIZE, 1 << 32)))
    if kind in (2, 5):
        ids.extend([1] * 64)
    if as_bytes:
        message.token_bytes = np.array(ids, "<u4").tobytes()
    else:
        message.token_ids.extend(ids)
    if kind in (1, 2, 4, 5):
        return message, False
    if kind in (3, 6):
        message.loss_mask = rng.bytes(int(rng.integers(1, 40)))
        bits = np.unpackbits(np.frombuffer(message.loss_mask, np.uint8), bitorder="little")
        return message, len(message.loss_mask) == (len(ids) + 7) // 8 and not bits[len(ids) :].any()
    if kind == 8:
        if rng.integers(2):
            message.token_bytes += rng.bytes(int(rng.integers(1, 4)))
        else:
            message.token_ids.append(1)
        return message, False
    return message, True


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Random bytes, or a good message with bytes changed, cut off or repeated."""
    kind = int(rng.integers(4))
    if kind == 0:
        return rng.bytes(int(rng.integers(0, 60)))
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
    if kind == 1:
        return bytes(damaged[: int(rng.integers(len(damaged)))])
    return bytes(damaged) * (2 if kind == 2 else 1)


async def bystander(address: str, stop: asyncio.Event) -> int:
    """A well-behaved client; how many of its requests were answered well, which is all."""
    answered = 0
    async with WireClient(address) as client:
        await client.open(client_id="bystander")
        while not stop.is_set():
            await client.request({answered: sequence(answered % VOCAB_SIZE, 1, 2)})
            result = (await client.receive(answered + 1))[answered]
            assert codec.decode(result.targets).num_rows == 3
            answered += 1
    return answered


async def semantic_fuzz(address: str, *, seed: int, count: int, batch: int = 250) -> None:
    """Requests good and bad, mixed in each message: the good ones are answered, the bad ones refused, all in-band."""
    rng = np.random.default_rng(seed)
    async with WireClient(address) as client:
        await client.open(client_id=f"hostile {seed}")
        for start in range(0, count, batch):
            made = [hostile_request(rng, start + index) for index in range(batch)]
            client.results.clear()
            await client.send([message for message, _ in made])
            await client.call.write(
                pb.StreamTargetsRequest(cancel=pb.Cancel(request_ids=rng.integers(1 << 60, size=9)))
            )
            results = await client.receive(batch, seconds=120)
            for message, good in made:
                result = results[message.request_id]
                assert (result.WhichOneof("outcome") == "targets") == good, (message, result)
                assert good or result.error.code in REFUSALS


SPECS = [SPEC, TargetSpec(sampler="top_k", codec_version=2), TargetSpec(sampler="full"), TargetSpec(seed=7)]


async def cancelling_fuzz(address: str, *, seed: int, rounds: int, live: int = 40) -> None:
    """Live requests, often what others ask for as well, cancelled at random: the others are answered, none twice."""
    rng = np.random.default_rng(seed)
    answers: Counter[int] = Counter()
    async with WireClient(address) as client:
        await client.open(SPECS[seed % len(SPECS)], client_id=f"fickle {seed % 3}")
        for turn in range(rounds):
            ids = [turn * live + index for index in range(live)]
            messages = [
                convert.request_to_message(
                    one,
                    sequence(*rng.integers(0, 30, int(rng.integers(1, 3))).tolist()),
                    draw_set=int(rng.integers(3)),
                    priority=int(rng.integers(4)),
                )
                for one in ids
            ]
            split = int(rng.integers(live + 1))
            await client.send(messages[:split])
            await asyncio.sleep(float(rng.choice([0.0, 0.002])))
            await client.send(messages[split:])
            cancelled = set(rng.choice(ids, int(rng.integers(live)), replace=False).tolist())
            await client.call.write(pb.StreamTargetsRequest(cancel=pb.Cancel(request_ids=sorted(cancelled))))
            async with asyncio.timeout(30):
                while not set(ids) - cancelled <= answers.keys():
                    results = (await client.call.read()).results.results
                    assert all(result.targets for result in results)
                    answers.update(result.request_id for result in results)
    assert set(answers.values()) == {1}


def raw_stream(channel: grpc.Channel, messages: list[bytes]) -> grpc.StatusCode:
    """Send bytes as they are; the status that ends the stream.

    Through the blocking client: grpc.aio reports INTERNAL of its own making where a write meets an ended stream.
    """
    call = channel.stream_stream(f"/{SERVICE}/StreamTargets")(iter(messages), timeout=60)
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
    return call.code()


def wire_fuzz(address: str, *, seed: int, count: int, batch: int = 20) -> None:
    """Streams of damaged messages, most behind a good `open`."""
    rng = np.random.default_rng(seed)
    hello = pb.StreamTargetsRequest(open=pb.Open(vocab_size=VOCAB_SIZE, spec=convert.spec_to_message(SPEC)))
    with grpc.insecure_channel(address) as channel:
        for _ in range(0, count, batch):
            good = convert.requests_to_message([hostile_request(rng, index)[0] for index in range(3)])
            messages = [mutated(rng, good.SerializeToString()) for _ in range(batch)]
            if rng.random() < 0.9:
                messages.insert(0, hello.SerializeToString())
            elif rng.random() < 0.5:
                messages.insert(0, mutated(rng, hello.SerializeToString()))
            assert raw_stream(channel, messages) in BAD_INPUT | {grpc.StatusCode.OK}
        describe = channel.unary_unary(f"/{SERVICE}/Describe")
        for _ in range(100):
            call = describe.future(mutated(rng, good.SerializeToString()), timeout=60)
            assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_hundred_thousand_hostile_requests_harm_nobody() -> None:
    settings = {"max_sequence_tokens": 64, "max_in_flight_tokens": 100_000, "max_message_bytes": 1 << 20}
    async with serving(FakeBackend(vocab_size=VOCAB_SIZE), **settings) as server:
        stop = asyncio.Event()
        watching = asyncio.ensure_future(bystander(server.address, stop))
        semantic = [semantic_fuzz(server.address, seed=seed, count=26_000) for seed in range(4)]
        wire = [asyncio.to_thread(wire_fuzz, server.address, seed=100 + seed, count=6_000) for seed in range(3)]
        fickle = [cancelling_fuzz(server.address, seed=200 + seed, rounds=60) for seed in range(8)]
        await asyncio.gather(*semantic, *wire, *fickle)
        stop.set()
        assert await watching > 10
        assert server.scheduler is not None
        assert server.scheduler.num_unfinished == 0


async def test_messages_of_the_largest_size_full_of_nothing_end_their_own_stream() -> None:
    async with serving(FakeBackend(), max_message_bytes=1 << 20) as server:
        empty = b"\x12" + b"\xfc\xff\x3f" + b"\x0a\x00" * ((1 << 19) - 2)  # requests { requests {} requests {} … }
        assert len(pb.StreamTargetsRequest.FromString(empty).requests.requests) == (1 << 19) - 2
        hello = pb.StreamTargetsRequest(open=pb.Open(vocab_size=VOCAB_SIZE, spec=convert.spec_to_message(SPEC)))
        async with WireClient(server.address) as ours:
            await ours.open()
            for size, expected in ((1, grpc.StatusCode.INVALID_ARGUMENT), (3, grpc.StatusCode.RESOURCE_EXHAUSTED)):
                with grpc.insecure_channel(server.address) as channel:
                    status = await asyncio.to_thread(raw_stream, channel, [hello.SerializeToString(), empty * size])
                assert status is expected
            await ours.request({1: sequence(1)})
            assert (await ours.receive(1))[1].targets
