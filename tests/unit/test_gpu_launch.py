"""The GPU path of the transformers teacher on a CPU: what it draws, packed, and that its launch never waits.

The kernels run in Triton's interpreter; a device that holds no numbers shows that the launch needs none.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from logitstream.errors import NonFiniteLogits
from logitstream.types import SparseTargets, TargetSpec, TokenSequence
from teacher_server.backend import ScoreRequest
from teacher_server.drawings import Drawing
from teacher_server.gpu import chunk_rows
from teacher_server.transformers_backend import TransformersBackend, split_by_budget
from tests.fake_gpu import FakeGpu
from tests.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from tests.unit.test_transformers_backend import INFO, dense, ragged, scored

draw_rows = pytest.importorskip("logitstream.kernels.draw_rows")
SPECS = [TargetSpec(num_samples=20), TargetSpec(sampler="threshold", threshold=0.1), TargetSpec(sampler="full")]


def backend_of(model: Any, **options: Any) -> tuple[TransformersBackend, FakeGpu]:
    gpu = FakeGpu(torch.device("cpu"))
    return TransformersBackend(model, INFO, gpu=gpu, **options), gpu


def requests_of(sequences: list[TokenSequence], specs: list[TargetSpec]) -> list[ScoreRequest]:
    return [ScoreRequest(sequence=one, spec=spec, draw_set=7) for one in sequences for spec in specs]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_gpu_draws_packed_is_what_a_cpu_draws(family: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(family)
    requests = requests_of(ragged([9, 3, 14], masked=True), SPECS)
    expected = scored(TransformersBackend(model, INFO), requests)
    backend, gpu = backend_of(model, logits_chunk_bytes=5 * 4 * VOCAB_SIZE)
    found = scored(backend, requests)
    assert backend.batches_at_once == 2
    assert gpu.fetches == len(backend.passes([9, 3, 14]))
    same = rows = 0
    for ours, theirs, request in zip(found, expected, requests, strict=True):
        assert ours.units == theirs.units
        assert ours.spec == request.spec
        error = np.abs(dense(ours) - dense(theirs)).max(axis=1)
        same += (error < 1e-4).sum()
        rows += len(error)
    assert same >= rows - 3


def test_the_families_that_pack_are_those_whose_attention_is_plain() -> None:
    torch.manual_seed(0)
    packing = {family: backend_of(tiny_model(family))[0].packs for family in FAMILIES}
    assert packing == {family: family != "gemma2" for family in FAMILIES}  # gemma2 bounds its attention's logits


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_logits_fail_their_own_request_alone() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    good, bad = ragged([6, 6])
    poisoned = TokenSequence(token_ids=np.where(bad.token_ids == 5, 6, bad.token_ids))
    poisoned.token_ids[2] = 5
    good = TokenSequence(token_ids=np.where(good.token_ids == 5, 6, good.token_ids))
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    backend, _ = backend_of(model)
    first, second = backend.score(requests_of([good, poisoned], SPECS[:1]))
    assert isinstance(first, SparseTargets)
    assert isinstance(second, NonFiniteLogits)


def test_a_launch_asks_the_device_for_no_number_and_reads_the_logits_once() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama").bfloat16()
    backend, gpu = backend_of(model, max_padded_tokens=40, logits_chunk_bytes=8 * 2 * VOCAB_SIZE)
    assert backend.packs
    model.to("meta")
    gpu.device = torch.device("meta")
    gpu.launched.clear()
    spec = TargetSpec(num_samples=20)
    sequences = ragged([9, 3, 14, 20], masked=True)
    drawings = [Drawing(one) for one in requests_of(sequences, [spec, TargetSpec(sampler="threshold", threshold=0.1)])]
    launched = backend.launch(drawings[::2])  # anything that needs a number of the device fails
    assert gpu.waits == []
    wanted = sum(len(drawing.rows) for drawing in drawings[::2])
    read = Counter[str]()
    for name, tensor in gpu.launched:
        read[name] += tensor.numel() * tensor.element_size()
    assert read["block_stats_kernel"] == wanted * VOCAB_SIZE * 2
    assert len(launched) == gpu.fetches == 2
    backend.launch(drawings[1::2])
    assert gpu.waits == []
    passes = backend.passes([len(one) for one in sequences])
    rows = [sum(len(drawings[2 * index].rows) for index in one) for one in passes]
    names = Counter(name for name, _ in gpu.launched)
    assert names["block_stats_kernel"] == 2 * sum(math.ceil(number / 8) for number in rows)


def test_a_warm_up_launches_every_kernel() -> None:
    backend, gpu = backend_of(tiny_model("llama"), max_padded_tokens=8)
    backend.warm_up()
    assert {name for name, _ in gpu.launched} == {name for name in vars(draw_rows) if name.endswith("_kernel")}


def test_chunks_of_logits_follow_the_memory() -> None:
    row = 151_936 * 2
    assert chunk_rows(row, logits_chunk_bytes=0, memory_bytes=None) == (24 << 20) // row
    assert chunk_rows(row, logits_chunk_bytes=0, memory_bytes=100 << 30) == (1 << 30) // row // 128 * 128
    assert chunk_rows(row, logits_chunk_bytes=0, memory_bytes=8 << 30) == (1 << 29) // row // 128 * 128
    assert chunk_rows(row, logits_chunk_bytes=0, memory_bytes=1 << 20) == 128
    assert chunk_rows(row, logits_chunk_bytes=row * 3 + 5, memory_bytes=100 << 30) == 3


def test_packed_passes_are_cut_by_tokens_alone() -> None:
    assert split_by_budget([3, 9, 4, 4, 20, 1], max_tokens=12) == [[0, 1], [2, 3], [4], [5]]
    assert split_by_budget([], max_tokens=12) == []
