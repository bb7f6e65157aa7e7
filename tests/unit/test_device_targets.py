"""Targets that are placed ahead: on torch's device `meta`, which holds nothing, and on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstream.testing import FakeTeacher
from logitstream.training.device_targets import PlacedTargets, Placer, placed_rows
from logitstream.training.target_stream import TargetStream
from tests.sparse_rows import random_targets

ROWS = 6


def test_the_arrays_travel_as_int32_and_meet_the_batchs_labels_and_mask() -> None:
    targets = random_targets(np.random.default_rng(0), num_rows=ROWS, vocab_size=50, max_entries=5)
    placed = Placer(torch.device("meta"))(targets)
    labels, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    rows = placed_rows(placed, labels=labels, loss_mask=mask)
    assert rows is not None
    for tensor, size in ((rows.starts, ROWS + 1), (rows.ids, targets.num_entries), (rows.counts, targets.num_entries)):
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("meta", torch.int32, (size,))
    assert (rows.units, rows.tail_units) == (targets.units, targets.tail_units)
    assert rows.labels.shape == rows.mask.shape == (ROWS,)
    assert rows.mask.dtype == torch.uint8


def test_a_part_of_placed_targets_is_placed_anew() -> None:
    targets = random_targets(np.random.default_rng(0), num_rows=ROWS, vocab_size=50, max_entries=5)
    part = Placer(torch.device("cpu"))(targets).slice_rows(0, 2)
    labels = torch.zeros(2, dtype=torch.int64)
    assert placed_rows(part, labels=labels, loss_mask=labels == 0) is None
    assert placed_rows(targets, labels=labels, loss_mask=labels == 0) is None


def test_a_streams_decode_thread_places_what_it_decodes() -> None:
    client = FakeTeacher(50)
    batches = [{"input_ids": torch.randint(50, (2, 4))} for _ in range(3)]
    plain = [batch["targets"] for batch in TargetStream(batches, client, draw_set=0)]
    stream = TargetStream(batches, client, draw_set=0)
    stream.place = Placer(torch.device("cpu"))
    for batch, expected in zip(stream, plain, strict=True):
        assert isinstance(batch["targets"], PlacedTargets)
        np.testing.assert_array_equal(batch["targets"].on_device.ids.numpy(), expected.token_ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_on_a_gpu_the_compute_stream_waits_for_the_copies() -> None:
    targets = random_targets(np.random.default_rng(0), num_rows=ROWS, vocab_size=50, max_entries=5)
    rows = Placer(torch.device("cuda", 0))(targets).on_device
    rows.wait()
    np.testing.assert_array_equal(rows.ids.cpu().numpy(), targets.token_ids)
