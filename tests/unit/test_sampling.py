"""The samplers on made-up distributions; a real teacher's are in tests/integration/test_unbiased_targets.py."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstream.errors import NonFiniteLogits
from logitstream.samplers import FULL_UNITS, SAMPLERS
from logitstream.sampling import draw, draw_key, row_uniforms, sample, uniforms_per_row
from logitstream.types import SparseTargets, TargetSpec, TokenSequence

SPECS = [
    TargetSpec(num_samples=50),
    TargetSpec(num_samples=1),
    TargetSpec(sampler="multinomial", num_samples=20),
    TargetSpec(sampler="multinomial", num_samples=20, proposal_temperature=0.8),
    TargetSpec(sampler="threshold", threshold=0.02),
    TargetSpec(sampler="threshold", threshold=1.0),
    TargetSpec(sampler="top_k", top_k=12),
    TargetSpec(sampler="top_k_ghost", top_k=12),
    TargetSpec(sampler="full", temperature=2.0),
]


def sequence_of(length: int, mask: list[bool] | None = None) -> TokenSequence:
    return TokenSequence(
        token_ids=np.arange(length, dtype=np.int32), loss_mask=None if mask is None else np.array(mask, np.bool_)
    )


def uniforms_of(spec: TargetSpec, sequence: TokenSequence, draw_set: int = 0) -> npt.NDArray[np.float64]:
    return row_uniforms(spec, draw_key(spec, sequence, draw_set), np.arange(len(sequence)))


def made_up_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def probs_of(logits: torch.Tensor) -> npt.NDArray[np.float64]:
    return torch.softmax(logits.double(), dim=-1).numpy()


def dense(targets: SparseTargets) -> npt.NDArray[np.float64]:
    out = np.zeros((targets.num_rows, targets.vocab_size))
    out[targets.row_index(), targets.token_ids] = targets.weights()
    return out


def same(a: SparseTargets, b: SparseTargets) -> bool:
    return (
        np.array_equal(a.row_offsets, b.row_offsets)
        and np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.counts, b.counts)
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_targets_are_a_valid_csr_of_the_specs_units(spec: TargetSpec) -> None:
    targets = sample(made_up_logits(7, 1000), spec, sequence_of(7))
    targets.validate()
    assert (targets.num_rows, targets.units, targets.tail_units) == (7, spec.kind.units(spec), spec.kind.tail_units)
    assert np.all(np.diff(targets.row_offsets) > 0)


@pytest.mark.parametrize("num_samples", [1, 13, 50, 1000])
def test_systematic_counts_are_the_floor_or_ceiling_and_sum_to_n(num_samples: int) -> None:
    logits = made_up_logits(20, 500)
    targets = sample(logits, TargetSpec(num_samples=num_samples), sequence_of(20))
    expected = probs_of(logits) * num_samples
    counts = dense(targets) * num_samples
    assert np.abs(counts - expected).max() < 1 + 1e-4
    np.testing.assert_array_equal(np.rint(counts.sum(axis=1)), num_samples)


def test_systematic_equals_the_formula_on_the_running_sum() -> None:
    logits, spec = made_up_logits(50, 300), TargetSpec(num_samples=37)
    u = uniforms_of(spec, sequence_of(50))
    running = np.cumsum(probs_of(logits), axis=1)
    steps = np.floor(running * 37 + u)
    expected = np.diff(steps, axis=1, prepend=0)
    got = np.rint(dense(sample(logits, spec, sequence_of(50))) * 37)
    # float32 against float64: a point in 10^7 may fall on the other side of an id's border.
    assert np.mean(got != expected) < 1e-3


def test_multinomial_draws_what_its_uniforms_say() -> None:
    logits, spec = made_up_logits(10, 300), TargetSpec(sampler="multinomial", num_samples=40)
    u = uniforms_of(spec, sequence_of(10))
    running = np.cumsum(probs_of(logits), axis=1)
    expected = np.stack(
        [np.bincount(np.searchsorted(c, 1 - row), minlength=300) for c, row in zip(running, u, strict=True)]
    )
    got = np.rint(dense(sample(logits, spec, sequence_of(10))) * 40)
    assert np.abs(got - expected).sum() <= 2


def test_a_proposal_temperature_keeps_the_sum_unbiased_and_not_exact() -> None:
    logits = made_up_logits(30, 400)
    spec = TargetSpec(sampler="multinomial", num_samples=50, proposal_temperature=0.7)
    sums = np.array([dense(sample(logits, spec, sequence_of(30), draw_set=i)).sum() for i in range(150)]) / 30
    # 150 independent draw sets: |z| < 5 fails once in 1.7 million runs.
    assert abs(sums.mean() - 1) < 5 * sums.std() / np.sqrt(150)
    assert sums.std() > 1e-3


def test_threshold_keeps_the_head_and_sums_to_one() -> None:
    logits = made_up_logits(200, 1000)
    spec = TargetSpec(sampler="threshold", threshold=0.02)
    targets = sample(logits, spec, sequence_of(200))
    probs, weights = probs_of(logits), dense(targets)
    head = probs >= 0.0201
    assert np.abs(weights - probs)[head].max() <= 1.01 / targets.units
    # Exact but for rows whose tail is below θ, which it keeps with probability tail/θ.
    small_tail = 1 - np.where(head, probs, 0).sum(axis=1) < 0.021
    np.testing.assert_allclose(weights.sum(axis=1)[~small_tail], 1, atol=1e-6)


def test_threshold_tail_below_theta_is_unbiased() -> None:
    # One id of 0.97 and 30 of 0.001: a tail of 0.03 < θ = 0.05 gives one point of weight θ in 60 % of the draws.
    probs = torch.tensor([0.97] + [0.001] * 30)
    logits = probs.log().expand(100, -1)
    spec = TargetSpec(sampler="threshold", threshold=0.05)
    tails = [dense(sample(logits, spec, sequence_of(100), draw_set=i))[:, 1:].sum(axis=1) for i in range(60)]
    values = np.concatenate(tails)
    assert set(np.round(values, 6)) == {0.0, 0.05}
    # 6,000 draws, |z| < 5.
    assert abs(values.mean() - 0.03) < 5 * values.std() / np.sqrt(len(values))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0.01, 0.6), st.integers(3, 40))
def test_threshold_never_hits_an_id_twice(seed: int, threshold: float, vocab_size: int) -> None:
    logits = made_up_logits(16, vocab_size, seed, scale=1.0)
    targets = sample(logits, TargetSpec(sampler="threshold", threshold=threshold, seed=seed), sequence_of(16))
    targets.validate()
    assert np.all(dense(targets).sum(axis=1) < 1 + threshold + 1e-6)


def assert_unbiased(probs: list[float], spec: TargetSpec, num_rows: int, seed: int = 0) -> None:
    """The mean of many draws is the distribution, by the empirical Bernstein bound (Audibert et al. 2009), which holds
    for rare entries too: a wrong alarm once in 3·10^8 entries.
    """
    logits = torch.tensor(probs, dtype=torch.float64).log().float()
    uniforms = np.random.default_rng(seed).random((num_rows, uniforms_per_row(spec)))
    targets = draw(logits.expand(num_rows, -1).contiguous(), spec, uniforms)
    targets.validate()
    expected = probs_of(logits)
    weights = targets.weights().astype(np.float64)
    mean, square = (np.bincount(targets.token_ids, w, len(probs)) / num_rows for w in (weights, weights**2))
    largest = 2.0
    if spec.proposal_temperature != 1.0:
        proposal = expected**spec.proposal_temperature
        largest += float((expected / proposal).max() * proposal.sum())
    log_odds = np.log(3 * 3e8)
    bound = np.sqrt(2 * log_odds * np.maximum(square - mean**2, 0) / num_rows) + 3 * largest * log_odds / num_rows
    assert np.all(np.abs(mean - expected) < bound + 1e-6), (probs, spec, mean - expected, bound)


@st.composite
def near_the_threshold(draw: st.DrawFn) -> tuple[list[float], float]:
    """θ and a few ids, most of them between θ/2 and θ, where tail points are about to hit an id twice."""
    theta = draw(st.sampled_from([0.07, 0.1, 0.13, 0.25, 0.4]))
    shares = draw(st.lists(st.one_of(st.floats(0.45, 1.02), st.sampled_from([0.5, 0.999, 1.0, 1e-4])), min_size=1))
    kept = [theta * share for share in shares[: int(0.95 / (1.02 * theta))]]
    return [1 - sum(kept), *kept], theta


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(near_the_threshold(), st.sampled_from(["threshold", "systematic", "flat", "sharp"]), st.integers(0, 1000))
def test_draws_of_few_ids_are_unbiased(case: tuple[list[float], float], sampler: str, seed: int) -> None:
    probs, theta = case
    spec = {
        "threshold": TargetSpec(sampler="threshold", threshold=theta),
        "systematic": TargetSpec(num_samples=round(1 / theta)),
        "flat": TargetSpec(sampler="multinomial", num_samples=round(1 / theta), proposal_temperature=0.6),
        "sharp": TargetSpec(sampler="multinomial", num_samples=round(1 / theta), proposal_temperature=1.3),
    }[sampler]
    assert_unbiased(probs, spec, 50_000, seed)


@pytest.mark.parametrize(
    ("probs", "num_rows"),
    [([0.7151, 0.0999, 0.0925, 0.0925], 400_000), ([0.901, 0.099], 50_000), ([0.7, 0.1, 0.1, 0.1], 50_000)],
    ids=str,
)
def test_a_tail_whose_units_were_rounded_up_is_unbiased(probs: list[float], num_rows: int) -> None:
    """left // θ points, too many by the rounding, once gave the first case's second id 12 standard errors too little;
    then the whole tail is one id, and then there is a tie.
    """
    assert_unbiased(probs, TargetSpec(sampler="threshold", threshold=0.1), num_rows)


def test_top_k_keeps_the_largest_and_the_ghost_keeps_their_mass() -> None:
    logits = made_up_logits(20, 300)
    probs = probs_of(logits)
    largest = np.sort(np.argsort(-probs, axis=1)[:, :12], axis=1)
    plain = sample(logits, TargetSpec(sampler="top_k", top_k=12), sequence_of(20))
    ghost = sample(logits, TargetSpec(sampler="top_k_ghost", top_k=12), sequence_of(20))
    np.testing.assert_array_equal(plain.token_ids.reshape(20, 12), largest)
    kept = np.take_along_axis(probs, largest, axis=1)
    np.testing.assert_allclose(plain.weights().reshape(20, 12), kept / kept.sum(axis=1, keepdims=True), atol=2e-5)
    np.testing.assert_allclose(ghost.weights().reshape(20, 12), kept, atol=2e-5)


def test_full_is_the_softmax() -> None:
    logits = made_up_logits(5, 300)
    np.testing.assert_allclose(
        dense(sample(logits, TargetSpec(sampler="full"), sequence_of(5))), probs_of(logits), atol=1e-6
    )
    assert sample(logits, TargetSpec(sampler="full"), sequence_of(5)).units == FULL_UNITS


def test_temperature_divides_the_logits() -> None:
    logits = made_up_logits(5, 300)
    hot = sample(logits, TargetSpec(sampler="full", temperature=2.0), sequence_of(5))
    np.testing.assert_allclose(dense(hot), probs_of(logits / 2), atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_chunks_concatenate_to_what_one_call_gives(spec: TargetSpec) -> None:
    logits, sequence = made_up_logits(23, 700), sequence_of(23)
    whole = sample(logits, spec, sequence)
    parts = [sample(logits[i : i + 5], spec, sequence, first_row=i) for i in range(0, 23, 5)]
    assert same(whole, SparseTargets.concatenate(parts))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masked_rows_come_out_empty_and_others_do_not_depend_on_them(sampler: str) -> None:
    logits, spec = made_up_logits(6, 200), TargetSpec(sampler=sampler)
    mask = [True, False, True, True, False, True]
    sequence = sequence_of(6, mask)
    logits[1] = torch.nan
    targets = sample(logits, spec, sequence)
    assert (np.diff(targets.row_offsets) > 0).tolist() == mask
    alone = sample(logits[2:4], spec, sequence, first_row=2)
    assert same(targets.slice_rows(2, 4), alone)
    assert sample(logits, spec, sequence_of(6, [False] * 6)).num_entries == 0


def test_draws_depend_on_seed_draw_set_content_and_row_alone() -> None:
    logits = made_up_logits(1, 500).expand(8, -1)
    spec, sequence = TargetSpec(num_samples=30), sequence_of(8)
    first = sample(logits, spec, sequence)
    assert same(first, sample(logits.clone(), spec, TokenSequence(token_ids=sequence.token_ids.copy())))
    rows = {first.slice_rows(i, i + 1).token_ids.tobytes() for i in range(8)}
    assert len(rows) == 8
    other_content = TokenSequence(token_ids=sequence.token_ids + 1)
    assert not same(first, sample(logits, spec, sequence, draw_set=1))
    assert not same(first, sample(logits, TargetSpec(num_samples=30, seed=1), sequence))
    assert not same(first, sample(logits, spec, other_content))


def test_uniforms_are_uniform_and_their_rows_do_not_depend_on_the_chunk() -> None:
    spec, sequence = TargetSpec(sampler="multinomial", num_samples=7), sequence_of(5000)
    uniforms = uniforms_of(spec, sequence, 3)
    assert uniforms.shape == (5000, uniforms_per_row(spec)) == (5000, 7)
    for rows in (range(1234, 1244), [4999], [], [0, 1, 3, 900, 902, 4000], range(1, 5000, 2)):
        chosen = np.array(rows, np.int64)
        np.testing.assert_array_equal(row_uniforms(spec, draw_key(spec, sequence, 3), chosen), uniforms[chosen])
    counts = np.histogram(uniforms, bins=50, range=(0, 1))[0]
    # Chi-square with 49 degrees of freedom: 120 is exceeded once in 10^7 runs.
    assert np.square(counts - 700).sum() / 700 < 120
    assert abs(np.asarray(np.corrcoef(uniforms.T))[~np.eye(7, dtype=bool)]).max() < 0.075


def test_uniforms_are_the_documented_ones() -> None:
    """Fixed for good: targets in caches were drawn with them."""
    uniforms = uniforms_of(TargetSpec(seed=7), TokenSequence(token_ids=np.array([1, 2, 3], np.int32)), 2)
    np.testing.assert_allclose(
        uniforms[:, 0], [0.20871563472154153, 0.9354698259899298, 0.6297129592199506], rtol=0, atol=1e-15
    )


DRAWN_BY_POINTS = [
    TargetSpec(num_samples=1),
    TargetSpec(num_samples=50),
    TargetSpec(sampler="multinomial", num_samples=50),
    *(TargetSpec(sampler="threshold", threshold=theta) for theta in (0.003, 0.02, 0.137, 0.5, 1.0)),
    TargetSpec(sampler="threshold", threshold=0.05, temperature=2.5),
]


@st.composite
def awkward_logits(draw: st.DrawFn) -> torch.Tensor:
    """Flat, tied, spiked, cut off, or with a largest logit that the first thousand ids say nothing of."""
    vocab_size = draw(st.one_of(st.integers(1, 200), st.sampled_from([1023, 1024, 1025, 1100, 4096, 5000])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    logits = torch.randn(12, vocab_size, generator=generator) * draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    match draw(st.sampled_from(["plain", "ties", "spike", "cut", "late", "one"])):
        case "ties":
            logits = (logits * 2).round() / 2
        case "spike":
            logits[:, draw(st.integers(0, vocab_size - 1))] += draw(st.sampled_from([5.0, 20.0, 90.0, 1000.0]))
        case "cut":
            cut = torch.rand(logits.shape, generator=generator) < 0.9
            cut[:, -1] = False
            logits[cut] = -torch.inf
        case "late":
            logits[:, : vocab_size - 1] -= draw(st.sampled_from([30.0, 60.0, 200.0, torch.inf]))
        case "one":
            logits[:, torch.arange(vocab_size) != draw(st.integers(0, vocab_size - 1))] = -torch.inf
    return logits


@settings(max_examples=250, deadline=None)
@given(awkward_logits(), st.sampled_from(DRAWN_BY_POINTS), st.booleans(), st.integers(0, 1000))
def test_awkward_rows_are_drawn_from_alone_as_among_others(
    logits: torch.Tensor, spec: TargetSpec, is_bfloat16: bool, seed: int
) -> None:
    logits = logits.bfloat16() if is_bfloat16 else logits
    uniforms = np.random.default_rng(seed).random((len(logits), uniforms_per_row(spec)))
    together = draw(logits, spec, uniforms)
    together.validate()
    assert np.all(dense(together)[torch.isneginf(logits).numpy()] == 0)
    alone = [draw(logits[i : i + 1], spec, uniforms[i : i + 1]) for i in range(len(logits))]
    assert same(together, SparseTargets.concatenate(alone))


@pytest.mark.parametrize("first", [0.0, -40.0, -300.0, -torch.inf])
def test_shares_do_not_depend_on_where_the_largest_logit_is(first: float) -> None:
    logits = torch.full((40, 3000), -torch.inf)
    logits[:, :1500] = first
    logits[:, -3:] = torch.tensor([0.7, 0.2, 0.1]).log()
    targets = sample(logits, TargetSpec(num_samples=1000), sequence_of(40))
    expected = probs_of(logits[:1])[0]
    assert np.abs(dense(targets) - expected).max() < 1e-3 + 1e-6


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFBFFFFF, 0x7FC001FF])
@pytest.mark.parametrize("column", [0, 1000, 2000])
def test_every_kind_of_nan_is_refused(bits: int, column: int) -> None:
    logits = torch.zeros(2, 2001)
    logits.numpy().view(np.uint32)[1, column] = bits
    for sampler in ("systematic", "threshold"):
        with pytest.raises(NonFiniteLogits, match="row 1 "):
            sample(logits, TargetSpec(sampler=sampler), sequence_of(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_drawn_as_their_float32_values(dtype: torch.dtype) -> None:
    logits = made_up_logits(9, 600).to(dtype)
    for spec in SPECS:
        assert same(sample(logits, spec, sequence_of(9)), sample(logits.float(), spec, sequence_of(9)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_impossible_ids_are_never_drawn(spec: TargetSpec) -> None:
    logits = made_up_logits(40, 130)
    logits[:, ::2] = -torch.inf
    targets = sample(logits, spec, sequence_of(40))
    assert targets.num_entries
    assert np.all(targets.token_ids % 2 == 1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("hot", [0, 63, 64, 129])
def test_one_hot_rows_give_that_id_the_whole_weight(spec: TargetSpec, hot: int) -> None:
    logits = torch.full((10, 130), -torch.inf)
    logits[:, hot] = 5.0
    targets = sample(logits, spec, sequence_of(10))
    assert targets.token_ids.tolist() == [hot] * 10
    np.testing.assert_array_equal(targets.weights(), 1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_that_is_not_finite_is_named(sampler: str, bad: float) -> None:
    logits = made_up_logits(6, 100)
    logits[4, 17] = bad
    with pytest.raises(NonFiniteLogits, match="row 14 "):
        sample(logits, TargetSpec(sampler=sampler), sequence_of(20), first_row=10)


def test_a_row_without_any_finite_logit_is_refused() -> None:
    with pytest.raises(NonFiniteLogits, match="row 0 "):
        sample(torch.full((1, 10), -torch.inf), TargetSpec(), sequence_of(1))


def test_rows_past_the_end_of_the_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="rows 3 to 6 of a sequence of 5 tokens"):
        sample(made_up_logits(3, 10), TargetSpec(), sequence_of(5), first_row=3)


def test_rows_of_many_sequences_are_drawn_in_one_call() -> None:
    spec, logits = TargetSpec(sampler="threshold"), made_up_logits(9, 300)
    a, b = sequence_of(4), TokenSequence(token_ids=np.arange(100, 105, dtype=np.int32))
    uniforms = np.concatenate([uniforms_of(spec, a), uniforms_of(spec, b, 5)])
    together = draw(logits, spec, uniforms)
    assert same(together.slice_rows(0, 4), sample(logits[:4], spec, a))
    assert same(together.slice_rows(4, 9), sample(logits[4:], spec, b, draw_set=5))
    with pytest.raises(ValueError, match="expected uniforms of shape"):
        draw(logits, TargetSpec(), uniforms)


def test_no_rows_give_no_targets() -> None:
    for sampler in SAMPLERS:
        assert sample(torch.zeros(0, 50), TargetSpec(sampler=sampler), sequence_of(3)).num_rows == 0


def test_a_vocabulary_of_262144_is_drawn_without_rounding_bias() -> None:
    """A float32 running sum would lose the tail behind the head: ids of 10^-6 after a mass of 0.7."""
    vocab_size, num_samples = 262_144, 65_536
    probs = torch.full((2, vocab_size), 0.3 / (vocab_size - 1))
    probs[0, 0] = probs[1, 1000] = 0.7
    targets = sample(probs.log(), TargetSpec(num_samples=num_samples), sequence_of(2))
    expected = probs_of(probs.log())
    for row in range(2):
        part = targets.slice_rows(row, row + 1)
        counts = np.bincount(part.token_ids, weights=part.counts, minlength=vocab_size)
        # A stretch of the running sum holds its mass's worth of equally spaced points, but for one at its ends.
        stretches = counts.reshape(64, -1).sum(axis=1) - num_samples * expected[row].reshape(64, -1).sum(axis=1)
        assert np.abs(stretches).max() < 1.02
        assert np.abs(np.cumsum(stretches)).max() < 1.02
