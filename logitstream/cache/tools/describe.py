"""Count what a cache holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import END_OF_STREAM, token_dtype
from logitstream.cache.tools.export import decode
from logitstream.cache.tools.verify import shard_log
from logitstream.errors import CodecError, CorruptRecord

SAMPLED_RECORDS = 256


def describe(reader: CacheReader) -> dict[str, Any]:
    """Return figures of a cache: sizes in bytes, entries a row of a sample of its records, and where it comes from.

    bytes counts the shards and their indexes, which grow with the records. Figures a token are None without tokens.
    """
    manifest, fingerprint = reader.manifest, reader.fingerprint
    num_bytes, draw_sets, part_bytes = 0, Counter[int](), Counter[str]()
    for shard in reader.shards:
        log = shard_log(shard.path, shard.is_sealed, manifest)
        num_bytes += log.end + max((entry.end for entry in log.entries), default=0)
        num_bytes += len(END_OF_STREAM) if shard.is_sealed else 0
        draw_sets.update(log.spans["draw_set"].tolist())
        for part in ("tokens", "payload"):
            part_bytes[part] += int(log.spans[f"{part}_bytes"].sum(dtype=np.int64))
    tokens = part_bytes["tokens"] // token_dtype(fingerprint.vocab_size).itemsize
    sealed = sum(shard.is_sealed for shard in reader.shards)
    return {
        "records": reader.num_records,
        "distinct_keys": len(reader),
        "tokens": tokens,
        "bytes": num_bytes,
        "payload_bytes_per_token": _quotient(part_bytes["payload"], tokens),
        "bytes_per_token": _quotient(num_bytes, tokens),
        "shards": {"sealed": sealed, "open": len(reader.shards) - sealed},
        "records_by_draw_set": {str(draw_set): draw_sets[draw_set] for draw_set in sorted(draw_sets)},
        "entries_per_row": _quotient(*_entries_and_rows(reader)),
        "fingerprint_digest": fingerprint.digest,
        "fingerprint": asdict(fingerprint),
        "provenance": manifest.provenance,
        "created": manifest.created,
    }


def _quotient(amount: int, number: int) -> float | None:
    return round(amount / number, 3) if number else None


def _entries_and_rows(reader: CacheReader) -> tuple[int, int]:
    """Count the entries and the wanted rows of a sample that is spread over the keys."""
    entries = rows = 0
    for i in range(0, len(reader), max(1, len(reader) // SAMPLED_RECORDS)):
        try:
            record = reader.record(i)
            per_row = np.diff(decode(reader, record).row_offsets)
        except (CorruptRecord, CodecError):
            continue
        wanted = per_row if record.loss_mask is None else per_row[record.loss_mask]
        entries, rows = entries + int(wanted.sum()), rows + len(wanted)
    return entries, rows
