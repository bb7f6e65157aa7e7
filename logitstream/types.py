"""The values that both sides share. They are frozen and hold numpy arrays; torch is not needed to handle them.

Row `t` of a sequence's targets belongs to the prediction of token `t + 1`: a sequence of T tokens has T rows, and the
last row predicts the token after its end. Longer than 300 lines, so that all values have one home.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.errors import InvalidSequence, InvalidSpec
from logitstream.samplers import FULL_UNITS, PROBABILITY_UNITS, SAMPLERS, Sampler
from logitstream.settings import setting

CODEC_VERSIONS = (1, 2)
MAX_VOCAB_SIZE = 1 << 24
MAX_MESSAGE_BYTES = 64 << 20
"""The most that a teacher's max_message_bytes may be: a client sets its channel's limit before it can ask."""
COMMON_FIELDS = frozenset({"sampler", "temperature", "seed", "codec_version"})
SPEC_RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "num_samples": (int, 1, PROBABILITY_UNITS),
    "threshold": (float, 1 / PROBABILITY_UNITS, 1.0),
    "top_k": (int, 1, MAX_VOCAB_SIZE),
    "proposal_temperature": (float, 0.1, 4.0),
    "temperature": (float, 0.01, 100.0),
    "seed": (int, 0, (1 << 64) - 1),
    "codec_version": (int, CODEC_VERSIONS[0], CODEC_VERSIONS[-1]),
}
"""A TargetSpec's numbers: type, least and greatest value."""


def used_fields(sampler: str) -> frozenset[str]:
    """Return the fields of a TargetSpec that affect this sampler's targets; an unknown sampler uses the common ones."""
    row = SAMPLERS.get(sampler)
    return COMMON_FIELDS.union(() if row is None else {row.size_field, *row.other_fields} - {""})


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """How sparse targets are drawn from a teacher's next-token distribution."""

    sampler: str = setting(f"One of {', '.join(SAMPLERS)}.", "systematic")
    num_samples: int = setting("N of systematic and multinomial.", 50)
    threshold: float = setting("θ of threshold: entries of at least this probability are kept as they are.", 0.02)
    top_k: int = setting("k of top_k and top_k_ghost.", 12)
    proposal_temperature: float = setting("τ of multinomial's proposal q ∝ t^τ.", 1.0)
    temperature: float = setting("Softmax temperature of teacher and student in the distillation loss.", 1.0)
    seed: int = setting(
        "Seed of the draws: with the draw set, the sequence's content and the position it determines a draw, so every "
        "student with the same seed gets the same draws.",
        0,
    )
    codec_version: int = setting("Version of the encoded targets.", 2)

    def __post_init__(self) -> None:
        """Check every field, and make numbers those of the field's type: 2 and 2.0 must not make two fingerprints."""
        if self.sampler not in tuple(SAMPLERS):
            raise InvalidSpec(f"unknown sampler {str(self.sampler)[:64]!r}: expected one of {', '.join(SAMPLERS)}")
        for name, (kind, low, high) in SPEC_RANGES.items():
            value: Any = getattr(self, name)
            is_number = isinstance(value, Real)
            if not (is_number and low <= value <= high and kind(value) == value):
                whole = " as a whole number" if kind is int else ""
                raise InvalidSpec(f"{name} must lie in [{low:g}, {high:g}]{whole}, got {str(value)[:64]!r}")
            object.__setattr__(self, name, kind(value))
        if self.proposal_temperature != 1.0 and "proposal_temperature" not in self.kind.other_fields:
            raise InvalidSpec(f"proposal_temperature is not a parameter of {self.sampler}: leave it at 1")

    @property
    def kind(self) -> Sampler:
        """The sampler's row of the table."""
        return SAMPLERS[self.sampler]

    def canonical(self) -> dict[str, str | int | float]:
        """Return the fields that affect this sampler's targets, for fingerprints."""
        used = used_fields(self.sampler)
        return {name: value for name, value in asdict(self).items() if name in used}

    @classmethod
    def from_canonical(cls, values: object) -> TargetSpec:
        """Undo `canonical` for values from a disk or a network; InvalidSpec for anything that it does not return."""
        if not isinstance(values, dict):
            raise InvalidSpec(f"expected a target specification, got a {type(values).__name__}")
        if unknown := sorted(str(name)[:64] for name in values.keys() - {one.name for one in fields(cls)}):
            raise InvalidSpec(f"a target specification has no {', '.join(unknown[:8])}")
        spec = cls(**values)
        if json.dumps(values, sort_keys=True) != json.dumps(spec.canonical(), sort_keys=True):  # as 1 equals 1.0
            raise InvalidSpec(f"expected the parameters of {spec.sampler}, {spec.canonical()}, got {values}")
        return spec

    def max_entries(self, vocab_size: int) -> int:
        """Return the most entries that a row of this sampler's targets can have."""
        return min(vocab_size, self.kind.entries(self, vocab_size))


