"""A checkpoint is taken as whole where nothing of it is missing or cut off; anything else is passed over and named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from logitstream.training.checkpoints import STAGING, ResumeUndecided, choose_checkpoint
from logitstream.training.trainer import DistillationTrainer
from student_worker.run import FolderInUse, locked
from tests.distributed_training import make_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    make_model(folder / "model", tied=True)
    auto: Any = AutoModelForCausalLM
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    DistillationTrainer(
        auto.from_pretrained(folder / "model"), arguments, train_dataset=[{"input_ids": torch.arange(8)}] * 16
    ).train()
    return folder / "out"


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def test_a_run_leaves_whole_checkpoints_alone(out: Path) -> None:
    assert choose_checkpoint(out, "latest") == out / "checkpoint-2"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_of_the_model_alone_is_taken_only_if_that_was_asked_for(out: Path) -> None:
    (out / "checkpoint-2" / "optimizer.pt").unlink()
    assert choose_checkpoint(out, "latest", with_optimizer=False) == out / "checkpoint-2"
    for word in ("latest", str(out / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"checkpoint-2 holds the model alone"):
            choose_checkpoint(out, word)


@pytest.mark.parametrize("word", ["latest", "true", "True", "LATEST", True])
def test_latest_and_true_mean_the_same(out: Path, tmp_path: Path, word: str | bool) -> None:
    assert choose_checkpoint(out, word) == out / "checkpoint-2"
    assert choose_checkpoint(tmp_path / "new", word) is None


@pytest.mark.parametrize("word", [None, "", "false", False, "no"])
def test_without_a_word_checkpoints_are_neither_taken_nor_lost(out: Path, tmp_path: Path, word: Any) -> None:
    with pytest.raises(ResumeUndecided, match="holds checkpoint-2 of an earlier run"):
        choose_checkpoint(out, word)
    assert choose_checkpoint(tmp_path / "new", word) is None


def test_a_named_checkpoint_is_taken(out: Path) -> None:
    assert choose_checkpoint(out, str(out / "checkpoint-1")) == out / "checkpoint-1"
    with pytest.raises(ValueError, match=r"expected `latest`, `true` or the folder of a checkpoint, got 'lastest'"):
        choose_checkpoint(out, "lastest")


HOLDER = """
import sys
from pathlib import Path
from student_worker.run import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_has_ended_even_by_a_kill(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(FolderInUse, match=f"in use by process {holder.pid} on "), locked(tmp_path / "out"):
            pass
        holder.kill()
    with locked(tmp_path / "out"):
        pass


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path: Path) -> None:
    (tmp_path / STAGING / "checkpoint-5").mkdir(parents=True)
    (tmp_path / ".keep").touch()
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".keep", ".lock"]
