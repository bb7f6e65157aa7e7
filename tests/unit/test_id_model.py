"""The static id model: bytes, refusals, and tables that hold every id."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from logitstream.errors import CodecError
from logitstream.id_model import INNER_BITS, NEXT_BITS, IdModel
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
    ends = np.append(tables.inner_start[1:].astype(np.int64), 0)
    ends[tables.bucket_start[1:] - 1] = 1 << INNER_BITS
    assert np.all(ends > tables.inner_start)
    assert np.all(tables.inner_start[tables.bucket_start[:-1]] == 0)
    for first in range(len(sizes)):
        widths = np.diff(tables.next_start[first], axis=1)
        assert np.all(widths[:, first:] >= 1)
        assert np.all(tables.next_start[first, :, first] == 0)
        assert np.all(tables.next_start[first, :, -1] == 1 << NEXT_BITS)


def test_tables_are_the_documented_integers() -> None:
    """Pinned, as both sides and every cache must agree on them."""
    levels = np.random.default_rng(3).integers(0, 200, 3000).astype(np.uint8)
    digest = hashlib.sha256()
    tables = IdModel(levels).tables
    for table in (tables.bucket_of, tables.bucket_start, tables.inner_start, tables.next_start):
        digest.update(np.ascontiguousarray(table, dtype="<i4").tobytes())
    assert digest.hexdigest() == "71e7e13f5f0b28670da61d5c0abcb715738208ddf107e9e3b494b5e01c5003bc"
