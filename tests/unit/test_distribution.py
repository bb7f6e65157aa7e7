"""The blocked search against a running sum over the whole vocabulary, and shares against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from logitstream.distribution import GATHER_BYTES, Distribution, locate, locate_plain, scratch
from logitstream.errors import NonFiniteLogits


def points_of(num_rows: int, num_points: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1 - torch.rand(num_rows, num_points, generator=generator, dtype=torch.float64)).sort(dim=1).values


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 1 << 32), st.floats(0.1, 30), st.floats(0, 0.95))
def test_locate_finds_what_the_plain_search_finds(vocab_size: int, seed: int, scale: float, share_cut: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocab_size, generator=generator) * scale
    cut = torch.rand(6, vocab_size, generator=generator) < share_cut
    cut[:, seed % vocab_size] = False
    logits[cut] = -torch.inf
    distribution = Distribution.of_logits(logits, 1.0)
    points = points_of(6, 50, seed)
    points[:, -1] = 1.0
    found = torch.from_numpy(distribution.locate(points.numpy()))
    # A point on the border of two ids may fall on either side, by the rounding of a block's float32 sum.
    assert (found != locate_plain(distribution.values, points))[:, :-1].double().mean() < 0.01
    assert distribution.values.gather(1, found).min() > 0


@pytest.mark.parametrize("vocab_size", [49_152, 50_257, 151_936, 262_144])
def test_locate_at_real_vocabulary_sizes(vocab_size: int) -> None:
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0)) * 4
    distribution, points = Distribution.of_logits(logits, 1.0), points_of(3, 5000)
    found = torch.from_numpy(distribution.locate(points.numpy()))
    assert (found != locate_plain(distribution.values, points)).double().mean() < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1 << 32), st.floats(0.01, 40), st.floats(0.3, 3))
@example(122, 85287247, 36.5, 2.342177027187476)
def test_shares_are_those_of_the_exact_softmax(vocab_size: int, seed: int, scale: float, temperature: float) -> None:
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    logits[0, seed % vocab_size] = -torch.inf if vocab_size > 1 else 0.0
    exact = torch.softmax((logits.double() / temperature), dim=-1)
    distribution = Distribution.of_logits(logits, temperature)
    values = distribution.values[:, :vocab_size].double() / torch.from_numpy(distribution.total())[:, None]
    seen = exact > 1e-30
    # Relative, in 10^-6: an exponent below 70 errs by roundings of the difference (at most 4.1), of the quotient (3.8)
    # and of the exponential.
    assert ((values / exact)[seen] - 1).abs().max() < 1.3e-5
    assert values[exact == 0].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 17, 64, 700, 50_257])
def test_the_compiled_rows_are_those_of_plain_torch(vocab_size: int, dtype: torch.dtype) -> None:
    """The first row's largest logit is far above its first 1,024, so that its exponentials are taken twice."""
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(3)) * 4
    logits[0, -1] = 90.0
    logits = logits.to(dtype)
    compiled, plain = (make(logits, 0.7) for make in (Distribution.of_logits, Distribution.of_logits_plain))
    for found, expected in ((compiled.values, plain.values), (compiled.sums, plain.sums)):
        shares = found.double() / torch.from_numpy(compiled.total())[:, None]
        torch.testing.assert_close(shares, expected.double(), rtol=1.5e-5, atol=1e-12)
    points = points_of(5, 40)
    located = torch.from_numpy(compiled.locate(points.numpy()))
    assert (located != locate(compiled.values, compiled.sums, points)).double().mean() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_first_row_without_finite_logits_is_named(bad: float, num_threads: int) -> None:
    logits = torch.zeros(40, 100)
    logits[[23, 37]] = bad
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with pytest.raises(NonFiniteLogits, match="row 123 "):
            Distribution.of_logits(logits, 1.0, row_names=np.arange(100, 140))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab_size", [17, 700, 49_152, 50_257])
def test_a_row_does_not_depend_on_the_rows_beside_it(vocab_size: int, temperature: float) -> None:
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(2)) * 4
    together = Distribution.of_logits(logits, temperature, memory=scratch(logits, 9))
    for row in range(9):
        alone = Distribution.of_logits(logits[row : row + 1], temperature)
        assert torch.equal(alone.values[0], together.values[row])
        assert torch.equal(alone.sums[0], together.sums[row])


def test_entries_of_a_share_are_found_and_taken_out() -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)) * 3
    probs = torch.softmax(logits.double(), dim=-1)
    distribution = Distribution.of_logits(logits, 1.0)
    rows, ids, shares = distribution.at_least(0.03)
    expected_rows, expected_ids = (probs >= 0.03).nonzero(as_tuple=True)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(shares, probs[expected_rows, expected_ids], rtol=1e-5)
    before = distribution.total()
    left = torch.where(probs >= 0.03, 0.0, probs).sum(dim=1)
    np.testing.assert_allclose(distribution.without(rows, ids).total() / before, left, rtol=1e-4, atol=1e-9)


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            self.num_bytes = max(self.num_bytes, tensor.nbytes if isinstance(tensor, torch.Tensor) else 0)
        return result


def test_the_search_gathers_a_bounded_number_of_blocks() -> None:
    distribution = Distribution.of_logits(torch.randn(9, 500, generator=torch.Generator().manual_seed(0)), 1.0)
    points = points_of(9, 40_000)
    with LargestResult() as largest:
        found = locate(distribution.values, distribution.sums, points)
    assert largest.num_bytes < GATHER_BYTES < 9 * 40_000 * 64 * 12
    assert (found != locate_plain(distribution.values, points)).double().mean() < 1e-3


def test_the_search_compiles_to_the_same_ids() -> None:
    """The uniforms, the check for bad rows and the counting of equal ids stay on the host."""
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 4
    distribution, points = Distribution.of_logits(logits, 0.7), points_of(6, 20)
    expected = locate(distribution.values, distribution.sums, points)
    compiled = torch.compile(locate, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(distribution.values, distribution.sums, points), expected)
