"""Budgets on a made-up teacher: met on the text that they were measured on, and nearly on another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from logitstream.budget import Draw, choose, measure
from logitstream.codec import encode
from logitstream.sampling import sample
from logitstream.types import TargetSpec, TokenSequence

VOCAB_SIZE, LENGTH = 2000, 64


def logits_of(sequence: TokenSequence) -> torch.Tensor:
    """A Zipf distribution per row, steeper in some rows than in others."""
    generator = torch.Generator().manual_seed(int(sequence.token_ids[0]))
    ranks = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator) for _ in range(LENGTH)]) + 1.0
    return -(0.7 + 1.5 * torch.rand(LENGTH, 1, generator=generator)) * ranks.log()


def teacher() -> tuple[Draw, list[int]]:
    calls: list[int] = []

    def draw(sequences: Sequence[TokenSequence], spec: TargetSpec, draw_set: int) -> list[bytes]:
        calls.append(draw_set)
        return [encode(sample(logits_of(s), spec, s, draw_set=draw_set)) for s in sequences]

    return draw, calls


def text(first: int, num_sequences: int = 6) -> list[TokenSequence]:
    return [
        TokenSequence(token_ids=np.arange(first + i, first + i + LENGTH, dtype=np.int32)) for i in range(num_sequences)
    ]


UNBIASED = [TargetSpec(), TargetSpec(sampler="multinomial"), TargetSpec(sampler="threshold")]


@pytest.mark.parametrize("spec", [*UNBIASED, TargetSpec(sampler="top_k", top_k=100)], ids=lambda s: s.sampler)
@pytest.mark.parametrize("budget", [10.0, 40.0])
def test_a_byte_budget_is_filled_and_not_exceeded(spec: TargetSpec, budget: float) -> None:
    draw, calls = teacher()
    choice = choose(draw, text(0), spec, bytes_per_token=budget)
    # From k = 3 to 4 is a quarter more bytes; everything else here comes closer.
    assert 0.8 * budget < choice.measured.bytes_per_token <= budget
    assert len(calls) <= 15
    assert choice.sentence.startswith(f"at most {budget:g} bytes a token: chose {spec.sampler} with ")
    other = measure(draw, text(1000), choice.spec, with_noise=False)
    assert other.bytes_per_token == pytest.approx(choice.measured.bytes_per_token, rel=0.15)


@pytest.mark.parametrize("spec", UNBIASED, ids=lambda s: s.sampler)
def test_a_noise_budget_is_met_with_the_fewest_samples(spec: TargetSpec) -> None:
    draw, _ = teacher()
    choice = choose(draw, text(0), spec, noise=0.0135)
    assert choice.measured.noise is not None
    assert 0.9 * 0.0135 < choice.measured.noise <= 0.0135
    other = measure(draw, text(1000), choice.spec, with_noise=True)
    assert other.noise == pytest.approx(0.0135, rel=0.25)


def test_noise_from_two_draws_is_the_squared_error() -> None:
    draw, _ = teacher()
    sequences, spec = text(0, 12), TargetSpec(sampler="multinomial", num_samples=30)
    measured = measure(draw, sequences, spec, with_noise=True)
    probs = torch.cat([torch.softmax(logits_of(s).double(), dim=-1) for s in sequences])
    expected = float((1 - probs.square().sum(dim=1)).mean()) / 30
    assert measured.noise == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("spec", [*UNBIASED, TargetSpec(sampler="top_k")], ids=lambda s: s.sampler)
def test_where_more_samples_take_no_more_bytes_no_more_are_asked_for(spec: TargetSpec) -> None:
    def draw(sequences: Sequence[TokenSequence], spec: TargetSpec, draw_set: int) -> list[bytes]:
        one_hot = torch.full((LENGTH, VOCAB_SIZE), -torch.inf)
        one_hot[:, 3] = 0.0
        return [encode(sample(one_hot, spec, s, draw_set=draw_set)) for s in sequences]

    choice = choose(draw, text(0), spec, bytes_per_token=50.0)
    assert (choice.spec.num_samples, choice.spec.threshold, choice.spec.top_k) == (50, 0.02, 12)


def test_bytes_and_noise_are_those_of_the_rows_that_are_wanted() -> None:
    draw, _ = teacher()
    mask = np.arange(LENGTH) % 8 == 0
    masked = [TokenSequence(token_ids=one.token_ids, loss_mask=mask) for one in text(0, 24)]
    of_all, of_some = (measure(draw, one, TargetSpec(), with_noise=True) for one in (text(0, 24), masked))
    assert of_some.entries_per_token == pytest.approx(of_all.entries_per_token, rel=0.2)
    assert of_some.noise == pytest.approx(of_all.noise, rel=0.3)


def test_budgets_that_cannot_be_met_are_refused() -> None:
    draw, _ = teacher()
    with pytest.raises(ValueError, match=r"at most 0\.1 bytes a token: no num_samples of"):
        choose(draw, text(0, 1), TargetSpec(num_samples=4), bytes_per_token=0.1)
    with pytest.raises(ValueError, match="needs an unbiased sampler, not top_k"):
        choose(draw, text(0, 1), TargetSpec(sampler="top_k"), noise=0.01)
    with pytest.raises(ValueError, match="no size to choose"):
        choose(draw, text(0, 1), TargetSpec(sampler="full"), bytes_per_token=16)
