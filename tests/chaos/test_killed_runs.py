"""A run that is killed again and again resumes by itself and ends with the parameters of an undisturbed one.

Workers, torchrun and teachers are killed, most of them while checkpoints and state files are written.
LOGITSTREAM_CHAOS_KILLS (66) and LOGITSTREAM_CHAOS_SEED change how often and where.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from student_worker.config import StudentConfig
from tests.authority import Authority
from tests.chaos.killed_runs import KillPoint, run_student, run_student_of_two, run_teacher
from tests.flat_settings import nested
from tests.forking import SPAWN
from tests.tiny_models import VOCAB_SIZE, save_tiny_teacher

NUM_KILLS = int(os.environ.get("LOGITSTREAM_CHAOS_KILLS", "66"))
SEED = int(os.environ.get("LOGITSTREAM_CHAOS_SEED", "1"))
SEQUENCE_TOKENS = 16
STEPS = 24
SAVE_STEPS = 4
MAX_EVENTS = 50
"""Kills fall on one of the first so many changes to a run's folder: its start, and one or two checkpoints."""
END_SECONDS = 180.0
SHARES = {"online": 0.25, "cached": 0.2, "cache alone": 0.15, "tls": 0.15, "two processes": 0.25}


@dataclass
class Place:
    """A teacher with and one without TLS, a text, and a student's config."""

    folder: Path
    teachers: dict[str, Teacher] = field(default_factory=dict)

    def settings(self, output: Path, **changes: Any) -> list[str]:
        values = {
            "model_config": str(self.folder / "student" / "config.json"),
            "tokenizer": str(self.folder / "teacher"),
            "text": [str(self.folder / "corpus.txt")],
            "teacher": [self.teachers["plain"].address],
            "sequence_tokens": SEQUENCE_TOKENS,
            "heldout_sequences": 4,
            "overhead_every": 0,
            "output_dir": str(output),
            "resume_from_checkpoint": "latest",
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",  # so that a step too many would show
            "logging_steps": 1,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        } | changes
        output.parent.mkdir(parents=True, exist_ok=True)
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(nested(StudentConfig, values)))
        return ["--config", str(path)]


class Teacher:
    """A real teacher server on a port of its own, which can be killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = f"localhost:{listener.getsockname()[1]}"
        self.words = [
            "--model.path",
            str(folder / "teacher"),
            "--server.address",
            self.address.replace("localhost", "127.0.0.1"),
        ]
        self.words += options
        self.log = folder / f"teacher-{self.address.split(':')[1]}.log"
        self.process = self.start()

    def start(self) -> BaseProcess:
        process = SPAWN.Process(target=run_teacher, args=(self.words, self.log), daemon=True)
        process.start()
        return process

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def restart(self) -> None:
        self.kill()
        self.process = self.start()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_teacher(folder / "teacher")
    words = random.Random(0).choices([f"w{number}" for number in range(3, VOCAB_SIZE)], k=SEQUENCE_TOKENS * 40)
    (folder / "corpus.txt").write_text(" ".join(words))
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "student").mkdir()
    student = config | {"num_hidden_layers": 1, "attention_dropout": 0.1}  # random numbers have to go on too
    (folder / "student" / "config.json").write_text(json.dumps(student))
    (folder / "token").write_text("secret\n")
    tls = Authority(folder).issue("server")
    made = Place(folder)
    secure = [
        "--tls.cert",
        str(tls.cert),
        "--tls.key",
        str(tls.key),
        "--server.token_file",
        str(folder / "token"),
    ]
    made.teachers = {"plain": Teacher(folder), "tls": Teacher(folder, *secure)}
    yield made
    for teacher in made.teachers.values():
        teacher.kill()


@dataclass
class Kind:
    """A way to train: how its processes start, and its settings."""

    place: Place
    name: str

    def words(self, output: Path) -> list[str]:
        changes: dict[str, Any] = {}
        if self.name == "cached":
            changes = {"targets": "cache_then_online", "cache": str(output.parent / "cache"), "draws": "reuse"}
        elif self.name == "cache alone":
            changes = {"targets": "cache", "cache": str(self.place.folder / "cache"), "text": []}
        elif self.name == "tls":
            changes = {
                "teacher": [self.place.teachers["tls"].address],
                "tls_ca": str(self.place.folder / "ca.pem"),
                "token_file": str(self.place.folder / "token"),
            }
        elif self.name == "two processes":
            changes = {"per_device_train_batch_size": 1}
        return self.place.settings(output, **changes)

    def start(self, output: Path, point: KillPoint | None = None) -> BaseProcess:
        target = run_student_of_two if self.name == "two processes" else run_student
        process = SPAWN.Process(target=target, args=(self.words(output), output.with_suffix(".log"), point))
        process.start()
        return process

    def finish(self, output: Path, point: KillPoint | None = None) -> int:
        """The exit status of one start; all its processes are gone then."""
        process = self.start(output, point)
        process.join(END_SECONDS)
        if process.is_alive():
            show_where_it_stands(process)
            process.kill()
            process.join()
            pytest.fail(f"{self.name} did not end:\n{log_of(output)}")
        wait_until_unlocked(output)
        assert process.exitcode is not None
        return process.exitcode


def show_where_it_stands(process: BaseProcess) -> None:
    """Have its processes write their threads' stacks to the log."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.send_signal(signal.SIGUSR1)
    time.sleep(1)


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text(errors="replace")[-8000:]


