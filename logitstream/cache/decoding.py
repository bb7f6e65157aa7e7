"""Decode the records of a cache, within the bounds that its manifest sets."""

from __future__ import annotations

from collections.abc import Callable

from logitstream import codec
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import Record
from logitstream.id_model import IdModel
from logitstream.types import SparseTargets, TargetSpec

Decode = Callable[[Record], SparseTargets]


def decoder(reader: CacheReader) -> Decode:
    """A function that decodes one record of the reader's cache; it raises CodecError as `codec.decode`."""
    fingerprint = reader.fingerprint
    spec = TargetSpec.from_canonical(fingerprint.spec)
    id_model = IdModel.from_bytes(reader.id_model) if reader.id_model else None

    def decode(record: Record) -> SparseTargets:
        return codec.decode(
            record.payload,
            spec=spec,
            vocab_size=fingerprint.vocab_size,
            id_model=id_model,
            num_rows=len(record.token_ids),
        )

    return decode
