"""The uniforms that targets are drawn with, keyed by what is drawn and not by who draws it, so that replicas, retries
and chunks of any size agree.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from logitstream.types import TargetSpec, TokenSequence

GAP = 256
"""Counter values that are sooner drawn and dropped than skipped."""


def draw_key(spec: TargetSpec, sequence: TokenSequence, draw_set: int) -> bytes:
    """16 bytes that key one sequence's uniforms: of seed, draw set and the sequence's content."""
    h = hashlib.blake2b(digest_size=16, person=b"ls-uniforms")
    h.update(spec.seed.to_bytes(8, "little") + draw_set.to_bytes(8, "little") + sequence.digest())
    return h.digest()


def row_uniforms(spec: TargetSpec, key: bytes, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1) of these rows of a sequence (rising), float64 [R, uniforms_per_row(spec)].

    Philox4x64 under `draw_key`, its counter by the row: memory and time are those of the rows asked for.
    """
    per_row = uniforms_per_row(spec)
    uniforms, blocks = np.empty((len(rows), per_row)), -(-per_row // 4)
    if uniforms.size == 0:
        return uniforms
    generator = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64))
    cuts = np.flatnonzero((np.diff(rows) - 1) * blocks > GAP) + 1
    next_row = 0
    for start, stop in pairwise([0, *cuts.tolist(), len(rows)]):
        first, last = int(rows[start]), int(rows[stop - 1])
        generator.advance((first - next_row) * blocks)
        next_row = last + 1
        raw = generator.random_raw((next_row - first) * blocks * 4).reshape(-1, blocks * 4)[:, :per_row]
        kept = raw if len(raw) == stop - start else raw[rows[start:stop] - first]
        uniforms[start:stop] = (kept >> np.uint64(11)) * 2.0**-53
    return uniforms


def uniforms_per_row(spec: TargetSpec) -> int:
    """How many uniforms one row's draw takes."""
    if spec.sampler == "multinomial":
        return spec.num_samples + (spec.proposal_temperature != 1.0)
    return {"systematic": 1, "threshold": 3}.get(spec.sampler, 0)
