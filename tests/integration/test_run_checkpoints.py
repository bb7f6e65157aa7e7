"""A checkpoint is taken as whole where nothing of it is missing or cut off; anything else is passed over and named."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from logitstream.training.checkpoints import SEAL, STAGING, ResumeUndecided, choose_checkpoint, fault_of, seal
from logitstream.training.trainer import DistillationTrainer
from student_worker.run import FolderInUse, locked
from tests.distributed_training import make_model

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
    "training_args.bin",
)
NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


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


def test_whole_checkpoints_have_no_fault(out: Path) -> None:
    assert [fault_of(out / f"checkpoint-{step}") for step in (1, 2)] == ["", ""]
    assert choose_checkpoint(out, "latest") == out / "checkpoint-2"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, None])
def test_a_file_that_is_cut_off_anywhere_makes_the_one_before_the_newest(
    out: Path, caplog: pytest.LogCaptureFixture, name: str, share: float | None
) -> None:
    """share None: all but the last byte."""
    path = out / "checkpoint-2" / name
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: -1 if share is None else int(share * len(content))])
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(out, "latest") == out / "checkpoint-1"
    assert name in caplog.messages[0]
    assert "checkpoint-2 is passed over" in caplog.messages[0]


@pytest.mark.parametrize("name", NEEDED)
def test_a_part_that_is_missing_makes_the_one_before_the_newest(out: Path, name: str) -> None:
    (out / "checkpoint-2" / name).unlink()
    assert choose_checkpoint(out, "latest") == out / "checkpoint-1"


def test_bytes_that_a_crash_left_as_zeros_are_noticed(out: Path) -> None:
    path = out / "checkpoint-2" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    assert "optimizer.pt is damaged" in fault_of(out / "checkpoint-2")


def test_a_folder_without_a_seal_is_no_checkpoint(out: Path) -> None:
    (out / "checkpoint-2" / SEAL).unlink()
    assert fault_of(out / "checkpoint-2").startswith(f"{SEAL} cannot be read: FileNotFoundError")
    assert choose_checkpoint(out, "latest") == out / "checkpoint-1"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin"])
def test_no_damage_stops_the_search_for_a_whole_checkpoint(out: Path, name: str) -> None:
    """Flipped bytes of a header may name methods of compression, passwords and types that no parser here knows."""
    path = out / "checkpoint-2" / name
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        for part in (damaged[:256], damaged[-1024:]):
            part[rng.integers(0, len(part), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        assert choose_checkpoint(out, "latest") in (out / "checkpoint-1", out / "checkpoint-2")
    assert fault_of(out / "checkpoint-2").startswith(name)


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, '{"a": null}', '{"a": [1]}', '{"a": 1}', ""])
def test_a_seal_of_other_types_is_a_fault(out: Path, content: str) -> None:
    (out / "checkpoint-2" / SEAL).write_text(content)
    assert "cannot be read" in fault_of(out / "checkpoint-2", with_optimizer=False)
    assert fault_of(out / "checkpoint-2")


def test_checkpoints_of_the_model_alone_need_no_optimizer_if_that_was_asked_for(out: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", SEAL):
        (out / "checkpoint-2" / name).unlink()
    seal(out / "checkpoint-2")
    assert choose_checkpoint(out, "latest", with_optimizer=False) == out / "checkpoint-2"
    assert choose_checkpoint(out, "latest") == out / "checkpoint-1"


def test_where_none_is_whole_the_run_starts_anew_and_says_so(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    for checkpoint in out.iterdir():
        (checkpoint / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(out, "latest") is None
    assert "no checkpoint in" in caplog.messages[-1]
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize("word", ["latest", "true", "True", "LATEST", True])
def test_latest_and_true_mean_the_same(out: Path, tmp_path: Path, word: str | bool) -> None:
    assert choose_checkpoint(out, word) == out / "checkpoint-2"
    assert choose_checkpoint(tmp_path / "new", word) is None


@pytest.mark.parametrize("word", [None, "", "false", False, "no"])
def test_without_a_word_checkpoints_are_neither_taken_nor_lost(out: Path, tmp_path: Path, word: Any) -> None:
    with pytest.raises(ResumeUndecided, match="holds checkpoint-2 of an earlier run"):
        choose_checkpoint(out, word)
    assert choose_checkpoint(tmp_path / "new", word) is None


@pytest.mark.parametrize(("word", "near"), [("lastest", "latest"), ("ture", "true"), ("Last", "latest")])
def test_a_word_that_is_nearly_right_is_named(out: Path, word: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"got {word!r}; did you mean {near!r}"):
        choose_checkpoint(out, word)


def test_a_named_checkpoint_is_taken_if_it_is_whole(out: Path) -> None:
    assert choose_checkpoint(out, str(out / "checkpoint-1")) == out / "checkpoint-1"
    (out / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-1 is not whole: optimizer\.pt has 0 bytes, expected "):
        choose_checkpoint(out, str(out / "checkpoint-1"))


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
