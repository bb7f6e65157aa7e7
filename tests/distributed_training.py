"""Small students trained one after another by one process, and by two that torchrun's agent starts.

FOLDER/scenarios.json names the students' settings (`Scenario`); FOLDER/NAME.PROCESSES.pt is what became of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, TrainerCallback, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from logitstream.client.local_client import LocalTeacherClient
from logitstream.processes import end_with_parent
from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from tests.chaos.killed_runs import launch_two, log_to

VOCAB_SIZE = 64
NUM_TOKENS = 12
SEQUENCES_PER_MICRO_BATCH = 4
SPEC = TargetSpec(num_samples=10, codec_version=1)
INFO = TeacherInfo(
    model="function",
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=VOCAB_SIZE,
    dtype="float32",
    max_sequence_tokens=64,
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One student's run, by any number of processes; `arguments` are further TrainingArguments.

    before: what happens before `train()`: nothing, `evaluate` or `predict`.
    streaming: from a dataset in two shards, one for each of two processes.
    share: of each sequence's tokens that is supervised; None: another one for each sequence. unsupervised: sequences
        without a supervised token, by their place in a global batch.
    student: `model`, `model_init`, `lora` or `experts`; strategy: `ddp`, also for one process, or `fsdp2`.
    same_micro_batches: one process takes in turn what two take at once, for a router's loss is of one micro-batch.
    resume_at: the run is cut off after this step and resumed by another trainer.
    out_of_memory_at: memory runs out once, at this step.
    seeds_differ: the processes draw different random numbers before they train.
    frozen_first: a call of `train()` with the embedding frozen comes before the one with all parameters.
    torn_at: after this step the last process changes a parameter of its own.
    """

    name: str
    strategy: str = "ddp"
    student: str = "model"
    tied: bool = False
    before: str = "evaluate"
    num_sequences: int = 24
    ragged: bool = False
    streaming: bool = False
    share: float | None = None
    unsupervised: tuple[int, ...] = ()
    stream: bool = False
    overhead_every: int = 0
    resume_at: int = 0
    out_of_memory_at: int = 0
    seeds_differ: bool = False
    frozen_first: bool = False
    torn_at: int = 0
    same_micro_batches: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 6,  # a few ids more than the teacher has
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_model(folder: Path, *, tied: bool, dropout: float = 0.0) -> None:
    """An untrained student with a few ids more than its teacher."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_experts(folder: Path) -> None:
    """A mixture of experts that adds its router's loss."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_dataset(scenario: Scenario) -> Dataset:
    """Sequences whose supervised share differs, so that a mean of means is not the mean."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(scenario.num_sequences):
        length = int(rng.integers(4, NUM_TOKENS + 1)) if scenario.ragged else NUM_TOKENS
        share = rng.random() if scenario.share is None else scenario.share
        share = 0.0 if index % SEQUENCES_PER_MICRO_BATCH in scenario.unsupervised else share
        mask = rng.random(length) < share
        rows.append({"input_ids": rng.integers(0, VOCAB_SIZE, length).tolist(), "loss_mask": mask.tolist()})
    return Dataset.from_list(rows)


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
    """Padded to the longest row, padding without targets."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([[*row[name], *[0] * (longest - len(row[name]))] for row in rows])
        for name in ("input_ids", "loss_mask")
    }
    batch["loss_mask"] = batch["loss_mask"].bool()
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    if int(lengths.min()) < longest:
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def collate_with_targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate(rows)
    longest = batch["input_ids"].shape[1]
    parts = []
    for row in rows:
        parts.append(targets_of(row["input_ids"]))
        parts.append(targets_of([0] * longest).slice_rows(0, longest - len(row["input_ids"])))
    return batch | {"targets": SparseTargets.concatenate(parts)}


