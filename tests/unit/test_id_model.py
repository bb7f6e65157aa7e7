"""The static id model: bytes, refusals, and tables that hold every id."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from logitstream.errors import CodecError
from logitstream.id_model import INNER_BITS, NEXT_BITS, NUM_BUCKETS, IdModel, IdTables, uniform_tables
from logitstream.types import Fingerprint, TargetSpec, TeacherInfo


def test_bytes_round_trip_and_digest_is_the_fingerprints() -> None:
    model = IdModel.from_expected_counts(np.array([0.0, 1.0, 1000.0, 3.5]))
    again = IdModel.from_bytes(model.to_bytes())
    np.testing.assert_array_equal(again.levels, model.levels)
    info = TeacherInfo(
        model="m",
        weights_digest="",
        tokenizer_digest="",
        vocab_size=4,
        dtype="float32",
        max_sequence_tokens=8,
        id_model=model.to_bytes(),
    )
    assert Fingerprint.of(info, TargetSpec()).id_model_digest == model.digest == again.digest
    assert model.digest == hashlib.sha256(model.to_bytes()).hexdigest()


def test_levels_are_eighths_of_a_bit_and_no_id_is_impossible() -> None:
    counts = np.array([512.0, 256.0, 128.0, 128.0, 0.0])
    levels = IdModel.from_expected_counts(counts).levels.astype(float) / 8
    np.testing.assert_allclose(levels[:4], -np.log2((counts / 1024)[:4]), atol=1 / 16)
    assert levels[4] == pytest.approx(np.log2(1024 * 32), abs=0.1)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x02abc"])
def test_other_bytes_are_no_model(data: bytes) -> None:
    with pytest.raises(CodecError, match="not an id model"):
        IdModel.from_bytes(data)


@pytest.mark.parametrize("counts", [[1.0, np.nan], [1.0, -1.0], [np.inf, 1.0]])
def test_counts_that_are_none_are_refused(counts: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        IdModel.from_expected_counts(np.array(counts))


def models() -> list[IdModel]:
    rng = np.random.default_rng(0)
    return [
        IdModel(np.zeros(1, np.uint8)),
        IdModel(np.array([255, 0, 255], np.uint8)),
        IdModel(rng.integers(0, 256, 5000).astype(np.uint8)),
        IdModel(np.full(300_000, 7, np.uint8)),
        IdModel.from_expected_counts(np.asarray(1e6 / np.arange(1, 150_001) ** 1.1, np.float64)),
    ]


@pytest.mark.parametrize("model", models(), ids=lambda m: str(m.vocab_size))
def test_tables_leave_no_id_and_no_bucket_without_a_code(model: IdModel) -> None:
    tables = model.tables
    sizes = np.diff(tables.bucket_start)
    assert tables.bucket_start[0] == 0
    assert tables.bucket_start[-1] == model.vocab_size
    np.testing.assert_array_equal(np.repeat(np.arange(len(sizes)), sizes), tables.bucket_of)
    ends = np.append(tables.inner_start[1:], 0)
    ends[tables.bucket_start[1:] - 1] = tables.inner_total
    assert np.all(ends > tables.inner_start)
    assert tables.inner_total.max() <= 1 << INNER_BITS
    check_next_tables(tables)


@pytest.mark.parametrize("size", [2, 3, 5, 7, 255, 383, 641, 6700, 43_691, 65_535, 65_536])
def test_the_reciprocal_of_a_buckets_total_divides_exactly(size: int) -> None:
    tables = uniform_tables(size * NUM_BUCKETS)
    assert tables.inner_total[0] == size
    reciprocal = int(tables.reciprocal[0])
    quotients = [0, 1, 2, (1 << 32) // size, (1 << 47) // size, (1 << 48) // size - 1]
    for width in (q * size + r for q in quotients for r in (0, 1, size - 1) if q * size + r < 1 << 48):
        assert width * reciprocal >> 64 == width // size


@pytest.mark.parametrize("vocab_size", [1, 2, 128, 129, 49_152, 1 << 24])
def test_uniform_tables_need_no_memory_of_the_vocabularys_size(vocab_size: int) -> None:
    tables = uniform_tables(vocab_size)
    assert sum(table.nbytes for table in tables) < 16 << 20
    assert len(tables.inner_total) <= 2 * NUM_BUCKETS
    assert tables.bucket_start[-1] == vocab_size == tables.inner_total.sum()
    check_next_tables(tables)


def check_next_tables(tables: IdTables) -> None:
    num_buckets = len(tables.inner_total)
    for first in range(num_buckets):
        widths = np.diff(tables.next_start[first], axis=1)
        assert np.all(widths[:, first:] >= 1)
        assert np.all(tables.next_start[first, :, first] == 0)
        assert np.all(tables.next_start[first, :, -1] == 1 << NEXT_BITS)


def test_tables_are_the_documented_integers() -> None:
    """Fixed for good: bytes in caches were coded with them."""
    levels = np.random.default_rng(3).integers(0, 200, 3000).astype(np.uint8)
    digest = hashlib.sha256()
    for table in (*IdModel(levels).tables[:4], IdModel(levels).tables.next_start):
        digest.update(np.ascontiguousarray(table, dtype="<i4").tobytes())
    assert digest.hexdigest() == "f0f7f5ab82f46ddd2e90c1c0e9701e2cb90eba1ee444748f766e546d26965f42"
