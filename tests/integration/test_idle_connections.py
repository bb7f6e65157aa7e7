"""Connections that say nothing, in numbers: whoever has work is still served, and health and metrics are answered."""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from logitstream import metrics
from teacher_server.calls import HEALTH_SERVICE, SERVICE
from tests.deaf_client import PREFACE, SETTINGS, frame
from tests.fakes import FakeBackend
from tests.serving import ENVIRONMENT, WireClient, sequence, serving

SECONDS = 40.0
"""Idle connections are closed after 5 to 10 s; the rest is for slow machines."""
FILES = 256
ATTACKERS = 300


def connected(port: int, greeting: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(greeting)
    return connection


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def small_server(tmp_path: Path, ports: list[int]) -> Iterator[Path]:
    """A server process that may open few files, fewer still at its start; its log."""
    port, health_port, metrics_port = ports
    addresses = ["--address", f"127.0.0.1:{port}", "--health-address", f"127.0.0.1:{health_port}"]
    address_file, log = tmp_path / "address", tmp_path / "log"
    arguments = [*addresses, "--metrics-port", str(metrics_port), "--address-file", str(address_file)]
    command = [sys.executable, "-m", "tests.fake_backend_server", *arguments, "--log-level", "INFO"]
    limited = ["sh", "-c", f'ulimit -Sn {FILES // 2}; ulimit -Hn {FILES}; exec "$@"', "sh", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(limited, env=ENVIRONMENT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not address_file.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield log
    finally:
        process.kill()
        process.wait()


async def is_healthy(port: int, *, timeout: float = 5) -> bool:
    async with aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = await HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def gets_targets(address: str) -> bool:
    async with WireClient(address) as client:
        try:
            return bool((await client.score(sequence(1, 2, 3)))[0].targets)
        except aio.AioRpcError:
            return False


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        assert response.status == 200
        return str(response.read().decode())


async def eventually(attempt: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await attempt():
            await asyncio.sleep(0.2)


async def test_more_idle_connections_than_files_on_every_port_take_nothing_off_line(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * ATTACKERS:
        pytest.skip(f"needs {4 * ATTACKERS} open files, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ports = port, health_port, metrics_port = free_ports(3)
    with small_server(tmp_path, ports) as log, ExitStack() as stack:
        assert f"up to {FILES} files" in log.read_text()
        for one in ports:
            for _ in range(ATTACKERS):
                stack.enter_context(connected(one))
        assert "logitstream_teacher_clients" in await asyncio.to_thread(scraped, metrics_port)
        await eventually(lambda: is_healthy(health_port))
        await eventually(lambda: is_healthy(port))
        await eventually(lambda: gets_targets(f"127.0.0.1:{port}"))


@pytest.mark.parametrize("greeting", [b"", PREFACE + frame(SETTINGS, 0, 0, b"")], ids=["silent", "after the preface"])
async def test_connections_without_a_call_fill_the_port_for_seconds_and_health_has_its_own(greeting: bytes) -> None:
    (health_port,) = free_ports(1)
    settings: dict[str, Any] = {"health_address": f"127.0.0.1:{health_port}", "max_connections": 8}
    async with serving(FakeBackend(delay_seconds=1.0), **settings) as server:
        port = int(server.address.rpartition(":")[2])
        async with WireClient(server.address) as busy:
            running = busy.call(sequence(1), seconds=60)
            await asyncio.sleep(0.2)
            with ExitStack() as stack:
                for _ in range(20):
                    stack.enter_context(await asyncio.to_thread(connected, port, greeting))
                await asyncio.sleep(0.2)
                assert not await gets_targets(server.address)  # all places are taken
                assert await is_healthy(health_port)
                assert (await running.read()).targets
                await eventually(lambda: gets_targets(server.address))


async def test_calls_that_never_send_their_request_are_ended() -> None:
    async with serving(FakeBackend()) as server, WireClient(server.address) as client:
        channel: Any = client.channel
        for call in [channel.stream_stream(f"/{name}")() for name in (f"{HEALTH_SERVICE}/Check", f"{SERVICE}/Score")]:
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert await call.details() == "no request within 10 seconds"


def test_a_scrape_is_answered_beside_any_number_of_silent_connections() -> None:
    port = metrics.serve(0, side="teacher", address="127.0.0.1")
    with ExitStack() as stack:
        for greeting in (b"", b"GET /metrics HT") * 100:
            stack.enter_context(connected(port, greeting))
        for _ in range(3):
            assert re.search(r"^logitstream_teacher_clients ", scraped(port), re.MULTILINE)
