"""The settings files that compose and Kubernetes give to the commands are the commands' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from logitstream.settings import parse
from student_worker.config import parse_student
from teacher_server.config import ServerSettings, TeacherConfig
from teacher_server.scheduler import CLOSE_SECONDS
from teacher_server.server import STOP_SECONDS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROOT = Path(__file__).parents[2]
FOLDERS = ("docker", "deploy/kubernetes/base/settings")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_commands_take_the_settings(folder: str) -> None:
    teacher = parse(TeacherConfig, ["--config", str(ROOT / folder / "teacher.yaml")], command="", description="")
    student, _ = parse_student(["--config", str(ROOT / folder / "student.yaml")])
    assert teacher.tls.cert
    assert student.tls.ca
    assert teacher.server.address.rpartition(":")[2] == student.teacher.addresses[0].rpartition(":")[2]


def test_compose_gives_a_teacher_the_time_it_may_take_to_end() -> None:
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["teacher"]
    drain_seconds = yaml.safe_load((ROOT / "docker/teacher.yaml").read_text())["server"]["drain_seconds"]
    assert float(service["stop_grace_period"].removesuffix("s")) >= drain_seconds + 2 * (STOP_SECONDS + CLOSE_SECONDS)


def test_the_image_probes_where_a_teacher_answers_by_default_and_in_compose() -> None:
    lines = (ROOT / "docker/teacher.Dockerfile").read_text().replace("\\\n", "").splitlines()
    (probe,) = [line for line in lines if line.startswith("HEALTHCHECK")]
    configured = yaml.safe_load((ROOT / "docker/teacher.yaml").read_text())["server"]["health_address"]
    for address in (ServerSettings().address, configured):
        assert f'"{address}"' in probe


def test_a_gpu_takes_more_memory_than_the_cpu_example() -> None:
    files = [yaml.safe_load((ROOT / "docker" / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml")]
    for name in ("teacher", "student-0", "student-1"):
        cpu, gpu = (file["services"][name]["deploy"]["resources"]["limits"]["memory"] for file in files)
        assert gpu.startswith("${GPU_MEMORY:-")
        assert int(gpu.removeprefix("${GPU_MEMORY:-").removesuffix("G}")) > 4 * int(cpu.removesuffix("G"))


def test_half_of_what_the_shipped_students_keep_in_flight_scales_the_teachers_out() -> None:
    folder = ROOT / "deploy/kubernetes"
    student, arguments = parse_student(["--config", str(folder / "base/settings/student.yaml")])
    documents = yaml.safe_load_all((folder / "base/students.yaml").read_text())
    (job,) = [document for document in documents if document["kind"] == "Job"]
    batch_tokens = arguments.per_device_train_batch_size * student.data.sequence_tokens
    in_flight = job["spec"]["parallelism"] * student.targets.prefetch_batches * batch_tokens
    scaler = yaml.safe_load((folder / "overlays/multi-teacher/autoscaler.yaml").read_text())["spec"]
    threshold = int(scaler["metrics"][0]["pods"]["target"]["averageValue"])
    assert in_flight / 2 / threshold > scaler["minReplicas"] * 1.1  # the autoscaler ignores a tenth
    assert threshold >= batch_tokens  # one batch of one student is no queue
