"""Two processes (gloo) train as one does on the same tokens, whatever came before; where they cannot, the run ends."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed_training import (
    Scenario,
    make_experts,
    make_model,
    relative_distance,
    train_all,
    train_together,
)
from tests.forking import SPAWN

TIMEOUT_SECONDS = 280
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
ACCUMULATING = {"gradient_accumulation_steps": 2}
SHRINKING = {"auto_find_batch_size": True}
SHARDS = {"accelerator_config": {"dispatch_batches": False}}
UNEVEN = {"accelerator_config": {"even_batches": False}}
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
BEST = {
    "eval_on_start": True,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_strategy": "steps",
    "save_steps": 5,
    "load_best_model_at_end": True,
}

TOGETHER = [
    Scenario(name="evaluated", tied=True, overhead_every=3, seeds_differ=True, arguments=SGD),
    Scenario(name="predicted", before="predict", num_sequences=22, ragged=True, arguments=SGD | ACCUMULATING),
    Scenario(name="untouched", before="", num_sequences=23, arguments={"dataloader_drop_last": True}),
    Scenario(name="resumed", resume_at=7, stream=True, num_sequences=22, tied=True),
    Scenario(name="model_init", student="model_init", stream=True, frozen_first=True),
    Scenario(name="lora", student="lora", num_sequences=22, overhead_every=3),
    Scenario(name="unfrozen", frozen_first=True, num_sequences=22),
    Scenario(name="best", arguments=BEST),
    Scenario(name="compiled", arguments=COMPILED),
    Scenario(name="by_length", ragged=True, num_sequences=30, resume_at=5, seeds_differ=True, arguments=BY_LENGTH),
    Scenario(name="nothing_on_one", unsupervised=(2, 3), arguments=SEQUENTIAL),
    Scenario(name="experts", student="experts", same_micro_batches=True, num_sequences=22),
    Scenario(name="own_means", share=1.0, arguments={"average_tokens_across_devices": False}),
    Scenario(name="fsdp2", strategy="fsdp2", tied=True, num_sequences=22, arguments=SGD),
    Scenario(
        name="fsdp2_accumulating",
        strategy="fsdp2",
        before="predict",
        stream=True,
        arguments=SGD | ACCUMULATING,
    ),
    Scenario(name="fsdp2_experts", strategy="fsdp2", student="experts", same_micro_batches=True, arguments=SGD),
    Scenario(name="fsdp2_lora", strategy="fsdp2", student="lora"),
    Scenario(
        name="fsdp2_model_init",
        strategy="fsdp2",
        student="model_init",
        num_sequences=61,
    ),
]
APART = [
    (
        Scenario(name="torn_at_first", torn_at=1),
        "RanksDiffer: the processes' students differ after step 1: ",
    ),
    (Scenario(name="torn_later", torn_at=9), "RanksDiffer: the processes' students differ at the end of training: "),
    (Scenario(name="uneven", before="", num_sequences=21, arguments=UNEVEN), "ValueError: even_batches must be true"),
    (Scenario(name="shrinking", before="", arguments=SHRINKING), "ValueError: auto_find_batch_size would try another"),
    (
        Scenario(name="uneven_shards", streaming=True, num_sequences=21, arguments=SHARDS),
        "RanksDiffer: expected as many batches on every rank, got [1, 0]",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios as one process trains them, one after another, and as two do."""
    folder = tmp_path_factory.mktemp("students")
    for name, tied in (("tied", True), ("untied", False)):
        make_model(folder / name, tied=tied)
    make_experts(folder / "experts")
    scenarios = [*TOGETHER, *(scenario for scenario, _ in APART)]
    (folder / "scenarios.json").write_text(json.dumps([asdict(scenario) for scenario in scenarios]))
    logs = {name: folder / f"{name}.log" for name in ("alone", "together")}
    alone = SPAWN.Process(target=train_all, args=(folder, logs["alone"]))
    together = SPAWN.Process(target=train_together, args=(folder, logs["together"]))
    try:
        for process in (alone, together):
            process.start()
        for process in (alone, together):
            process.join(TIMEOUT_SECONDS)
        said = "".join(log.read_text(errors="replace")[-4000:] for log in logs.values())
        assert (alone.exitcode, together.exitcode) == (0, 0), said
    finally:
        for process in (alone, together):
            process.kill()
            process.join()
    return folder


def result(folder: Path, scenario: Scenario, *, processes: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{scenario.name}.{processes}.pt")
    return loaded


@pytest.mark.parametrize("scenario", TOGETHER, ids=lambda scenario: scenario.name)
def test_two_processes_train_as_one(folder: Path, scenario: Scenario) -> None:
    """After 20 steps (4 of compiled ones); the measured overhead's cross-entropy steps leave no trace either.

    AdamW divides by gradients' sizes and so makes much of rounding: their later gradients are compared under SGD alone.
    """
    alone, together = (result(folder, scenario, processes=number) for number in (1, 2))
    assert "error" not in alone, alone["error"]
    assert "error" not in together, together["error"]
    assert alone["steps"] == together["steps"] == scenario.arguments.get("max_steps", 20)
    assert len(together["ranks"]) == 2
    assert len(set(together["ranks"])) == 1, "the ranks' parameters are equal bit for bit"
    assert relative_distance(together["parameters"], alone["parameters"], since=alone["initial"]) < 1e-5
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert together["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-5)
    compared = 3 if "optim" in scenario.arguments else 1
    for step, expected in zip(together["gradients"][:compared], alone["gradients"][:compared], strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert bool(together["measured"]) == bool(scenario.overhead_every)


def test_what_fsdp2_saves_is_the_student_of_one_process(folder: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(folder / "fsdp2.2").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder / "fsdp2.1").state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("scenario", "message"), APART, ids=lambda value: getattr(value, "name", ""))
def test_processes_that_would_train_apart_end_with_an_error(folder: Path, scenario: Scenario, message: str) -> None:
    assert message in result(folder, scenario, processes=2)["error"]
