"""`python -m teacher_server` as users run it: from settings to a healthy server, new weights, SIGTERM, --check."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstream import codec
from logitstream.id_model import IdModel
from logitstream.rpc import convert
from logitstream.types import TargetSpec
from teacher_server.__main__ import check, main, tokenizer_of
from teacher_server.config import IdModelSettings, TeacherConfig
from teacher_server.id_model_calibration import id_model_from
from teacher_server.server import EXIT_STUCK, Served, serve
from teacher_server.weights import weights_digest
from tests.authority import Authority
from tests.fakes import FakeBackend
from tests.flat_settings import nested, teacher_config
from tests.serving import COMMAND, ENVIRONMENT, WireClient, sequence, teacher_process
from tests.tiny_models import save_tiny_teacher


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


async def test_serves_reports_and_drains_at_sigterm(tiny_teacher: Path, tmp_path: Path) -> None:
    address_file = tmp_path / "address"
    (tmp_path / "settings.yaml").write_text(f"model: {{path: {tiny_teacher}}}\nmetrics: {{port: 0}}\n")
    arguments = ["--config", str(tmp_path / "settings.yaml"), "--server.address_file", str(address_file)]
    with teacher_process(*arguments) as (process, address):
        assert address_file.read_text().strip() == address
        assert process.stderr is not None
        metrics_address = process.stderr.readline().strip().rpartition("metrics on ")[2]
        async with WireClient(address) as client:
            info = convert.info_from_message(await client.describe())
            assert info.weights_digest == weights_digest(tiny_teacher)
            asked = [sequence(*range(number, number + 9)) for number in range(20)]
            results = await client.score(*asked, spec=TargetSpec())
            assert all(codec.decode(result.targets).num_rows == 9 for result in results)
            (bad,) = await client.score(sequence(1_000_000))
            assert bad.error.code == "InvalidSequence"
            exported = urllib.request.urlopen(f"http://{metrics_address}/metrics").read().decode()
            assert "logitstream_teacher_tokens_total 180.0" in exported
            assert "logitstream_teacher_sequences_total 20.0" in exported
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "drained: 0 calls left unanswered\n" in errors


def test_new_checkpoints_are_served_as_they_appear_and_broken_ones_are_not(tiny_teacher: Path, tmp_path: Path) -> None:
    watched = tmp_path / "checkpoints"
    watched.mkdir()

    async def version(client: WireClient, wanted: int) -> str:
        async with asyncio.timeout(30):
            while (info := await client.describe()).teacher_version < wanted:
                await asyncio.sleep(0.05)
        return info.weights_digest

    async def scenario(address: str) -> None:
        async with WireClient(address) as client:
            (first,) = await client.score(sequence(1, 2, 3), spec=TargetSpec())
            second = save_tiny_teacher(watched / "checkpoint-2", seed=2)
            assert await version(client, 1) == weights_digest(second)
            (watched / "checkpoint-3").mkdir()
            (watched / "checkpoint-3" / "config.json").write_text("{}")
            (watched / "checkpoint-3" / "model.safetensors").write_bytes(b"\x05")
            wrong = save_tiny_teacher(watched / "checkpoint-4", family="gpt2", seed=3)
            (wrong / "config.json").write_text("{}")
            fifth = save_tiny_teacher(watched / "checkpoint-5", seed=5)
            assert await version(client, 2) == weights_digest(fifth)
            (result,) = await client.score(sequence(1, 2, 3), spec=TargetSpec())
            assert result.teacher_version == 2
            assert result.weights_digest.hex() == weights_digest(fifth)[:16]
            assert first.teacher_version == 0
            assert result.targets != first.targets

    arguments = ["--model.path", str(tiny_teacher), "--watch.folder", str(watched), "--watch.seconds", "0.1"]
    with teacher_process(*arguments) as (_, address):
        asyncio.run(scenario(address))
    with teacher_process(*arguments) as (_, address):  # begins with what it served when it ended
        assert asyncio.run(served(address)) == weights_digest(watched / "checkpoint-5")


async def served(address: str) -> str:
    async with WireClient(address) as client:
        return (await client.describe()).weights_digest


async def test_an_id_model_is_made_once_and_then_shared(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{number * 7 % 96}" for number in range(500)))
    arguments = ["--model.path", str(tiny_teacher), "--id_model.file", str(tmp_path / "ids")]
    with teacher_process(*arguments, "--id_model.text", str(tmp_path / "text")) as (_, address):
        async with WireClient(address) as client:
            encoded = (await client.describe()).id_model
            assert encoded == (tmp_path / "ids").read_bytes()
            payload = (await client.score(sequence(*range(30)), spec=TargetSpec()))[0].targets
        targets = codec.decode(payload, id_model=IdModel.from_bytes(encoded))
        assert targets.num_rows == 30
    assert (
        id_model_from(IdModelSettings(file=str(tmp_path / "ids")), Characters(), FakeBackend(vocab_size=96)) == encoded
    )


def test_an_id_model_of_another_vocabulary_is_refused_before_anything_is_served(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ids"
    path.write_bytes(IdModel.from_expected_counts(np.ones(128)).to_bytes())
    with pytest.raises(SystemExit, match=r"teacher-server: id_model.file .*ids: it is of 128 ids, the teacher has 96"):
        check(teacher_config(model=str(tiny_teacher), device="cpu", id_model=str(path)))


def test_files_that_an_id_model_cannot_be_made_of_are_named_with_their_settings(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd").write_bytes(b"\xff\xfe")
    backend = FakeBackend(vocab_size=70_000)
    with pytest.raises(ValueError, match=r"^id_model.file .*odd: not an id model"):
        id_model_from(IdModelSettings(file=str(tmp_path / "odd")), Characters(), backend)
    for name in ("odd", "nowhere"):
        with pytest.raises(ValueError, match=f"^id_model.text .*{name}: "):
            id_model_from(IdModelSettings(text=str(tmp_path / name)), Characters(), backend)
    with pytest.raises(ValueError, match=r"^tokenizer: there is no folder /nowhere/at all"):
        tokenizer_of(teacher_config(model="m", tokenizer="/nowhere/at all"))


class Characters:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


async def test_check_tells_what_describe_tells_and_both_what_was_set(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids").write_bytes(IdModel.from_expected_counts(np.ones(96)).to_bytes())
    settings: dict[str, Any] = {"max_message_bytes": 1 << 17, "max_in_flight_tokens": 777, "max_sequence_tokens": 33}
    settings |= {"id_model": str(tmp_path / "ids")}
    sections = nested(TeacherConfig, settings)
    words = [f"--{name}.{leaf}={value}" for name, part in sections.items() for leaf, value in part.items()]
    with teacher_process("--model.path", str(tiny_teacher), *words) as (_, address):
        async with WireClient(address) as client:
            told = convert.info_from_message(await client.describe())
    assert told.id_model == (tmp_path / "ids").read_bytes()
    assert {name: getattr(told, name) for name in settings} == settings | {"id_model": told.id_model}
    await asyncio.to_thread(check, teacher_config(model=str(tiny_teacher), device="cpu", **settings))
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    expected = asdict(told) | {"id_model": f"{len(told.id_model)} bytes"}
    assert lines == {name: str(value) for name, value in expected.items()}


def test_check_validates_without_serving(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(teacher_config(model=str(tiny_teacher), device="cpu"))
    output = capsys.readouterr().out
    assert "vocab_size: 96" in output
    assert "serving on" not in output


def test_check_fails_on_a_model_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match=r"teacher-server: model: there is no folder /nowhere/at all"):
        check(teacher_config(model="/nowhere/at all"))


def test_a_device_that_is_none_and_weights_that_are_cut_off_end_in_a_line(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"^teacher-server: model .* cannot be loaded on device 'cuda:77': .*"
    ) as device:
        check(teacher_config(model=str(tiny_teacher), device="cuda:77"))
    cut_off = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    content = (cut_off / "model.safetensors").read_bytes()
    (cut_off / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r"^teacher-server: model .*") as weights:
        check(teacher_config(model=str(cut_off), device="cpu"))
    assert all("\n" not in str(stopped.value) for stopped in (device, weights))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"token_file": "{tmp}/nowhere"}, "token_file: .*nowhere"),
        ({"token_file": "{tmp}/empty"}, "token_file: no token in .*empty"),
        ({"tls_cert": "{tmp}/empty", "tls_key": "{tmp}/empty"}, "tls.cert .*empty, tls.key .*empty, tls.ca none: "),
        ({"tls_cert": "{cert}", "tls_key": "{key}", "tls_ca": "{tmp}/empty"}, "tls.ca .*empty: "),
        ({"tls_cert": "{cert}", "tls_key": "{tmp}/nowhere"}, "tls.key .*nowhere, tls.ca none: .*No such file"),
    ],
)
def test_check_says_what_would_keep_the_server_from_working(
    settings: dict[str, object], text: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    files = Authority(tmp_path).issue("server")
    places = {"tmp": tmp_path, "cert": files.cert, "key": files.key}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(SystemExit, match=f"teacher-server: .*{text}"):
        check(teacher_config(model="/nowhere/at all", **given))


def test_what_keeps_the_server_from_starting_is_said_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        for arguments, text in (
            ({"address": f"127.0.0.1:{taken}"}, f"cannot serve on 127.0.0.1:{taken}"),
            ({"address": "127.0.0.1:0", "health_address": f"127.0.0.1:{taken}"}, f"cannot serve on 127.0.0.1:{taken}"),
            ({"address": "127.0.0.1:0", "metrics_port": taken}, "Address already in use"),
        ):
            with pytest.raises(SystemExit, match=f"^teacher-server: .*{text}"):
                serve(teacher_config(model="m", **arguments), lambda: Served(FakeBackend()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--model.path", "m", "--model.dtype", "float31"],
            "expected one of auto, float32",
        ),
        (["--model.path", "m", "--modle", "x"], "did you mean 'model.path'"),
        ([], "model.path is needed"),
        (["--model.path", "m", "--server.address", "0.0.0.0:0"], "--tls.insecure"),
        (["--model.path", "m", "--tls.cert", "x"], "tls.key"),
        (["--model.path", "m", "--limits.max_batch_tokens", "-1"], "max_batch_tokens must be at least 0, got -1"),
        (["--model.path", "m", "--backend", "magic"], "magic"),
        (["--model.path", "m", "--server.address", "notanaddress"], "server: expected HOST:PORT"),
        (["--model.path", "m", "--server.address", "127.0.0.1:99999"], "a port up to 65535, got '127.0.0.1:99999'"),
        (["--model.path", "m", "--server.health_address", "::1"], "server: expected HOST:PORT"),
        (["--model.path", "m", "--metrics.port", "99999"], "99999"),
        (["--model.path", "m", "--backend", "vllm", "--watch.folder", "x"], "cannot replace its weights"),
    ],
)
def test_settings_that_cannot_work_end_with_a_clear_message(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_a_server_told_to_stop_while_it_loads_stops(tiny_teacher: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--model.path", str(tiny_teacher), "--server.address", "127.0.0.1:0"], env=ENVIRONMENT
    )
    time.sleep(1.0)
    process.terminate()
    assert process.wait(timeout=20) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # while Python itself starts


async def test_a_batch_that_never_ends_does_not_hold_the_server_beyond_its_drain(tmp_path: Path) -> None:
    address_file = tmp_path / "address"
    command = [sys.executable, "-m", "tests.fake_backend_server", "--address-file", str(address_file)]
    process = subprocess.Popen([*command, "--delay-seconds", "600", "--drain-seconds", "0.5"], env=ENVIRONMENT)
    try:
        async with asyncio.timeout(30):
            while not address_file.exists():
                await asyncio.sleep(0.05)
        async with WireClient(address_file.read_text().strip()) as client:
            running = client.call(sequence(1))
            await asyncio.sleep(0.5)
            assert not running.done()
            process.terminate()
            assert await asyncio.to_thread(process.wait, 30) == EXIT_STUCK
    finally:
        process.kill()
        process.wait()


SLOW_LOADS = """
import sys, time
from dataclasses import asdict
from pathlib import Path
from teacher_server.server import Served, serve
from tests.authority import Authority
from tests.flat_settings import teacher_config
from tests.fakes import FakeBackend

def load(folder):
    print("loading", flush=True)
    time.sleep(600)

serve(
    teacher_config(model="fake", address="127.0.0.1:0", drain_seconds=0.5, watch_folder=sys.argv[1]),
    lambda: Served(FakeBackend()),
    load_checkpoint=load,
)
"""


def test_a_checkpoint_that_is_being_loaded_does_not_hold_the_server_beyond_its_drain(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-1").symlink_to(tiny_teacher)
    command = [sys.executable, "-c", SLOW_LOADS, str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while process.stdout.readline() != "loading\n":
            assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
