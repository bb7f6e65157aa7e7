"""`student-worker` as users run it, against a teacher server of its own: online, from the cache, with a budget."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from student_worker.config import StudentConfig
from tests.chaos.killed_runs import run_student, run_student_of_two
from tests.distributed_training import relative_distance
from tests.flat_settings import nested
from tests.forking import SPAWN
from tests.hanging_disk import hanging_file
from tests.student_home import student_home
from tests.tiny_models import VOCAB_SIZE

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SEQUENCES = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with student_home(tmp_path_factory.mktemp("home"), num_words=32 * (SEQUENCES + 4)) as folder:
        yield folder


def settings(home: Path, output: Path, **changes: Any) -> Path:
    values = {
        "model_config": str(home / "student" / "config.json"),
        "tokenizer": str(home / "teacher"),
        "sequence_tokens": 32,
        "heldout_sequences": 4,
        "overhead_every": 1,
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "draws": "reuse",
    } | changes
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(nested(StudentConfig, values)))
    return path


def taught(home: Path) -> dict[str, Any]:
    """Settings of a run that asks the teacher for the text's targets."""
    return {"text": [str(home / "corpus.txt")], "teacher": [(home / "address").read_text()]}


def run(config: Path, *, workers: int = 1) -> tuple[int, str]:
    """Status and what was written, of a process forked from one that has imported everything."""
    log = config.with_suffix(".log")
    target = run_student if workers == 1 else run_student_of_two
    process = SPAWN.Process(target=target, args=(["--config", str(config)], log, None))
    process.start()
    process.join(240)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode, log.read_text()


def test_two_processes_with_default_settings_train_the_student_of_one(home: Path, tmp_path: Path) -> None:
    """Held-out text is evaluated first, three epochs of seven steps end with an incomplete batch each."""
    words = random.Random(1).choices([f"w{index}" for index in range(3, VOCAB_SIZE)], k=32 * (32 + 6 * 16 + 5) + 31)
    (tmp_path / "corpus.txt").write_text(" ".join(words))
    outputs, running = [tmp_path / "alone", tmp_path / "together"], []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for output, how, more in (
        (outputs[0], [], ["--training.per_device_train_batch_size", "16"]),
        (outputs[1], launcher, []),
    ):
        command = [sys.executable, *how, "-m", "tests.student_with_digests", *more]
        command += ["--teacher.addresses", (home / "address").read_text(), "--data.text", str(tmp_path / "corpus.txt")]
        command += ["--model.config", str(home / "student" / "config.json"), "--model.tokenizer", str(home / "teacher")]
        command += ["--data.sequence_tokens", "32", "--training.output_dir", str(output)]
        running.append(subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT))
    printed = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    digests = re.findall(r"^rank (\d) (\w{64})$", printed[1], re.MULTILINE)
    assert sorted(rank for rank, _ in digests) == ["0", "1"]
    assert digests[0][1] == digests[1][1], "equal bit for bit"
    reports = [report_of(output) for output in outputs]
    assert reports[1]["tokens_trained"] == reports[0]["tokens_trained"] == 3 * (6 * 16 + 5) * 32
    for name in ("heldout_loss_before", "heldout_loss_after"):
        assert reports[1][name] == pytest.approx(reports[0][name], abs=1e-5)
    torch.manual_seed(42)  # TrainingArguments' seed
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / "student"))
    alone, together = (AutoModelForCausalLM.from_pretrained(output).state_dict() for output in outputs)
    assert relative_distance(together, alone, since=untrained.state_dict()) < 1e-5


def report_of(output: Path) -> dict[str, Any]:
    report = json.loads((output / "report.json").read_text())
    assert isinstance(report, dict)
    return report