def pack_mask(mask: npt.NDArray[np.bool_] | None) -> bytes:
    """Return a loss mask as bits, the lowest first; empty for one that leaves nothing out."""
    return b"" if mask is None or mask.all() else np.packbits(mask, bitorder="little").tobytes()


def unpack_mask(data: bytes, num_tokens: int) -> npt.NDArray[np.bool_] | None:
    """Undo `pack_mask`; InvalidSequence for another number of bytes, or bits set beyond the tokens."""
    if not data:
        return None
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if len(data) != (num_tokens + 7) // 8 or bits[num_tokens:].any():
        raise InvalidSequence(f"loss_mask of {len(data)} bytes: expected a bit for each of {num_tokens} tokens")
    return bits[:num_tokens].astype(bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Token ids of one sequence, int32 [T], and which of its T rows are wanted, bool [T] (None: all)."""

    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_wanted(self) -> int:
        return len(self) if self.loss_mask is None else int(self.loss_mask.sum())

    def validate(self, *, vocab_size: int, max_sequence_tokens: int) -> None:
        """Raise InvalidSequence, saying what was expected and what came."""
        if not 1 <= len(self) <= max_sequence_tokens:
            raise InvalidSequence(f"sequence of {len(self)} tokens: expected 1 to {max_sequence_tokens}")
        for bad in (int(self.token_ids.min()), int(self.token_ids.max())):
            if not 0 <= bad < vocab_size:
                raise InvalidSequence(f"token id {bad} is outside the teacher's vocabulary of {vocab_size}")
        if self.loss_mask is not None and len(self.loss_mask) != len(self):
            raise InvalidSequence(f"loss_mask of {len(self.loss_mask)} entries for a sequence of {len(self)} tokens")

    def digest(self) -> bytes:
        """Return 16 bytes that depend on the token ids and the mask alone."""
        h = hashlib.blake2b(digest_size=16, person=b"ls-sequence")
        h.update(np.ascontiguousarray(self.token_ids, dtype="<i4").tobytes())
        if mask := pack_mask(self.loss_mask):
            h.update(b"mask" + mask)
        return h.digest()


ENTRIES_PER_TOKEN = 1024
"""Entries that weigh as much as one token of forward in budgets: few samplers get near, `full` goes far beyond."""
LEAST_CALL_TOKENS, LEAST_SEQUENCE_TOKENS = 512, 8
"""The least that a call and a sequence count, for the bookkeeping that they cost."""


def entries_bound(sequence: TokenSequence, spec: TargetSpec, vocab_size: int) -> int:
    """Return the most entries that a sequence's targets can have."""
    return sequence.num_wanted * spec.max_entries(vocab_size)


def credit_tokens(sequence: TokenSequence, spec: TargetSpec, vocab_size: int) -> int:
    """Return what a sequence costs a teacher in tokens: its own, or its entries where those weigh more."""
    return max(len(sequence), entries_bound(sequence, spec, vocab_size) // ENTRIES_PER_TOKEN)


def call_tokens(costs: Sequence[int]) -> int:
    """Return what a call counts against its client's limit, from the `credit_tokens` of its sequences."""
    return max(LEAST_CALL_TOKENS, sum(max(cost, LEAST_SEQUENCE_TOKENS) for cost in costs))


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """Sparse next-token targets of R rows in CSR form; weights are whole numbers of units, so sums are exact.

    row_offsets: int64 [R + 1]; row r holds entries row_offsets[r] to row_offsets[r + 1].
    token_ids: int32 [K], strictly increasing within a row, below vocab_size.
    counts: int32 [K]; an entry's weight is counts / units. A count of 0 marks a tail entry (sampler `threshold`): a
        row's m tail entries share what its other entries leave of 1, but no less than tail_units in all, so each
        weighs max(units - sum(counts), tail_units) / (m * units).
    units: N for systematic and for multinomial at τ = 1, a fine grid otherwise.
    spec: how they were drawn, from which the losses take the temperature and the ghost bucket; None: not known.
    """

    vocab_size: int
    units: int
    row_offsets: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    tail_units: int = 0
    spec: TargetSpec | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_entries(self) -> int:
        return len(self.token_ids)

    def row_index(self) -> npt.NDArray[np.int64]:
        """Return the row of each entry, int64 [K]."""
        return np.repeat(np.arange(self.num_rows, dtype=np.int64), np.diff(self.row_offsets))

    def weights(self) -> npt.NDArray[np.float32]:
        """Return t̂ of each entry, float32 [K]."""
        weights = self.counts.astype(np.float64) / self.units
        tail = self.counts == 0
        if tail.any():
            rows = self.row_index()
            head_units = np.bincount(rows, weights=self.counts, minlength=self.num_rows)
            num_tail = np.bincount(rows, weights=tail, minlength=self.num_rows)
            tail_mass = np.maximum(self.units - head_units, self.tail_units) / self.units
            weights[tail] = (tail_mass / np.maximum(num_tail, 1))[rows[tail]]
        return weights.astype(np.float32)

    def slice_rows(self, start: int, stop: int) -> SparseTargets:
        """Return rows start to stop."""
        offsets = self.row_offsets[start : stop + 1]
        kept = slice(int(offsets[0]), int(offsets[-1]))
        return replace(self, row_offsets=offsets - kept.start, token_ids=self.token_ids[kept], counts=self.counts[kept])

    @staticmethod
    def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
        """Return all rows of several targets drawn alike; ValueError if vocabulary, units or spec differ."""
        if len(kinds := {(part.vocab_size, part.units, part.tail_units, part.spec) for part in parts}) != 1:
            raise ValueError(f"expected targets drawn alike, got (vocab_size, units, tail_units, spec) = {kinds}")
        starts = np.cumsum([0] + [part.num_entries for part in parts])
        offsets = [part.row_offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
        return replace(
            parts[0],
            row_offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
            token_ids=np.concatenate([part.token_ids for part in parts]),
            counts=np.concatenate([part.counts for part in parts]),
        )

    def validate(self, *, shape_only: bool = False) -> None:
        """Raise ValueError if the arrays do not form a CSR in range; shape_only: do not look at each entry."""
        if not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must lie in [1, {MAX_VOCAB_SIZE}], got {self.vocab_size}")
        if not 1 <= self.units <= FULL_UNITS or not 0 <= self.tail_units <= self.units:
            raise ValueError(f"units {self.units} or tail_units {self.tail_units} out of bounds")
        lengths = np.diff(self.row_offsets, prepend=0, append=self.num_entries)
        if lengths[0] or lengths[-1] or (lengths < 0).any() or len(self.counts) != self.num_entries:
            raise ValueError("row_offsets must rise from 0 to the number of entries, and each entry needs one count")
        if shape_only or not self.num_entries:
            return
        if self.token_ids.min() < 0 or self.token_ids.max() >= self.vocab_size or self.counts.min() < 0:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size}) and counts must not be negative")
        if np.any((np.diff(self.token_ids) <= 0) & (np.diff(self.row_index()) == 0)):
            raise ValueError("token ids must increase strictly within a row")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """A teacher's description of itself; digests are hex, limits in tokens and bytes.

    More attributes than 12: they are those of the message `DescribeResponse`.
    """

    model: str
    revision: str = ""
    weights_digest: str
    tokenizer_digest: str
    vocab_size: int
    dtype: str
    max_sequence_tokens: int
    max_in_flight_tokens: int = 65_536
    max_message_bytes: int = 16 << 20
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    codec_versions: tuple[int, ...] = CODEC_VERSIONS
    id_model: bytes = field(default=b"", repr=False)
    teacher_version: int = 0
    server_version: str = ""
    backend: str = ""
    tokenizer_rules: str = ""

    @property
    def short_weights_digest(self) -> bytes:
        """The first bytes of the weights' digest, which travel with every result."""
        return bytes.fromhex(self.weights_digest)[:8]


_TEXT = re.compile("[0-9a-z_]{0,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Everything that affects a target but the sequence and the draw set; `digest` is part of every cache key."""

    weights_digest: str
    tokenizer_digest: str
    vocab_size: int
    dtype: str
    id_model_digest: str
    spec: dict[str, str | int | float]

    @classmethod
    def of(cls, info: TeacherInfo, spec: TargetSpec) -> Fingerprint:
        same = ("weights_digest", "tokenizer_digest", "vocab_size", "dtype")
        return cls(
            **{name: getattr(info, name) for name in same},
            id_model_digest=hashlib.sha256(info.id_model).hexdigest() if info.id_model else "",
            spec=spec.canonical(),
        )

    @classmethod
    def from_json(cls, values: object) -> Fingerprint:
        """Undo `asdict` for values read from a file; ValueError names what is missing, unknown or of another kind."""
        if not isinstance(values, dict):
            raise ValueError(f"expected a fingerprint, got a {type(values).__name__}")
        if wrong := sorted(str(name)[:64] for name in {one.name for one in fields(cls)} ^ values.keys()):
            raise ValueError(f"a fingerprint has other fields, missing or unknown: {', '.join(wrong[:8])}")
        for name in ("weights_digest", "tokenizer_digest", "id_model_digest", "dtype"):
            if not (isinstance(values[name], str) and _TEXT.fullmatch(values[name])):
                raise ValueError(f"{name} must match {_TEXT.pattern}, got {str(values[name])[:80]!r}")
        vocab_size = values["vocab_size"]
        if type(vocab_size) is not int or not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be a whole number in [1, {MAX_VOCAB_SIZE}], got {str(vocab_size)[:64]}")
        return cls(**values | {"spec": TargetSpec.from_canonical(values["spec"]).canonical()})

    @property
    def digest(self) -> str:
        """The SHA-256 of the canonical JSON, hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Fingerprint) -> str:
        """Return a phrase for each field that differs, this one's value first; empty if none does."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return "; ".join(f"{name}: {mine!r} against {theirs!r}" for name, mine, theirs in pairs if mine != theirs)


def request_key(fingerprint_digest: str, sequence: TokenSequence, draw_set: int) -> bytes:
    """Return the 16 bytes that name one sequence's targets in caches and retries, wherever in a run it is asked for."""
    h = hashlib.blake2b(digest_size=16, person=b"ls-key")
    h.update(bytes.fromhex(fingerprint_digest) + sequence.digest() + draw_set.to_bytes(8, "little"))
    return h.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedTargets:
    """Encoded targets of one sequence as they came over the wire or from disk, and the weights that made them.

    fingerprint: digest of the fingerprint with those weights; weights_digest: their TeacherInfo.short_weights_digest.
    wire_bytes: size of their part of the gRPC message; 0 if they are from a cache or a teacher in this process.
    """

    payload: bytes
    fingerprint: str = ""
    teacher_version: int = 0
    weights_digest: bytes = b""
    from_cache: bool = False
    wire_bytes: int = 0
