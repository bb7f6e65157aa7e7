"""A student trains from a teacher that keeps learning in another process: versions change, and none is mixed up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from logitstream.client.teacher_client import GrpcTeacherClient
from logitstream.loss import sparse_kl
from logitstream.tokenizer import UNCHECKED_TOKENIZER
from logitstream.training.target_stream import TargetStream
from logitstream.types import Fingerprint, ReceivedTargets, TargetSpec, TeacherInfo, TokenSequence
from teacher_server.weights import weights_digest
from tests.flat_settings import teacher_client
from tests.learning_teacher import pattern
from tests.serving import ENVIRONMENT, teacher_process
from tests.tiny_models import save_tiny_teacher, tiny_model

SPEC = TargetSpec(num_samples=20)
NUM_CHECKPOINTS = 4
MAX_LAG = 1


class Watched:
    """The client, with a note of every answer and of the newest version known when it came."""

    def __init__(self, client: GrpcTeacherClient) -> None:
        self.client = client
        self.answers: list[tuple[ReceivedTargets, int]] = []

    @property
    def info(self) -> TeacherInfo:
        return self.client.info

    def submit(
        self, sequences: Sequence[TokenSequence], *, draw_set: int = 0, priority: int = 0
    ) -> list[Future[ReceivedTargets]]:
        futures = self.client.submit(sequences, draw_set=draw_set, priority=priority)
        for future in futures:
            future.add_done_callback(self._note)
        return futures

    @property
    def spec(self) -> TargetSpec:
        return self.client.spec

    @property
    def max_teacher_lag(self) -> int:
        return self.client.max_teacher_lag

    def close(self) -> None:
        self.client.close()

    def _note(self, future: Future[ReceivedTargets]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.answers.append((future.result(), self.info.teacher_version))


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": pattern(4, 24, seed=number)} for number in range(count)]


def heldout_loss(model: torch.nn.Module) -> float:
    ids = pattern(64, 24, seed=-1)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_a_student_follows_a_teacher_that_keeps_learning(tmp_path: Path) -> None:
    first, folder = save_tiny_teacher(tmp_path / "first"), tmp_path / "checkpoints"
    folder.mkdir()
    student = tiny_model("llama", seed=9, sharpness=1.0)
    before = heldout_loss(student)
    learner_command = [sys.executable, "-m", "tests.learning_teacher", str(first), str(folder), str(NUM_CHECKPOINTS)]
    arguments = ["--model.path", str(first), "--watch.folder", str(folder), "--watch.seconds", "0.1"]
    with teacher_process(*arguments) as (_, address):
        learner = subprocess.Popen(learner_command, env=ENVIRONMENT)
        try:
            client = Watched(
                teacher_client([address], SPEC, vocab_size=96, tokenizer=UNCHECKED_TOKENIZER, max_teacher_lag=MAX_LAG)
            )
            train(student, client, until_version=2)
            client.close()
        finally:
            learner.kill()
            learner.wait()
    assert heldout_loss(student) < before - 0.5
    check_versions(client, [first, *(folder / f"checkpoint-{n}" for n in range(1, NUM_CHECKPOINTS + 1))])


def train(student: torch.nn.Module, client: Watched, *, until_version: int) -> None:
    """Train until the teacher has become that version, and for twenty steps more."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    steps_left = 20
    for batch in TargetStream(batches(3000), client, prefetch_batches=4):
        logits = student(input_ids=batch["input_ids"]).logits
        sparse_kl(logits, batch["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps_left -= client.info.teacher_version >= until_version
        if steps_left <= 0:
            return
    raise AssertionError(f"the teacher is still at version {client.info.teacher_version} after 3000 steps")


def check_versions(client: Watched, checkpoints: list[Path]) -> None:
    """Each answer names weights that were served, and its fingerprint is that of these weights and no others."""
    digests = [weights_digest(path) for path in checkpoints if (path / "config.json").exists()]
    by_version: dict[int, set[bytes]] = {}
    for received, newest in client.answers:
        by_version.setdefault(received.teacher_version, set()).add(received.weights_digest)
        assert newest - received.teacher_version <= MAX_LAG
        (digest,) = [digest for digest in digests if bytes.fromhex(digest)[:8] == received.weights_digest]
        fingerprint = Fingerprint.of(client.info, SPEC)
        assert received.fingerprint == replace(fingerprint, weights_digest=digest).digest
    assert len(by_version) >= 3, by_version
    assert all(len(found) == 1 for found in by_version.values())
    assert len(set().union(*by_version.values())) == len(by_version)
    assert sorted(by_version)[0] == 0
    assert np.all(np.diff(sorted(by_version)) >= 1)
