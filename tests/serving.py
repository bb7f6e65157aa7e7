"""A real server in the test's own event loop, and a client that speaks the wire contract by hand."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
from grpc import aio

from logitstream.rpc import convert
from logitstream.rpc.channel import bearer_metadata, open_channel
from logitstream.rpc.tls import TlsSettings
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.rpc.v1.teacher_pb2_grpc import TeacherServiceStub
from logitstream.tokenizer import Vocabulary
from logitstream.types import TargetSpec, TokenSequence
from teacher_server.backend import TeacherBackend
from teacher_server.checkpoints import LoadCheckpoint
from teacher_server.server import Served, TeacherServer
from tests.flat_settings import teacher_config

SPEC = TargetSpec(num_samples=8, codec_version=1)
COMMAND = [sys.executable, "-m", "teacher_server"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@asynccontextmanager
async def serving(
    backend: TeacherBackend,
    *,
    load_checkpoint: LoadCheckpoint | None = None,
    vocabulary: Vocabulary | None = None,
    **settings: Any,
) -> AsyncIterator[TeacherServer]:
    """A server that is healthy on entry and drained on exit; what its `run` raises is raised here."""
    config = teacher_config(**{"model": "test", "address": "127.0.0.1:0", "drain_seconds": 5.0} | settings)
    server = TeacherServer(config, lambda: Served(backend, vocabulary=vocabulary), load_checkpoint=load_checkpoint)
    running = asyncio.ensure_future(server.run())
    while not server.serving and not running.done():
        await asyncio.sleep(0.005)
    try:
        yield server
    finally:
        server.stop()
        await running


def sequence(*token_ids: int, mask: Sequence[bool] | None = None) -> TokenSequence:
    loss_mask = None if mask is None else np.array(mask, bool)
    return TokenSequence(token_ids=np.array(token_ids, np.int32), loss_mask=loss_mask)


class ScoreCall:
    """A call of Score whose results are read one by one; all else is the gRPC call's."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._ready: deque[pb.ScoreResult] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def read(self) -> Any:
        """Return the next result; aio.EOF at the end."""
        while not self._ready:
            message = await self._call.read()
            if message is aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
                return message
            self._ready.extend(message.results)
        return self._ready.popleft()

    async def __aiter__(self) -> AsyncIterator[pb.ScoreResult]:
        while (result := await self.read()) is not aio.EOF:  # type: ignore[attr-defined]
            yield result


class WireClient:
    """Calls of one server, made from messages by hand."""

    def __init__(self, address: str, *, token: str | None = None, tls: TlsSettings | None = None) -> None:
        self.channel = open_channel(address, max_message_bytes=8 << 20, tls=tls)
        self.stub = TeacherServiceStub(self.channel)
        self.metadata = bearer_metadata(token)

    async def __aenter__(self) -> WireClient:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.channel.close(None)

    async def describe(self) -> pb.DescribeResponse:
        return await self.stub.Describe(pb.DescribeRequest(), metadata=self.metadata, timeout=10)

    def call(
        self,
        *sequences: TokenSequence | pb.Sequence,
        spec: TargetSpec | pb.TargetSpec = SPEC,
        seconds: float = 20.0,
        **fields: Any,
    ) -> ScoreCall:
        message = convert.spec_to_message(spec) if isinstance(spec, TargetSpec) else spec
        settings: dict[str, Any] = {"client_id": "test", "vocab_size": 1 << 24, "spec": message} | fields
        request = pb.ScoreRequest(**settings)
        request.sequences.extend(
            one if isinstance(one, pb.Sequence) else convert.sequence_to_message(one) for one in sequences
        )
        return ScoreCall(self.stub.Score(request, metadata=self.metadata, timeout=seconds))

    async def score(self, *sequences: TokenSequence | pb.Sequence, **fields: Any) -> list[pb.ScoreResult]:
        """Return the results in the sequences' order."""
        results = {result.index: result async for result in self.call(*sequences, **fields)}
        return [results[index] for index in range(len(sequences))]

    async def refusal(self, *sequences: TokenSequence | pb.Sequence, **fields: Any) -> aio.AioRpcError:
        """Return how a call ends that must be refused as a whole."""
        try:
            results = await self.score(*sequences, **fields)
        except aio.AioRpcError as error:
            return error
        raise AssertionError(f"the call was answered: {results}")


@contextmanager
def teacher_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its address."""
    command = [*COMMAND, "--server.address", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving on "), process.communicate(timeout=10)
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()
