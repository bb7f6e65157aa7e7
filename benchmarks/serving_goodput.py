"""The server's goodput with a teacher that answers at once, against bare gRPC calls, and what bounds it."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
import timeit
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from benchmarks.instant_teacher import BARE_HEADER, BARE_METHOD, MAX_MESSAGE_BYTES, VOCAB_SIZE, typical_targets
from benchmarks.load import SPEC, instant, random_sequences
from logitstream import codec
from logitstream.rpc import convert
from logitstream.rpc.channel import open_channel
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.types import TokenSequence
from teacher_server.backend import ScoreRequest
from teacher_server.calls import SERVICE
from teacher_server.scheduler import Scored, key_of
from teacher_server.servicer import results_message

SCORE_METHOD = f"/{SERVICE}/Score"
CALL_SEQUENCES = 8
CALLS_AT_ONCE = 64
LENGTHS = (512, 8192)
LARGE_BATCH_TOKENS = 262_144


async def raw_run(address: str, method: str, requests: list[bytes]) -> tuple[float, list[int]]:
    """Make the calls, CALLS_AT_ONCE of them at a time; return seconds and the sizes of what came, unparsed."""
    sizes: list[int] = []
    waiting = iter(requests)
    async with open_channel(address, max_message_bytes=MAX_MESSAGE_BYTES) as channel:

        async def make_calls() -> None:
            for request in waiting:
                sizes.extend([len(message) async for message in channel.unary_stream(method, None, None)(request)])

        start = time.perf_counter()
        await asyncio.gather(*(make_calls() for _ in range(CALLS_AT_ONCE)))
        return time.perf_counter() - start, sizes


def measure_goodput(args: argparse.Namespace) -> dict[str, Any]:
    """Payload bytes/s of a backend that answers at once over those of bare calls of equal messages."""
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
    groups = [call_of(sequences[i : i + CALL_SEQUENCES]) for i in range(0, num_sequences, CALL_SEQUENCES)]
    requests = [message.SerializeToString() for message in groups]
    num_tokens = sum(map(len, sequences))
    found: dict[str, list[float]] = {name: [] for name in servers}
    cpu: dict[str, list[float]] = {name: [] for name in servers}
    sizes = [0]
    for _ in range(repeats + 1):
        for name, (address, server) in servers.items():
            before = sum(server.cpu_times()[:2])
            if name == "bare":
                plan = BARE_HEADER.pack(len(sizes) // len(requests), sum(sizes) // len(sizes))
                seconds, _ = asyncio.run(raw_run(address, BARE_METHOD, [plan + one[len(plan) :] for one in requests]))
            else:
                seconds, sizes = asyncio.run(raw_run(address, SCORE_METHOD, requests))
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


def call_of(sequences: Sequence[TokenSequence]) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        client_id="goodput",
        vocab_size=1 << 24,
        spec=convert.spec_to_message(SPEC),
        sequences=map(convert.sequence_to_message, sequences),
    )


def steps_alone(call: pb.ScoreRequest) -> dict[str, float]:
    """Time each step that every sequence takes by itself, one after another in one thread: the least of five."""
    data, count = call.SerializeToString(), len(call.sequences)
    limits: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_sequence_tokens": max(LENGTHS)}
    sequences = [convert.sequence_from_message(one, **limits) for one in call.sequences]
    targets = typical_targets(len(sequences[0]))
    scored = Scored(codec.encode(targets), teacher_version=0, weights_digest="00" * 32)

    def answer_one_future_each() -> None:
        async def answer() -> None:
            for _ in range(count):
                future = asyncio.get_running_loop().create_future()
                future.add_done_callback(bool)  # the call's and the scheduler's
                future.add_done_callback(bool)
                future.set_result(None)
            await asyncio.sleep(0)

        loop.run_until_complete(answer())

    loop = asyncio.new_event_loop()
    steps: dict[str, Callable[[], object]] = {
        "parse": lambda: pb.ScoreRequest.FromString(data),
        "check_and_convert": lambda: [convert.sequence_from_message(one, **limits) for one in call.sequences],
        "key": lambda: [hash(key_of(ScoreRequest(sequence=one, spec=SPEC))) for one in sequences],
        "future": answer_one_future_each,
        "serialize": lambda: results_message(
            deque((index, 1, scored) for index in range(count)), MAX_MESSAGE_BYTES, call
        ),
        "encode": lambda: [codec.encode(targets) for _ in sequences],
    }
    alone = {name: 1e6 * min(timeit.repeat(step, number=20, repeat=5)) / 20 / count for name, step in steps.items()}
    loop.close()
    return alone
