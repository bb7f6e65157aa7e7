"""Packing keeps every token in order, whatever the text's shape; rows that are tokens already pass through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from logitstream.data.batches import split_batch
from logitstream.data.corpus import collate, load_sequences
from logitstream.data.packing import frame_of, pack
from logitstream.data.student_limits import StudentLimits

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
    frame, limits = frame_of(tokenizer()), StudentLimits(vocab_size=30)
    packed = [row["input_ids"].tolist() for row in pack((rows,), "text", tokenizer(), sequence_tokens, frame, limits)]
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


def test_padding_of_rows_of_tokens_is_dropped_and_their_loss_mask_kept(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [0, 5, 6, 7], "loss_mask": [0, 0, 1, 1], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [8, 9, 0, 0], "loss_mask": [1, 0, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [0, 0], "loss_mask": [0, 0], "attention_mask": [0, 0]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sequences = load_sequences([str(tmp_path / "rows.jsonl")], tokenizer(), sequence_tokens=2)
    assert sequences[:] == {"input_ids": [[5, 6], [8, 9]], "loss_mask": [[0, 1], [1, 0]]}
    assert collate([sequences[0], sequences[1]])["loss_mask"].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [2, 3], "loss_mask": [1]}], "row 0: .*one length.*'input_ids': 2, 'loss_mask': 1"),
        (
            [{"input_ids": [2], "labels": [2]}, {"input_ids": [3]}],
            "row 1: expected whole numbers, got an entry of labels that is null",
        ),
        ([{"input_ids": [[2, 3]]}], "rows.jsonl: expected input_ids to hold a list of whole numbers a row"),
        ([{"input_ids": [0.5]}], "rows.jsonl: expected input_ids to hold a list of whole numbers a row"),
        ([{"input_ids": []}], "no row holds a token"),
    ],
)
def test_rows_of_tokens_of_other_shapes_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        load_sequences([str(tmp_path / "rows.jsonl")], tokenizer(), sequence_tokens=8)


def write_rows(folder: Path, **columns: Any) -> list[str]:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"input_ids": [5, 6, 7, 8, 9, 10], "attention_mask": [1] * 6} | columns))
    return [str(file)]


@pytest.mark.parametrize(
    ("columns", "rows_that_count"),
    [
        ({"completion_mask": [0, 0, 0, 1, 1, 1]}, [[0, 0, 1, 1, 1, 0]]),
        ({"assistant_masks": [0, 0, 0, 1, 1, 1]}, [[0, 0, 1, 1, 1, 0]]),
        ({"labels": [-100, -100, -100, 8, 9, 10]}, [[0, 0, 1, 1, 1, 0]]),
        ({"loss_mask": [0, 0, 1, 1, 1, 0]}, [[0, 0, 1, 1, 1, 0]]),
        ({"completion_mask": [0, 0, 0, 1, 1, 1], "assistant_masks": [1, 1, 1, 1, 0, 1]}, [[0, 0, 1, 0, 1, 0]]),
        ({"position_ids": [0, 1, 2, 0, 1, 2]}, [[1, 1, 1], [1, 1, 1]]),
        ({"seq_lengths": [3, 3]}, [[1, 1, 1], [1, 1, 1]]),
        ({"seq_idx": [4, 4, 5, 5, 5, 5]}, [[1, 1], [1, 1, 1, 1]]),
        ({"attention_mask": [1, 1, 1, 1, 1, 0], "seq_idx": [1, 1, 1, 1, 2, 2]}, [[1, 1, 1, 1], [1]]),
        ({"position_ids": [0, 1, 2, 0, 1, 2], "completion_mask": [1, 0, 1, 1, 1, 0]}, [[0, 1, 0], [1, 0, 0]]),
        ({"prompt": "text", "rows": [1, 2]}, [[1, 1, 1, 1, 1, 1]]),
    ],
)
def test_columns_say_which_rows_count_and_which_tokens_are_one_document(
    tmp_path: Path, columns: dict[str, Any], rows_that_count: list[list[int]]
) -> None:
    sequences = load_sequences(write_rows(tmp_path, **columns), tokenizer(), sequence_tokens=8)
    parts = [sequence for _, sequence in split_batch(collate([sequences[0]]))]
    masks = [np.ones(len(part), int) if part.loss_mask is None else part.loss_mask.astype(int) for part in parts]
    assert [mask.tolist() for mask in masks] == rows_that_count
    assert [i for part in parts for i in part.token_ids] == [5, 6, 7, 8, 9, 10][: sum(map(len, parts))]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"token_type_ids": [0] * 6}, "the column 'token_type_ids' has an entry for each token, and is not known"),
        ({"offset_mapping": [[0, 1]] * 6}, "the column 'offset_mapping' has an entry for each token"),
        ({"weights": [0.5] * 6}, "the column 'weights' has an entry for each token"),
        ({"position_ids": [3, 4, 5, 6, 7, 8]}, "rows.jsonl: row 0: .*its position is 3"),
        ({"seq_lengths": [3, 4]}, "rows.jsonl: row 0: expected lists of one length.*'seq_idx': 7"),
        (
            {"labels": [5, None, 7, 8, 9, 10]},
            "rows.jsonl: row 0: expected whole numbers, got an entry of labels that is",
        ),
        ({"completion_mask": [0.5] * 6}, "expected completion_mask to hold a list of whole numbers"),
        ({"input_ids": [5, 6, 30, 8, 9, 10]}, "rows.jsonl: row 0: token id 30 is outside the student's .* of 30 ids"),
        ({"input_ids": [5, -1, 7, 8, 9, 10]}, "rows.jsonl: row 0: token id -1 is outside"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_row_or_column(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    limits = StudentLimits(vocab_size=30)
    with pytest.raises(ValueError, match=message):
        load_sequences(write_rows(tmp_path, **columns), tokenizer(), sequence_tokens=8, limits=limits)


def test_an_unknown_column_of_tokens_is_refused_though_some_rows_lack_it(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "span_mask": mask} for mask in (None, [0, 1, 1], None)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="the column 'span_mask' has an entry for each token"):
        load_sequences([str(path)], tokenizer(), sequence_tokens=8)


def test_documents_that_some_rows_do_not_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [5, 6, 7], "seq_lengths": one}) for one in ([1, 2], None)))
    with pytest.raises(ValueError, match=r"row 1: expected whole numbers, got an entry of seq_lengths that is null"):
        load_sequences([str(path)], tokenizer(), sequence_tokens=8)


def test_ids_of_padding_are_nobodys_and_lengths_are_those_of_documents(tmp_path: Path) -> None:
    limits = StudentLimits(vocab_size=30, num_positions=4)
    padded = write_rows(tmp_path, input_ids=[5, 6, 7, 8, 30, 30], attention_mask=[1, 1, 1, 1, 0, 0])
    sequences = load_sequences(padded, tokenizer(), sequence_tokens=8, limits=limits)
    assert sequences["input_ids"] == [[5, 6, 7, 8]]
    packed = write_rows(tmp_path, position_ids=[0, 1, 2, 3, 0, 1])
    assert len(load_sequences(packed, tokenizer(), sequence_tokens=8, limits=limits)[0]["input_ids"]) == 6
    with pytest.raises(ValueError, match=r"rows.jsonl: row 0: 6 tokens, but the student has 4 positions"):
        load_sequences(write_rows(tmp_path), tokenizer(), sequence_tokens=8, limits=limits)
    text = tmp_path / "a.txt"
    text.write_text("w2 w3 w4 w5 w6")
    with pytest.raises(ValueError, match="sequence_tokens: 5 tokens, but the student has 4 positions"):
        load_sequences([str(text)], tokenizer(), sequence_tokens=5, limits=limits)
    with pytest.raises(ValueError, match="sequence 1 of the text: token id 6 is outside"):
        load_sequences([str(text)], tokenizer(), sequence_tokens=3, limits=StudentLimits(vocab_size=6))


def test_ends_of_rows_that_are_cut_off_are_counted_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"input_ids": [2] * n, "attention_mask": [1] * (n - 1) + [0]} for n in (3, 9, 5, 13)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sequences = load_sequences([str(tmp_path / "rows.jsonl")], tokenizer(), sequence_tokens=5)
    assert [len(ids) for ids in sequences["input_ids"]] == [2, 5, 4, 5]
    assert "2 of 4 rows are longer than sequence_tokens = 5: their ends, 10 tokens (38.5 % of all)" in caplog.text
    assert "the longest has 12" in caplog.text
    caplog.clear()
    load_sequences([str(tmp_path / "rows.jsonl")], tokenizer(), sequence_tokens=12)
    assert "longer" not in caplog.text


@pytest.mark.parametrize("other", [{"text": "w2"}, {"input_ids": [3]}])
def test_files_with_and_without_token_columns_are_not_mixed(tmp_path: Path, other: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [2], "labels": [2]}))
    (tmp_path / "b.jsonl").write_text(json.dumps(other))
    with pytest.raises(
        ValueError, match=r"same of text, input_ids.*a.jsonl has input_ids, labels; .*b.jsonl has (text|input)"
    ):
        load_sequences([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tokenizer(), sequence_tokens=1)


def test_files_of_several_kinds_share_a_text_column_and_rows_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w2 w3\n\nw4")
    documents = [{"content": "w5", "id": 1}, {"content": None, "id": 2}, {"content": "w6", "id": 3}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, documents)))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    packed = load_sequences(files, tokenizer(), sequence_tokens=2, text_column="content")
    assert packed["input_ids"] == [[2, 3], [4, 0], [5, 0], [6, 0]]


def test_splits_without_one_to_train_on_are_named(tmp_path: Path) -> None:
    DatasetDict({"validation": Dataset.from_dict({"input_ids": [[2]]})}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="expected a dataset or a split 'train', got the splits validation"):
        load_sequences([str(tmp_path / "rows")], tokenizer(), sequence_tokens=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot read .*missing.txt"),
        ("table.csv", "a,b", "cannot read .*table.csv: expected an existing .txt"),
        ("rows.jsonl", '{"body": "w2"}', "expected a column 'text' or 'input_ids', got body"),
        ("short.txt", "w2 w3", "less than one sequence of 8 tokens"),
        ("cut.jsonl", '{"text": "w2"}\n{"text": ', "cut.jsonl: expected rows in json"),
        ("empty.jsonl", "", "empty.jsonl: expected rows in json"),
        ("table.parquet", "w2", "table.parquet: expected rows in parquet"),
        ("numbers.jsonl", '{"text": 5}', r"numbers.jsonl: expected a text in each row of 'text', got Value\('int64'\)"),
    ],
)
def test_input_that_cannot_be_trained_on_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_sequences([str(tmp_path / name)], tokenizer(), sequence_tokens=8)
