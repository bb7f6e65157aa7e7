"""The order of sequences and what a step counts do not depend on how many processes share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from torch.utils.data import DataLoader, Dataset

from logitstream.data.documents import Batch
from logitstream.data.loss_mask import supervised_mask
from logitstream.training.distributed import without_repeats

NUM_TOKENS = 3


class Numbers(Dataset[Batch]):
    """Sequences that consist of their own number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": torch.full((NUM_TOKENS,), index)}


def dataloader(number: int, *, batch_size: int, processes: int, rank: int, **options: Any) -> DataLoaderShard:
    plain: DataLoader[Batch] = DataLoader(Numbers(number), batch_size=batch_size, drop_last=options.pop("drop", False))
    shard: DataLoaderShard = prepare_data_loader(plain, num_processes=processes, process_index=rank, **options)
    return shard


def counted(loader: DataLoaderShard, *, rank: int, skip: int = 0) -> list[list[int]]:
    """Each batch's sequences that count, by their numbers."""
    batches = iter(loader)
    for _ in range(skip):
        next(batches)
    rows = []
    for batch in without_repeats(batches, loader, process_index=rank):
        counts = supervised_mask(batch | {"targets": "some"}).all(1)
        assert torch.equal(counts, supervised_mask(batch | {"targets": "some"}).any(1)), (
            "whole sequences count or do not"
        )
        rows.append(batch["input_ids"][counts, 0].tolist())
    return rows


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("number", [1, 2, 5, 11, 12, 13, 18, 23, 24])
@pytest.mark.parametrize("split", [False, True])
def test_each_step_counts_the_sequences_that_one_process_would(number: int, processes: int, split: bool) -> None:
    own = 6 if split else 6 // processes
    loaders = [
        dataloader(number, batch_size=own, processes=processes, rank=rank, split_batches=split)
        for rank in range(processes)
    ]
    ranks = [counted(loader, rank=rank) for rank, loader in enumerate(loaders)]
    steps = [[number for part in step for number in part] for step in zip(*ranks, strict=True)]
    assert steps == [list(range(start, min(start + 6, number))) for start in range(0, number, 6)]


def test_a_resumed_epoch_leaves_the_repeats_out_too() -> None:
    loader = dataloader(13, batch_size=3, processes=2, rank=1)
    assert counted(loader, rank=1, skip=1) == [[9, 10, 11], []]


def test_nothing_is_left_out_where_nothing_is_repeated() -> None:
    dropping = dataloader(13, batch_size=3, processes=2, rank=1, drop=True)
    assert counted(dropping, rank=1) == [[3, 4, 5], [9, 10, 11]]
    uneven = dataloader(13, batch_size=3, processes=2, rank=0, even_batches=False)
    assert counted(uneven, rank=0) == [[0, 1, 2], [6, 7, 8], [12]]
