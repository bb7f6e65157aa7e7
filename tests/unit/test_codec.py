"""Encoded targets: exact round trips, slices, sizes, refusals."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstream import codec
from logitstream.codec import IdModel, decode, encode
from logitstream.errors import CodecError
from logitstream.samplers import FULL_UNITS
from logitstream.types import CODEC_VERSIONS, MAX_VOCAB_SIZE, SparseTargets


def targets_of(rows: list[dict[int, int]], vocab_size: int, units: int, tail_units: int = 0) -> SparseTargets:
    """From each row's {id: count}."""
    return SparseTargets(
        vocab_size=vocab_size,
        units=units,
        tail_units=tail_units,
        row_offsets=np.cumsum([0] + [len(row) for row in rows]).astype(np.int64),
        token_ids=np.array([i for row in rows for i in sorted(row)], np.int32),
        counts=np.array([row[i] for row in rows for i in sorted(row)], np.int32),
    )


def drawn_targets(num_rows: int, vocab_size: int, num_samples: int, seed: int = 0) -> SparseTargets:
    """Independent draws from a Zipf distribution over shuffled ids: what a sampler might give, without torch."""
    rng = np.random.default_rng(seed)
    probs = zipf(vocab_size, seed)
    rows = [
        dict(zip(*np.unique(rng.choice(vocab_size, num_samples, p=probs), return_counts=True), strict=True))
        for _ in range(num_rows)
    ]
    return targets_of([{int(i): int(c) for i, c in row.items()} for row in rows], vocab_size, num_samples)


def zipf(vocab_size: int, seed: int = 0) -> npt.NDArray[np.float64]:
    probs = 1 / np.random.default_rng(seed).permutation(np.arange(1, vocab_size + 1))
    return probs / probs.sum()


def zipf_model(vocab_size: int, seed: int = 0) -> IdModel:
    return IdModel.from_expected_counts(zipf(vocab_size, seed) * 50_000)


