from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitstream.data.batches import leave_out, place_rows, split_batch
from logitstream.errors import CodecError
from logitstream.types import SparseTargets, TargetSpec, TokenSequence


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    num_sequences, num_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (num_sequences, num_tokens)
    batch = {"input_ids": torch.from_numpy(rng.integers(0, 1000, shape))}
    if draw(st.booleans()):
        lengths = rng.integers(0, num_tokens + 1, num_sequences)[:, None]
        mask = np.arange(num_tokens) < lengths
        batch["attention_mask"] = torch.from_numpy((mask if draw(st.booleans()) else mask[:, ::-1]).astype(np.int64))
    if draw(st.booleans()):
        batch["labels"] = batch["input_ids"].masked_fill(torch.from_numpy(rng.random(shape) < 0.3), -100)
    if draw(st.booleans()):
        batch["loss_mask"] = torch.from_numpy(rng.random(shape) < 0.5)
    return batch


def wanted_rows(batch: dict[str, torch.Tensor]) -> set[tuple[int, int]]:
    """The rule of TargetStream, position by position."""
    rows = set()
    num_sequences, num_tokens = batch["input_ids"].shape
    for b in range(num_sequences):
        for t in range(num_tokens):
            if "attention_mask" in batch and batch["attention_mask"][b, t] == 0:
                continue
            if "loss_mask" in batch:
                wanted = bool(batch["loss_mask"][b, t])
            elif "labels" in batch:
                wanted = t + 1 < num_tokens and int(batch["labels"][b, t + 1]) != -100
            else:
                wanted = True
            if wanted:
                rows.add((b, t))
    return rows


def echo(sequence: TokenSequence) -> SparseTargets:
    """One entry a wanted row: the row's own token id."""
    wanted = np.ones(len(sequence), bool) if sequence.loss_mask is None else sequence.loss_mask
    return SparseTargets(
        vocab_size=1000,
        units=3,
        row_offsets=np.concatenate([[0], np.cumsum(wanted)]).astype(np.int64),
        token_ids=sequence.token_ids[wanted],
        counts=np.full(int(wanted.sum()), 3, np.int32),
    )


@given(batches())
def test_each_wanted_row_gets_the_targets_of_its_own_position(batch: dict[str, torch.Tensor]) -> None:
    parts = [(rows, echo(sequence)) for rows, sequence in split_batch(batch)]
    num_tokens = batch["input_ids"].shape[1]
    targets = place_rows(parts, num_rows=batch["input_ids"].numel(), vocab_size=1000)
    targets.validate()
    found = {
        (int(row) // num_tokens, int(row) % num_tokens): int(token_id)
        for row, token_id in zip(targets.row_index(), targets.token_ids, strict=True)
    }
    assert found == {(b, t): int(batch["input_ids"][b, t]) for b, t in wanted_rows(batch)}


@given(batches())
def test_padding_and_sequences_without_a_wanted_row_are_not_sent(batch: dict[str, torch.Tensor]) -> None:
    parts = split_batch(batch)
    wanted = wanted_rows(batch)
    assert len(parts) == len({b for b, _ in wanted})
    for rows, sequence in parts:
        b = int(rows[0]) // batch["input_ids"].shape[1]
        present = batch["attention_mask"][b].bool() if "attention_mask" in batch else slice(None)
        assert sequence.token_ids.tolist() == batch["input_ids"][b][present].tolist()


def test_leaving_rows_out_changes_labels_and_mask_but_not_the_datasets_tensors() -> None:
    labels, mask = torch.arange(6).reshape(2, 3), torch.ones(2, 3, dtype=torch.bool)
    batch = {"input_ids": labels, "labels": labels, "loss_mask": mask}
    leave_out(batch, np.arange(3, 6))
    assert batch["labels"].tolist() == [[0, 1, 2], [-100, -100, -100]]
    assert batch["loss_mask"].tolist() == [[True] * 3, [False] * 3]
    assert labels.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert mask.all()


def test_leaving_rows_out_of_a_batch_without_labels_makes_a_mask() -> None:
    batch = {"input_ids": torch.zeros(2, 2, dtype=torch.int64)}
    leave_out(batch, np.array([0, 1]))
    assert batch["loss_mask"].tolist() == [[False, False], [True, True]]


def test_targets_with_a_row_too_few_are_refused() -> None:
    targets = echo(TokenSequence(token_ids=np.arange(3, dtype=np.int32)))
    with pytest.raises(CodecError, match="targets of 4 rows, one a token, got 3"):
        place_rows([(np.arange(4), targets)], num_rows=4, vocab_size=1000)


def test_targets_keep_how_they_were_drawn_and_do_not_mix() -> None:
    spec, other = TargetSpec(num_samples=1), TargetSpec(num_samples=1, temperature=2.0)
    drawn = replace(echo(TokenSequence(token_ids=np.arange(4, dtype=np.int32))), spec=spec)
    assert drawn.slice_rows(1, 3).spec == spec
    assert SparseTargets.concatenate([drawn, drawn]).spec == spec
    assert place_rows([(np.arange(4), drawn)], num_rows=6, vocab_size=1000).spec == spec
    assert place_rows([], num_rows=6, vocab_size=1000, spec=spec).spec == spec
    for stranger in (replace(drawn, spec=other), replace(drawn, spec=None)):
        with pytest.raises(ValueError, match="expected targets drawn alike"):
            SparseTargets.concatenate([drawn, stranger])
