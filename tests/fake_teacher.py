"""A teacher server without a model, in a process of its own: answers at once, and misbehaves where it is told to.

Row t of its targets is a pure function of the sequence, the draw set and the weights: `expected_targets`.
SIGTERM drains, SIGUSR1 replaces the weights by the next version's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from grpc import aio

from logitstream import codec
from logitstream.errors import FingerprintMismatch, LogitstreamError, ServerDraining, TooManyInFlight
from logitstream.rpc.convert import info_to_message, sequence_from_message
from logitstream.rpc.status import status_of, trailing_metadata
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.rpc.v1.teacher_pb2_grpc import TeacherServiceServicer, add_TeacherServiceServicer_to_server
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence, call_tokens
from tests.forking import SPAWN

VOCAB_SIZE = 1000
TOKENIZER_DIGEST = hashlib.sha256(b"fake tokenizer").hexdigest()
POISON_ID = 999
"""A sequence with this id gets a ScoringFailed that is not retryable."""
FLAKY_ID = 998
"""A sequence with this id gets a retryable ScoringFailed on its first `--flaky` tries at this server."""
FATAL_ID = 997
"""A sequence with this id kills the server."""
SPEC = TargetSpec(num_samples=8, codec_version=1)


def weights_digest(weights: str, version: int) -> str:
    return hashlib.sha256(f"{weights} {version}".encode()).hexdigest()


def fake_info(*, weights: str = "a", version: int = 0, credit: int = 65536) -> TeacherInfo:
    return TeacherInfo(
        model="fake",
        weights_digest=weights_digest(weights, version),
        tokenizer_digest=TOKENIZER_DIGEST,
        vocab_size=VOCAB_SIZE,
        dtype="float32",
        max_sequence_tokens=4096,
        max_in_flight_tokens=credit,
        teacher_version=version,
    )


def expected_targets(sequence: TokenSequence, draw_set: int, *, version: int = 0) -> SparseTargets:
    """One entry a wanted row: the id after this row's, further by the draw set and the teacher's version."""
    wanted = np.ones(len(sequence), bool) if sequence.loss_mask is None else sequence.loss_mask
    ids = ((sequence.token_ids + 1 + draw_set + 7 * version) % VOCAB_SIZE).astype(np.int32)[wanted]
    return SparseTargets(
        vocab_size=VOCAB_SIZE,
        units=SPEC.num_samples,
        row_offsets=np.concatenate([[0], np.cumsum(wanted)]).astype(np.int64),
        token_ids=ids,
        counts=np.full(len(ids), SPEC.num_samples, np.int32),
    )


class FakeTeacher(TeacherServiceServicer):
    """Answers in random order; what it holds at a time is bounded by `--credit`, as in a real server."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.info = replace(
            fake_info(weights=options.weights, version=options.version, credit=options.credit),
            tokenizer_digest=options.tokenizer,
        )
        self.flaky_left = options.flaky
        self.draining = False
        self.num_tokens = 0
        self.device = asyncio.Lock()
        self.random = np.random.default_rng(options.seed)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:  # noqa: N802
        await asyncio.sleep(self.options.describe_seconds)
        return info_to_message(self.info)

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResults]:  # noqa: N802
        num_tokens = call_tokens([len(one.token_bytes) // 4 for one in request.sequences])
        try:
            self._check(request, num_tokens)
        except LogitstreamError as error:
            await context.abort(status_of(error), str(error), trailing_metadata(error))
        self.num_tokens += num_tokens
        try:
            for index in self.random.permutation(len(request.sequences)).tolist():
                if self.options.seconds:
                    async with self.device:
                        await asyncio.sleep(self.options.seconds)
                yield pb.ScoreResults(results=[self._result(index, request.sequences[index], request.draw_set)])
        finally:
            self.num_tokens -= num_tokens

    def _check(self, request: pb.ScoreRequest, num_tokens: int) -> None:
        if self.draining:
            raise ServerDraining("told to end")
        if request.weights_digest not in ("", self.info.weights_digest):
            raise FingerprintMismatch(f"weights_digest: {request.weights_digest} against {self.info.weights_digest}")
        if self.num_tokens and self.num_tokens + num_tokens > self.options.credit:
            error = TooManyInFlight("beyond the credit")
            error.retry_after_seconds = 0.05
            raise error

    def _result(self, index: int, one: pb.Sequence, draw_set: int) -> pb.ScoreResult:
        sequence = sequence_from_message(one, vocab_size=VOCAB_SIZE, max_sequence_tokens=4096)
        if FATAL_ID in sequence.token_ids:
            os._exit(13)
        if POISON_ID in sequence.token_ids:
            return _refusal(index, retryable=False)
        if FLAKY_ID in sequence.token_ids and self.flaky_left > 0:
            self.flaky_left -= 1
            return _refusal(index, retryable=True)
        targets = expected_targets(sequence, draw_set, version=self.info.teacher_version)
        return pb.ScoreResult(
            index=index,
            targets=codec.encode(targets, version=SPEC.codec_version),
            teacher_version=self.info.teacher_version,
            weights_digest=bytes.fromhex(self.info.weights_digest)[:8],
        )

    def replace_weights(self) -> None:
        version = self.info.teacher_version + 1
        digest = weights_digest(self.options.weights, version)
        self.info = replace(self.info, teacher_version=version, weights_digest=digest)


def _refusal(index: int, *, retryable: bool) -> pb.ScoreResult:
    error = pb.RequestError(code="ScoringFailed", message="told to fail", retryable=retryable)
    return pb.ScoreResult(index=index, error=error)


async def _serve(options: argparse.Namespace, telling: Connection | None) -> None:
    teacher = FakeTeacher(options)  # type: ignore[abstract]
    server = aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 100),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]
    )
    add_TeacherServiceServicer_to_server(teacher, server)
    port = server.add_insecure_port(f"127.0.0.1:{options.port}")
    await server.start()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGUSR1, teacher.replace_weights)
    if telling is not None:
        telling.send(f"127.0.0.1:{port}")
    await stopping.wait()
    teacher.draining = True
    await asyncio.sleep(0.1)  # calls that are on their way are refused, not broken
    await server.stop(options.grace)


