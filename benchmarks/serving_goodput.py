"""The server's goodput with a teacher that answers at once, against a bare gRPC stream, and what bounds it."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import psutil
from grpc import aio

from benchmarks.instant_teacher import BARE_HEADER, BARE_METHOD, MAX_MESSAGE_BYTES, VOCAB_SIZE, typical_targets
from benchmarks.load import SPEC, instant, random_sequences
from logitstream import codec
from logitstream.rpc import convert
from logitstream.rpc.channel import open_channel
from logitstream.rpc.v1 import teacher_pb2 as pb
from teacher_server.backend import ScoreRequest
from teacher_server.interceptors import SERVICE
from teacher_server.replies import reply_messages
from teacher_server.stream import Event, Outcome
from teacher_server.work import Scored, key_of

STREAM_METHOD = f"/{SERVICE}/StreamTargets"
LENGTHS = (512, 8192)
LARGE_BATCH_TOKENS = 262_144


async def raw_run(address: str, method: str, requests: list[bytes]) -> tuple[float, list[int]]:
    """Seconds to send all and read to the end of the stream, and the sizes of what came; bytes are not looked into."""
    async with open_channel(address, max_message_bytes=MAX_MESSAGE_BYTES) as channel:
        call = channel.stream_stream(method)()
        start = time.perf_counter()

        async def read() -> list[int]:
            sizes = []
            while (message := await call.read()) is not aio.EOF:
                sizes.append(len(message))
            return sizes

        reading = asyncio.ensure_future(read())
        for request in requests:
            await call.write(request)
        await call.done_writing()
        sizes = await reading
        return time.perf_counter() - start, sizes


def measure_goodput(args: argparse.Namespace) -> dict[str, Any]:
    """Payload bytes/s of a backend that answers at once over those of a bare stream of equal messages."""
    large = ("--encoded-before", "--max-batch-tokens", str(LARGE_BATCH_TOKENS))
    with (
        instant("--bare") as bare,
        instant("--encoded-before") as ready,
        instant(*large) as ready_large,
        instant() as encoding,
    ):
        servers = {
            "encoding": encoding,
            "encoded_before": ready,
            "encoded_before_large_batches": ready_large,
            "bare": bare,
        }
        return {
            f"sequences_of_{length}_tokens": goodput(servers, length, args.num_requests * 512 // length, args.repeats)
            for length in LENGTHS
        }


def goodput(
    servers: dict[str, tuple[str, psutil.Process]], length: int, num_sequences: int, repeats: int
) -> dict[str, Any]:
    """`bare` moves, as the last of the servers, what the one before it has sent."""
    sequences = random_sequences([length] * num_sequences)
    messages = [convert.request_to_message(number, one) for number, one in enumerate(sequences)]
    groups = [convert.requests_to_message(messages[i : i + 8]) for i in range(0, len(messages), 8)]
    hello = pb.Open(client_id="goodput", vocab_size=1 << 24, spec=convert.spec_to_message(SPEC))
    requests = [message.SerializeToString() for message in (pb.StreamTargetsRequest(open=hello), *groups)]
    num_tokens = sum(map(len, sequences))
    found: dict[str, list[float]] = {name: [] for name in servers}
    cpu: dict[str, list[float]] = {name: [] for name in servers}
    sizes = [0]
    for _ in range(repeats + 1):
        for name, (address, server) in servers.items():
            before = sum(server.cpu_times()[:2])
            if name == "bare":
                plan = BARE_HEADER.pack(len(requests), len(sizes), sum(sizes) // len(sizes))
                seconds, _ = asyncio.run(raw_run(address, BARE_METHOD, [plan, *requests]))
            else:
                seconds, sizes = asyncio.run(raw_run(address, STREAM_METHOD, requests))
            found[name].append(seconds)
            cpu[name].append((sum(server.cpu_times()[:2]) - before) / len(sequences))
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {
        "targets_tokens_per_second": {name: num_tokens / seconds for name, seconds in medians.items()},
        "goodput_over_bare": {name: medians["bare"] / medians[name] for name in medians if name != "bare"},
        "response_bytes_per_token": sum(sizes) / num_tokens,
        "messages": {"requests": len(requests), "responses": len(sizes), "response_bytes": sum(sizes) // len(sizes)},
        "server_cpu_microseconds_per_sequence": {
            name: 1e6 * statistics.median(values[1:]) for name, values in cpu.items()
        },
        "steps_alone_microseconds_per_sequence": steps_alone(groups[0]),
        "seconds": found,
    }


def steps_alone(group: pb.StreamTargetsRequest) -> dict[str, float]:
    """What each step that every sequence takes costs by itself, one after another in one thread: the least of five."""
    data, count = group.SerializeToString(), len(group.requests.requests)
    limits: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_sequence_tokens": max(LENGTHS)}
    sequences = [convert.sequence_from_message(request, **limits) for request in group.requests.requests]
    targets = typical_targets(len(sequences[0]))
    scored = Scored(payload=codec.encode(targets), teacher_version=0, weights_digest="00" * 32)
    answers: list[Event] = [
        Outcome(request_id=number, num_tokens=len(sequences[0]), was_taken=True, answer=scored)
        for number in range(count)
    ]

    def answer_one_future_each() -> None:
        async def answer() -> None:
            for _ in range(count):
                future = asyncio.get_running_loop().create_future()
                future.add_done_callback(bool)  # the stream's and the scheduler's
                future.add_done_callback(bool)
                future.set_result(None)
            await asyncio.sleep(0)

        loop.run_until_complete(answer())

    loop = asyncio.new_event_loop()
    steps: dict[str, Callable[[], object]] = {
        "parse": lambda: pb.StreamTargetsRequest.FromString(data),
        "check_and_convert": lambda: [convert.sequence_from_message(one, **limits) for one in group.requests.requests],
        "key": lambda: [hash(key_of(ScoreRequest(sequence=one, spec=SPEC))) for one in sequences],
        "future": answer_one_future_each,
        "serialize": lambda: list(reply_messages(answers, max_message_bytes=MAX_MESSAGE_BYTES)),
        "encode": lambda: [codec.encode(targets) for _ in sequences],
    }
    alone = {name: 1e6 * min(timeit.repeat(step, number=20, repeat=5)) / 20 / count for name, step in steps.items()}
    loop.close()
    return alone
