"""DistillationTrainer in one process: real stream and codec, a teacher that is a function."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from logitstream import codec, metrics
from logitstream.client.local_client import LocalTeacherClient
from logitstream.data.corpus import collate
from logitstream.data.loss_mask import next_token_labels, supervised_mask
from logitstream.loss import sparse_kl
from logitstream.training.report import report
from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import SparseTargets, TargetSpec, TokenSequence
from tests.distributed_training import INFO, SPEC, VOCAB_SIZE, make_model, targets_of

NUM_SEQUENCES = 24


pytestmark = pytest.mark.usefixtures("one_thread")


class Asked:
    """A teacher that remembers what it was asked: (first token, draw set)."""

    def __init__(self, spec: TargetSpec = SPEC) -> None:
        self.requests: list[tuple[int, int]] = []
        self.client = LocalTeacherClient(self.score, info=INFO, spec=spec)

    def score(self, sequence: TokenSequence, draw_set: int) -> SparseTargets:
        self.requests.append((int(sequence.token_ids[0]), draw_set))
        return targets_of([*sequence.token_ids.tolist(), draw_set]).slice_rows(0, len(sequence))


@pytest.fixture
def teacher() -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.client.close()


def dataset() -> Dataset:
    """Each sequence begins with its own number."""
    rng = np.random.default_rng(1)
    rows = rng.integers(0, VOCAB_SIZE, (NUM_SEQUENCES, 10))
    rows[:, 0] = np.arange(NUM_SEQUENCES)
    return Dataset.from_dict({"input_ids": rows.tolist()})


def trainer_of(folder: Path, teacher: Asked | None, *, model: Any = None, **options: Any) -> DistillationTrainer:
    names = ("save_steps", "max_steps", "num_train_epochs", "seed", "lr_scheduler_type")
    arguments = {name: options.pop(name) for name in names if name in options}
    if model is None:
        make_model(folder / "model", tied=True, dropout=0.2)
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(folder / "model")
    if teacher is not None:
        options["wrap_dataloader"] = lambda dataloader: TargetStream(dataloader, teacher.client, prefetch_batches=1)
    return options.pop("kind", DistillationTrainer)(
        model,
        TrainingArguments(
            str(folder / "out"),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=options.pop("eval_batch_size", 8),
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="steps" if "save_steps" in arguments else "no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset().select(range(6)),
        **options,
    )


def losses_of(trainer: DistillationTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_measuring_the_overhead_leaves_no_trace_in_the_training(tmp_path: Path, teacher: Asked) -> None:
    """With dropout, so that a random number taken would show; gradients accumulate over two micro-batches."""
    plain = trainer_of(tmp_path / "a", teacher, num_train_epochs=1)
    plain.train()
    measured = trainer_of(tmp_path / "b", teacher, num_train_epochs=1, overhead_every=1)
    measured.train()
    assert measured.stats.meter.num_measured == 4
    assert losses_of(measured) == losses_of(plain)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(measured.model.state_dict()[name], tensor), name
    last = [row for row in measured.state.log_history if "loss" in row][-1]
    parts = {part: metrics.value(metrics.STUDENT_OVERHEAD._name, part=part) for part in metrics.OVERHEAD_PARTS}
    assert parts["total"] == pytest.approx(parts["waiting"] + parts["decoding"] + parts["computing"])
    assert {"overhead_vs_cross_entropy", "overhead_vs_cross_entropy_without_waiting"} <= last.keys()


def test_a_run_resumed_within_its_second_epoch_goes_on_as_if_never_stopped(tmp_path: Path, teacher: Asked) -> None:
    """The batches of the epoch that were trained on before are not asked for again; draws are the epoch's own."""
    whole = trainer_of(tmp_path, teacher, num_train_epochs=2, save_steps=8)
    whole.train()
    teacher.requests.clear()
    make_model(tmp_path / "other", tied=True, dropout=0.2)
    resumed = trainer_of(tmp_path, teacher, num_train_epochs=2, save_steps=100)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert losses_of(resumed) == losses_of(whole)
    assert {draw_set for _, draw_set in teacher.requests} == {1}
    assert len(teacher.requests) == NUM_SEQUENCES - 2 * 4


def test_the_step_loss_is_the_mean_over_all_its_supervised_rows(tmp_path: Path, teacher: Asked) -> None:
    """Micro-batches with different numbers of supervised rows weigh by rows."""
    trainer = trainer_of(tmp_path, teacher, max_steps=1, ce_weight=0.5)
    trainer.model.eval()
    mask = torch.arange(40).view(4, 10) % 7 > torch.tensor([[0], [5], [3], [1]])
    batches: list[dict[str, Any]] = []
    for rows in (slice(0, 1), slice(1, 4)):
        input_ids = torch.tensor(dataset()[rows]["input_ids"])
        targets = SparseTargets.concatenate([targets_of(row) for row in input_ids.tolist()])
        batches.append({"input_ids": input_ids, "loss_mask": mask[rows], "targets": targets})
    student: Any = trainer.model
    num_items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert num_items == mask.sum()
    got = sum(trainer.compute_loss(student, batch, num_items_in_batch=num_items) for batch in batches)
    whole = {"input_ids": torch.tensor(dataset()[:4]["input_ids"]), "loss_mask": mask}
    expected = sparse_kl(
        student(input_ids=whole["input_ids"]).logits,
        SparseTargets.concatenate([batch["targets"] for batch in batches]),
        labels=next_token_labels(whole),
        ce_weight=0.5,
        loss_mask=mask,
    )
    torch.testing.assert_close(got, expected)


