"""More than 100,000 malformed or hostile sequences and calls: each is refused for what it is, and nobody else notices.

Three kinds: bytes that are no message, sequences that cannot be scored among good ones, and good calls of several specs
that are cancelled while they wait, run or are on their way back. Statuses are those of bad input, never INTERNAL or
UNKNOWN, and a bystander's calls go on throughout.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np

from logitstream import codec
from logitstream.rpc import convert
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.types import TargetSpec
from teacher_server.calls import SERVICE
from tests.fakes import FakeBackend
from tests.serving import SPEC, WireClient, sequence, serving

VOCAB_SIZE = 1000
BAD_INPUT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def hostile_sequence(rng: np.random.Generator) -> tuple[pb.Sequence, bool]:
    """Return a sequence, and whether it can be scored."""
    kind = int(rng.integers(6))
    if kind == 0:
        return pb.Sequence(), False
    ids = rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 20))).tolist()
    if kind == 1:
        ids.append(int(rng.integers(VOCAB_SIZE, 1 << 32)))
    if kind == 2:
        ids.extend([1] * 64)
    message = pb.Sequence(token_bytes=np.array(ids, "<u4").tobytes())
    if kind == 3:
        message.loss_mask = rng.bytes(int(rng.integers(1, 40)))
        bits = np.unpackbits(np.frombuffer(message.loss_mask, np.uint8), bitorder="little")
        return message, len(message.loss_mask) == (len(ids) + 7) // 8 and not bits[len(ids) :].any()
    if kind == 4:
        message.token_bytes += rng.bytes(int(rng.integers(1, 4)))
    return message, kind == 5


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
    """Make calls that are all answered well; return their number."""
    answered = 0
    async with WireClient(address) as client:
        while not stop.is_set():
            (result,) = await client.score(sequence(answered % VOCAB_SIZE, 1, 2), client_id="bystander")
            assert codec.decode(result.targets).num_rows == 3
            answered += 1
    return answered


async def semantic_fuzz(address: str, *, seed: int, count: int, batch: int = 250) -> None:
    """Mix good and bad sequences in each call: the good ones are answered, the bad ones refused, all in-band."""
    rng = np.random.default_rng(seed)
    async with WireClient(address) as client:
        for _ in range(0, count, batch):
            made = [hostile_sequence(rng) for _ in range(batch)]
            results = await client.score(
                *[message for message, _ in made],
                client_id=f"hostile {seed}",
                draw_set=int(rng.integers(1 << 62)) * 4 + 3,
                priority=int(rng.integers(1 << 62)) * 4 + 3,
                seconds=120,
            )
            for (message, good), result in zip(made, results, strict=True):
                assert (result.WhichOneof("outcome") == "targets") == good, (message, result)
                assert good or result.error.code == "InvalidSequence"


SPECS = [SPEC, TargetSpec(sampler="top_k", codec_version=2), TargetSpec(sampler="full"), TargetSpec(seed=7)]


async def cancelling_fuzz(address: str, *, seed: int, rounds: int, live: int = 40) -> None:
    """Make calls, often for what others ask for as well, and cancel some at random: the others are answered once."""
    rng = np.random.default_rng(seed)

    async def one_call(client: WireClient) -> None:
        asked = [sequence(*rng.integers(0, 30, int(rng.integers(1, 3))).tolist()) for _ in range(live // 4)]
        call = client.call(
            *asked,
            spec=SPECS[seed % len(SPECS)],
            client_id=f"fickle {seed % 3}",
            draw_set=int(rng.integers(3)),
            priority=int(rng.integers(4)),
        )
        stop_after = int(rng.integers(2 * live))
        answered = []
        async for result in call:
            assert result.targets
            answered.append(result.index)
            if len(answered) == stop_after:
                call.cancel()
                return
            await asyncio.sleep(float(rng.choice([0.0, 0.002])))
        assert sorted(answered) == list(range(len(asked)))

    async with WireClient(address) as client:
        for _ in range(rounds):
            await asyncio.gather(*(one_call(client) for _ in range(4)))


def raw_call(channel: grpc.Channel, message: bytes) -> grpc.StatusCode:
    """Send bytes as a call's request; return the status that ends it."""
    call = channel.unary_stream(f"/{SERVICE}/Score", None, None)(message, timeout=60)
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
    return call.code()


def wire_fuzz(address: str, *, seed: int, count: int) -> None:
    """Make calls of damaged messages."""
    rng = np.random.default_rng(seed)
    with grpc.insecure_channel(address) as channel:
        for _ in range(count):
            good = pb.ScoreRequest(
                vocab_size=VOCAB_SIZE,
                spec=convert.spec_to_message(SPEC),
                sequences=[hostile_sequence(rng)[0] for _ in range(3)],
            )
            assert raw_call(channel, mutated(rng, good.SerializeToString())) in BAD_INPUT | {grpc.StatusCode.OK}
        describe = channel.unary_unary(f"/{SERVICE}/Describe", None, None)
        for _ in range(100):
            call = describe.future(mutated(rng, good.SerializeToString()), timeout=60)
            assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_hundred_thousand_hostile_sequences_harm_nobody() -> None:
    limits: dict[str, Any] = {"max_sequence_tokens": 64, "max_in_flight_tokens": 100_000, "max_message_bytes": 1 << 20}
    async with serving(FakeBackend(vocab_size=VOCAB_SIZE), **limits) as server:
        stop = asyncio.Event()
        watching = asyncio.ensure_future(bystander(server.address, stop))
        semantic = [semantic_fuzz(server.address, seed=seed, count=26_000) for seed in range(4)]
        wire = [asyncio.to_thread(wire_fuzz, server.address, seed=100 + seed, count=1_000) for seed in range(3)]
        fickle = [cancelling_fuzz(server.address, seed=200 + seed, rounds=30) for seed in range(8)]
        await asyncio.gather(*semantic, *wire, *fickle)
        stop.set()
        assert await watching > 10
        assert server.scheduler is not None
        async with asyncio.timeout(5):
            while server.scheduler.num_unfinished or server.admission.num_tokens:
                await asyncio.sleep(0.01)


async def test_messages_of_the_largest_size_full_of_nothing_end_their_own_call() -> None:
    async with serving(FakeBackend(), max_message_bytes=1 << 20) as server:
        nothing = pb.ScoreRequest(vocab_size=VOCAB_SIZE, spec=convert.spec_to_message(SPEC)).SerializeToString()
        nothing += b"\x42\x00" * ((1 << 19) - 100)  # sequences {} sequences {} …
        assert len(pb.ScoreRequest.FromString(nothing).sequences) == (1 << 19) - 100
        async with WireClient(server.address) as ours:
            for size, expected in ((1, grpc.StatusCode.INVALID_ARGUMENT), (3, grpc.StatusCode.RESOURCE_EXHAUSTED)):
                with grpc.insecure_channel(server.address) as channel:
                    assert await asyncio.to_thread(raw_call, channel, nothing * size) is expected
            assert (await ours.score(sequence(1)))[0].targets
