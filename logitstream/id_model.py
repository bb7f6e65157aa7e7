"""A static model of which token ids occur in a teacher's targets: it brings their codes near their entropy.

Both sides hold the same model: the teacher makes it from how often each id occurs in its own targets of typical text,
TeacherInfo carries it, its digest is part of every fingerprint, and the payload names it. All arithmetic is on
integers, so that both sides derive the same tables from it on any machine.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from logitstream.errors import CodecError
from logitstream.types import MAX_VOCAB_SIZE

STEPS_PER_BIT = 8
MAX_LEVEL = 255
PSEUDO_COUNT = 1 / 32
"""Added to every id's expected count, so that no id is impossible; 1/8 or 1/128 cost no byte more on English text."""

NUM_BUCKETS = 128
MAX_BUCKET_SIZE = 1 << 16
INNER_BITS = 16
NEXT_BITS = 15
SLOT_BITS = 7
MAX_SLOT_BITS = 12
MASS_BITS = 31
DRAW_CLASSES = np.array(
    [*range(1, 17), 18, 20, 23, 26, 29, 32, 40, 50, 64, 80, 100, 128, 192, 256, 512, 1024], dtype=np.int64
)
"""Numbers of ids still to come that have a table of their own; others take the next smaller one's."""


@dataclass(frozen=True, eq=False)
class IdModel:
    """levels: uint8 [V], each id's -log2(probability) in steps of 1/8 bit."""

    levels: npt.NDArray[np.uint8]

    @property
    def vocab_size(self) -> int:
        return len(self.levels)

    @classmethod
    def from_expected_counts(cls, expected_counts: npt.NDArray[np.float64]) -> IdModel:
        """The model of ids that occur this often in targets of 4,000 rows or more, float64 [V]; none need be seen.

        How often an id occurs, not its mean probability: a frequent id's share of the entries is the smaller one.
        """
        if not (np.isfinite(expected_counts).all() and (expected_counts >= 0).all()):
            raise ValueError("expected counts must be finite and not negative")
        smoothed = expected_counts + PSEUDO_COUNT
        bits = -np.log2(smoothed / smoothed.sum())
        return cls(np.clip(np.rint(bits * STEPS_PER_BIT), 0, MAX_LEVEL).astype(np.uint8))

    def to_bytes(self) -> bytes:
        """A version byte and the levels: not compressed, as another zlib would give another digest."""
        return b"\x01" + self.levels.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> IdModel:
        """Raises CodecError where the bytes are none."""
        if data[:1] != b"\x01" or not 1 <= len(data) - 1 <= MAX_VOCAB_SIZE:
            raise CodecError(
                f"not an id model: {len(data)} bytes, the first {data[:1].hex()}, expected 01 and the levels"
            )
        return cls(np.frombuffer(data, np.uint8, offset=1))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of to_bytes(), hex; equal to Fingerprint.id_model_digest of a teacher that carries these bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @functools.cached_property
    def tables(self) -> IdTables:
        return _tables(_weights(self.levels))


class IdTables(NamedTuple):
    """What encoding and decoding ids looks up, small enough for a core's cache. Consecutive ids form B buckets of about
    equal mass.

    bucket_of: uint16 [V], or empty for buckets of equal ids without inner_start and inner_slot;
    bucket_start: int32 [B + 1], first ids;
    inner_start: uint16 [V], running sum of frequencies within the id's bucket; inner_total: int32 [B], their sum;
    next_start: uint16 [B, classes, B + 1], for the bucket of the next id, when ids from the first index's bucket on are
    free and a class of DRAW_CLASSES says how many are still to come: running sums of frequencies with 2^NEXT_BITS in
    all;
    next_slot: uint8 [B, classes, slots], where a search for the bucket that holds a number starts, by the number's
    highest SLOT_BITS: the last bucket that starts no later than the slot, or 255;
    inner_slot: uint16, the same for ids, counted from the bucket's first: those of bucket b from slot_start[b] on, by
    the number over 2^slot_shift[b]; both int32 [B];
    reciprocal: uint64 [B], 2^64 / inner_total, rounded up, and 2^64 - 1 for 1.
    """

    bucket_of: npt.NDArray[np.uint16]
    bucket_start: npt.NDArray[np.int32]
    inner_start: npt.NDArray[np.uint16]
    inner_total: npt.NDArray[np.int32]
    next_start: npt.NDArray[np.uint16]
    next_slot: npt.NDArray[np.uint8]
    inner_slot: npt.NDArray[np.uint16]
    slot_start: npt.NDArray[np.int32]
    slot_shift: npt.NDArray[np.int32]
    reciprocal: npt.NDArray[np.uint64]


