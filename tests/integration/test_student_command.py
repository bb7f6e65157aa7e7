"""How `student-worker` speaks and ends: in one line, with a status, with nothing lost; under torchrun too."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from logitstream.training.checkpoints import choose_checkpoint
from student_worker.config import StudentConfig
from tests.chaos.killed_runs import run_student, run_student_of_two
from tests.flat_settings import nested
from tests.forking import SPAWN
from tests.serving import ENVIRONMENT, teacher_process
from tests.student_home import student_home
from tests.tiny_models import save_tiny_teacher

MANY_STEPS = 100_000
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with student_home(tmp_path_factory.mktemp("home"), num_words=16 * 30) as folder:
        yield folder


def config_of(home: Path, output: Path, **changes: Any) -> Path:
    values = {
        "model_config": str(home / "student" / "config.json"),
        "tokenizer": str(home / "teacher"),
        "text": [str(home / "corpus.txt")],
        "teacher": [(home / "address").read_text()],
        "sequence_tokens": 16,
        "heldout_sequences": 4,
        "overhead_every": 0,
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
    } | changes
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(nested(StudentConfig, values)))
    return path


def run(config: Path, *words: str) -> tuple[int, str]:
    """Status and what was written, of a process forked from one that has imported everything."""
    log = config.with_suffix(".log")
    log.unlink(missing_ok=True)
    process = SPAWN.Process(target=run_student, args=(["--config", str(config), *words], log, None))
    process.start()
    process.join(120)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode, log.read_text()


def test_the_same_command_again_is_refused_and_loses_nothing(home: Path, tmp_path: Path) -> None:
    config = config_of(home, tmp_path / "run", save_total_limit=1)
    status, said = run(config)
    assert status == 0, said
    assert "training an untrained LlamaForCausalLM" in said
    assert said.splitlines()[-1].startswith("held-out loss ")
    assert f"student and report.json are in {tmp_path / 'run'}" in said.splitlines()[-1]
    (kept,) = (tmp_path / "run").glob("checkpoint-*")
    before = {path: path.read_bytes() for path in kept.iterdir()}
    status, said = run(config)
    assert status == 1
    (line,) = said.splitlines()
    assert f"{tmp_path / 'run'} holds checkpoint-4 of an earlier run" in line
    assert "delete it to start over; to go on from" in line
    assert line.endswith("add --training.resume_from_checkpoint latest")
    assert {path: path.read_bytes() for path in kept.iterdir()} == before
    status, said = run(config, "--training.resume_from_checkpoint", "true", "--training.max_steps", "6")
    assert status == 0, said
    assert "going on from checkpoint-4" in said
    steps = [json.loads(row) for row in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    assert [(row["step"], row["tokens"]) for row in steps] == [(step, step * 32) for step in range(1, 7)]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["tokens_trained"] == 6 * 32


def test_state_files_that_an_old_kill_emptied_do_not_stop_a_start(home: Path, tmp_path: Path) -> None:
    config = config_of(home, tmp_path / "run", resume_from_checkpoint="latest")
    assert run(config, "--training.max_steps", "2")[0] == 0
    for name in ("config.yaml", "report.json", "progress.jsonl"):
        (tmp_path / "run" / name).write_bytes(b"")
    status, said = run(config)
    assert status == 0, said
    (tmp_path / "run" / "teacher.json").write_bytes(b"")
    status, said = run(config, "--training.max_steps", "6")
    assert status == 1
    assert "teacher.json cannot be read" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "/nowhere/tokenizer"}, "model.tokenizer: there is no folder /nowhere/tokenizer"),
        ({"model_config": "/nowhere/config.json"}, "model.config: there is no folder /nowhere/config.json"),
        ({"tokenizer": str(Path(__file__).parent)}, f"tokenizer {Path(__file__).parent}: "),
        ({"text": ["/nowhere/text.txt"]}, "cannot read /nowhere/text.txt"),
        ({"heldout_sequences": 1000}, "heldout_sequences = 1000 leaves nothing"),
        ({"resume_from_checkpoint": "lates"}, "expected `latest`, `true` or the folder of a checkpoint, got 'lates'"),
        ({"teacher": ["127.0.0.1:1"], "connect_timeout_seconds": 1.0}, "127.0.0.1:1"),
        ({"output_dir": "/dev/null/run"}, "Not a directory: '/dev/null/run'"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(
    home: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    status, said = run(config_of(home, tmp_path / "run", **changes))
    assert status == 1, said
    line = said.splitlines()[-1]
    assert line.startswith("student-worker: ")
    assert words in line
    assert "Traceback" not in said


def test_a_run_of_which_all_was_refused_fails_and_leaves_the_folder_to_the_corrected_one(
    home: Path, tmp_path: Path
) -> None:
    """Too few sequences for the stream to end it before: the teacher takes 64 tokens."""
    student = json.loads((home / "student" / "config.json").read_text()) | {"max_position_embeddings": 128}
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text(json.dumps(student))
    changes = {"model_config": str(tmp_path / "student" / "config.json"), "save_steps": 1, "max_steps": 2}
    status, said = run(config_of(home, tmp_path / "run", **changes, sequence_tokens=80, heldout_sequences=1))
    assert status == 1, said
    assert said.splitlines()[-1].startswith("student-worker: no token was trained on: each sequence was refused")
    assert not (tmp_path / "run" / "report.json").exists()
    status, said = run(config_of(home, tmp_path / "run", **changes))
    assert status == 0, said


def test_a_model_that_is_cut_off_is_said_in_one_line(home: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_teacher(model)
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    status, said = run(config_of(home, tmp_path / "run", model=str(model), model_config=""))
    assert status == 1
    assert said.splitlines()[-1].startswith("student-worker: ")
    assert "Traceback" not in said


def test_a_run_from_the_cache_alone_speaks_of_no_teacher(home: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    status, said = run(config_of(home, tmp_path / "filling", cache=cache, save_strategy="no", heldout_sequences=0))
    assert status == 0, said
    status, said = run(config_of(home, tmp_path / "alone", cache=cache, text=[], targets="cache"))
    assert status == 0, said
    assert "teacher" not in said.replace(str(home / "teacher"), "").replace(str(tmp_path), "")


def wait_for_steps(output: Path, process: subprocess.Popen[str], number: int = 3) -> None:
    deadline = time.monotonic() + 150
    while (
        not (output / "progress.jsonl").exists() or len((output / "progress.jsonl").read_bytes().splitlines()) < number
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_whose_teacher_is_gone_leave_one_checkpoint_and_one_line(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with teacher_process("--model.path", str(home / "teacher")) as (teacher, address):
        changes: dict[str, Any] = {"teacher": [address], "deadline_seconds": 2.0, "max_steps": MANY_STEPS}
        config = config_of(home, output, **changes, resume_from_checkpoint="latest", save_steps=MANY_STEPS)
        log = config.with_suffix(".log")
        torchrun = SPAWN.Process(target=run_student_of_two, args=(["--config", str(config)], log, None))
        torchrun.start()
        while not (output / "progress.jsonl").exists() or not (output / "progress.jsonl").read_bytes():
            assert torchrun.is_alive(), log.read_text()
            time.sleep(0.05)
        teacher.kill()
        torchrun.join(60)
    said = log.read_text()
    assert torchrun.exitcode == 1, said
    (checkpoint,) = output.glob("checkpoint-*")
    assert choose_checkpoint(output, "latest") == checkpoint
    ours = [line for line in said.splitlines() if line.startswith("student-worker")]
    assert len(set(ours)) == 1, said
    assert f"; to go on from {checkpoint}, add --training.resume_from_checkpoint latest" in ours[0]
    steps = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    words = [
        "--config",
        str(config),
        "--training.max_steps",
        str(steps + 2),
        "--teacher.addresses",
        (home / "address").read_text(),
    ]
    torchrun = SPAWN.Process(target=run_student_of_two, args=(words, log, None))
    torchrun.start()
    torchrun.join(60)
    assert torchrun.exitcode == 0, log.read_text()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children() if "student_worker" in " ".join(one.cmdline())]


def start_two(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, *TWO, "-m", "student_worker", "--config", str(config)]
    environment = ENVIRONMENT | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
def test_a_torchrun_that_is_told_to_end_leaves_a_checkpoint_and_a_killed_one_no_worker(
    home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    config = config_of(home, output, max_steps=MANY_STEPS, save_steps=MANY_STEPS, resume_from_checkpoint="latest")
    with start_two(config) as torchrun:
        wait_for_steps(output, torchrun)
        second = run(config)  # while it runs
        torchrun.send_signal(signal.SIGTERM)
        said, _ = torchrun.communicate(timeout=60)
    assert second[0] == 1
    assert f"{output} is in use by process" in second[1].splitlines()[-1]
    ours = [line for line in said.splitlines() if line.startswith("student-worker")]
    assert len(ours) == 1, said
    (checkpoint,) = output.glob("checkpoint-*")
    assert f"stopped by SIGTERM; to go on from {checkpoint}, add" in ours[0]
    with start_two(config) as torchrun:
        wait_for_steps(output, torchrun, int(checkpoint.name.removeprefix("checkpoint-")) + 2)
        workers = workers_of(torchrun)
        assert len(workers) == 2
        torchrun.kill()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        torchrun.communicate()


@pytest.mark.slow
def test_processes_of_one_run_say_an_error_once(home: Path, tmp_path: Path) -> None:
    config = config_of(home, tmp_path / "run", text=["/nowhere/text.txt"])
    with start_two(config) as torchrun:
        said, _ = torchrun.communicate(timeout=150)
    assert torchrun.returncode == 1
    ours = [line for line in said.splitlines() if line.startswith("student-worker")]
    assert ours == ["student-worker: " + ours[0].removeprefix("student-worker: ")]
    assert "cannot read /nowhere/text.txt" in ours[0]
    before_torchruns_own, _, _ = said.partition("torch/distributed/elastic")
    assert "Traceback" not in before_torchruns_own
