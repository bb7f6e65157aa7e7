"""The teacher on a GPU: its kernels, its launch, its memory. Never run so far: no GPU was at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from logitstream.sampling import sample
from logitstream.types import SparseTargets, TargetSpec, TokenSequence
from teacher_server.backend import ScoreRequest
from teacher_server.drawings import Drawing
from teacher_server.transformers_backend import TransformersBackend
from tests.unit.test_draw_kernels import (  # noqa: F401  which run on this device where there is one
    SPECS,
    entries,
    named_rows,
    test_bad_rows_are_marked_and_the_others_drawn,
    test_every_sampler_draws_what_the_table_draws,
    test_points_fall_where_the_exact_distribution_has_them,
    test_rows_of_a_wider_head_and_in_another_chunk_are_drawn_alike,
    test_uniforms_are_the_hosts_bit_for_bit,
)
from tests.unit.test_transformers_backend import INFO

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
draw = pytest.importorskip("logitstream.kernels.draw")
VOCAB = 32_000


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB
    )
    model: Any = LlamaForCausalLM(config)
    return model.to("cuda", torch.bfloat16)


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def requests(lengths: list[int]) -> list[ScoreRequest]:
    rng = np.random.default_rng(0)
    sequences = [TokenSequence(token_ids=rng.integers(0, VOCAB, n).astype(np.int32)) for n in lengths]
    return [ScoreRequest(sequence=one, spec=TargetSpec(num_samples=20)) for one in sequences]


def test_rows_beyond_two_to_the_31_elements_are_drawn_as_alone() -> None:
    vocab_size, num_rows = 151_936, 14_400
    logits = torch.randn(num_rows, vocab_size, device="cuda", dtype=torch.bfloat16)
    for spec in SPECS:
        names, _ = named_rows(spec, 12)
        last = draw.RowNames(names.keys, names.sequences[-4:], names.rows[-4:])
        many = draw.RowNames(names.keys, *(one[-1:].expand(num_rows).clone() for one in names[1:]))
        for whole, part in zip(many[1:], last[1:], strict=True):
            whole[-4:] = part
        assert entries(draw.draw(logits, spec, many)[:, -4:]) == entries(draw.draw(logits[-4:].clone(), spec, last))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_is_drawn_on_from_a_thread_whose_current_one_is_the_first() -> None:
    logits = torch.randn(6, 1000, device="cuda:1", dtype=torch.bfloat16)
    names, _ = named_rows(SPECS[0], 6)
    there = draw.draw(logits, SPECS[0], draw.RowNames(*(one.to("cuda:1") for one in names)))
    assert torch.equal(there.cpu(), draw.draw(logits.to("cuda:0"), SPECS[0], names).cpu())


def test_draws_are_allowed_in_deterministic_mode() -> None:
    logits = torch.randn(6, 1000, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        for spec in SPECS:
            draw.draw(logits, spec, named_rows(spec, 6)[0])
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_public_draw_on_a_gpu_is_that_of_the_cpu_but_for_a_neighbour() -> None:
    logits = torch.randn(60, 5000, dtype=torch.bfloat16) * 3
    sequence = TokenSequence(token_ids=np.zeros(60, np.int32))
    for spec in SPECS[:4]:
        there, here = sample(logits.cuda(), spec, sequence), sample(logits, spec, sequence)
        rows = [(one.slice_rows(r, r + 1) for one in (there, here)) for r in range(60)]
        assert sum(np.array_equal(a.token_ids, b.token_ids) for a, b in rows) >= 57


def test_a_batch_is_packed_and_launched_without_a_wait(model: Any, sync_is_an_error: None) -> None:
    backend = TransformersBackend(model, INFO)
    assert backend.packs
    batch = requests([300, 5, 77, 1])
    padded = TransformersBackend(model.cpu().float(), INFO).score(batch)
    model.to("cuda", torch.bfloat16)
    backend.score(batch)
    drawings = [Drawing(request) for request in batch]
    torch.cuda.set_sync_debug_mode("error")
    backend.launch(drawings)
    torch.cuda.set_sync_debug_mode("default")
    for drawing, expected in zip(drawings, padded, strict=True):
        found = drawing.result(VOCAB)
        assert isinstance(found, SparseTargets)
        assert isinstance(expected, SparseTargets)
        found.validate()
        assert found.num_rows == expected.num_rows
        assert (np.add.reduceat(found.counts, found.row_offsets[:-1]) == 20).all()


def test_two_threads_may_score_at_once(model: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    backend = TransformersBackend(model, INFO)
    batches = [requests([40 + n, 9]) for n in range(8)]
    alone = [backend.score(batch) for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(backend.score, batches))
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert isinstance(a, SparseTargets)
            assert isinstance(b, SparseTargets)
            assert np.array_equal(a.token_ids, b.token_ids)


def test_logits_and_draws_stay_within_the_chunk_and_a_fifth(model: Any) -> None:
    chunk = 64 << 20
    backend = TransformersBackend(model, INFO, logits_chunk_bytes=chunk)
    batch = requests([4000])
    backend.score(batch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        backend.lm.hidden(torch.zeros(1, 4000, dtype=torch.long, device="cuda"), **bounds(4000))
    body = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    backend.score(batch)
    assert torch.cuda.max_memory_allocated() - before <= body + 1.2 * chunk


def bounds(length: int) -> dict[str, Any]:
    ends = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    return {
        "position_ids": torch.arange(length, device="cuda")[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), length),
    }


def test_out_of_memory_leaves_nothing_behind_and_a_smaller_batch_fits(model: Any) -> None:
    backend = TransformersBackend(model, INFO, logits_chunk_bytes=1 << 30)
    torch.cuda.empty_cache()
    used = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + (200 << 20)) / total)
    try:
        with pytest.raises(MemoryError):
            backend.score(requests([4000] * 8))
        assert torch.cuda.memory_allocated() <= used + (8 << 20)
        (found,) = backend.score(requests([200]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert isinstance(found, SparseTargets)