def wait_until_unlocked(output: Path) -> None:
    """Workers end with their torchrun; a killed one may take a moment."""
    deadline = time.monotonic() + 10
    while (output / ".lock").exists():
        with (output / ".lock").open("a") as file, contextlib.suppress(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        assert time.monotonic() < deadline, f"the workers of {output} train on"
        time.sleep(0.02)


def parameters(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def random_point(dice: random.Random, output: Path, name: str) -> KillPoint:
    rank = dice.choice([0, 0, 1, None]) if name == "two processes" else 0
    # The second process writes little itself: its random numbers, a few files' names.
    number = dice.randint(1, MAX_EVENTS) if rank != 1 else dice.randint(1, 6)
    return KillPoint(
        folder=output, number=number, seconds_after=dice.choice([0.0, dice.uniform(0.0001, 0.004)]), rank=rank
    )


def assert_same_run(output: Path, whole: Path) -> None:
    assert parameters(output) == parameters(whole), log_of(output)
    steps = [json.loads(line)["step"] for line in (output / "progress.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    report, expected = (json.loads((folder / "report.json").read_text()) for folder in (output, whole))
    assert report["heldout_loss_after"] == expected["heldout_loss_after"]
    assert report["tokens_trained"] == expected["tokens_trained"] == STEPS * 2 * SEQUENCE_TOKENS


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(SHARES))
def test_a_killed_run_resumes_by_itself_and_ends_as_if_it_had_not_been(place: Place, tmp_path: Path, name: str) -> None:
    kind, dice = Kind(place, name), random.Random(f"{SEED} {name}")
    if name == "cache alone":
        fill_cache(place, tmp_path)
    whole = tmp_path / "whole" / "run"
    assert kind.finish(whole) == 0, log_of(whole)
    kills = runs = 0
    while kills < NUM_KILLS * SHARES[name]:
        output = tmp_path / str(runs) / "run"
        while (status := kind.finish(output, random_point(dice, output, name))) != 0:
            kills += 1
            # a killed rank ends its torchrun with 1
            assert status in (-signal.SIGKILL, -signal.SIGALRM) or name == "two processes", log_of(output)
        runs += 1
        assert_same_run(output, whole)
        shutil.rmtree(output.parent)
    print(f"{name}: {kills} kills in {runs} runs")


def fill_cache(place: Place, tmp_path: Path) -> None:
    filling = tmp_path / "filling"
    words = place.settings(filling, cache=str(place.folder / "cache"), save_strategy="no", heldout_sequences=0)
    process = SPAWN.Process(target=run_student, args=(words, filling.with_suffix(".log"), None))
    process.start()
    process.join(END_SECONDS)
    assert process.exitcode == 0, log_of(filling)


@pytest.mark.chaos
@pytest.mark.slow
def test_a_teacher_that_is_killed_again_and_again_changes_nothing(place: Place, tmp_path: Path) -> None:
    kind, teacher, dice = Kind(place, "online"), place.teachers["plain"], random.Random(SEED)
    whole, output = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    assert kind.finish(whole) == 0, log_of(whole)
    ended = threading.Event()

    def kill_and_start() -> None:
        for _ in range(6):
            if not ended.wait(dice.uniform(0.1, 0.4)):
                teacher.restart()

    thread = threading.Thread(target=kill_and_start)
    thread.start()
    status = kind.finish(output)
    ended.set()
    thread.join()
    assert status == 0, log_of(output)
    assert_same_run(output, whole)
