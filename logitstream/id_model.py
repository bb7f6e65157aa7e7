"""A static model of which token ids occur in a teacher's targets, which brings their codes near their entropy.

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
INNER_BITS, NEXT_BITS, MASS_BITS = 16, 15, 31
SLOT_BITS, INNER_SLOT_BITS = 7, 9
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
        """Return the model of ids that occur this often in targets of 4,000 rows or more, float64 [V]; zeros are fine.

        Occurrences, not mean probabilities: a frequent id's share of the entries is smaller than of the probability.
        """
        if not (np.isfinite(expected_counts).all() and (expected_counts >= 0).all()):
            raise ValueError("expected counts must be finite and not negative")
        smoothed = expected_counts + PSEUDO_COUNT
        bits = -np.log2(smoothed / smoothed.sum())
        return cls(np.clip(np.rint(bits * STEPS_PER_BIT), 0, MAX_LEVEL).astype(np.uint8))

    def to_bytes(self) -> bytes:
        """Return a version byte and the levels: not compressed, as another zlib would give another digest."""
        return b"\x01" + self.levels.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> IdModel:
        """Undo `to_bytes`; CodecError for other bytes."""
        if data[:1] != b"\x01" or not 1 <= len(data) - 1 <= MAX_VOCAB_SIZE:
            raise CodecError(
                f"not an id model: {len(data)} bytes, the first {data[:1].hex()}, expected 01 and the levels"
            )
        return cls(np.frombuffer(data, np.uint8, offset=1))

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of to_bytes(), hex; a teacher with these bytes has it as its Fingerprint.id_model_digest."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @functools.cached_property
    def tables(self) -> IdTables:
        # round(2^30 * 2^(-f/8)), written out: no machine's floating point may change them.
        fractions = np.array(
            [1073741824, 984625594, 902905651, 827968132, 759250125, 696235434, 638450708, 585461881], dtype=np.int64
        )
        level = self.levels.astype(np.int64)
        return _tables(np.maximum(fractions[level % STEPS_PER_BIT] >> (level // STEPS_PER_BIT), 1))


class IdTables(NamedTuple):
    """Look-up tables of the coder, small enough for a core's cache. Consecutive ids form B buckets of about equal mass.

    bucket_of: uint16 [V]; bucket_start: int32 [B + 1], first ids.
    inner_start: uint16 [V], running sum of frequencies within the id's bucket, which are 2^INNER_BITS in all.
    inner_slot: uint16 [B, slots], where a search for the id that holds a number starts, by the number's highest
        INNER_SLOT_BITS: the last id that starts no later than the slot, counted from the bucket's first.
    next_start: uint16 [B, classes, B + 1], for the bucket of the next id, if ids from the first index's bucket on are
        free and a class of DRAW_CLASSES says how many are still to come: running sums of frequencies, 2^NEXT_BITS in
        all.
    next_slot: uint8 [B, classes, slots], where a search for the bucket that holds a number starts, by SLOT_BITS:
        the last bucket that starts no later than the slot, or 255.
    """

    bucket_of: npt.NDArray[np.uint16]
    bucket_start: npt.NDArray[np.int32]
    inner_start: npt.NDArray[np.uint16]
    inner_slot: npt.NDArray[np.uint16]
    next_start: npt.NDArray[np.uint16]
    next_slot: npt.NDArray[np.uint8]


NO_TABLES = IdTables(
    *(np.zeros(0, np.uint16), np.zeros(1, np.int32), np.zeros(0, np.uint16), np.zeros((0, 0), np.uint16)),
    *(np.zeros((0, 0, 0), np.uint16), np.zeros((0, 0, 0), np.uint8)),
)
"""Without an id model there are no buckets."""


def _tables(weights: npt.NDArray[np.int64]) -> IdTables:
    """Return the tables of ids with these weights, 1 to 2^30 each."""
    starts = _bucket_starts(weights)
    sizes = np.diff(starts)
    bucket_of = np.repeat(np.arange(len(sizes)), sizes)
    running = np.cumsum(weights) - weights
    mass = np.add.reduceat(weights, starts[:-1])
    # A frequency of one for each id, and what is left of the total by mass: at most 2^62 before the division.
    rank, before = np.arange(len(weights)) - starts[bucket_of], running - running[starts[bucket_of]]
    inner_start = rank + before * ((1 << INNER_BITS) - sizes)[bucket_of] // mass[bucket_of]
    numbers = np.arange(1 << INNER_SLOT_BITS) << (INNER_BITS - INNER_SLOT_BITS)
    keys, wanted = (bucket_of << INNER_BITS) + inner_start, (np.arange(len(sizes))[:, None] << INNER_BITS) + numbers
    inner_slot = np.searchsorted(keys, wanted, side="right") - 1 - starts[:-1, None]
    next_start = _next_bucket(mass)
    return IdTables(
        bucket_of=bucket_of.astype(np.uint16),
        bucket_start=starts.astype(np.int32),
        inner_start=inner_start.astype(np.uint16),
        inner_slot=inner_slot.astype(np.uint16),
        next_start=next_start,
        next_slot=_next_slots(next_start),
    )


def _bucket_starts(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Close each bucket once it holds 1/NUM_BUCKETS of the mass, or MAX_BUCKET_SIZE ids."""
    running = np.cumsum(weights)
    target = max(1, int(running[-1]) // NUM_BUCKETS)
    starts = [0]
    while starts[-1] < len(weights):
        before = int(running[starts[-1] - 1]) if starts[-1] else 0
        full = int(np.searchsorted(running, before + target)) + 1
        starts.append(min(full, starts[-1] + MAX_BUCKET_SIZE, len(weights)))
    return np.array(starts)


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
    """Return base [B] to each power of DRAW_CLASSES, [classes, B]: of 30 binary digits, rounded down at each step."""
    result = np.full((len(DRAW_CLASSES), len(base)), 1 << 30, np.int64)
    for digit in reversed(range(int(DRAW_CLASSES[-1]).bit_length())):
        result = (result * result) >> 30
        odd = (DRAW_CLASSES >> digit) & 1 == 1
        result[odd] = (result[odd] * base) >> 30
    return result


def _next_slots(next_start: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Return the last bucket of each table whose next_start is at most each slot's first number."""
    num_buckets, num_classes, _ = next_start.shape
    tables = np.arange(num_buckets * num_classes).reshape(num_buckets, num_classes, 1) << (NEXT_BITS + 1)
    slots = np.arange(1 << SLOT_BITS) << (NEXT_BITS - SLOT_BITS)
    found = np.searchsorted((next_start[..., :-1] + tables).ravel(), tables + slots, side="right") - 1
    slot: npt.NDArray[np.uint8] = np.minimum(found % num_buckets, 255).astype(np.uint8)
    return slot
