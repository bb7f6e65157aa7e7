"""Documents of a packed row: found whichever way a batch says them, refused by name where it says something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstream.data.batches import split_batch
from logitstream.data.documents import for_the_model, number_documents, positions_of
from logitstream.data.loss_mask import next_token_labels, supervised_mask

Lengths = list[list[int]]
WAYS = ["position_ids", "seq_idx"]


def numbers_of(lengths: Lengths, num_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Each row's documents from its beginning, then padding."""
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return np.stack([np.pad(row, (0, num_tokens - len(row))) for row in rows]).astype(np.int64)


def say(way: str, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, torch.Tensor]:
    """The documents of a batch, told in one of the ways of collators; written token by token."""
    num_rows, num_tokens = numbers.shape
    positions = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
    for row in range(num_rows):
        for i in range(num_tokens):
            if i and numbers[row, i] == numbers[row, i - 1] > 0:
                positions[row, i] = positions[row, i - 1] + 1
    padding = {"attention_mask": torch.from_numpy((numbers > 0).astype(np.int64))}
    return {
        "position_ids": {"position_ids": positions} | padding,
        "seq_idx": {"seq_idx": torch.from_numpy(numbers).int() + 6} | padding,
    }[way]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    way=st.sampled_from(WAYS),
)
def test_each_document_is_sent_alone_however_the_batch_says_it(lengths: Lengths, padding: int, way: str) -> None:
    num_tokens = max(map(sum, lengths)) + padding
    numbers = numbers_of(lengths, num_tokens)
    input_ids = torch.arange(numbers.size).reshape(numbers.shape)
    batch = {"input_ids": input_ids} | say(way, numbers)
    assert (number_documents(batch) == numbers).all()
    parts = split_batch(batch)
    sent = [sequence.token_ids.tolist() for _, sequence in parts]
    assert sent == [
        input_ids[row][numbers[row] == n].tolist()
        for row in range(len(lengths))
        for n in range(1, len(lengths[row]) + 1)
    ]
    assert [rows.tolist() for rows, _ in parts] == sent, "the ids here are the places in the flattened batch"
    assert all(sequence.loss_mask is None for _, sequence in parts)
    inputs = for_the_model(batch)
    if numbers.max() > 1:
        assert "attention_mask" not in inputs
        assert inputs["position_ids"][torch.from_numpy(numbers > 0)].tolist() == [
            place for row in lengths for length in row for place in range(length)
        ]
    else:
        assert inputs.get("attention_mask", torch.ones_like(input_ids)).tolist() == (numbers > 0).astype(int).tolist()


def test_lengths_of_the_flattened_batch_need_position_ids_and_are_not_passed_on() -> None:
    batch = {"input_ids": torch.arange(9)[None], "cu_seq_lens_q": torch.tensor([0, 4, 5, 9], dtype=torch.int32)}
    for use in (split_batch, for_the_model, number_documents):
        with pytest.raises(ValueError, match="cu_seq_lens_q in a batch without position_ids: mark documents by"):
            use(batch)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3]])
    assert [len(sequence) for _, sequence in split_batch(batch)] == [4, 1, 4]
    assert for_the_model(batch | {"max_length_q": 4}).keys() == {"input_ids", "position_ids"}