class Started:
    """A fake teacher in a process that is forked for it."""

    def __init__(self, *options: str, port: int = 0) -> None:
        self._told, telling = SPAWN.Pipe(duplex=False)
        arguments = (_parser().parse_args(["--port", str(port), *options]), telling)
        self._process = SPAWN.Process(target=run_fake_teacher, args=arguments, daemon=True)
        self._process.start()
        telling.close()

    def address(self) -> str:
        """Wait until it serves."""
        address: str = self._told.recv()
        return address

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def exit_status(self, seconds: float = 0.0) -> int | None:
        """None: it runs, also after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._told.close()


@contextlib.contextmanager
def fake_teacher(*options: str, port: int = 0) -> Iterator[tuple[Started, str]]:
    """A running fake teacher and its address; killed at the end, stopped or not."""
    teacher = Started(*options, port=port)
    try:
        yield teacher, teacher.address()
    finally:
        teacher.stop()


def _exit_with_parent(parent: int) -> None:
    """A test run that is killed leaves no teacher behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--weights", default="a")
    parser.add_argument("--version", type=int, default=0)
    parser.add_argument("--credit", type=int, default=65536)
    parser.add_argument("--seconds", type=float, default=0.0, help="to score one sequence")
    parser.add_argument("--describe_seconds", type=float, default=0.0, help="before it tells what it serves")
    parser.add_argument("--tokenizer", default=TOKENIZER_DIGEST)
    parser.add_argument("--flaky", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grace", type=float, default=5.0)
    return parser


def run_fake_teacher(options: argparse.Namespace, telling: Connection | None = None) -> None:
    """Serve until SIGTERM; whoever listens at the other end of `telling` is told the address."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    asyncio.run(_serve(options, telling))
