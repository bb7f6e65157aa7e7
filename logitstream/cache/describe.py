"""What a cache directory holds, in figures."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.cache.decoding import decoder
from logitstream.cache.manifest import file_bytes, read_entry, summary
from logitstream.cache.open_shard import OPEN_SUFFIX, directory_bytes, shard_bytes
from logitstream.cache.reader import CacheReader
from logitstream.cache.shard import scanned_spans, token_width
from logitstream.cache.shard_state import other_fingerprint, shard_spans, unreadable
from logitstream.errors import CacheError, CodecError, CorruptRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Sizes in bytes; entries: how many of the sampled wanted rows hold 0, 1, 2, … entries.

    directory_bytes: of all files; shard_bytes: of the shards and their sidecars alone, which grow with the records.
    """

    manifest: dict[str, Any]
    directory_bytes: int
    shard_bytes: int
    payload_bytes: int
    sealed_shards: int
    open_shards: int
    records: int
    distinct_keys: int
    tokens: int
    draw_sets: dict[int, int]
    entries: npt.NDArray[np.int64]

    @property
    def payload_bytes_per_token(self) -> float | None:
        """None where there are no tokens."""
        return self.payload_bytes / self.tokens if self.tokens else None

    @property
    def bytes_per_token(self) -> float | None:
        """With token ids, masks, keys, checksums and indexes, without manifest and id model; None without tokens."""
        return self.shard_bytes / self.tokens if self.tokens else None

    @property
    def entries_per_row(self) -> float | None:
        """Mean over the sampled wanted rows; None where there are none."""
        rows = int(self.entries.sum())
        return float(self.entries @ np.arange(len(self.entries))) / rows if rows else None


def describe(directory: Path, *, sampled_records: int = 256) -> Description:
    """Read the shards' entries, scan open shards, decode a sample spread over the keys."""
    reader = CacheReader(directory)
    totals, draw_sets = Counter[str](), Counter[int]()
    sealed = [path for path in sorted(directory.glob("*.arrow")) if not unreadable(path)]
    sealed = [path for path in sealed if not other_fingerprint(path, reader.manifest)]
    growing = [path for path in sorted(directory.glob(f"*{OPEN_SUFFIX}")) if not unreadable(path)]
    for path in [*sealed, *growing]:
        entry = _entry(path, reader.manifest)
        totals.update({name: entry[name] for name in ("records", "tokens", "payload_bytes")})
        draw_sets.update({int(draw_set): count for draw_set, count in entry["draw_sets"].items()})
    return Description(
        manifest=reader.manifest,
        directory_bytes=directory_bytes(directory),
        shard_bytes=sum(map(shard_bytes, sealed)) + sum(map(file_bytes, growing)),
        payload_bytes=totals["payload_bytes"],
        sealed_shards=len(sealed),
        open_shards=len(growing),
        records=totals["records"],
        distinct_keys=len(reader),
        tokens=totals["tokens"],
        draw_sets=dict(sorted(draw_sets.items())),
        entries=_entries(reader, sampled_records),
    )


def _entry(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A sealed shard's entry; made anew for an open one, or where it is damaged."""
    if path.suffix == OPEN_SUFFIX:
        return summary(scanned_spans(path, token_width(manifest)))
    with contextlib.suppress(CacheError):
        return read_entry(path)
    return summary(shard_spans(path, manifest)[0])


def _entries(reader: CacheReader, sampled_records: int) -> npt.NDArray[np.int64]:
    """Histogram of entries a wanted row."""
    decode = decoder(reader)
    histogram = np.zeros(1, np.int64)
    for i in np.unique(np.linspace(0, len(reader) - 1, min(sampled_records, len(reader))).astype(int)):
        try:
            record = reader.record(int(i))
            targets = decode(record)
        except (CorruptRecord, CodecError):
            continue
        per_row = np.diff(targets.row_offsets)
        if record.loss_mask is not None:
            per_row = per_row[record.loss_mask]
        counts = np.bincount(per_row, minlength=len(histogram))
        histogram = counts + np.pad(histogram, (0, len(counts) - len(histogram)))
    return histogram
