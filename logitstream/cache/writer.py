"""Appending records to a cache directory: each writer has its own shards, so any number of them write at once."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream import metrics
from logitstream.cache.manifest import create_manifest, tree_bytes
from logitstream.cache.open_shard import OpenShard, recover
from logitstream.cache.remote import Mirror, is_remote, local_path
from logitstream.cache.shard import KEY_BYTES, MAX_SHARD_BYTES, SPAN, TOKEN_DTYPES, Record, encode_batch, token_width
from logitstream.types import Fingerprint

logger = logging.getLogger(__name__)

MAX_PENDING_SECONDS = 1.0
"""A record waits no longer than this for its batch to fill once another one comes."""
ENTRY_BYTES = 1024
"""More than a shard's entry, end marker and index header take."""
RECORD_BYTES = 160
"""More than a record takes beside its tokens, mask and payload: columns, offsets and its span in the index."""
MESSAGE_BYTES = 4096
"""More than a record batch's or a schema's metadata and padding take."""
CHECK_BYTES = 16 << 20
"""How much this writer writes between looks at what others wrote."""


class CacheWriter:
    """Write-through of one process; safe from several threads.

    put() collects records into record batches of `batch_bytes`; flush() writes what is pending and acknowledges it;
    close() seals the shard. What flush() acknowledged survives a kill of the process at any moment, and with
    `fsync=True` a loss of power (otherwise only sealed shards do). A shard is sealed at `shard_bytes`.

    A failed write (a full disk, an I/O error) or a directory that reached `max_bytes` (0: no bound) never raises: the
    writer warns once, counts `cache_write_errors_total` and takes nothing more; `disabled` says why. Raises
    FingerprintMismatch or CacheError where the directory holds other targets.

    directory: a folder, or an fsspec URL (s3://…, gs://…): then shards are written in the folder `staging` and uploaded
    once they are sealed; storage_options go to fsspec. disk_label: its name in the metrics; by default the folder.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: Fingerprint,
        *,
        id_model: bytes = b"",
        provenance: dict[str, Any] | None = None,
        max_bytes: int = 0,
        writer_id: str = "writer",
        disk_label: str = "",
        shard_bytes: int = 256 << 20,
        batch_bytes: int = 256 << 10,
        fsync: bool = False,
        staging: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if not 0 < batch_bytes <= shard_bytes <= MAX_SHARD_BYTES // 2:
            raise ValueError(
                f"expected batch_bytes <= shard_bytes <= {MAX_SHARD_BYTES // 2}, got {batch_bytes=} {shard_bytes=}"
            )
        self.directory = local_path(directory)
        self._name = str(directory)
        self._vocab_size, self._width = fingerprint.vocab_size, 4
        self.disabled = ""
        self._limits = (max_bytes, shard_bytes, batch_bytes)
        self._writer_id = "".join(c if c.isalnum() or c in "-_" else "_" for c in writer_id)
        self._fsync = fsync
        self._disk_label = disk_label
        self._mirror: Mirror | None = None
        self._lock = threading.RLock()
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self.unwritten = 0
        """Records that were put and are not on disk yet."""
        self._pending_since = 0.0
        self._shard: OpenShard | None = None
        self._others_bytes = 0
        self._unchecked_bytes = 0
        self._pid = os.getpid()
        try:
            if is_remote(directory):
                self._mirror = Mirror(str(directory), staging=staging, storage_options=storage_options)
                self._mirror.pull_head()
                self.directory = self._mirror.staging
            self._manifest = create_manifest(
                self.directory, fingerprint, provenance=provenance or {}, id_model=id_model
            )
            self._width = token_width(self._manifest)
            recover(self.directory, self._manifest)
            if self._mirror is not None:
                self._mirror.push_head()
                self._mirror.push_missing()
            self._look_around()
        except OSError as error:
            self._disable(f"{error}")

    def put(
        self,
        key: bytes,
        token_ids: npt.NDArray[np.int32],
        loss_mask: npt.NDArray[np.bool_] | None,
        payload: bytes,
        draw_set: int,
        *,
        teacher_version: int = 0,
    ) -> bool:
        """Take one sequence's encoded targets, verbatim; whether they were taken. They are safe after flush()."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"expected a key of {KEY_BYTES} bytes, got {len(key)}")
        with self._lock:
            self._leave_parents_shard()
            if self.disabled:
                return False
            if not self._pending:
                self._pending_since = time.monotonic()
            mask = None if loss_mask is None else np.array(loss_mask, bool)  # copies: the caller may reuse its arrays
            record = Record(key, self._checked(token_ids), mask, bytes(payload), draw_set, teacher_version)
            self._pending.append(record)
            self.unwritten += 1
            self._pending_bytes += len(payload) + self._width * len(token_ids)
            old = time.monotonic() - self._pending_since > MAX_PENDING_SECONDS
            if self._pending_bytes >= self._limits[2] or old:
                return self.flush()
            return True

    def _checked(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """A copy as it is stored; ValueError where it is not the same."""
        stored = np.array(token_ids).astype(TOKEN_DTYPES[self._width])
        if not np.array_equal(stored, token_ids):
            low, high = min(token_ids), max(token_ids)
            raise ValueError(f"expected token ids of a vocabulary of {self._vocab_size}, got {low} to {high}")
        return stored

    def flush(self) -> bool:
        """Write what is pending: True where everything that was put is on disk."""
        with self._lock:
            self._leave_parents_shard()
            records, self._pending, self._pending_bytes = self._pending, [], 0
            if records and not self.disabled:
                try:
                    self._append(records)
                    self.unwritten -= 0 if self.disabled else len(records)
                except OSError as error:
                    self._disable(f"{error}")
            return not self.disabled

    def close(self) -> None:
        """Flush and seal; idempotent."""
        with self._lock:
            self.flush()
            self._seal()
            self.disabled = self.disabled or "closed"
            if self._mirror is not None:
                self._mirror.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, records: list[Record]) -> None:
        max_bytes, shard_bytes, _ = self._limits
        if self._shard is None:
            self._shard = OpenShard.create(self.directory, self._writer_id, self._manifest)
        message = encode_batch(records, self._shard.schema)
        if self._shard.size + message.size > shard_bytes and self._shard.rows:
            self._seal()
            self._shard = OpenShard.create(self.directory, self._writer_id, self._manifest)
        if max_bytes and self._total_bytes(message.size) > max_bytes:
            self._disable(f"cache.max_bytes = {max_bytes} is reached (`logitstream cache prune` makes room)")
            return
        self._shard.append(message, fsync=self._fsync)
        self._unchecked_bytes += message.size
        if self._unchecked_bytes > CHECK_BYTES:
            self._look_around()
        metrics.CACHE_BYTES.set(self._total_bytes())

    def look_around(self) -> bool:
        """Count what others have written and deleted meanwhile; whether anything more can be written."""
        with self._lock:
            try:
                self._look_around()
            except OSError as error:
                self._disable(f"{error}")
            return not self.disabled

    @property
    def num_bytes(self) -> int:
        """At most so many bytes has the directory once all that was put is sealed, as far as this writer knows."""
        with self._lock:
            if not self._pending:
                return self._total_bytes()
            masks = self._pending_bytes // 8
            head = MESSAGE_BYTES if self._shard is not None else 2 * MESSAGE_BYTES + ENTRY_BYTES
            return self._total_bytes(self._pending_bytes + masks + RECORD_BYTES * len(self._pending) + head)

    def _total_bytes(self, more: int = 0) -> int:
        """Bytes of the directory as far as this writer knows, with the sidecars that its shard will get."""
        mine = _sealed_bytes(self._shard) if self._shard is not None else 0
        return self._others_bytes + mine + more

    def _look_around(self) -> None:
        """Look up what other writers wrote, and how full the disk is; so much is never left for the seal to sync."""
        self._unchecked_bytes = 0
        if self._shard is not None:
            self._shard.sync()
        self._others_bytes = tree_bytes(self.directory) - (self._shard.size if self._shard is not None else 0)
        usage = shutil.disk_usage(self.directory)
        metrics.CACHE_DISK_FREE.labels(self._disk_label or str(self.directory)).set(usage.free / usage.total)

    def _leave_parents_shard(self) -> None:
        """A forked child writes shards of its own."""
        if self._pid != os.getpid():
            self._pid, self._pending, self._pending_bytes, self.unwritten = os.getpid(), [], 0, 0
            if self._shard is not None:
                self._shard.abandon()
                self._shard = None

    def _seal(self) -> None:
        shard, self._shard = self._shard, None
        if shard is None:
            return
        try:
            sealed = shard.seal()
        except OSError as error:
            shard.abandon()
            self._disable(f"sealing {shard.path}: {error}")
            return
        self._others_bytes += _sealed_bytes(shard)
        if sealed is not None and self._mirror is not None:
            self._mirror.push_later(sealed)

    def _disable(self, reason: str) -> None:
        if self.disabled:
            return
        self.disabled = reason
        metrics.CACHE_WRITE_ERRORS.inc()
        logger.warning("cache %s: nothing more is written, the run goes on without it: %s", self._name, reason)
        self._seal()


def _sealed_bytes(shard: OpenShard) -> int:
    return shard.size + SPAN.size * shard.rows + ENTRY_BYTES
