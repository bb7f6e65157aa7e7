"""A run that ends before its time leaves a whole checkpoint, and a resumed one ends as if nothing had happened."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from logitstream.errors import InvalidSequence, LogitstreamError, TeacherUnavailable
from logitstream.training.checkpoints import CheckpointFailed, Stopped, choose_checkpoint
from logitstream.training.report import report
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import SparseTargets, TokenSequence
from tests.integration.test_trainer import NUM_SEQUENCES, Asked, losses_of, trainer_of

STEPS_AN_EPOCH = 6


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def teacher() -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.client.close()


class AtStep(TrainerCallback):
    """Does something at the end of an optimizer step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


class FailingTeacher(Asked):
    """Cannot be reached from its n-th sequence on."""

    failing_from = 10

    def score(self, sequence: TokenSequence, draw_set: int) -> SparseTargets:
        if len(self.requests) >= self.failing_from:
            raise TeacherUnavailable("no replica answered within 300 s")
        return super().score(sequence, draw_set)


class SilentTeacher(Asked):
    """Tells that it is asked for its n-th sequence, and answers once it is let."""

    def __init__(self, silent_from: int) -> None:
        super().__init__()
        self.silent_from = silent_from
        self.asked, self.let = threading.Event(), threading.Event()

    def score(self, sequence: TokenSequence, draw_set: int) -> SparseTargets:
        if len(self.requests) >= self.silent_from:
            self.asked.set()
            self.let.wait(60)
        return super().score(sequence, draw_set)


def parameters(trainer: DistillationTrainer) -> list[torch.Tensor]:
    assert isinstance(trainer.model, torch.nn.Module)
    return [parameter.detach() for parameter in trainer.model.parameters()]


def undisturbed(folder: Path) -> DistillationTrainer:
    whole = trainer_of(folder, Asked(), num_train_epochs=2)
    whole.train()
    return whole


class InOrder(DistillationTrainer):
    """Takes the sequences in order: there is no sampler's generator, and random numbers come from torch's own."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def resumed(folder: Path, teacher: Asked, kind: type[DistillationTrainer] = DistillationTrainer) -> DistillationTrainer:
    """Run the same again, from its newest checkpoint to its end."""
    trainer = trainer_of(folder, teacher, num_train_epochs=2, kind=kind)
    trainer.train(resume_from_checkpoint=str(choose_checkpoint(folder / "out", "latest")))
    return trainer


def assert_same_end(trainer: DistillationTrainer, whole: DistillationTrainer) -> None:
    """Bit for bit, with dropout: the random numbers go on too. What is counted is the whole run's."""
    ours, theirs = (report(one.stats) for one in (trainer, whole))
    assert [epoch["tokens"] for epoch in ours["epochs"]] == [epoch["tokens"] for epoch in theirs["epochs"]]
    assert ours["tokens_trained"] == theirs["tokens_trained"]
    logged = [[row["tokens"] for row in one.state.log_history if "tokens" in row] for one in (trainer, whole)]
    assert logged[0] == logged[1]
    assert losses_of(trainer) == losses_of(whole)
    for one, other in zip(parameters(trainer), parameters(whole), strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> DistillationTrainer:
    return undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [1, 4, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 1])
def test_a_signal_leaves_a_checkpoint_that_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, teacher: Asked, whole: DistillationTrainer, step: int
) -> None:
    trainer = trainer_of(tmp_path, teacher, num_train_epochs=2)
    trainer.add_callback(AtStep(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match="SIGTERM"), trainer.stop.listening():
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert_same_end(resumed(tmp_path, teacher), whole)


@pytest.mark.parametrize(("silent_from", "step"), [(15, 3), (NUM_SEQUENCES, STEPS_AN_EPOCH)])
def test_a_signal_ends_the_wait_for_a_teacher_that_does_not_answer(tmp_path: Path, silent_from: int, step: int) -> None:
    """Also at the border of two epochs, where the dataloader has taken a random number that it will take again."""
    whole = trainer_of(tmp_path / "whole", Asked(), num_train_epochs=2, kind=InOrder)
    whole.train()
    teacher = SilentTeacher(silent_from)
    trainer = trainer_of(tmp_path, teacher, num_train_epochs=2, kind=InOrder)

    def interrupt() -> None:
        teacher.asked.wait(60)
        while trainer.state.global_step < step:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(60)
        teacher.let.set()

    ended = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped, match="SIGINT"), trainer.stop.listening():
        trainer.train()
    ended.set()
    thread.join()
    teacher.client.close()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert_same_end(resumed(tmp_path, Asked(), kind=InOrder), whole)