def assert_same(got: SparseTargets, want: SparseTargets) -> None:
    assert (got.vocab_size, got.units, got.tail_units) == (want.vocab_size, want.units, want.tail_units)
    for name in ("row_offsets", "token_ids", "counts"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        assert getattr(got, name).dtype == getattr(want, name).dtype


@st.composite
def any_targets(draw: st.DrawFn) -> SparseTargets:
    """Any CSR in range: vocabularies up to 2^24, counts up to 2^31 - 1, empty, full and summing rows."""
    vocab_size = draw(st.one_of(st.integers(1, 40), st.integers(1, MAX_VOCAB_SIZE)))
    units = draw(st.one_of(st.integers(1, 100), st.integers(1, FULL_UNITS)))
    count = draw(st.sampled_from([st.integers(0, 3), st.integers(1, 60), st.integers(0, (1 << 31) - 1)]))
    ids = st.one_of(st.integers(0, vocab_size - 1), st.integers(max(0, vocab_size - 5), vocab_size - 1))
    rows = draw(st.lists(st.dictionaries(ids, count, max_size=12), max_size=12))
    if draw(st.booleans()):
        rows = [sum_to(row, units) for row in rows]
    rows *= draw(st.sampled_from([1, 1, 1, 60]))
    return targets_of(rows, vocab_size, units, draw(st.integers(0, units)))


def sum_to(row: dict[int, int], units: int) -> dict[int, int]:
    kept = dict(list(row.items())[:units])
    spare = units - len(kept)
    return {i: 1 + spare * (n == 0) for n, i in enumerate(kept)}


@settings(max_examples=400, deadline=None)
@given(any_targets(), st.sampled_from(CODEC_VERSIONS))
def test_any_targets_survive(targets: SparseTargets, version: int) -> None:
    assert_same(decode(encode(targets, version=version)), targets)


@settings(max_examples=150, deadline=None)
@given(any_targets(), st.randoms(use_true_random=False))
def test_any_targets_survive_under_any_id_model(targets: SparseTargets, random: object) -> None:
    vocab_size = min(targets.vocab_size, 70_000)
    kept = targets.token_ids < vocab_size
    rows = targets.row_index()[kept]
    small = SparseTargets(
        vocab_size=vocab_size,
        units=targets.units,
        tail_units=targets.tail_units,
        row_offsets=np.searchsorted(rows, np.arange(targets.num_rows + 1)),
        token_ids=targets.token_ids[kept],
        counts=targets.counts[kept],
    )
    levels = np.random.default_rng(random.getrandbits(32)).integers(0, 256, vocab_size)  # type: ignore[attr-defined]
    model = IdModel(levels.astype(np.uint8))
    assert_same(decode(encode(small, id_model=model), id_model=model), small)


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 49_152, 262_144, MAX_VOCAB_SIZE])
def test_edges_of_a_vocabulary_survive(vocab_size: int) -> None:
    rows = [{0: 1}, {vocab_size - 1: 1}, {}, dict.fromkeys({0, vocab_size // 2, vocab_size - 1}, 1)]
    rows += [
        dict.fromkeys(range(max(0, vocab_size - 300), vocab_size), 1),
        dict.fromkeys(range(min(300, vocab_size)), 2),
    ]
    targets = targets_of(rows, vocab_size, 600)
    assert_same(decode(encode(targets)), targets)


def test_no_rows_survive() -> None:
    empty = targets_of([], 100, 5)
    for version in CODEC_VERSIONS:
        assert_same(decode(encode(empty, version=version)), empty)


def test_long_runs_of_empty_rows_take_next_to_nothing() -> None:
    targets = targets_of([{}] * 100_000, 49_152, 50)
    payload = encode(targets)
    assert len(payload) < 100_000 / 50
    assert_same(decode(payload), targets)


@pytest.mark.parametrize("version", CODEC_VERSIONS)
def test_more_or_fewer_rows_than_the_reader_knows_of_are_refused(version: int) -> None:
    targets = targets_of([{3: 1}] * 300, 10, 1)
    payload = encode(targets, version=version)
    assert_same(decode(payload, num_rows=300), targets)
    for wrong in (0, 299, 301):
        with pytest.raises(CodecError, match=f"expected {wrong} rows, got 300"):
            decode(payload, num_rows=wrong)


def header(*shape: int, version: int = 2, flags: int = 0) -> bytes:
    """vocab_size, units, tail_units, rows, entries."""
    return struct.pack("<BBxx5I", version, flags, *shape)


def test_a_small_payload_of_very_many_rows_is_refused_before_they_take_memory() -> None:
    """A handful of bytes would become 64 MiB of row lengths and offsets."""
    num_rows = 1 << 22
    payload = sealed(header(10, 3, 0, num_rows, 0) + bytes(8))
    decode(encode(targets_of([{}], 10, 3)))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="expected at most 1048576 rows, got 4194304"):
            decode(payload)
        with pytest.raises(CodecError, match="expected 100 rows, got 4194304"):
            decode(payload, num_rows=100)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20
    assert decode(payload, num_rows=num_rows).num_rows == num_rows


def test_entries_of_no_information_are_padded_to_the_bound() -> None:
    targets = targets_of([{0: 1, 1: 1}] * 20_000, 2, 2)
    payload = encode(targets)
    assert 40_000 / codec.MAX_ENTRIES_PER_BYTE <= len(payload) < 2_000
    assert_same(decode(payload), targets)


def test_ids_cost_near_their_entropy() -> None:
    """Against log2 of the number of id sets, or under the model its -log2 probability; counts and lengths are free."""
    num_rows, num_ids, vocab_size = 2000, 12, 49_152
    rng, probs = np.random.default_rng(1), zipf(49_152)
    uniform = [{int(i): 1 for i in rng.choice(vocab_size, num_ids, replace=False)} for _ in range(num_rows)]
    log2_sets = np.log2(np.arange(vocab_size - num_ids + 1, vocab_size + 1) / np.arange(1, num_ids + 1)).sum()
    size = len(encode(targets_of(uniform, vocab_size, num_ids))) * 8 / num_rows
    assert log2_sets <= size < log2_sets * 1.03 + 1

    drawn = drawn_targets(num_rows, vocab_size, num_ids)
    plain, modelled = encode(drawn), encode(drawn, id_model=zipf_model(vocab_size))
    lengths = np.diff(drawn.row_offsets)
    orders = np.log2(np.arange(1, num_ids + 1)).cumsum()[lengths - 1].mean()
    entropy = -np.log2(probs[drawn.token_ids]).sum() / num_rows - orders
    assert len(modelled) < 0.75 * len(plain)
    assert len(modelled) * 8 / num_rows < entropy * 1.05 + 8


def test_counts_cost_less_than_their_own_entropy() -> None:
    """As their sum is known: against coding each count alone with the best table for it."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2000):
        shares = np.r_[rng.dirichlet(np.full(8, 0.3))]
        counts = np.bincount(rng.choice(8, 21, p=shares), minlength=8)
        rows.append({i: int(c) for i, c in enumerate(counts) if c})
    targets = targets_of(rows, 8, 21)
    with_counts = len(encode(targets)) * 8
    without = len(encode(targets_of([dict.fromkeys(row, 1) for row in rows], 8, 21))) * 8
    _, number = np.unique(targets.counts, return_counts=True)
    entropy = -(number * np.log2(number / number.sum())).sum()
    assert with_counts - without < 0.85 * entropy


def test_a_payload_needs_its_own_id_model() -> None:
    targets = drawn_targets(20, 1000, 10)
    model, other = zipf_model(1000), zipf_model(1000, seed=5)
    payload = encode(targets, id_model=model)
    with pytest.raises(CodecError, match=f"need the id model {model.digest[:8]} of 1000 ids, at hand is none"):
        decode(payload)
    with pytest.raises(CodecError, match=f"{model.digest[:8]} of 1000 ids, at hand is {other.digest}"):
        decode(payload, id_model=other)
    # Without a model in the payload, the one at hand is not needed and not used.
    assert_same(decode(encode(targets), id_model=other), targets)
    with pytest.raises(ValueError, match="id model of 999 ids for targets over 1000"):
        encode(targets, id_model=zipf_model(999))


def test_invalid_targets_are_not_encoded() -> None:
    good = targets_of([{3: 1, 7: 2}], 10, 3)
    for broken in (
        SparseTargets(
            vocab_size=7, units=3, row_offsets=good.row_offsets, token_ids=good.token_ids, counts=good.counts
        ),
        SparseTargets(
            vocab_size=10, units=3, row_offsets=good.row_offsets, token_ids=good.token_ids[::-1], counts=good.counts
        ),
        SparseTargets(
            vocab_size=10, units=3, row_offsets=good.row_offsets, token_ids=good.token_ids, counts=-good.counts
        ),
        SparseTargets(
            vocab_size=10, units=3, row_offsets=good.row_offsets[::-1], token_ids=good.token_ids, counts=good.counts
        ),
    ):
        for version in CODEC_VERSIONS:
            with pytest.raises(ValueError, match=r"\d|must"):
                encode(broken, version=version)
    with pytest.raises(ValueError, match="unknown codec version 3: expected one of"):
        encode(good, version=3)


def made_without_chance(num_rows: int, vocab_size: int, units: int, *, exact: bool) -> SparseTargets:
    """Rows of 1 to 40 ids, close together and far apart; exact: their counts sum to units."""
    rows = []
    for r in range(num_rows):
        ids = {(r * 7919 + i * i * i * (1 + r % 5) * 31) % vocab_size for i in range(1 + r * 13 % 40)}
        counts = [1 + (r * i) % 3 * (i % 7 == 0) for i in range(len(ids))]
        if exact:
            counts[r % len(ids)] += units - sum(counts)
        rows.append(dict(zip(sorted(ids), counts, strict=True)))
    return targets_of(rows, vocab_size, units)


@pytest.mark.parametrize(
    ("vocab_size", "exact", "has_model", "expected"),
    [
        (1000, True, True, "fd834d9118f8dadd"),
        (1000, True, False, "192e5a5b15265380"),
        (1000, False, True, "a9f537591a136a4e"),
        (1000, False, False, "4548f2be6b3ddb5e"),
        (49152, True, True, "dd44b04da9c4b1ef"),
        (49152, True, False, "b23d1b9aa23bfb71"),
        (49152, False, True, "c8907f6c9b5548e8"),
        (49152, False, False, "a2f9944b004a1ad5"),
        (300000, True, True, "8de2bac7db9f2157"),
        (300000, True, False, "7d9c90f70a9f2cab"),
        (300000, False, True, "048da85affd4e926"),
        (300000, False, False, "17d58f8f5d689bb5"),
    ],
)
def test_bytes_are_what_they_always_were(vocab_size: int, exact: bool, has_model: bool, expected: str) -> None:
    """Pinned, as both sides and every cache must agree on them."""
    targets = made_without_chance(700, vocab_size, 200, exact=exact)
    levels = (np.arange(vocab_size) * 37 % 120 + 20).astype(np.uint8)
    payload = encode(targets, id_model=IdModel(levels) if has_model else None)
    assert hashlib.sha256(payload).hexdigest()[:16] == expected


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def test_what_is_wrong_with_bytes_is_said() -> None:
    payload = encode(targets_of([{3: 1, 7: 2}], 10, 3))
    for broken, message in (
        (b"", "0 bytes are too few"),
        (b"\x09" + payload[1:], "unknown codec version 9"),
        (payload[:-6] + b"\0" + payload[-5:], "checksum does not match"),
        (sealed(b"\x02"), "too few"),
        (sealed(header(10, 3, 0, 1, 1, flags=4)), "unknown flags 4"),
        (sealed(header(10, 3, 0, 1, 1, version=1, flags=2)), "unknown flags 2 in the header of version 1"),
        (sealed(header((1 << 24) + 1, 3, 0, 1, 1)), "out of bounds"),
        (sealed(header(10, 0, 0, 1, 1)), "out of bounds"),
        (sealed(header(10, 3, 4, 1, 1)), "out of bounds"),
        (sealed(header(10, 3, 0, 1, 5, flags=2)), "5 entries in 28 bytes and 1 rows of at most 3"),
        (sealed(header(10, 3, 0, 1, 5)), "the bytes hold no 1 rows of 5 entries"),
        (sealed(header(10, 3, 0, 7, 1 << 30, version=1)), "entries in 28 bytes"),
        (sealed(header(10, 3, 0, 7, 1, version=1)), "do not fit"),
        (sealed(header(10, 3, 0, 1, 1, version=1) + struct.pack("<3I", 1, 10, 1)), "not a valid CSR"),
        (sealed(header(10, 3, 0, 1, 1, version=1) + struct.pack("<3I", 1, 1 << 31, 1)), "exceeds 31 bits"),
    ):
        with pytest.raises(CodecError, match=message):
            decode(broken)
