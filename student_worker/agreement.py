"""All processes of one student, and a run that is resumed, train from the same teacher."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from logitstream.types import Fingerprint, TargetSpec
from student_worker.teacher_client import GrpcTeacherClient

FILE = "teacher.json"


def expected_teacher(folder: Path, spec: TargetSpec, *, resumes: bool) -> Fingerprint | None:
    """The teacher that a resumed run began with, drawing as this one asks it to; None where any will do."""
    path = folder / FILE
    if not resumes or not path.exists():
        return None
    return replace(Fingerprint(**json.loads(path.read_text(encoding="utf-8"))), spec=spec.canonical())


def agree_on_teacher(client: GrpcTeacherClient, spec: TargetSpec, folder: Path) -> None:
    """The main process's teacher is everybody's, and noted in the folder; waits for a replica to come up.

    Call it on every process before the first sequence is asked for. A process that had met replicas of another teacher
    first leaves those alone; it raises FingerprintMismatch later, when only such are left.
    """
    distributed = dist.is_available() and dist.is_initialized()
    is_main = not distributed or dist.get_rank() == 0
    found: list[Fingerprint | None] = [Fingerprint.of(client.info, spec) if is_main else None]
    if distributed:
        dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    client.insist_on(found[0])
    if is_main:
        (folder / FILE).write_text(json.dumps(asdict(found[0]), indent=1), encoding="utf-8")
