"""What orchestrators ask of a teacher: docker/check_health.py and plaintext health beside TLS."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from logitstream.rpc.v1 import teacher_pb2 as pb
from logitstream.rpc.v1.teacher_pb2_grpc import TeacherServiceStub
from tests.fakes import FakeBackend
from tests.serving import serving

CHECK_HEALTH = Path(__file__).parents[2] / "docker" / "check_health.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def exit_status(address: str) -> int:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHECK_HEALTH), address, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def test_health_is_answered_at_an_address_of_its_own_and_nothing_else_is() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with serving(FakeBackend(), health_address=address) as server:
        async with aio.insecure_channel(address) as channel:
            answer = await HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(aio.AioRpcError) as refused:
                await TeacherServiceStub(channel).Describe(pb.DescribeRequest(), timeout=10)
            assert refused.value.code() == StatusCode.UNIMPLEMENTED
        assert await exit_status(address) == 0
        server.stop()
    assert await exit_status(address) == 1
