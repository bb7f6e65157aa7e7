"""A real server in the test's own event loop, and a client that speaks the wire contract by hand."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
from grpc import aio

from logitstream.rpc import convert
from logitstream.rpc.channel import TlsFiles, bearer_metadata, open_channel
from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.rpc.v1.teacher_pb2_grpc import TeacherServiceStub
from logitstream.tokenizer import Vocabulary
from logitstream.types import TargetSpec, TokenSequence
from teacher_server.backend import TeacherBackend
from teacher_server.checkpoints import LoadCheckpoint
from teacher_server.config import TeacherConfig
from teacher_server.server import TeacherServer

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
    config = TeacherConfig(**{"model": "test", "address": "127.0.0.1:0", "drain_seconds": 5.0} | settings)
    server = TeacherServer(config, lambda: backend, load_checkpoint=load_checkpoint, load_vocabulary=lambda: vocabulary)
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


class WireClient:
    """One stream; answers are collected by request id as pb.Result, everything else in `notices`."""

    def __init__(self, address: str, *, token: str | None = None, tls: TlsFiles | None = None) -> None:
        self.channel = open_channel(address, max_message_bytes=8 << 20, tls=tls)
        self.stub = TeacherServiceStub(self.channel)
        self.metadata = bearer_metadata(token)
        self.results: dict[int, pb.Result] = {}
        self.notices: list[pb.StreamTargetsResponse] = []
        self.call: Any = None

    async def __aenter__(self) -> WireClient:
        return self

    async def __aexit__(self, *_error: object) -> None:
        if self.call is not None:
            self.call.cancel()
        await self.channel.close()

    async def describe(self) -> pb.DescribeResponse:
        return await self.stub.Describe(pb.DescribeRequest(), metadata=self.metadata, timeout=10)

    async def open(self, spec: TargetSpec | pb.TargetSpec = SPEC, **fields: Any) -> WireClient:
        message = spec if isinstance(spec, pb.TargetSpec) else convert.spec_to_message(spec)
        hello = pb.Open(**{"client_id": "test", "vocab_size": 1 << 24, "spec": message} | fields)
        self.call = self.stub.StreamTargets(metadata=self.metadata)
        await self.call.write(pb.StreamTargetsRequest(open=hello))
        response = await self.call.read()
        assert response is not aio.EOF, await self.call.details()
        assert response.WhichOneof("kind") == "opened"
        return self

    async def request(self, sequences: dict[int, TokenSequence], *, draw_set: int = 0, priority: int = 0) -> None:
        messages = [
            convert.request_to_message(request_id, one, draw_set=draw_set, priority=priority)
            for request_id, one in sequences.items()
        ]
        await self.send(messages)

    async def send(self, messages: Sequence[pb.TargetRequest]) -> None:
        await self.call.write(convert.requests_to_message(messages))

    async def receive(self, count: int, *, seconds: float = 20.0) -> dict[int, pb.Result]:
        """Read until `count` answers are here in all."""
        async with asyncio.timeout(seconds):
            while len(self.results) < count:
                response = await self.call.read()
                if response is aio.EOF:
                    raise EOFError(f"{await self.call.code()}: {await self.call.details()}")
                if response.WhichOneof("kind") == "results":
                    self.results |= {result.request_id: result for result in response.results.results}
                else:
                    self.notices.append(response)
        return self.results

    async def finish(self) -> tuple[Any, str]:
        """The status that the server ends the stream with."""
        try:
            while (response := await self.call.read()) is not aio.EOF:
                self.notices.append(response)
        except aio.AioRpcError:
            pass
        return await self.call.code(), await self.call.details()


@contextmanager
def teacher_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its address."""
    command = [*COMMAND, "--address", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving on "), process.communicate(timeout=10)
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()
