"""Any bytes decode to what was encoded or raise CodecError: 100,000 damaged payloads."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from test_codec import drawn_targets, targets_of, zipf_model

from logitstream.codec import MAX_ENTRIES_PER_BYTE, IdModel, decode, encode, varint
from logitstream.errors import CodecError
from logitstream.types import SparseTargets

MODEL = zipf_model(300)
SOURCES: list[tuple[SparseTargets, int, IdModel | None]] = [
    (drawn_targets(5, 300, 8), 1, None),
    (drawn_targets(9, 300, 8), 2, None),
    (drawn_targets(12, 300, 8), 2, MODEL),
    (targets_of([{3: 7, 9: 0, 200: 0}, {}, {250: 9, 299: 1}], 300, 80, 4), 2, MODEL),
    (targets_of([{0: 1}] * 600, 3, 1), 2, None),
]
PAYLOADS = [(encode(targets, version=version, id_model=model), targets) for targets, version, model in SOURCES]


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


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
            data[rng.integers(min(24, len(data)))] = rng.choice([0, 1, 127, 128, 255])
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
    rng = np.random.default_rng(7)
    for _ in range(10_000):
        data = rng.bytes(int(rng.integers(40)))
        for forged in (data, sealed(data), sealed(bytes([rng.integers(1, 3), rng.integers(4)]) + data)):
            with contextlib.suppress(CodecError):
                decode(forged, id_model=MODEL).validate()


def test_forged_sizes_allocate_little() -> None:
    """Headers that promise up to 2^34 rows or entries: what is allocated stays within what the bytes could hold."""
    rng = np.random.default_rng(8)
    decode(PAYLOADS[1][0])
    tracemalloc.start()
    try:
        for _ in range(2000):
            huge = bytes([*rng.integers(128, 256, int(rng.integers(5))), rng.integers(128)])
            body = b"\x02\x00\xac\x02\x08\x00" + huge + huge + rng.bytes(60)
            with contextlib.suppress(CodecError):
                decode(sealed(body))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(("vocab_size", "units", "flags"), [(5, 50, 0), (1000, 2, 2)])
def test_more_entries_than_the_rows_can_have_are_refused_before_memory_is_taken(
    vocab_size: int, units: int, flags: int
) -> None:
    """Four MiB that promise a quarter of a billion entries of one row."""
    shape = [vocab_size, units, 0, 1, MAX_ENTRIES_PER_BYTE << 22, 1]
    body = (bytes([2, flags]) + b"".join(map(varint, shape))).ljust(1 << 22, b"\0")
    tracemalloc.start()
    with pytest.raises(CodecError, match="entries in block 0 of 1 rows"):
        decode(sealed(body))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
