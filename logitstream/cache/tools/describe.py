"""Count what a cache holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import OPEN_SUFFIX, token_dtype
from logitstream.cache.tools.export import decode
from logitstream.errors import CodecError, CorruptRecord


def describe(reader: CacheReader, *, sampled_records: int = 256) -> dict[str, Any]:
    """Return figures of a cache: sizes in bytes, entries a row of a sample of its records, and where it comes from.

    Figures a token are None if there are no tokens. shard_bytes counts the shards and their indexes alone, which grow
    with the records.
    """
    manifest, fingerprint = reader.manifest, reader.fingerprint
    spans = [shard.spans(fingerprint.digest) for shard in reader.shards]
    draw_sets = Counter[int]()
    for part in spans:
        values, counts = np.unique(part["draw_set"], return_counts=True)
        draw_sets.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    tokens, payload_bytes = (
        sum(int(part[name].sum(dtype=np.int64)) // unit for part in spans)
        for name, unit in (("tokens_bytes", token_dtype(fingerprint.vocab_size).itemsize), ("payload_bytes", 1))
    )
    sizes = reader.file_sizes()
    shard_bytes = sum(size for name, size in sizes.items() if name.endswith((".arrow", OPEN_SUFFIX, ".index")))
    histogram = entries_histogram(reader, sampled_records)
    num_rows = int(histogram.sum())
    sealed = sum(shard.is_sealed for shard in reader.shards)
    return {
        "records": reader.num_records,
        "distinct_keys": len(reader),
        "tokens": tokens,
        "directory_bytes": sum(sizes.values()),
        "shard_bytes": shard_bytes,
        "payload_bytes_per_token": _quotient(payload_bytes, tokens),
        "bytes_per_token": _quotient(shard_bytes, tokens),
        "shards": {"sealed": sealed, "open": len(reader.shards) - sealed},
        "records_by_draw_set": {str(draw_set): draw_sets[draw_set] for draw_set in sorted(draw_sets)},
        "entries_per_row": _quotient(int(histogram @ np.arange(len(histogram))), num_rows),
        "entries_histogram": {str(k): int(n) for k, n in enumerate(histogram) if n},
        "fingerprint_digest": fingerprint.digest,
        "fingerprint": asdict(fingerprint),
        "provenance": manifest.provenance,
        "created": manifest.created,
    }


def _quotient(amount: int, number: int) -> float | None:
    return round(amount / number, 3) if number else None


def entries_histogram(reader: CacheReader, sampled_records: int) -> npt.NDArray[np.int64]:
    """Count how many wanted rows hold 0, 1, 2, … entries, in a sample spread over the keys."""
    histogram = np.zeros(1, np.int64)
    for i in np.unique(np.linspace(0, len(reader) - 1, min(sampled_records, len(reader))).astype(int)):
        try:
            record = reader.record(int(i))
            per_row = np.diff(decode(reader, record).row_offsets)
        except (CorruptRecord, CodecError):
            continue
        counts = np.bincount(per_row if record.loss_mask is None else per_row[record.loss_mask])
        length = max(len(counts), len(histogram))
        histogram = np.pad(histogram, (0, length - len(histogram))) + np.pad(counts, (0, length - len(counts)))
    return histogram
