"""Every file under examples/ works with the commands and the library as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from logitstream.settings import build, parse
from student_worker.config import StudentConfig, training_arguments
from teacher_server.config import TeacherConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.stem}" for path in FILES])
def test_the_commands_take_the_settings(path: Path) -> None:
    words = ["--config", str(path)]
    if path.stem == "teacher":
        assert parse(TeacherConfig, words, command="", description="").model.path
        return
    config = parse(StudentConfig, words, command="", description="")
    training = dict(config.training) | {"use_cpu": True}
    assert training.pop("bf16", "true") == "true"  # transformers refuses it without a GPU
    assert build(training_arguments(), training, "training.").output_dir.startswith("runs/")


def test_every_example_is_described() -> None:
    described = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        assert f"`{path.name}`" in described or path.name == "README.md"


def test_the_own_loop_trains() -> None:
    losses = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]()
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