def test_evaluation_is_the_models_own_cross_entropy_and_the_saved_student_loads(tmp_path: Path, teacher: Asked) -> None:
    trainer = trainer_of(tmp_path, teacher, max_steps=2)
    trainer.train()
    trainer.save_model()
    auto: Any = AutoModelForCausalLM
    saved = auto.from_pretrained(tmp_path / "out").eval()
    input_ids = torch.tensor(dataset()[:6]["input_ids"])
    with torch.no_grad():
        expected = saved(input_ids=input_ids, labels=input_ids).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_evaluation_weighs_by_supervised_tokens_for_any_batch_size(
    tmp_path: Path, teacher: Asked, batch_size: int
) -> None:
    """Sequences of 2 to 9 tokens, some prompts, one with no label at all; against torch's cross-entropy of each."""
    rng = np.random.default_rng(4)
    rows = [{"input_ids": rng.integers(0, VOCAB_SIZE, length).tolist()} for length in (9, 2, 5, 3, 8, 4, 6)]
    for row, num_prompt in zip(rows, (5, 0, 1, 3, 2, 1, 4), strict=True):
        row["labels"] = [-100] * num_prompt + row["input_ids"][num_prompt:]
    trainer = trainer_of(tmp_path, teacher, eval_batch_size=batch_size, data_collator=collate)
    student: Any = trainer.model
    student.eval()
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = student(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses.append(torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")[labels != -100])
    assert len(losses[3]) == 0
    found = trainer.evaluate(rows)["eval_loss"]  # type: ignore[arg-type]
    assert found == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_evaluation_without_a_supervised_token_has_no_loss(tmp_path: Path, teacher: Asked) -> None:
    trainer = trainer_of(tmp_path, teacher)
    assert np.isnan(trainer.evaluate([{"input_ids": [1, 2], "labels": [-100, -100]}])["eval_loss"])  # type: ignore[arg-type]


class SlowAtFirst(DistillationTrainer):
    """Its first pass without targets takes half a second of CPU time more, as one that compiles or allocates would."""

    warm = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if inputs.get("targets") is None and not self.warm:
            self.warm, started = True, time.thread_time()
            while time.thread_time() < started + 0.5:
                pass
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_the_first_cross_entropy_pass_is_not_part_of_the_overhead(tmp_path: Path, teacher: Asked) -> None:
    """One measured step of a few milliseconds: counted, the half second would make it about -1."""
    trainer = trainer_of(tmp_path, teacher, kind=SlowAtFirst, max_steps=3, overhead_every=100)
    trainer.train()
    assert isinstance(trainer, SlowAtFirst)
    assert trainer.warm
    assert trainer.stats.meter.num_measured == 1
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert last["overhead_vs_cross_entropy_without_waiting"] > -0.7


def test_logged_bytes_per_token_are_those_of_the_batches_trained_on(tmp_path: Path) -> None:
    """The stream decodes four batches ahead; each step's bytes are still those of its own targets, encoded."""
    asked = Asked()
    trainer = trainer_of(tmp_path, asked, num_train_epochs=1, seed=3)
    trainer.wrap_dataloader = lambda dataloader: TargetStream(dataloader, asked.client, prefetch_batches=4)
    seen: list[tuple[int, int]] = []
    step = trainer.training_step

    def remember(model: Any, inputs: Any, *args: Any) -> Any:
        parts = [targets_of([*row, 0]).slice_rows(0, len(row)) for row in inputs["input_ids"].tolist()]
        seen.append((sum(len(codec.encode(part, version=SPEC.codec_version)) for part in parts), 2 * 10))
        return step(model, inputs, *args)

    trainer.training_step = remember  # type: ignore[method-assign, assignment]
    trainer.train()
    asked.client.close()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    expected = [(a[0] + b[0]) / (a[1] + b[1]) for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert [row["payload_bytes_per_token"] for row in rows] == pytest.approx(expected)


def test_an_epochs_overhead_in_the_report_is_what_it_measured_itself(tmp_path: Path, teacher: Asked) -> None:
    """Six steps an epoch, of which the third, the eleventh and the nineteenth are measured; none in the third epoch."""
    trainer = trainer_of(tmp_path, teacher, num_train_epochs=4, overhead_every=8)
    trainer.train()
    figures = report(trainer.stats)
    assert [("overhead_vs_cross_entropy" in epoch) for epoch in figures["epochs"]] == [True, True, False, True]
    assert not any(epoch["received_bytes"] for epoch in figures["epochs"])  # a teacher in the process: no message
    assert figures["offline_overhead_vs_cross_entropy"] == figures["epochs"][3]["overhead_vs_cross_entropy"]
    assert metrics.value(metrics.STUDENT_OVERHEAD._name, part="total") == figures["offline_overhead_vs_cross_entropy"]
    assert "resumed_at_step" not in figures


def test_the_report_of_a_resumed_run_names_its_first_step(tmp_path: Path, teacher: Asked) -> None:
    trainer_of(tmp_path, teacher, max_steps=4, save_steps=4).train()
    resumed = trainer_of(tmp_path, teacher, max_steps=6, overhead_every=100)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert report(resumed.stats)["resumed_at_step"] == 4
    assert metrics.value(metrics.STUDENT_OVERHEAD._name, part="total") is None  # an earlier run's does not stay


class OtherLinear(torch.nn.Linear):
    """A head whose forward is its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.5}])
def test_a_student_that_cannot_be_split_trains_on_its_logits_and_shows_the_same_statistics(
    tmp_path: Path, teacher: Asked, options: dict[str, Any]
) -> None:
    make_model(tmp_path / "model", tied=False)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "model")
    head = OtherLinear(32, VOCAB_SIZE + 6, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    fallback = trainer_of(tmp_path, teacher, model=model, max_steps=2, **options)
    assert not fallback.is_fused
    fused = trainer_of(tmp_path, teacher, model=auto.from_pretrained(tmp_path / "model"), max_steps=2, **options)
    assert fused.is_fused
    fallback.train()
    fused.train()
    assert losses_of(fallback) == pytest.approx(losses_of(fused), rel=1e-5)
    figures = ("kl", "student_kept_mass", "draw_top1_agreement")
    ours, theirs = (
        [row[name] for row in t.state.log_history if "kl" in row for name in figures] for t in (fused, fallback)
    )
    assert len(ours) == 2 * len(figures)
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert fallback.evaluate()["eval_loss"] == pytest.approx(fused.evaluate()["eval_loss"], rel=1e-5)


def test_unknown_statistics_are_left_out(tmp_path: Path) -> None:
    """Without targets there is no KL and no teacher to agree with; a dense student has no router."""
    make_model(tmp_path / "model", tied=True)
    auto: Any = AutoModelForCausalLM
    trainer = trainer_of(tmp_path, None, model=auto.from_pretrained(tmp_path / "model"), max_steps=1, ce_weight=1.0)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert not {"kl", "student_kept_mass", "draw_top1_agreement", "router_loss"} & row.keys()
    assert row["tokens"] > 0


def test_supervised_rows_follow_mask_labels_and_padding() -> None:
    input_ids = torch.tensor([[5, 6, 7, 8]])
    everything = {"input_ids": input_ids, "targets": object()}
    assert supervised_mask(everything).tolist() == [[True, True, True, True]]
    assert supervised_mask({"input_ids": input_ids}).tolist() == [[True, True, True, False]]
    labels = {"labels": torch.tensor([[-100, -100, 7, 8]])}
    assert supervised_mask(everything | labels).tolist() == [[False, True, True, False]]
    assert next_token_labels(everything | labels).tolist() == [[-100, 7, 8, -100]]
    padded = {"attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert supervised_mask(everything | padded).tolist() == [[True, True, True, False]]
    assert next_token_labels(everything | padded).tolist() == [[6, 7, -100, -100]]
    masked = {"loss_mask": torch.tensor([[1, 0, 0, 1]])}
    assert supervised_mask(everything | masked | labels).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize(
    "spec", [TargetSpec(num_samples=10, temperature=2.0), TargetSpec(sampler="top_k_ghost", top_k=5)]
)
def test_a_trainer_takes_temperature_and_ghost_from_its_targets(tmp_path: Path, spec: TargetSpec) -> None:
    """The first step's loss, against plain torch on the batches that were trained on."""
    make_model(tmp_path / "model", tied=True)
    auto: Any = AutoModelForCausalLM
    trainer = trainer_of(tmp_path, Asked(spec), model=auto.from_pretrained(tmp_path / "model"), max_steps=1)
    batches: list[Any] = []
    compute_loss = trainer.compute_loss

    def remember(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append((model(input_ids=inputs["input_ids"]).logits.detach(), inputs["targets"]))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = remember  # type: ignore[method-assign]
    trainer.train()
    logits = torch.cat([logits.flatten(0, 1) for logits, _ in batches])
    targets = SparseTargets.concatenate([targets for _, targets in batches])
    assert targets.spec == spec
    assert losses_of(trainer) == pytest.approx([sparse_kl(logits, targets).item()], rel=1e-3)
    assert sparse_kl(logits, replace(targets, spec=None)).item() != pytest.approx(losses_of(trainer)[0], rel=1e-2)
