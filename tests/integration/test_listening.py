"""A server listens where it is told and alone, and ends when it is told, whatever it is doing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from logitstream import metrics
from teacher_server.server import Served, TeacherServer
from tests.fakes import FakeBackend
from tests.flat_settings import student_config, teacher_config
from tests.serving import COMMAND, ENVIRONMENT, WireClient, sequence, serving
from tests.tiny_models import save_tiny_teacher


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"health_address": "127.0.0.1:{port}"}, {"health_address": "127.0.0.1:{port}"}),
        ({"health_address": "127.0.0.1:{port}"}, {"health_address": "localhost:{port}"}),
        ({"health_address": "127.0.0.1:{port}"}, {"health_address": "0.0.0.0:{port}"}),
        ({"health_address": "unix:{tmp}/health"}, {"health_address": "unix:{tmp}/health"}),
        ({"address": "127.0.0.1:{port}"}, {"address": "127.0.0.1:{port}"}),
        ({"address": "127.0.0.1:{port}"}, {"address": "localhost:{port}"}),
        ({"address": "127.0.0.1:{port}"}, {"health_address": "127.0.0.1:{port}"}),
        ({"address": "unix:{tmp}/teacher"}, {"address": "unix:{tmp}/teacher"}),
        ({"address": "unix:{tmp}/teacher"}, {"address": "unix://{tmp}/teacher"}),
    ],
)
async def test_a_second_server_at_an_address_that_is_served_says_so_and_ends(
    first: dict[str, str], second: dict[str, str], tmp_path: Path
) -> None:
    places = {"port": free_port(), "tmp": tmp_path}
    (name, wanted), *_ = ((name, value.format(**places)) for name, value in second.items())
    theirs: dict[str, Any] = {name: value.format(**places) for name, value in first.items()}
    async with serving(FakeBackend(), **theirs) as server:
        settings = {"model": "m", "address": "127.0.0.1:0"} | {name: wanted}
        other = TeacherServer(teacher_config(**settings), lambda: Served(FakeBackend()))
        with pytest.raises(OSError, match=f"^cannot serve on {wanted}: .*(in use|listens there)"):
            await other.run()
        async with WireClient(server.address) as client:  # the first one is not harmed
            assert (await client.score(sequence(1)))[0].targets


async def test_a_unix_socket_is_announced_by_its_path_and_taken_over_from_a_server_that_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, address_file = f"unix:{tmp_path}/teacher", tmp_path / "address"
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(f"{tmp_path}/teacher")
    async with serving(FakeBackend(), address=address, address_file=str(address_file)) as server:
        assert server.address == address
        while not address_file.exists():
            await asyncio.sleep(0.01)
        assert address_file.read_text() == f"{address}\n"
        async with WireClient(server.address) as client:
            assert (await client.score(sequence(1)))[0].targets
    assert f"serving on {address}\n" in capsys.readouterr().out


def test_metrics_are_for_this_machine_alone_unless_told_otherwise() -> None:
    assert student_config(model="m", text=["t"]).metrics.address == "127.0.0.1"
    assert teacher_config(model="m").metrics.address == "127.0.0.1"
    for addresses, arguments in ((["127.0.0.1"], {}), (["127.0.0.1", "127.0.0.2"], {"address": "0.0.0.0"})):
        port = metrics.serve(0, side="student", **arguments)
        for address in ("127.0.0.1", "127.0.0.2"):
            if address in addresses:
                with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10) as response:
                    assert response.status == 200
            else:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((address, port))
        with pytest.raises(OSError, match=f"cannot serve metrics on 127.0.0.1:{port}"):
            metrics.serve(port, side="student")


SLOW_LOAD = """
import sys, time
from tests.flat_settings import teacher_config
from teacher_server.server import Served, serve

def load():
    print("loading", flush=True)
    time.sleep(600)

serve(teacher_config(model="fake", address="127.0.0.1:0"), load)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_server_that_loads_ends_at_each_signal(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_LOAD], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_still_being_imported_ends_at_each_signal_without_a_traceback(
    number: signal.Signals, tmp_path: Path
) -> None:
    command = [*COMMAND, "--model.path", str(save_tiny_teacher(tmp_path)), "--server.address", "127.0.0.1:0"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        has_begun = Path(f"/proc/{process.pid}/status")
        deadline = time.monotonic() + 30
        while not caught(has_begun.read_text(), signal.SIGHUP):  # Python itself catches SIGINT from its start on
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode in (0, 128 + number)
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def caught(status: str, number: signal.Signals) -> bool:
    """Tell whether a process, by its /proc/PID/status, has a handler for the signal."""
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("ignored", [False, True], ids=["as usual", "under nohup"])
async def test_a_hangup_drains_a_server_as_sigterm_does_unless_it_was_started_to_ignore_it(
    ignored: bool, tmp_path: Path
) -> None:
    address_file = tmp_path / "address"
    command = [sys.executable, "-m", "tests.fake_backend_server", "--address-file", str(address_file)]
    command += ["--delay-seconds", "1"]
    shell = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"] if ignored else []
    process = subprocess.Popen([*shell, *command], env=ENVIRONMENT)
    try:
        async with asyncio.timeout(60):
            while not address_file.exists():
                await asyncio.sleep(0.05)
        async with WireClient(address_file.read_text().strip()) as client:
            running = asyncio.ensure_future(client.score(sequence(1)))
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGHUP)
            assert (await running)[0].targets
            if ignored:
                assert (await client.score(sequence(2)))[0].targets
                os.kill(process.pid, signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        process.kill()
        process.wait()