def test_labels_do_not_cross_the_border_between_documents() -> None:
    """The rows that count are those of the same documents alone, whether labels are given, a mask, or neither."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    batch: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "position_ids": positions}
    assert next_token_labels(batch).tolist() == [[6, 7, -100, 9, -100]]
    assert supervised_mask(batch).tolist() == [[True, True, False, True, False]]
    assert supervised_mask(batch, with_targets=True).all()
    batch["labels"] = batch["input_ids"]
    assert next_token_labels(batch).tolist() == [[6, 7, -100, 9, -100]]
    assert supervised_mask(batch, with_targets=True).tolist() == [[True, True, False, True, False]]
    batch["loss_mask"] = torch.ones(1, 5, dtype=torch.bool)
    assert supervised_mask(batch, with_targets=True).all()


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_a_mask_of_tokens_counts_the_row_before_each(name: str) -> None:
    batch: dict[str, Any] = {"input_ids": torch.arange(6)[None], name: torch.tensor([[0, 0, 0, 1, 1, 1]])}
    wanted = [[False, False, True, True, True, False]]
    assert supervised_mask(batch, with_targets=True).tolist() == wanted
    assert supervised_mask(batch).tolist() == wanted
    ((_, sequence),) = split_batch(batch)
    assert sequence.loss_mask is not None
    assert [sequence.loss_mask.tolist()] == wanted
    batch["loss_mask"] = torch.tensor([[1, 1, 1, 0, 1, 1]])
    assert supervised_mask(batch, with_targets=True).tolist() == [[False, False, True, False, True, False]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(WAYS))
def test_what_is_sent_is_what_the_loss_counts(seed: int, way: str) -> None:
    rng = np.random.default_rng(seed)
    lengths = [[int(n) for n in rng.integers(1, 5, rng.integers(1, 4))] for _ in range(3)]
    numbers = numbers_of(lengths, max(map(sum, lengths)) + 1)
    batch: dict[str, Any] = {"input_ids": torch.from_numpy(rng.integers(0, 99, numbers.shape))} | say(way, numbers)
    for name in ("loss_mask", "completion_mask", "assistant_masks"):
        if rng.random() < 0.4:
            batch[name] = torch.from_numpy(rng.integers(0, 2, numbers.shape))
    if rng.random() < 0.5:
        batch["labels"] = batch["input_ids"].masked_fill(torch.from_numpy(rng.random(numbers.shape) < 0.3), -100)
    sent = np.zeros(numbers.size, bool)
    for rows, sequence in split_batch(batch):
        sent[rows] = True if sequence.loss_mask is None else sequence.loss_mask
    assert (sent.reshape(numbers.shape) == supervised_mask(batch | {"targets": object()}).numpy()).all()


def test_padding_on_the_left_does_not_move_the_students_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = for_the_model({"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": mask})
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert inputs["attention_mask"].tolist() == mask.tolist()
    right = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "attention_mask": mask[:1].flip(1)}
    assert "position_ids" not in for_the_model(right)


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"token_type_ids": torch.zeros(1, 4)}, "token_type_ids of shape .1, 4. in a batch cannot be told"),
        ({"inputs_embeds": torch.zeros(1, 4, 8)}, "inputs_embeds of shape"),
        ({"pixel_values": torch.zeros(1, 3, 2, 2)}, "pixel_values of shape"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens of shape"),
        (
            {"position_ids": torch.tensor([[3, 4, 5, 6]])},
            "token 0: its position is 3, expected position_ids",
        ),
        ({"position_ids": torch.tensor([[0, 1, 5, 6]])}, "token 2: its position is 5"),
        ({"position_ids": torch.zeros(3, 1, 4, dtype=torch.int64)}, "position_ids of shape .1, 4., got .3, 1, 4."),
        ({"attention_mask": CAUSAL[None, None]}, "attention_mask of shape .1, 4., got .1, 1, 4, 4."),
        ({"attention_mask": CAUSAL[None]}, "attention_mask of shape .1, 4., got .1, 4, 4."),
        ({"attention_mask": {"full_attention": CAUSAL}}, "attention_mask of shape"),
        (
            {"attention_mask": torch.tensor([[1, 2, 1, 2]])},
            "an attention_mask of 0 .padding. and 1: mark documents by position_ids or seq_idx",
        ),
        ({"attention_mask": torch.tensor([[0.0, -1e9, 0.0, 0.0]])}, "expected an attention_mask"),
        (
            {"seq_idx": torch.tensor([[0, 0, 1, 1]]), "position_ids": torch.tensor([[0, 1, 2, 0]])},
            "row 0 of a batch, token 2: its position is 2, expected position_ids that",
        ),
    ],
)
def test_what_the_teacher_cannot_be_told_is_refused_by_name(extra: dict[str, Any], message: str) -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)} | extra
    with pytest.raises(ValueError, match=message):
        split_batch(batch)
    with pytest.raises(ValueError, match=message):
        for_the_model(batch)


def test_one_entry_a_row_and_things_that_are_no_tensors_pass() -> None:
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "index": torch.tensor([7, 8]), "name": ["a", "b"]}
    assert for_the_model(batch) == batch
    assert len(split_batch(batch)) == 2


def test_padding_inside_a_document_of_a_packed_row_is_refused() -> None:
    mask, positions = torch.tensor([[1, 0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 0, 1]])
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "attention_mask": mask, "position_ids": positions}
    with pytest.raises(ValueError, match="row 0 of a batch: expected packed documents without padding inside"):
        for_the_model(batch)


def test_places_in_documents_count_tokens_alone() -> None:
    numbers = np.array([[0, 1, 1, 0, 1, 2, 2, 3, 0]])
    assert positions_of(numbers).tolist() == [[0, 0, 1, 0, 2, 0, 1, 0, 0]]
