"""The loss under the Trainer's own settings and with other students, held against plain torch and against eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import is_compiled_module
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, EvalPrediction, TrainingArguments

from logitstream.data.corpus import collate
from logitstream.data.loss_mask import next_token_labels, supervised_mask
from logitstream.loss import sparse_kl
from logitstream.training.trainer import DistillationTrainer, refuse_what_is_not_honoured
from logitstream.types import SparseTargets
from tests.distributed_training import VOCAB_SIZE, targets_of

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FIGURES = ("loss", "grad_norm", "kl", "student_kept_mass", "draw_top1_agreement")


pytestmark = pytest.mark.usefixtures("one_thread")


def student(family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **sizes | heads | special | options)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    model.get_output_embeddings().weight.data.mul_(4)
    return model


def rows_of(num_rows: int, *, lengths: int = 6) -> Dataset:
    """Sequences of 5 tokens and more, of so many different lengths."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(3, VOCAB_SIZE, 5 + index % lengths).tolist() for index in range(num_rows)]
    return Dataset.from_dict({"input_ids": rows})


def with_targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A padded batch and the targets of all its rows, padding's too."""
    batch: dict[str, Any] = dict(collate(rows))
    batch["targets"] = SparseTargets.concatenate([targets_of(row) for row in batch["input_ids"].tolist()])
    return batch


