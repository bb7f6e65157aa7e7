"""Packed rows are trained on as their documents are: with the teacher's own weights the loss is 0, else as padded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, TrainingArguments

from logitstream.client.local_client import LocalTeacherClient
from logitstream.data.batches import split_batch
from logitstream.data.corpus import collate
from logitstream.data.documents import Batch
from logitstream.errors import InvalidSequence
from logitstream.sampling import sample
from logitstream.training.target_stream import TargetStream
from logitstream.training.trainer import DistillationTrainer
from logitstream.types import SparseTargets, TargetSpec, TeacherInfo, TokenSequence
from tests.tiny_models import VOCAB_SIZE, any_family, tiny_model

SPEC = TargetSpec(sampler="full")
INFO = TeacherInfo(
    model="local",
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    vocab_size=VOCAB_SIZE,
    dtype="float32",
    max_sequence_tokens=64,
)
LENGTHS = (12, 9, 15, 4)
HYBRIDS = ["mamba", "jamba", "falcon_h1", "lfm2_moe", "recurrent_gemma"]
Row = dict[str, Any]
Collator = Callable[[list[Row]], Batch]


def documents() -> list[Row]:
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(3, VOCAB_SIZE, length).tolist()} for length in LENGTHS]
    return [row | {"labels": row["input_ids"]} for row in rows]


def flattened(**options: Any) -> Collator:
    return DataCollatorWithFlattening(return_tensors="pt", **options)


def two_rows(rows: list[Row]) -> Batch:
    """The first three documents in a row, the fourth and padding in another; position_ids beside a mask of padding."""
    packed = [flattened()(rows[:3]), flattened()(rows[3:])]
    longest = max(part["input_ids"].shape[1] for part in packed)
    batch = {
        name: torch.cat(
            [nn.functional.pad(part[name], (0, longest - part[name].shape[1]), value=-100) for part in packed]
        )
        for name in packed[0]
    }
    batch["attention_mask"] = (batch["position_ids"] >= 0).long()
    batch["input_ids"] = batch["input_ids"].clamp(min=0)
    batch["position_ids"] = batch["position_ids"].clamp(min=0)
    return batch


def numbered(rows: list[Row]) -> Batch:
    batch = two_rows(rows)
    starts = (batch.pop("position_ids") == 0) & (batch["attention_mask"] == 1)
    return batch | {"seq_idx": starts.cumsum(1)}


def with_lengths(rows: list[Row]) -> Batch:
    return flattened(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)


def padded_on_the_left(rows: list[Row]) -> Batch:
    longest = max(LENGTHS)
    pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    full = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([[value] * (longest - len(row[name])) + row[name] for row in full])
        for name, value in pad.items()
    }


WAYS: list[Collator] = [flattened(), two_rows, numbered, with_lengths, padded_on_the_left]
NAMES = ["flattened", "two_rows", "numbered", "with_lengths", "padded_on_the_left"]


def client_of(teacher: Any, refuse: Callable[[TokenSequence], bool] = lambda _: False) -> LocalTeacherClient:
    @torch.no_grad()
    def score(sequence: TokenSequence, draw_set: int) -> SparseTargets:
        if refuse(sequence):
            raise InvalidSequence("told to refuse")
        logits = teacher(input_ids=torch.from_numpy(sequence.token_ids[None]).long(), use_cache=False).logits[0]
        return sample(logits, SPEC, sequence, draw_set=draw_set)

    return LocalTeacherClient(score, info=INFO, spec=SPEC)


def trainer_of(
    folder: Path, student: Any, client: LocalTeacherClient | None, collator: Collator
) -> DistillationTrainer:
    stream = None if client is None else (lambda loader: TargetStream(loader, client))
    return DistillationTrainer(
        model=student,
        args=TrainingArguments(
            output_dir=str(folder),
            report_to="none",
            per_device_train_batch_size=len(LENGTHS),
            per_device_eval_batch_size=len(LENGTHS),
            use_cpu=True,
            max_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=0.0,
            logging_steps=1,
        ),
        train_dataset=documents(),
        eval_dataset=documents(),
        data_collator=collator,
        wrap_dataloader=stream,
    )


def trained(folder: Path, teacher: Any, student: Any, collator: Collator) -> DistillationTrainer:
    """After one training step."""
    client = client_of(teacher)
    student = copy.deepcopy(student)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer = trainer_of(folder, student, client, collator)
    trainer.train()
    client.close()
    return trainer


def losses(folder: Path, teacher: Any, student: Any, collator: Collator) -> tuple[float, float]:
    """Return the loss of one training step, and of the evaluation, which has no targets."""
    trainer = trained(folder, teacher, student, collator)
    return trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_packed_batch_has_the_loss_of_its_documents(tmp_path: Path, one_thread: None, family: str) -> None:
    """Relative and absolute positions, windows shorter than a document; the teacher's weights, then others."""
    teacher, student = tiny_model(family, seed=1), tiny_model(family, seed=2)
    expected = losses(tmp_path, teacher, student, collate)
    assert expected[0] > 0.1
    for name, way in zip(NAMES, WAYS, strict=True):
        own = trained(tmp_path, teacher, teacher, way).state.log_history[0]["loss"]
        assert own == pytest.approx(0, abs=2e-5), name
        assert losses(tmp_path, teacher, student, way) == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("family", ["mamba", "bloom", "jamba", "falcon_h1", "lfm2_moe", "recurrent_gemma"])
def test_a_student_that_sees_across_documents_is_refused(tmp_path: Path, family: str) -> None:
    """Hybrid students too, of which an untrained one shows it by a thousandth of its logits."""
    student = any_family(family, vocab_size=VOCAB_SIZE)
    trainer = trainer_of(tmp_path, student, client_of(tiny_model("llama")), flattened())
    with pytest.raises(ValueError, match="ForCausalLM sees across the documents of a packed row"):
        trainer.train()


