"""Packing keeps every token in order, whatever the text's shape; rows that are tokens already pass through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from student_worker.data import _pack, collate, load_sequences, split_heldout

WORDS = {"<end>": 0, "<unknown>": 1} | {f"w{index}": index for index in range(2, 30)}


def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel(WORDS, unk_token="<unknown>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unknown>", eos_token="<end>")


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(2, 29), max_size=40), min_size=1, max_size=12),
    sequence_tokens=st.integers(1, 16),
)
def test_packed_sequences_hold_the_documents_tokens_in_order(documents: list[list[int]], sequence_tokens: int) -> None:
    texts = [" ".join(f"w{token}" for token in document) for document in documents]
    rows = Dataset.from_dict({"text": texts})
    packed = [row["input_ids"].tolist() for row in _pack(rows, "text", tokenizer(), sequence_tokens)]
    stream = [token for document in documents for token in [*document, WORDS["<end>"]]]
    assert [token for row in packed for token in row] == stream[: len(stream) // sequence_tokens * sequence_tokens]
    assert {len(row) for row in packed} <= {sequence_tokens}


def test_text_and_jsonl_files_are_packed_alike(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w2 w3\n\nw4 w5 w6\n\nw7")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("w2 w3 w4", "w5 w6 w7")))
    text = load_sequences([str(tmp_path / "a.txt")], tokenizer(), sequence_tokens=3)
    rows = load_sequences([str(tmp_path / "b.jsonl")], tokenizer(), sequence_tokens=4)
    assert text["input_ids"] == [[2, 3, 4], [5, 6, 7]]
    assert rows["input_ids"] == [[2, 3, 4, 0], [5, 6, 7, 0]]


def test_rows_of_tokens_pass_through_with_their_labels(tmp_path: Path) -> None:
    Dataset.from_dict({"input_ids": [[2, 3, 4], [5]], "labels": [[-100, 3, 4], [5]]}).save_to_disk(tmp_path / "rows")
    sequences = load_sequences([str(tmp_path / "rows")], tokenizer(), sequence_tokens=2)
    assert sequences[:] == {"input_ids": [[2, 3], [5]], "labels": [[-100, 3], [5]]}
    batch = collate([sequences[0], sequences[1]])
    assert batch["input_ids"].tolist() == [[2, 3], [5, 0]]
    assert batch["labels"].tolist() == [[-100, 3], [5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_training_and_heldout_sequences_are_disjoint_and_chosen_by_seed() -> None:
    rows = Dataset.from_dict({"input_ids": [[index] for index in range(50)]})
    train, heldout = split_heldout(rows, heldout_sequences=7, max_sequences=0, seed=3)
    assert sorted([*train["input_ids"], *heldout["input_ids"]]) == [[index] for index in range(50)]
    again, _ = split_heldout(rows, heldout_sequences=7, max_sequences=20, seed=3)
    assert len(again) == 20
    assert not set(np.ravel(again["input_ids"]).tolist()) & set(np.ravel(heldout["input_ids"]).tolist())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot read .*missing.txt"),
        ("table.csv", "a,b", "cannot read .*table.csv: expected an existing .txt"),
        ("rows.jsonl", '{"body": "w2"}', "expected a column 'text' or 'input_ids', got body"),
        ("short.txt", "w2 w3", "less than one sequence of 8 tokens"),
    ],
)
def test_input_that_cannot_be_trained_on_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_sequences([str(tmp_path / name)], tokenizer(), sequence_tokens=8)