class Gradients(TrainerCallback):
    """The first steps' gradients by parameter, gathered where they are sharded."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if len(self.steps) < 3:
            gradients = {
                name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
            }
            self.steps.append({name: whole(gradient) for name, gradient in gradients.items()})


class Trouble(TrainerCallback):
    """Memory that runs out once, a process that goes its own way, a run that is cut off."""

    def __init__(self, scenario: Scenario, *, cut_off: bool) -> None:
        self.scenario = scenario
        self.cut_off = cut_off
        self.has_run_out = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.scenario.out_of_memory_at and not self.has_run_out:
            self.has_run_out = True
            raise RuntimeError("CUDA out of memory. (a test's)")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        control.should_training_stop |= self.cut_off and state.global_step == self.scenario.resume_at

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.scenario.torn_at and args.process_index == args.world_size - 1:
            with torch.no_grad():
                next(parameter for parameter in model.parameters() if parameter.requires_grad).flatten()[0] += 1e-4


def whole(tensor: Any) -> Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    copy: Tensor = tensor.detach().clone()
    return copy


def make_student(scenario: Scenario, folder: Path) -> nn.Module:
    name = "experts" if scenario.student == "experts" else "tied" if scenario.tied else "untied"
    auto: Any = AutoModelForCausalLM
    if scenario.strategy == "fsdp2":
        sharded = DistributedConfig(fsdp_size=dist.get_world_size(), tp_size=1)
        model = auto.from_pretrained(folder / name, distributed_config=sharded)
        assert type(model.lm_head.weight).__name__ == "DTensor"
    else:
        model = auto.from_pretrained(folder / name)
    if scenario.student == "lora":
        from peft import LoraConfig, get_peft_model  # takes a second

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    student: nn.Module = model
    return student


def make_trainer(scenario: Scenario, folder: Path, callbacks: list[TrainerCallback], wrap: Any) -> DistillationTrainer:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": SEQUENCES_PER_MICRO_BATCH // world,
        "per_device_eval_batch_size": SEQUENCES_PER_MICRO_BATCH // world,
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 0.005,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    settings |= scenario.arguments
    if scenario.same_micro_batches:
        settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // world}
    if "step_sequences" in settings:
        settings["per_device_train_batch_size"] = settings.pop("step_sequences") // world
    if scenario.resume_at:
        settings |= {"save_strategy": "steps", "save_steps": scenario.resume_at}
    student: dict[str, Any] = {"model": make_student(scenario, folder)}
    if scenario.student == "model_init":
        student = {"model_init": lambda: make_student(scenario, folder)}
    sequences = make_dataset(scenario)
    return DistillationTrainer(
        **student,
        args=TrainingArguments(str(folder / f"{scenario.name}.{world}"), **settings),
        train_dataset=sequences.to_iterable_dataset(num_shards=2) if scenario.streaming else sequences,
        eval_dataset=make_dataset(scenario),
        data_collator=collate if wrap else collate_with_targets,
        wrap_dataloader=wrap,
        ce_weight=0.25,
        overhead_every=scenario.overhead_every,
        callbacks=callbacks,
    )


def do_before(scenario: Scenario, trainer: DistillationTrainer) -> float | None:
    """The held-out loss, where one was asked for."""
    if scenario.seeds_differ:
        torch.manual_seed(100 + trainer.args.process_index)
    if scenario.before == "evaluate":
        return float(trainer.evaluate(make_dataset(scenario))["eval_loss"])
    if scenario.before == "predict":
        trainer.predict(make_dataset(scenario))
    return None


@contextlib.contextmanager
def teacher(scenario: Scenario) -> Iterator[Any]:
    """Give a trainer its targets from a teacher that is a function; None if the batches bring them."""
    if not scenario.stream:
        yield None
        return

    def score(sequence: TokenSequence, draw_set: int) -> SparseTargets:
        return targets_of([*sequence.token_ids.tolist(), draw_set]).slice_rows(0, len(sequence))

    with contextlib.closing(LocalTeacherClient(score, info=INFO, spec=SPEC)) as client:
        yield lambda dataloader: TargetStream(dataloader, client)


def train(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Trains the student; what became of it."""
    gradients = Gradients()
    trouble = Trouble(scenario, cut_off=scenario.resume_at > 0)
    with teacher(scenario) as wrap:
        trainer = make_trainer(scenario, folder, [gradients, trouble], wrap)
        evaluated = do_before(scenario, trainer)
        initial = {name: whole(tensor) for name, tensor in trainer.model.named_parameters()}
        if scenario.frozen_first:
            trainer.model.get_input_embeddings().requires_grad_(False)
            trainer.train()
            trainer.model.get_input_embeddings().requires_grad_(True)
            trainer.optimizer = None
            do_before(scenario, trainer)
        trainer.train()
        if scenario.resume_at:
            trainer = make_trainer(scenario, folder, [Trouble(scenario, cut_off=False)], wrap)
            do_before(scenario, trainer)
            trainer.train(
                resume_from_checkpoint=str(Path(str(trainer.args.output_dir)) / f"checkpoint-{scenario.resume_at}")
            )
    trainer.save_model()
    parameters = {name: whole(tensor) for name, tensor in trainer.model.named_parameters()}
    return {
        "steps": trainer.state.global_step,
        "initial": initial,
        "parameters": parameters,
        "ranks": ranks_of(parameters),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "gradients": gradients.steps,
        "measured": trainer.stats.meter.num_measured,
        "evaluated": evaluated,
    }


def ranks_of(parameters: dict[str, Tensor]) -> list[str]:
    """A digest of all parameters for each process."""
    mine = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in parameters.values())).hexdigest()
    everyone = [mine]
    if dist.is_initialized():
        everyone = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return everyone


def relative_distance(got: dict[str, Tensor], expected: dict[str, Tensor], *, since: dict[str, Tensor]) -> float:
    """Return the distance of two trained students, relative to the distance that training has moved them."""
    assert got.keys() == expected.keys() == since.keys()

    def norm(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return float(sum((one[name] - other[name]).double().square().sum() for name in one)) ** 0.5

    return norm(got, expected) / norm(expected, since)


def train_together(folder: Path, log: Path) -> None:
    log_to(log)
    launch_two(train_all, folder, log)


def train_all(folder: Path, log: Path) -> None:
    """Train as one process, alone or as one of two."""
    end_with_parent()
    log_to(log)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        dist.init_process_group("gloo")
    for settings in json.loads((folder / "scenarios.json").read_text()):
        scenario = Scenario(**settings)
        if processes == 1 and scenario.strategy == "fsdp2":
            scenario = Scenario(**settings | {"strategy": "ddp"})
        try:
            result = train(scenario, folder)
        except Exception as error:
            logging.exception("scenario %s", scenario.name)
            result = {"error": f"{type(error).__name__}: {error}"}
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(result, folder / f"{scenario.name}.{processes}.pt")