@pytest.mark.parametrize("family", HYBRIDS)
def test_rounding_does_not_hide_what_a_student_sees_across_documents(tmp_path: Path, family: str) -> None:
    """In bfloat16 a fresh hybrid's logits need not move at all for what its state carries across the border."""
    student = any_family(family, vocab_size=VOCAB_SIZE).to(torch.bfloat16)
    trainer = trainer_of(tmp_path, student, None, flattened())
    with pytest.raises(ValueError, match="sees across the documents of a packed row"):
        trainer.evaluate()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "mixtral"])
def test_attention_in_low_precision_hides_other_documents(tmp_path: Path, family: str) -> None:
    """Nothing of them comes through, whatever the precision; nor of padding."""
    student = tiny_model(family).to(torch.bfloat16)
    for collator in (flattened(), left_padded):
        assert np.isfinite(trainer_of(tmp_path, student, None, collator).evaluate()["eval_loss"])


class PackedAlone(LlamaForCausalLM):
    """Takes heed of packed positions in a batch of one row alone, as flash attention does."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, position_ids=position_ids if len(input_ids) == 1 else None, **kwargs)


def test_a_student_that_hides_documents_in_single_rows_is_tried_with_several(tmp_path: Path) -> None:
    student = PackedAlone(tiny_model("llama").config).eval()
    trainer = trainer_of(tmp_path, student, None, flattened())
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.data_collator = two_rows
    with pytest.raises(ValueError, match="PackedAlone sees across the documents of a packed row"):
        trainer.evaluate()


def left_padded(rows: list[Row]) -> Batch:
    longest = max(len(row["input_ids"]) for row in rows)
    before = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([[5] * n + row["input_ids"] for n, row in zip(before, rows, strict=True)]),
        "attention_mask": (torch.arange(longest) >= torch.tensor(before)[:, None]).long(),
    }


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma"])
def test_a_student_that_sees_padding_before_a_text_is_refused(tmp_path: Path, family: str) -> None:
    """These take no heed of attention_mask, which hides the padding of all others."""
    student = any_family(family, vocab_size=VOCAB_SIZE)
    trainer = trainer_of(tmp_path, student, client_of(tiny_model("llama")), left_padded)
    with pytest.raises(ValueError, match="ForCausalLM sees padding that stands before a text"):
        trainer.train()


@pytest.mark.parametrize("family", ["mamba", "gpt_oss", "falcon_h1"])
def test_rows_of_one_document_need_no_student_that_sees_them_alone(tmp_path: Path, family: str) -> None:
    """With position_ids too, which say then what is so anyway."""
    student = any_family(family, vocab_size=VOCAB_SIZE)
    rows = [{"input_ids": row["input_ids"][:4], "position_ids": [0, 1, 2, 3]} for row in documents()]
    for collator in (collate, left_padded):
        client = client_of(student)
        trainer = trainer_of(tmp_path, copy.deepcopy(student), client, collator)
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.train()
        client.close()
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)


class Seen:
    """The rows of ids that an embedding was asked for."""

    def __init__(self, embedding: nn.Module) -> None:
        self.rows: list[list[int]] = []
        embedding.register_forward_pre_hook(lambda _, ids: self.rows.extend(ids[0].tolist()))


def test_a_refused_sequence_never_reaches_the_student(tmp_path: Path, one_thread: None) -> None:
    """Its tokens do not, whether it is a row or a document of one; the others' loss is as without it."""
    teacher, student = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    refused = [row["input_ids"] for row in documents()][1]
    found = []
    for collator in (collate, flattened()):
        client = client_of(teacher, lambda sequence: sequence.token_ids.tolist() == refused)
        trainer = trainer_of(tmp_path, copy.deepcopy(student), client, collator)
        seen = Seen(trainer.model.get_input_embeddings())
        trainer.train()
        client.close()
        assert seen.rows
        assert not any(str(refused)[1:-1] in str(row) for row in seen.rows)
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_ids_and_lengths_beyond_the_student_are_named_before_its_forward(tmp_path: Path, one_thread: None) -> None:
    trainer = trainer_of(tmp_path, tiny_model("gpt2"), None, collate)
    rows = [{"input_ids": [3, 4]}, {"input_ids": [5, VOCAB_SIZE]}]
    with pytest.raises(ValueError, match=f"a batch: token id {VOCAB_SIZE} is outside the student's .* of 96"):
        trainer.evaluate(rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="65 tokens, but the student has 64 positions"):
        trainer.evaluate([{"input_ids": [3] * 65}])  # type: ignore[arg-type]
    packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": [3] * 40}] * 3)
    assert len(split_batch(packed)) == 3
    trainer.data_collator = flattened()
    assert np.isfinite(trainer.evaluate([{"input_ids": [3] * 40}] * 3)["eval_loss"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weights", "seq_lengths"])
def test_a_datasets_columns_of_tokens_are_not_left_out_without_a_word(tmp_path: Path, name: str) -> None:
    trainer = trainer_of(tmp_path, tiny_model("llama"), None, collate)
    rows = [{"input_ids": [3, 4, 5], name: [1, 2] if name == "seq_lengths" else [0.1, 0.2, 0.3], "text": "a"}] * 4
    with pytest.raises(ValueError, match=f"the column '{name}' of the evaluation dataset has an entry"):
        trainer.evaluate(Dataset.from_list(rows))
    kept = Dataset.from_list([{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1], "text": "a"}] * 4)
    assert np.isfinite(trainer.evaluate(kept)["eval_loss"])
