"""The probes of orchestrators: docker/check_health.py and plaintext health beside TLS."""

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


async def exit_status(*addresses: str) -> int:
    command = [sys.executable, str(CHECK_HEALTH), *addresses]
    nowhere = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=nowhere, stderr=nowhere)
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


async def test_a_teacher_without_an_address_for_health_is_healthy_at_its_own_where_that_is_plaintext() -> None:
    nobody = f"127.0.0.1:{free_port()}"
    async with serving(FakeBackend()) as server:
        assert await exit_status(nobody, server.address) == 0
        assert await exit_status(nobody) == 1
        server.stop()
    assert await exit_status(nobody, server.address) == 1
