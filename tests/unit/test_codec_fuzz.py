"""Any bytes decode to what was encoded or raise CodecError: 100,000 damaged payloads."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstream.codec import MAX_ENTRIES_PER_BYTE, IdModel, decode, encode
from logitstream.errors import CodecError
from logitstream.types import SparseTargets, TargetSpec
from tests.unit.test_codec import drawn_targets, header, sealed, targets_of, zipf_model

MODEL = zipf_model(300)
SPEC = TargetSpec(num_samples=8)
SOURCES: list[tuple[SparseTargets, int, IdModel | None]] = [
    (drawn_targets(5, 300, 8), 1, None),
    (drawn_targets(9, 300, 8), 2, None),
    (drawn_targets(12, 300, 8), 2, MODEL),
    (targets_of([{3: 7, 9: 0, 200: 0}, {}, {250: 9, 299: 1}], 300, 80, 4), 2, MODEL),
    (targets_of([{0: 1}] * 600, 3, 1), 2, None),
]
PAYLOADS = [(encode(targets, version=version, id_model=model), targets) for targets, version, model in SOURCES]


def damaged(payload: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(payload)
    match rng.integers(5):
        case 0:
            return payload[: rng.integers(len(payload))]
        case 1:
            return payload + rng.bytes(int(rng.integers(1, 9)))
        case 2:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        case 3:
            start = int(rng.integers(len(data)))
            data[start : start + 8] = rng.bytes(int(rng.integers(9)))
        case _:
            data[rng.integers(min(28, len(data)))] = rng.choice([0, 1, 127, 128, 255])
    return bytes(data)


def same(a: SparseTargets, b: SparseTargets) -> bool:
    return (a.vocab_size, a.units, a.tail_units) == (b.vocab_size, b.units, b.tail_units) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("row_offsets", "token_ids", "counts")
    )


@pytest.mark.parametrize("source", range(len(SOURCES)))
def test_damage_is_noticed(source: int) -> None:
    """10,000 payloads each; a damaged one has the right checksum once in 2^32 times."""
    rng = np.random.default_rng(source)
    payload, targets = PAYLOADS[source]
    num_refused = 0
    for _ in range(10_000):
        try:
            assert same(decode(damaged(payload, rng), id_model=MODEL), targets)
        except CodecError:
            num_refused += 1
    assert num_refused > 8_000


@pytest.mark.parametrize("source", range(len(SOURCES)))
def test_forged_payloads_give_valid_targets_or_are_refused(source: int) -> None:
    """10,000 payloads each whose checksum was made to match: what the checks behind it are for."""
    rng = np.random.default_rng(100 + source)
    body = PAYLOADS[source][0][:-4]
    num_decoded = 0
    for _ in range(10_000):
        forged = sealed(damaged(body, rng))
        try:
            targets = decode(forged, id_model=MODEL)
        except CodecError:
            continue
        targets.validate()
        assert targets.num_entries <= MAX_ENTRIES_PER_BYTE * len(forged)
        num_decoded += 1
    assert num_decoded > 100


def test_random_bytes_are_refused() -> None:
    """With and without a checksum that matches, by a reader that knows what it asked for."""
    rng = np.random.default_rng(7)
    for _ in range(10_000):
        data = rng.bytes(int(rng.integers(40)))
        for forged in (data, sealed(data), sealed(bytes([rng.integers(1, 3), rng.integers(4)]) + data)):
            with pytest.raises(CodecError):
                decode(forged, spec=SPEC, vocab_size=300, id_model=MODEL, num_rows=20)


def test_random_bytes_that_a_reader_without_expectations_takes_are_valid_targets() -> None:
    rng = np.random.default_rng(7)
    num_decoded = 0
    for _ in range(10_000):
        body = header(*rng.integers(1, 4, 2), 0, *rng.integers(2, size=2)) + bytes(rng.integers(4, size=3).tolist())
        with contextlib.suppress(CodecError):
            decode(sealed(body)).validate()
            num_decoded += 1
    assert num_decoded > 10


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(CodecError, match="expected targets over 300 ids, got 2000003"):
        decode(sealed(header(2_000_003, 8, 0, 1, 1) + b"\1"), spec=SPEC, vocab_size=300, num_rows=1)
    plain = encode(targets_of([{3: 8}], 301, 8), version=1)
    with pytest.raises(CodecError, match="expected targets over 300 ids, got 301"):
        decode(plain, spec=SPEC, vocab_size=300, num_rows=1)


@pytest.mark.parametrize(
    "spec",
    [
        TargetSpec(num_samples=4),
        TargetSpec(sampler="multinomial", num_samples=4, proposal_temperature=0.8),
        TargetSpec(sampler="threshold", threshold=0.7),
        TargetSpec(sampler="top_k", top_k=4),
        TargetSpec(sampler="top_k_ghost", top_k=4),
    ],
    ids=lambda spec: spec.sampler,
)
@pytest.mark.parametrize("version", [1, 2])
def test_more_entries_than_the_sampler_gives_are_refused(spec: TargetSpec, version: int) -> None:
    """In all rows together before memory is taken, and in a single row that takes from its neighbours."""
    most = spec.max_entries(300)
    assert 4 <= most <= 5
    full, fuller = dict.fromkeys(range(most), 1), dict.fromkeys(range(most + 1), 1)
    taken = targets_of([full, full], 300, 8)
    assert same(decode(encode(taken, version=version), spec=spec, vocab_size=300, num_rows=2), taken)
    for rows in ([fuller, fuller], [fuller, {}], [{}, fuller]):
        payload = encode(targets_of(rows, 300, 8), version=version)
        with pytest.raises(CodecError, match="entries"):
            decode(payload, spec=spec, vocab_size=300, num_rows=2)


@given(
    data=st.data(),
    vocab_size=st.sampled_from([10, 300, 50_000]),
    num_rows=st.integers(1, 600),
    num_samples=st.integers(1, 20),
    num_bytes=st.integers(20, 1 << 16),
)
@settings(max_examples=150, deadline=None)
def test_memory_is_bounded_by_what_the_reader_expects_whatever_comes(
    data: st.DataObject, vocab_size: int, num_rows: int, num_samples: int, num_bytes: int
) -> None:
    """Well-formed headers that promise up to 64 entries a byte: 16 bytes an entry that may come, and 64 KiB."""
    spec = TargetSpec(num_samples=num_samples)
    most = num_rows * spec.max_entries(vocab_size)
    promised = data.draw(st.one_of(st.integers(0, 2 * most), st.integers(0, MAX_ENTRIES_PER_BYTE * num_bytes)))
    flags = data.draw(st.sampled_from([0, 2]))
    forged = sealed(header(vocab_size, num_samples, 0, num_rows, promised, flags=flags).ljust(num_bytes, b"\0"))
    decode(PAYLOADS[1][0])  # what is compiled is loaded
    tracemalloc.start()
    try:
        with contextlib.suppress(CodecError):
            targets = decode(forged, spec=spec, vocab_size=vocab_size, num_rows=num_rows)
            assert targets.num_rows == num_rows
            assert np.diff(targets.row_offsets).max() <= num_samples
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 * most + 40 * num_rows + len(forged) + (64 << 10)


def test_forged_sizes_allocate_little() -> None:
    """Headers that promise up to 2^32 rows or entries: what is allocated stays within what the bytes could hold."""
    rng = np.random.default_rng(8)
    decode(PAYLOADS[1][0])
    tracemalloc.start()
    try:
        for _ in range(2000):
            num_rows, num_entries = (int(rng.integers(1 << rng.integers(1, 33))) for _ in range(2))
            with contextlib.suppress(CodecError):
                decode(sealed(header(300, 8, 0, min(num_rows, 1 << 14), num_entries) + rng.bytes(60)))
            with contextlib.suppress(CodecError):
                decode(sealed(header(300, 8, 0, num_rows | 1 << 21, num_entries) + rng.bytes(60)))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(("vocab_size", "units", "flags"), [(5, 50, 0), (1000, 2, 2)])
def test_more_entries_than_the_rows_can_have_are_refused_before_memory_is_taken(
    vocab_size: int, units: int, flags: int
) -> None:
    """Four MiB that promise a quarter of a billion entries of one row."""
    body = header(vocab_size, units, 0, 1, MAX_ENTRIES_PER_BYTE << 22, flags=flags).ljust(1 << 22, b"\0")
    tracemalloc.start()
    with pytest.raises(CodecError, match="entries in 4194308 bytes and 1 rows"):
        decode(sealed(body))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
