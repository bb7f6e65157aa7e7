"""Two processes (gloo) train as one does on the same tokens: DDP and FSDP2, tied and untied, accumulating or not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed_training import make_model, train

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240


def run(folder: Path, name: str, *, processes: int, **settings: Any) -> dict[str, Any]:
    """What tests/distributed_training.py writes."""
    output, config = folder / f"{name}.pt", folder / f"{name}.json"
    config.write_text(json.dumps({"output": str(output), "model": str(folder / "model")} | settings))
    if processes == 1:
        train(json.loads(config.read_text()))
        return load(output)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(REPOSITORY / "tests" / "distributed_training.py"), str(config)]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            assert process.wait(TIMEOUT_SECONDS) == 0, log.read_text()[-4000:]
        finally:
            with contextlib.suppress(ProcessLookupError):  # the launcher's children too, where it did not end them
                os.killpg(process.pid, signal.SIGKILL)
    return load(output)


def load(output: Path) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(output)
    return result


@pytest.mark.parametrize(("tied", "accumulation"), [(True, 2), (False, 1)])
def test_two_processes_train_as_one(tmp_path: Path, tied: bool, accumulation: int) -> None:
    """The measured overhead's cross-entropy steps leave no trace either, where they are measured."""
    make_model(tmp_path / "model", tied=tied)
    common = {"gradient_accumulation_steps": accumulation, "train_steps": 3}
    alone = run(tmp_path, "alone", processes=1, strategy="ddp", overhead_every=0, evaluate_first=True, **common)
    ddp = run(tmp_path, "ddp", processes=2, strategy="ddp", overhead_every=1, **common)
    fsdp2 = run(tmp_path, "fsdp2", processes=2, strategy="fsdp2", overhead_every=1, evaluate_first=True, **common)
    assert ddp["measured"] == 1
    assert fsdp2["measured"] == (0 if accumulation > 1 else 1)
    for together in (ddp, fsdp2):
        assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert fsdp2["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-5)  # of 24 sequences in batches of 8 each
    for together in (ddp, fsdp2):
        for step, expected in zip(together["gradients"], alone["gradients"], strict=True):
            for name, gradient in expected.items():
                torch.testing.assert_close(step[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "fsdp2.folder").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "alone.folder").state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
