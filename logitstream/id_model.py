"""A static model of which token ids appear in targets: a quantised log-probability per id, shared by both sides."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from logitstream.errors import CodecError


@dataclass(frozen=True, slots=True, eq=False)
class IdModel:
    """levels: uint8 [V], each id's -log2(probability) in steps of 1/8 bit."""

    levels: npt.NDArray[np.uint8]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(self.to_bytes()).hexdigest())

    @property
    def vocab_size(self) -> int:
        return len(self.levels)

    def to_bytes(self) -> bytes:
        return b"\x01" + zlib.compress(self.levels.tobytes(), 9)

    @classmethod
    def from_bytes(cls, data: bytes) -> IdModel:
        """Raises CodecError where the bytes are none."""
        if data[:1] != b"\x01":
            raise CodecError("not an id model: expected version byte 1")
        try:
            return cls(np.frombuffer(zlib.decompress(data[1:]), np.uint8))
        except zlib.error as error:
            raise CodecError(f"damaged id model: {error}") from error