def test_a_teacher_that_is_gone_leaves_a_checkpoint(tmp_path: Path, teacher: Asked, whole: DistillationTrainer) -> None:
    trainer = trainer_of(tmp_path, FailingTeacher(), num_train_epochs=2)
    with pytest.raises(TeacherUnavailable):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert_same_end(resumed(tmp_path, teacher), whole)


def test_a_run_killed_after_its_last_checkpoint_trains_no_further(tmp_path: Path, teacher: Asked) -> None:
    """It ends within its first epoch, and its learning rate is not 0 there."""
    whole = trainer_of(tmp_path, teacher, max_steps=4, save_steps=4, lr_scheduler_type="constant")
    whole.train()
    teacher.requests.clear()
    resumed = trainer_of(tmp_path, teacher, max_steps=4, save_steps=4, lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert teacher.requests == []
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert report(resumed.stats)["tokens_trained"] == report(whole.stats)["tokens_trained"]
    assert len(resumed.stats.epochs) == 1


def test_nothing_is_saved_if_no_step_was_done(tmp_path: Path, teacher: Asked) -> None:
    trainer = trainer_of(tmp_path, teacher, num_train_epochs=2)
    trainer.stop.number = signal.SIGTERM
    with pytest.raises(Stopped):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


class RefusingTeacher(Asked):
    """Refuses all that it is asked."""

    def score(self, sequence: TokenSequence, draw_set: int) -> SparseTargets:
        raise InvalidSequence("longer than the 4 tokens that this teacher takes")


def test_nothing_is_saved_if_every_sequence_was_refused(tmp_path: Path, teacher: Asked) -> None:
    """A run that goes on from such a checkpoint would pass over sequences that were never trained on."""
    for options in ({}, {"save_steps": 1}):
        with pytest.raises(LogitstreamError, match="sequences are refused or damaged; the last: longer than the 4 tok"):
            trainer_of(tmp_path, RefusingTeacher(), num_train_epochs=2, **options).train()
        assert not list((tmp_path / "out").glob("checkpoint-*"))
    trainer_of(tmp_path, teacher, max_steps=1, save_steps=1).train()
    resumed = trainer_of(tmp_path, RefusingTeacher(), num_train_epochs=2, save_steps=1)
    with pytest.raises(LogitstreamError, match="sequences are refused or damaged"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_trainer_that_goes_on_from_a_checkpoint_twice_counts_its_tokens_once(tmp_path: Path, teacher: Asked) -> None:
    trainer = trainer_of(tmp_path, teacher, max_steps=2, save_steps=1)
    trainer.train()
    expected = [row["tokens"] for row in trainer.state.log_history if "tokens" in row]
    for _ in range(2):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
        assert [row["tokens"] for row in trainer.state.log_history if "tokens" in row] == expected


def test_a_signal_during_the_evaluation_afterwards_keeps_what_was_trained(tmp_path: Path, teacher: Asked) -> None:
    trainer = trainer_of(tmp_path, teacher, num_train_epochs=1)
    trainer.train()
    trainer.stop.number = signal.SIGTERM
    with pytest.raises(Stopped):
        trainer.evaluate()
    trainer.keep_progress()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{STEPS_AN_EPOCH}"]


def test_a_full_disk_leaves_no_half_checkpoint_and_the_last_whole_one(tmp_path: Path, teacher: Asked) -> None:
    trainer = trainer_of(tmp_path, teacher, num_train_epochs=1, save_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer.add_callback(AtStep(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))))
    try:
        with pytest.raises(CheckpointFailed, match=r"checkpoint-4 cannot be written to .*out: "):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_newest_checkpoints_are_kept(tmp_path: Path, teacher: Asked) -> None:
    trainer = trainer_of(tmp_path, teacher, max_steps=5, save_steps=1)
    trainer.args.save_total_limit = 2
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path, teacher: Asked) -> None:
    trainer_of(tmp_path, teacher, max_steps=2, save_steps=1).train()
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    trainer = trainer_of(tmp_path, teacher, max_steps=2, save_steps=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert choose_checkpoint(tmp_path / "out", "latest") == tmp_path / "out" / "checkpoint-2"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]