@functools.lru_cache(maxsize=4)
def uniform_tables(vocab_size: int) -> IdTables:
    """Tables for ids of which nothing is known."""
    size = min(-(-vocab_size // NUM_BUCKETS), MAX_BUCKET_SIZE)
    bucket_start = np.minimum(np.arange(-(-vocab_size // size) + 1) * size, vocab_size).astype(np.int32)
    next_start, next_slot = _equal_buckets(len(bucket_start) - 1)
    return IdTables(
        bucket_of=np.zeros(0, np.uint16),
        bucket_start=bucket_start,
        inner_start=np.zeros(0, np.uint16),
        inner_total=np.diff(bucket_start),
        next_start=next_start,
        next_slot=next_slot,
        inner_slot=np.zeros(0, np.uint16),
        slot_start=np.zeros(0, np.int32),
        slot_shift=np.zeros(0, np.int32),
        reciprocal=_reciprocals(np.diff(bucket_start)),
    )


@functools.lru_cache(maxsize=4)
def _equal_buckets(num_buckets: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    next_start = _next_bucket(np.ones(num_buckets, np.int64))
    return next_start, _next_slots(next_start)


def _weights(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """2^30 times each level's probability, at least 1."""
    # round(2^30 * 2^(-f/8)), written out: no machine's floating point may change them.
    fractions = np.array(
        [1073741824, 984625594, 902905651, 827968132, 759250125, 696235434, 638450708, 585461881], dtype=np.int64
    )
    level = levels.astype(np.int64)
    weights: npt.NDArray[np.int64] = np.maximum(fractions[level % STEPS_PER_BIT] >> (level // STEPS_PER_BIT), 1)
    return weights


def _tables(weights: npt.NDArray[np.int64]) -> IdTables:
    bucket_of = _buckets(weights)
    bucket_start = np.searchsorted(bucket_of, np.arange(bucket_of[-1] + 2))
    size = np.diff(bucket_start)
    mass = np.add.reduceat(weights, bucket_start[:-1])
    spare = (1 << INNER_BITS) - size
    frequency = 1 + _mul_div(weights, spare[bucket_of], mass[bucket_of])
    inner_end = np.cumsum(frequency)
    before = np.concatenate([[0], inner_end])[bucket_start[:-1]]
    inner_start = inner_end - frequency - before[bucket_of]
    next_start = _next_bucket(mass)
    inner_slot, slot_start, slot_shift = _inner_slots(bucket_of, bucket_start, inner_start)
    inner_total = np.add.reduceat(frequency, bucket_start[:-1]).astype(np.int32)
    return IdTables(
        bucket_of=bucket_of.astype(np.uint16),
        bucket_start=bucket_start.astype(np.int32),
        inner_start=inner_start.astype(np.uint16),
        inner_total=inner_total,
        next_start=next_start,
        next_slot=_next_slots(next_start),
        inner_slot=inner_slot,
        slot_start=slot_start,
        slot_shift=slot_shift,
        reciprocal=_reciprocals(inner_total),
    )


def _reciprocals(totals: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    return np.array([min(-(-(1 << 64) // n), (1 << 64) - 1) for n in totals.tolist()], np.uint64)


def _inner_slots(
    bucket_of: npt.NDArray[np.int64], bucket_start: npt.NDArray[np.int64], inner_start: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """inner_slot, slot_start and slot_shift: two to four slots an id, so that a search rarely takes a step."""
    size = np.diff(bucket_start)
    bits = np.minimum([int(n).bit_length() + 1 for n in size], MAX_SLOT_BITS)
    ends = np.cumsum(1 << bits)
    slot_start = ends - (1 << bits)
    bucket = np.repeat(np.arange(len(size)), 1 << bits)
    number = (np.arange(ends[-1]) - slot_start[bucket]) << (INNER_BITS - bits[bucket])
    keys = (bucket_of << (INNER_BITS + 1)) + inner_start
    found = np.searchsorted(keys, (bucket << (INNER_BITS + 1)) + number, side="right") - 1 - bucket_start[bucket]
    return found.astype(np.uint16), slot_start.astype(np.int32), (INNER_BITS - bits).astype(np.int32)


def _next_slots(next_start: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """The last bucket of each table whose next_start is at most each slot's first number."""
    num_buckets, num_classes, _ = next_start.shape
    tables = np.arange(num_buckets * num_classes).reshape(num_buckets, num_classes, 1) << (NEXT_BITS + 1)
    slots = np.arange(1 << SLOT_BITS) << (NEXT_BITS - SLOT_BITS)
    found = np.searchsorted((next_start[..., :-1] + tables).ravel(), tables + slots, side="right") - 1
    slots_of: npt.NDArray[np.uint8] = np.minimum(found % num_buckets, 255).astype(np.uint8)
    return slots_of


def _mul_div(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], c: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """a * b // c for a ≤ c < 2^55 and b ≤ 2^16, with c cut to 46 bits where the product would not fit."""
    shift = 10 * (c >> 46 > 0)
    quotient: npt.NDArray[np.int64] = ((a >> shift) * b) // np.maximum(c >> shift, 1)
    return quotient


def _buckets(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The bucket of each id: closed once it holds 1/NUM_BUCKETS of the mass, or MAX_BUCKET_SIZE ids."""
    running = np.cumsum(weights)
    target = max(1, int(running[-1]) // NUM_BUCKETS)
    starts = [0]
    while starts[-1] < len(weights):
        before = int(running[starts[-1] - 1]) if starts[-1] else 0
        full = int(np.searchsorted(running, before + target)) + 1
        starts.append(min(full, starts[-1] + MAX_BUCKET_SIZE, len(weights)))
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _next_bucket(mass: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """P(first of m ids in bucket < c | all in buckets ≥ s) = 1 - (mass of c.. / mass of s..)^m, no bucket below 1."""
    num_buckets = len(mass)
    shift = max(0, int(mass.sum()).bit_length() - MASS_BITS)
    mass = np.maximum(mass >> shift, 1)
    remaining = np.concatenate([np.cumsum(mass[::-1])[::-1], [0]])
    table = np.zeros((num_buckets, len(DRAW_CLASSES), num_buckets + 1), np.uint16)
    for s in range(num_buckets):
        reached = (1 << 30) - _powers((remaining[s:] << 30) // remaining[s])
        least = np.arange(num_buckets - s + 1)
        table[s, :, s:] = least + ((reached * ((1 << NEXT_BITS) - (num_buckets - s))) >> 30)
    return table


def _powers(base: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """base [B] to each power of DRAW_CLASSES, [classes, B]: of 30 binary digits, rounded down at each step."""
    result = np.full((len(DRAW_CLASSES), len(base)), 1 << 30, np.int64)
    for digit in reversed(range(int(DRAW_CLASSES[-1]).bit_length())):
        result = (result * result) >> 30
        odd = (DRAW_CLASSES >> digit) & 1 == 1
        result[odd] = (result[odd] * base) >> 30
    return result
