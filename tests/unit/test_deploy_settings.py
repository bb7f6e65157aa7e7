"""The settings files that compose and Kubernetes give to the commands are the commands' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from logitstream.settings import parse_settings
from student_worker.config import StudentConfig
from teacher_server.config import TeacherConfig
from teacher_server.scheduler import CLOSE_SECONDS
from teacher_server.server import STOP_SECONDS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROOT = Path(__file__).parents[2]
FOLDERS = ("docker", "deploy/kubernetes/base/settings")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_commands_take_the_settings(folder: str) -> None:
    (teacher,) = parse_settings(
        [TeacherConfig], command="teacher", description="", argv=["--config", str(ROOT / folder / "teacher.yaml")]
    )
    student, _ = parse_settings(
        [StudentConfig, TrainingArguments],
        command="student",
        description="",
        argv=["--config", str(ROOT / folder / "student.yaml")],
    )
    assert teacher.tls_cert
    assert student.tls_ca
    assert teacher.address.rpartition(":")[2] == student.teacher[0].rpartition(":")[2]


def test_compose_gives_a_teacher_the_time_it_may_take_to_end() -> None:
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["teacher"]
    drain_seconds = yaml.safe_load((ROOT / "docker/teacher.yaml").read_text())["drain_seconds"]
    assert float(service["stop_grace_period"].removesuffix("s")) >= drain_seconds + 2 * (STOP_SECONDS + CLOSE_SECONDS)