def test_one_online_run_feeds_others_from_its_cache(home: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    online = {"cache": cache, "bytes_per_token": 12.0, "targets": "cache_then_online"}
    status, said = run(settings(home, tmp_path / "online", **taught(home), **online))
    assert status == 0, said
    report = report_of(tmp_path / "online")
    first, second = report["epochs"]
    assert first["received_bytes"] > 0
    assert second["received_bytes"] == 0
    assert second["cache_hits"] == SEQUENCES
    assert report["tokens_trained"] == 2 * SEQUENCES * 32
    losses = [json.loads(line)["loss"] for line in (tmp_path / "online" / "progress.jsonl").read_text().splitlines()]
    assert len(losses) == SEQUENCES
    assert sum(losses[-4:]) < sum(losses[:4]), "on words drawn at random the distillation loss falls, the text's cannot"
    assert 6.0 < report["bytes_per_token"] < 15.0, (
        "a budget of 12 bytes of targets a token, and the messages around them"
    )
    assert {"overhead_vs_cross_entropy", "overhead_vs_cross_entropy_without_waiting"} <= report.keys()
    resolved = yaml.safe_load((tmp_path / "online" / "config.yaml").read_text())
    targets = resolved["targets"]
    assert (targets["bytes_per_token"], targets["num_samples"] != 50) == (0.0, True)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "online")
    assert torch.isfinite(student(torch.tensor([[3, 4, 5]])).logits).all()

    two = settings(
        home,
        tmp_path / "two",
        text=[str(home / "corpus.txt")],
        cache=cache,
        targets="cache",
        per_device_train_batch_size=1,
        use_cpu=False,  # workers find each other where there is no accelerator, told so or not
        bytes_per_token=12.0,  # the cache's number of samples is taken: nobody is there to be asked
        draws="fresh",  # the cache holds one draw set for two epochs
    )
    status, said = run(two, workers=2)
    assert status == 0, said
    assert [epoch["cache_hits"] for epoch in report_of(tmp_path / "two")["epochs"]] == [SEQUENCES, SEQUENCES]
    assert (
        yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["targets"]["num_samples"]
        == targets["num_samples"]
    )

    alone = settings(
        home,
        tmp_path / "alone",
        cache=cache,
        targets="cache",
        heldout_sequences=0,
        draws="fresh",
        per_device_train_batch_size=1,
        use_cpu=False,
    )
    status, said = run(alone, workers=2)
    assert status == 0, said
    assert report_of(tmp_path / "alone")["tokens_trained"] == 2 * SEQUENCES * 32


def test_a_student_with_another_tokenizer_is_refused_at_once_and_told_which_tokens_differ(
    home: Path, tmp_path: Path
) -> None:
    words = {f"w{index}": index for index in range(VOCAB_SIZE)} | {"w7": 9, "w9": 7}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / "other")
    status, said = run(settings(home, tmp_path / "run", **taught(home), tokenizer=str(tmp_path / "other")))
    assert status != 0
    told = said.splitlines()[-1]
    assert f"2 of {VOCAB_SIZE} ids stand for other tokens (7 is 'w9' here and 'w7' there, 9 is 'w7' here" in told
    assert f"tokenize with the teacher's tokenizer, that of {home / 'teacher'}" in told


def test_a_student_that_added_a_token_of_its_own_is_taught(home: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "teacher")
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "more")
    config = json.loads((home / "student/config.json").read_text()) | {"vocab_size": VOCAB_SIZE + 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    changes = {"model_config": str(tmp_path / "config.json"), "tokenizer": str(tmp_path / "more")}
    status, said = run(settings(home, tmp_path / "run", **taught(home), num_train_epochs=1, **changes))
    assert status == 0, said
    assert report_of(tmp_path / "run")["tokens_trained"] == SEQUENCES * 32


def test_a_killed_worker_goes_on_from_its_latest_checkpoint(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    changes = {"resume_from_checkpoint": "latest", "save_strategy": "steps", "save_steps": 5, "heldout_sequences": 0}
    config = settings(home, output, **taught(home), **changes)
    words = ["--config", str(config)]
    process = SPAWN.Process(target=run_student, args=(words, config.with_suffix(".log"), None))
    process.start()
    while not (output / "checkpoint-5" / "trainer_state.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    status, said = run(config)
    assert status == 0, said
    steps = [json.loads(line)["step"] for line in (output / "progress.jsonl").read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1))
    assert report_of(output)["resumed_at_step"] >= 5, "the resumed run trains on what was left"
    assert report_of(output)["tokens_trained"] == steps[-1] * 2 * 32


def test_student_worker_trains_to_its_end_although_its_cache_does_not_answer(home: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").touch()
    cache = str(tmp_path / "cache")
    changes = {"targets": "cache_then_online", "num_train_epochs": 1, "overhead_every": 0, "cache": cache}
    with hanging_file(tmp_path / "cache" / "manifest.json"):
        status, said = run(settings(home, tmp_path / "output", **taught(home), **changes))
    assert status == 0, said
    assert f"reading the cache {cache}, has not answered for 5 s: the run goes on without it" in said
    assert report_of(tmp_path / "output")["heldout_loss_after"] is not None