def trainer_of(folder: Path, model: Any, *, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    """Four steps of two micro-batches, unless `arguments` say otherwise."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    settings = TrainingArguments(str(folder / "out"), **defaults | (arguments or {}))
    options = {"data_collator": with_targets, "train_dataset": rows_of(24), "eval_dataset": rows_of(7)} | options
    return DistillationTrainer(model, settings, **options)


def logged(trainer: Any, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


# A mixture of experts


def test_a_steps_router_loss_is_the_mean_over_its_micro_batches(tmp_path: Path) -> None:
    """The step's gradients against plain torch: the distillation loss of all rows, and each micro-batch's own term."""
    model = student("mixtral", output_router_logits=True, router_aux_loss_coef=0.5, **EXPERTS).train()
    trainer = trainer_of(tmp_path, model, ce_weight=0.25)
    assert trainer.is_fused
    rows = rows_of(6)
    batches = [with_targets([rows[i] for i in part]) for part in (range(4), range(4, 6))]
    num_items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    model.zero_grad()
    for batch in batches:
        trainer.compute_loss(model, batch, num_items_in_batch=num_items).backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    for batch in batches:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = sparse_kl(
            output.logits,
            batch["targets"],
            labels=next_token_labels(batch),
            loss_mask=supervised_mask(batch),
            ce_weight=0.25,
            num_items=num_items,
        )
        (loss + 0.5 * output.aux_loss / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_router_loss_is_trained_and_shown_and_evaluation_stays_cross_entropy(tmp_path: Path) -> None:
    weights, logs = {}, {}
    for coefficient in (0.0, 5.0):
        model = student("mixtral", output_router_logits=True, router_aux_loss_coef=coefficient, **EXPERTS)
        trainer = trainer_of(tmp_path, model, arguments={"per_device_eval_batch_size": 7}, overhead_every=1)
        trainer.train()
        logs[coefficient] = [row for row in trainer.state.log_history if "loss" in row]
        weights[coefficient] = model.model.layers[0].mlp.gate.weight.detach().clone()
        batch = collate([rows_of(7)[index] for index in range(7)])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            whole = model.eval()(**batch, labels=labels)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(
            (whole.loss - coefficient * whole.aux_loss).item(), 1e-4
        )
    assert (weights[5.0] - weights[0.0]).abs().max() > 1e-3
    assert not any("router_loss" in row for row in logs[0.0])
    assert len(logs[5.0]) == 4
    first = [row[0] for row in logs.values()]
    assert first[1]["router_loss"] == pytest.approx(first[1]["loss"] - first[0]["loss"], rel=1e-4)
    assert first[1]["kl"] == pytest.approx(first[0]["kl"], rel=1e-6)


# torch.compile


NOT_A_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""torch looks at what its second graph takes from the first."""


@NOT_A_LEAF
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_compiled_student_trains_and_shows_what_an_eager_one_does(tmp_path: Path, family: str) -> None:
    experts = EXPERTS | {"output_router_logits": True} if family == "mixtral" else {}
    _compare_compiled(tmp_path, "aot_eager", 2, lambda: student(family, num_hidden_layers=1, **experts))


@NOT_A_LEAF
@pytest.mark.slow
def test_inductor_trains_and_shows_what_eager_does(tmp_path: Path) -> None:
    """The backend that torch_compile means; each graph goes through a C++ compiler."""
    _compare_compiled(tmp_path, "inductor", 1, lambda: student(num_hidden_layers=1))


def _compare_compiled(folder: Path, backend: str, accumulation: int, make: Callable[[], Any]) -> None:
    found = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch.compiler.reset()
        arguments = {"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 2} | compiled
        rows = rows_of(24, lengths=1)  # one shape, one graph
        options = {"train_dataset": rows, "eval_dataset": rows.select(range(4)), "overhead_every": 1, "ce_weight": 0.25}
        trainer = trainer_of(folder, make(), arguments=arguments, **options)
        before = trainer.evaluate()
        trainer.train()
        assert trainer.stats.meter.num_measured == 2
        assert is_compiled_module(trainer.model_wrapped) == bool(compiled)
        heldout = [before, *(row for row in trainer.state.log_history if "eval_loss" in row), trainer.evaluate()]
        figures = logged(trainer, *FIGURES) + [[row["eval_loss"], row["eval_kl"]] for row in heldout]
        found.append((figures, state_of(trainer.model)))
    torch.compiler.reset()
    (eager, weights), (ours, compiled_weights) = found
    assert len(eager) == 4 + 4
    for theirs, mine in zip(eager, ours, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
        assert all(figure > 0 for figure in mine[:3])
    for name, tensor in weights.items():
        torch.testing.assert_close(compiled_weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


# Adapters

OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""peft asks transformers by it."""


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
    ids=["frozen-head", "trained-copy-of-the-head", "adapted-head"],
)
@OLD_NAME
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_student_with_adapters_trains_as_on_its_logits(
    tmp_path: Path, family: str, options: dict[str, Any], fused: bool
) -> None:
    peft = pytest.importorskip("peft")
    experts = EXPERTS | {"output_router_logits": True} if family == "mixtral" else {}
    found = []
    for from_logits in (False, True):
        torch.manual_seed(1)
        model = peft.get_peft_model(student(family, **experts), peft.LoraConfig(**LORA | options))
        trainer = trainer_of(tmp_path, model, ce_weight=0.25)
        assert trainer.is_fused == fused
        trainer.is_fused = fused and not from_logits
        trainer.train()
        found.append(([*logged(trainer, *FIGURES), [trainer.evaluate()["eval_loss"]]], state_of(model)))
    (ours, weights), (theirs, expected) = found
    assert len(ours) == 5
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(plain, rel=1e-4)
        assert all(figure > 0 for figure in mine[:3])
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-6, msg=name)


@OLD_NAME
def test_a_learned_prompt_has_no_rows_of_its_own(tmp_path: Path) -> None:
    """The first step's loss against plain torch, of the rows behind the prompt; compute_metrics sees those alone."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(student(), config)
    shapes: list[tuple[int, ...]] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.extend([np.shape(prediction.predictions)[:2], np.shape(prediction.label_ids)])
        return {}

    trainer = trainer_of(tmp_path, model, compute_metrics=compute_metrics)
    assert not trainer.is_fused
    batch = with_targets([rows_of(4)[index] for index in range(4)])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 3:]
    expected = sparse_kl(logits, batch["targets"], loss_mask=supervised_mask(batch))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.evaluate()
    assert shapes == [(7, 10), (7, 10)]


# Measuring leaves no trace


class Statistics(torch.nn.Module):
    """Scales by a running mean, one that is replaced and one that is changed in place, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("noise", torch.zeros(()), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean: torch.Tensor = 0.9 * self.mean + 0.1 * hidden.detach().abs().mean()
            self.num_calls.add_(1)
            self.noise.fill_(torch.rand(()).item())
        return hidden * (1 + 0.1 * self.mean + 0.01 * self.noise)


class WithStatistics(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.statistics = inner, Statistics()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.statistics(self.inner(hidden))


@pytest.mark.parametrize("mixed", [{}, {"bf16": True}])
def test_measuring_leaves_buffers_and_random_numbers_as_they_were(tmp_path: Path, mixed: dict[str, Any]) -> None:
    found = []
    for every in (0, 1):
        model = student("mixtral", output_router_logits=True, attention_dropout=0.2, **EXPERTS)
        model.model.norm = WithStatistics(model.model.norm)
        trainer = trainer_of(tmp_path, model, arguments={"max_steps": 6, **mixed}, overhead_every=every)
        trainer.train()
        assert trainer.stats.meter.num_measured == (4 if every else 0)
        drawn = torch.rand(()).item()
        found.append((logged(trainer, *FIGURES, "router_loss", "tokens"), state_of(model), drawn))
    (logs, state, drawn), (measured_logs, measured_state, measured_drawn) = found
    assert state["model.norm.statistics.num_calls"] == 12
    assert measured_logs == logs
    assert measured_drawn == drawn
    for name, tensor in state.items():
        assert torch.equal(measured_state[name], tensor), name


def _step_in_backward(model: Any) -> None:
    """torch's own recipe: each parameter's optimizer in a hook behind its gradient."""
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.05)

        def step(parameter: Any, optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


def _change_in_hook(model: Any) -> None:
    """As LOMO does: the parameter changes in the hook on its gradient."""
    for parameter in model.parameters():

        def step(gradient: torch.Tensor, parameter: Any = parameter) -> torch.Tensor:
            parameter.data.sub_(gradient, alpha=0.05)
            return torch.zeros_like(gradient)

        parameter.register_hook(step)


@pytest.mark.parametrize("step_in_backward", [_step_in_backward, _change_in_hook])
def test_an_optimizer_inside_the_backward_pass_is_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step_in_backward: Callable[[Any], None]
) -> None:
    found = []
    for every in (0, 1):
        model = student()
        step_in_backward(model)
        trainer = trainer_of(tmp_path, model, arguments={"gradient_accumulation_steps": 1}, overhead_every=every)
        trainer.train()
        assert trainer.stats.meter.num_measured == 0
        found.append(state_of(model))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
    (told,) = [record.message for record in caplog.records if "is not measured" in record.message]
    assert "a pass of this student cannot be undone" in told


# Evaluation


def test_batches_with_targets_are_evaluated_with_their_kl(tmp_path: Path) -> None:
    """All rows against plain torch, whatever ce_weight the training has; eval_loss is as without targets."""
    model = student().eval()
    evaluated = trainer_of(tmp_path, model, ce_weight=0.25).evaluate()
    batch = with_targets([rows_of(7)[index] for index in range(7)])
    parts = [with_targets([rows_of(7)[index] for index in range(*part)]) for part in ((0, 4), (4, 7))]
    with torch.no_grad():
        sums = [
            sparse_kl(
                model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits,
                part["targets"],
                loss_mask=supervised_mask(part),
                num_items=1,
            )
            for part in parts
        ]
    kept = [(np.diff(part["targets"].row_offsets) > 0) & supervised_mask(part).flatten().numpy() for part in parts]
    assert evaluated["eval_kl"] == pytest.approx(sum(sums).item() / np.concatenate(kept).sum(), rel=1e-5)
    assert 0 < evaluated["eval_student_kept_mass"] < 1
    plain = trainer_of(tmp_path, model, data_collator=collate).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert "eval_kl" not in plain
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert plain["eval_loss"] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"include_for_metrics": ["inputs", "loss"]}, {"eval_accumulation_steps": 1}])
def test_labels_for_compute_metrics_are_the_tokens_that_count(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Padding, prompts and masked rows are -100; the accuracy is that of the rows that eval_loss is about."""
    rows = [dict(row) for row in rows_of(7)]
    for index, row in enumerate(rows):
        row["loss_mask"] = [place >= index % 3 for place in range(len(row["input_ids"]))]
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    model = student().eval()
    trainer = trainer_of(tmp_path, model, arguments=arguments, data_collator=collate, compute_metrics=compute_metrics)
    evaluated = trainer.evaluate(rows)
    expected = np.full((7, 10), -100)
    for index, row in enumerate(rows):
        for place, token in list(enumerate(row["input_ids"]))[1:]:
            if row["loss_mask"][place - 1]:
                expected[index, place] = token
    (prediction,) = seen
    assert np.array_equal(prediction.label_ids, expected)
    logprobs = torch.log_softmax(torch.from_numpy(np.asarray(prediction.predictions)), -1)[:, :-1]
    labels = torch.from_numpy(expected)[:, 1:]
    loss = torch.nn.functional.nll_loss(logprobs.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (prediction.inputs is not None) == ("include_for_metrics" in arguments)


# Settings of the Trainer


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor softens labels"),
        ({}, {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func would replace the loss"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel needs"),
    ],
)
def test_a_setting_that_the_loss_would_pass_over_is_refused_by_name(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, student(), arguments=arguments, **options)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    refuse_what_is_not_honoured(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes would train 2 students: on CPUs set use_cpu=True"):
        refuse_what_is_not_honoured(arguments)


def test_noise_on_embeddings_and_recomputed_layers_reach_the_fused_loss(tmp_path: Path) -> None:
    losses = {}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "noise": {"neftune_noise_alpha": 50.0},
        "recomputed": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    }
    for name, arguments in kinds.items():
        trainer = trainer_of(tmp_path, student(), arguments=arguments)
        trainer.train()
        losses[name] = [row[0] for row in logged(trainer, "loss")]
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert abs(losses["noise"][0] - losses["plain"][0]) > 1e-3
