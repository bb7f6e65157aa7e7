"""A small student trained for a few steps: `python distributed_training.py SETTINGS.json`, alone or under torchrun.

SETTINGS: strategy (`ddp`, also for one process, or `fsdp2`), model (folder), output (file), overhead_every,
train_steps, gradient_accumulation_steps, evaluate_first. The main process writes losses, each step's gradients and the
evaluation's loss.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from logitstream.types import SparseTargets
from student_worker.trainer import DistillationTrainer

VOCAB_SIZE = 64
NUM_SEQUENCES, NUM_TOKENS = 24, 12
SEQUENCES_PER_MICRO_BATCH = 4


def make_model(folder: Path, *, tied: bool, dropout: float = 0.0) -> None:
    """An untrained student with a few ids more than its teacher."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE + 6,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_dataset() -> Dataset:
    """Sequences whose supervised share differs, so that a mean of means is not the mean."""
    rng = np.random.default_rng(0)
    shape = (NUM_SEQUENCES, NUM_TOKENS)
    mask = rng.random(shape) < rng.random((NUM_SEQUENCES, 1))
    return Dataset.from_dict({"input_ids": rng.integers(0, VOCAB_SIZE, shape).tolist(), "loss_mask": mask.tolist()})


def targets_of(token_ids: list[int]) -> SparseTargets:
    """Targets that follow from the sequence, with empty rows and sums other than 1."""
    rng = np.random.default_rng(token_ids)
    sizes = rng.integers(0, 6, len(token_ids))
    rows = [np.sort(rng.choice(VOCAB_SIZE, size, replace=False)) for size in sizes]
    return SparseTargets(
        vocab_size=VOCAB_SIZE,
        units=10,
        row_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        token_ids=np.concatenate(rows).astype(np.int32),
        counts=rng.integers(1, 4, sizes.sum()).astype(np.int32),
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "loss_mask": torch.tensor([row["loss_mask"] for row in rows]),
        "targets": SparseTargets.concatenate([targets_of(row["input_ids"]) for row in rows]),
    }


class InOrder(DistillationTrainer):
    """Takes the sequences in their order, so that one process and two train on the same ones at each step."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


class Gradients(TrainerCallback):
    """Each step's gradients by parameter, gathered where they are sharded."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {}
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            gradients[name.removeprefix("module.")] = gradient.detach().clone()
        self.steps.append(gradients)


def train(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    auto: Any = AutoModelForCausalLM
    if settings["strategy"] == "fsdp2":
        dist.init_process_group("gloo")
        sharded = DistributedConfig(fsdp_size=world, tp_size=1)
        model = auto.from_pretrained(settings["model"], distributed_config=sharded)
        assert type(model.lm_head.weight).__name__ == "DTensor"
    else:
        model = auto.from_pretrained(settings["model"])
    gradients = Gradients()
    output = Path(settings["output"])
    trainer = InOrder(
        model,
        TrainingArguments(
            str(output.with_suffix(".folder")),
            per_device_train_batch_size=SEQUENCES_PER_MICRO_BATCH // world,
            gradient_accumulation_steps=settings["gradient_accumulation_steps"],
            max_steps=settings["train_steps"],
            logging_steps=1,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=make_dataset(),
        data_collator=collate,
        ce_weight=0.25,
        overhead_every=settings["overhead_every"],
        callbacks=[gradients],
    )
    assert trainer.is_fused
    evaluated = trainer.evaluate(make_dataset())["eval_loss"] if settings.get("evaluate_first") else None
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trainer.save_model()
    if trainer.args.process_index == 0:
        measured = trainer.figures.meter.num_measured
        result = {"losses": losses, "gradients": gradients.steps, "measured": measured, "evaluated": evaluated}
        torch.save(result, output)


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()))
    dist.barrier()
    # Freed with the GIL held, a gloo process group joins a thread that may wait for the GIL (torch 2.13): do not.
    os._exit(0)
