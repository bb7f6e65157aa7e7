"""Every figure that a run logs, exports and reports, against a count by hand from its cache and plain torch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from logitstream import codec
from logitstream.types import SparseTargets
from student_worker.config import StudentConfig
from tests.flat_settings import nested
from tests.serving import ENVIRONMENT, teacher_process
from tests.tiny_models import VOCAB_SIZE, save_tiny_teacher, tiny_model

ROWS, HELD_OUT, TOKENS, SUPERVISED = 22, 6, 24, 15
"""Each row supervises as many tokens, so that a step's mean weighs like any other's."""
BATCH, ACCUMULATED = 2, 2
STEPS = (ROWS - HELD_OUT) // (BATCH * ACCUMULATED)
EPOCHS = 2
CE_WEIGHT = 0.25
MESSAGE_BYTES = 64
"""More than a sequence's share of the messages around its targets."""


@dataclass
class Run:
    """The results of a run, and the data it was made of."""

    logs: list[dict[str, float]]
    progress: list[dict[str, float]]
    report: dict[str, Any]
    student: dict[str, float]
    teacher: dict[str, float]
    trained: dict[tuple[int, ...], SparseTargets]
    payload_bytes: int
    heldout: torch.Tensor
    masks: dict[tuple[int, ...], torch.Tensor]
    student_model: Any
    teacher_model: Any


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def exported(text: str) -> dict[str, float]:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(f"|{v}" for v in sample.labels.values()): sample.value for sample in samples}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs at learning rate 0, so that all steps' figures are of one student: online, then from the cache."""
    home = tmp_path_factory.mktemp("figures")
    save_tiny_teacher(home / "teacher")
    tiny_model("llama", seed=7, sharpness=1.0).save_pretrained(home / "student")
    rng = np.random.default_rng(5)
    ids = rng.integers(3, VOCAB_SIZE, (ROWS, TOKENS))
    masks = np.array([np.isin(np.arange(TOKENS), rng.choice(TOKENS - 1, SUPERVISED, replace=False)) for _ in ids])
    rows = [{"input_ids": a.tolist(), "loss_mask": b.tolist()} for a, b in zip(ids, masks, strict=True)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": home / "student", "tokenizer": home / "teacher", "text": home / "rows.jsonl", "cache": home / "cache",
        "targets": "cache_then_online", "draws": "reuse", "num_samples": 12, "ce_weight": CE_WEIGHT,
        "sequence_tokens": TOKENS, "heldout_sequences": HELD_OUT, "output_dir": home / "out", "learning_rate": 0,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATED, "num_train_epochs": EPOCHS,
        "logging_steps": 1, "save_strategy": "epoch", "report_to": "none", "use_cpu": True, "overhead_every": 1,
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    with teacher_process("--model.path", str(home / "teacher"), f"--metrics.port={metrics_port}") as (_, address):
        sections = nested(StudentConfig, settings)
        arguments = [f"--{name}.{leaf}={v}" for name, section in sections.items() for leaf, v in section.items()]
        command = [
            sys.executable,
            "-m",
            "tests.exporting_worker",
            str(home / "exported"),
            f"--teacher.addresses={address}",
        ]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        teacher_figures = exported(read(f"http://127.0.0.1:{metrics_port}/metrics"))
    shards = [pa.ipc.open_stream(path).read_all() for path in (home / "cache").glob("*.arrow")]
    records = [record for shard in shards for record in shard.to_pylist()]
    trained = {tuple(r["token_ids"]): codec.decode(r["payload"]) for r in records}
    heldout = [row["input_ids"] for row in rows if tuple(row["input_ids"]) not in trained]
    auto: Any = AutoModelForCausalLM
    state = json.loads((home / "out" / f"checkpoint-{EPOCHS * STEPS}" / "trainer_state.json").read_text())
    return Run(
        logs=[row for row in state["log_history"] if "loss" in row],
        progress=[json.loads(line) for line in (home / "out" / "progress.jsonl").read_text().splitlines()],
        report=json.loads((home / "out" / "report.json").read_text()),
        student=exported((home / "exported").read_text()),
        teacher=teacher_figures,
        trained=trained,
        payload_bytes=sum(len(r["payload"]) for r in records),
        heldout=torch.tensor(heldout),
        masks={tuple(a.tolist()): torch.from_numpy(b) for a, b in zip(ids, masks, strict=True)},
        student_model=auto.from_pretrained(home / "student").eval(),
        teacher_model=auto.from_pretrained(home / "teacher").eval(),
    )


def by_hand(run: Run) -> dict[str, float]:
    """Means over the supervised rows of all that was trained on, from whole logits; the student never changed."""
    sums = dict.fromkeys(("kl", "cross_entropy", "student_kept_mass", "draw_top1_agreement", "rows"), 0.0)
    for ids, targets in run.trained.items():
        with torch.no_grad():
            logprobs = run.student_model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        offsets, weights = targets.row_offsets, targets.weights()
        for row in torch.nonzero(run.masks[ids])[:, 0].tolist():
            entries = slice(int(offsets[row]), int(offsets[row + 1]))
            drawn, weight = torch.from_numpy(targets.token_ids[entries]).long(), torch.from_numpy(weights[entries])
            sums["kl"] += float((weight * (weight.log() - logprobs[row, drawn])).sum())
            sums["cross_entropy"] -= float(logprobs[row, ids[row + 1]])
            sums["student_kept_mass"] += float(logprobs[row, drawn].exp().sum())
            first = int(logprobs[row].argmax())
            sums["draw_top1_agreement"] += first in drawn[weight == weight.max()].tolist()
            sums["rows"] += 1
    return {name: total / sums["rows"] for name, total in sums.items()}


def test_counts_of_tokens_and_entries(run: Run) -> None:
    """Logged, exported, in progress.jsonl and in the report; entries of rows that are not supervised do not exist."""
    tokens, entries = (ROWS - HELD_OUT) * SUPERVISED, sum(one.num_entries for one in run.trained.values())
    assert len(run.trained) == ROWS - HELD_OUT
    assert [row["tokens"] for row in run.logs] == [
        BATCH * ACCUMULATED * SUPERVISED * step for step in range(1, EPOCHS * STEPS + 1)
    ]
    assert [row["tokens"] for row in run.progress] == [row["tokens"] for row in run.logs]
    assert run.student["logitstream_student_tokens_total"] == run.report["tokens_trained"] == EPOCHS * tokens
    assert run.student["logitstream_student_steps_total"] == EPOCHS * STEPS
    assert run.student["logitstream_student_entries_total"] == EPOCHS * entries
    assert run.report["entries_per_token"] == pytest.approx(entries / tokens)
    assert np.mean([row["entries_per_token"] for row in run.logs]) == pytest.approx(entries / tokens)
    assert [epoch["tokens"] for epoch in run.report["epochs"]] == [tokens, tokens]
    assert [epoch["entries"] for epoch in run.report["epochs"]] == [entries, entries]


def test_bytes_encoded_and_on_the_wire(run: Run) -> None:
    """Logged: as encoded, online and from the cache; reported: of the wire, and none for the epoch from the cache."""
    rows = (ROWS - HELD_OUT) * TOKENS
    assert np.mean([row["payload_bytes_per_token"] for row in run.logs]) == pytest.approx(run.payload_bytes / rows)
    assert min(row["payload_bytes_per_token"] for row in run.logs) > 0
    online, cached = run.report["epochs"]
    assert run.payload_bytes < online["received_bytes"] < run.payload_bytes + MESSAGE_BYTES * len(run.trained)
    assert (cached["received_bytes"], cached["received_rows"], cached["bytes_per_token"]) == (0, 0, None)
    assert online["received_rows"] == rows
    assert run.report["bytes_per_token"] == pytest.approx(online["received_bytes"] / rows)
    first_choices = HELD_OUT * TOKENS
    assert run.student["logitstream_student_target_rows_total"] == rows + first_choices


def test_hits_misses_and_what_the_teacher_counts(run: Run) -> None:
    assert run.student["logitstream_cache_hits_total"] == len(run.trained)
    assert run.student["logitstream_cache_misses_total"] == len(run.trained)
    assert [epoch["cache_hits"] for epoch in run.report["epochs"]] == [0, len(run.trained)]
    assert run.teacher["logitstream_teacher_sequences_total"] == ROWS
    assert run.teacher["logitstream_teacher_tokens_total"] == ROWS * TOKENS
    first_choices = HELD_OUT * SUPERVISED
    entries = sum(one.num_entries for one in run.trained.values())
    assert run.teacher["logitstream_teacher_entries_total"] == entries + first_choices
    for name in ("cache_corrupt_total", "cache_write_errors_total", "student_retries_total|lost"):
        assert run.student[f"logitstream_{name}"] == 0
    for name in ("queue_batches", "in_flight_tokens"):
        assert run.student[f"logitstream_student_{name}"] == 0


def test_losses_and_diagnostics(run: Run) -> None:
    """Steps weigh alike, so that their mean is that of all rows; the random order is the trainer's."""
    expected = by_hand(run)
    for name in ("kl", "student_kept_mass", "draw_top1_agreement"):
        assert np.mean([row[name] for row in run.logs]) == pytest.approx(expected[name], rel=1e-4), name
    assert not any("teacher_top1_agreement" in row for row in run.logs)
    loss = (1 - CE_WEIGHT) * expected["kl"] + CE_WEIGHT * expected["cross_entropy"]
    assert np.mean([row["loss"] for row in run.logs]) == pytest.approx(loss, rel=1e-3)  # rounded by the Trainer
    assert [row["loss"] for row in run.progress] == [row["loss"] for row in run.logs]
    assert run.student["logitstream_student_loss_nats"] == run.logs[-1]["loss"]


def test_held_out_loss_and_agreement_with_the_teachers_own_first_choices(run: Run) -> None:
    with torch.no_grad():
        students, teachers = (model(run.heldout).logits for model in (run.student_model, run.teacher_model))
    mask = torch.stack([run.masks[tuple(ids.tolist())] for ids in run.heldout])
    agreement = (students.argmax(-1) == teachers.argmax(-1))[mask].double().mean().item()
    losses = torch.nn.functional.cross_entropy(
        students[:, :-1].flatten(0, 1), run.heldout[:, 1:].flatten(), reduction="none"
    )
    loss = losses[mask[:, :-1].flatten()].double().mean().item()
    for when in ("before", "after"):
        assert run.report[f"heldout_loss_{when}"] == pytest.approx(loss, rel=1e-5)
        assert run.report[f"heldout_teacher_top1_agreement_{when}"] == pytest.approx(agreement)


def test_times_and_overheads_add_up(run: Run) -> None:
    waiting = run.logs[-1]["waiting_seconds"]
    assert waiting > 0
    assert run.student["logitstream_student_waiting_seconds_total"] == pytest.approx(waiting, abs=1e-3)
    assert run.report["seconds_waiting_for_targets"] == pytest.approx(waiting, abs=1e-3)
    assert run.logs[-1]["decoding_seconds"] == pytest.approx(
        run.student["logitstream_student_decoding_seconds_total"], abs=1e-3
    )
    seconds = waiting + run.student["logitstream_student_computing_seconds_total"]
    tokens = EPOCHS * (ROWS - HELD_OUT) * SUPERVISED
    assert run.report["student_tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-3)
    parts = [run.report[f"overhead_{part}"] for part in ("waiting", "decoding", "computing")]
    assert run.report["overhead_vs_cross_entropy"] == pytest.approx(sum(parts))
