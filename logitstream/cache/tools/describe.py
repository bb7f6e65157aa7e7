"""Count what a cache holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import END_OF_STREAM, token_dtype
from logitstream.cache.tools.verify import shard_log


def describe(reader: CacheReader) -> dict[str, Any]:
    """Return figures of a cache and where it comes from.

    bytes counts the shards and their indexes, which grow with the records. Figures a token are None without tokens.
    """
    manifest, fingerprint = reader.manifest, reader.fingerprint
    num_bytes, part_bytes = 0, Counter[str]()
    for shard in reader.shards:
        log = shard_log(shard.path, shard.is_sealed, manifest)
        num_bytes += log.end + max((entry.end for entry in log.entries), default=0)
        num_bytes += len(END_OF_STREAM) if shard.is_sealed else 0
        for part in ("tokens", "payload"):
            part_bytes[part] += int(log.spans[f"{part}_bytes"].sum(dtype=np.int64))
    tokens = part_bytes["tokens"] // token_dtype(fingerprint.vocab_size).itemsize
    draw_sets, counts = np.unique(reader.draw_sets(), return_counts=True)
    sealed = sum(shard.is_sealed for shard in reader.shards)
    return {
        "records": reader.num_records,
        "distinct_keys": len(reader),
        "tokens": tokens,
        "bytes": num_bytes,
        "payload_bytes_per_token": round(part_bytes["payload"] / tokens, 3) if tokens else None,
        "bytes_per_token": round(num_bytes / tokens, 3) if tokens else None,
        "shards": {"sealed": sealed, "open": len(reader.shards) - sealed},
        "distinct_keys_by_draw_set": dict(zip(map(str, draw_sets.tolist()), counts.tolist(), strict=True)),
        "fingerprint_digest": fingerprint.digest,
        "fingerprint": asdict(fingerprint),
        "provenance": manifest.provenance,
        "created": manifest.created,
    }
