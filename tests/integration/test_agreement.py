"""Processes of one student that meet different replicas first end up with the main process's teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from logitstream.errors import FingerprintMismatch
from logitstream.types import TargetSpec
from student_worker.agreement import agree_on_teacher, expected_teacher
from student_worker.teacher_client import GrpcTeacherClient
from tests.fake_teacher import SPEC, VOCAB_SIZE, fake_teacher, weights_digest

PROCESS = """
import sys
from pathlib import Path
import torch.distributed as dist
from student_worker.agreement import agree_on_teacher
from student_worker.teacher_client import GrpcTeacherClient
from tests.fake_teacher import SPEC, VOCAB_SIZE

dist.init_process_group("gloo")
rank = dist.get_rank()
first, later = sys.argv[2 + rank], sys.argv[3 - rank]
behind = [first]

async def look_up(name):
    return list(behind)

client = GrpcTeacherClient(["teachers:1"], SPEC, vocab_size=VOCAB_SIZE, resolve=look_up, resolve_seconds=0.05)
before = client.info.weights_digest
behind.append(later)
agree_on_teacher(client, SPEC, Path(sys.argv[1]))
print(f"rank {rank} {before} {client.info.weights_digest}\\n", end="", flush=True)
client.close()
dist.destroy_process_group()
"""


def test_all_processes_train_from_the_main_ones_teacher(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with fake_teacher() as (_, a), fake_teacher("--weights", "b") as (_, b):
        ended = subprocess.run(
            [*launch, str(script), str(tmp_path), a, b],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    digest_a, digest_b = weights_digest("a", 0), weights_digest("b", 0)
    lines = sorted(line for line in ended.stdout.splitlines() if line.startswith("rank"))
    assert lines == [f"rank 0 {digest_a} {digest_a}", f"rank 1 {digest_b} {digest_a}"]


def test_a_resumed_run_refuses_another_teacher_but_may_draw_otherwise(tmp_path: Path) -> None:
    with fake_teacher() as (_, a), fake_teacher("--weights", "b") as (_, b):
        client = GrpcTeacherClient([a], SPEC, vocab_size=VOCAB_SIZE)
        agree_on_teacher(client, SPEC, tmp_path)
        client.close()
        spec = TargetSpec(num_samples=9, codec_version=1)
        assert expected_teacher(tmp_path, spec, resumes=False) is None
        expected = expected_teacher(tmp_path, spec, resumes=True)
        client = GrpcTeacherClient([a], spec, vocab_size=VOCAB_SIZE, fingerprint=expected)
        assert client.info.weights_digest == weights_digest("a", 0)
        client.close()
        client = GrpcTeacherClient([b], spec, vocab_size=VOCAB_SIZE, fingerprint=expected)
        with pytest.raises(FingerprintMismatch, match=weights_digest("b", 0)):
            agree_on_teacher(client, spec, tmp_path)
        client.close()
