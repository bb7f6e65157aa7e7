"""The program that a GPU will run: every line of it on a CPU, and without the packages that a GPU machine may lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
OPTIONAL = (
    "datasets",
    "grpc_health",
    "grpc_reflection",
    "pytest_asyncio",
    "liger_kernel",
    "rich",
    "pygments",
    "psutil",
)


@pytest.mark.slow
def test_every_part_runs_with_tiny_shapes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=290, stdout=subprocess.DEVNULL)
    lines = json.loads((tmp_path / "gpu.json").read_text())["lines"]
    missing = {name for name, line in lines.items() if "skipped" in line}
    assert missing <= {"student_liger"}
    assert {"ceilings", "draw_us_1000_8", "teacher_8b_through_grpc", "student_our_distillation", "loss_memory"} <= set(
        lines
    )
    assert lines["draws_are_right_1000"]["counts_sum_to_n"]
    assert lines["loss_is_right"]["hidden_error_3"] < 0.01
    assert "| loss_is_right |" in (tmp_path / "gpu.md").read_text()


def test_it_needs_no_package_that_a_gpu_machine_may_lack() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"
    program = f"{blocked}; import benchmarks.gpu, benchmarks.gpu_student, benchmarks.gpu_teacher"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
