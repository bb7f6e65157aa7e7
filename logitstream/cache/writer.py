"""Appending records to a cache: each writer has its own shards, so any number of them write at once."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream import metrics
from logitstream.cache.manifest import create_manifest, tree_bytes
from logitstream.cache.open_shard import OpenShard, recover
from logitstream.cache.remote import Mirror, is_remote, local_path
from logitstream.cache.shard import END_OF_STREAM, KEY_BYTES, MAX_SHARD_BYTES, Stored, bound_of_bytes, token_dtype
from logitstream.types import Fingerprint, pack_mask

logger = logging.getLogger(__name__)

CHECK_BYTES = 16 << 20
"""How much a writer writes between looks at what others wrote."""


class CacheWriter:
    """The writer of one process; its methods may be called from any thread.

    put() collects records into batches of `batch_bytes`, flush() writes what is pending and acknowledges it, close()
    seals the shard, and so does a shard of `shard_bytes`. What flush() acknowledged survives a kill of the process at
    any moment; a sealed shard also survives a loss of power.

    A failed write (a full disk, an I/O error) or a directory that has reached `max_bytes` (0: no bound) never raises:
    the writer warns once, counts `cache_write_errors_total` and takes nothing more; `disabled` says why. Raises
    FingerprintMismatch or CacheError if the directory holds other targets.

    directory: a folder or an fsspec URL (s3://…): then shards are written to the folder `staging` and uploaded once
    they are sealed; storage_options go to fsspec. disk_label: the disk's name in the metrics, by default the folder.
    More attributes than 12 because the limits, what is pending and what is known of the disk belong to one lock.
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
        staging: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if not 0 < batch_bytes <= shard_bytes <= MAX_SHARD_BYTES // 2:
            raise ValueError(
                f"expected batch_bytes <= shard_bytes <= {MAX_SHARD_BYTES // 2}, got {batch_bytes=} {shard_bytes=}"
            )
        self.directory = local_path(directory)
        self.disabled = ""
        self._vocab_size = fingerprint.vocab_size
        self._limits = (max_bytes, shard_bytes, batch_bytes)
        self._labels = (str(directory), disk_label or str(directory))
        self._writer_id = "".join(c if c.isalnum() or c in "-_" else "_" for c in writer_id)
        self._lock = threading.RLock()
        self._pending: list[Stored] = []
        self._pending_bytes = self._written_bytes = self._unchecked_bytes = 0
        self._shard: OpenShard | None = None
        self._mirror: Mirror | None = None
        try:
            if is_remote(directory):
                self._mirror = Mirror(str(directory), staging=staging, storage_options=storage_options)
                self._mirror.pull_head()
                self.directory = self._mirror.staging
            self._manifest = create_manifest(
                self.directory, fingerprint, provenance=provenance or {}, id_model=id_model
            )
            recover(self.directory, self._manifest)
            if self._mirror is not None:
                self._mirror.push_missing()
        except OSError as error:
            self._disable(str(error))
        self.look_around()

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
        """Take one sequence's encoded targets, verbatim; return whether they were taken. flush() makes them safe."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"expected a key of {KEY_BYTES} bytes, got {len(key)}")
        stored = np.asarray(token_ids).astype(token_dtype(self._vocab_size))
        if not np.array_equal(stored, token_ids):
            got = f"{min(token_ids)} to {max(token_ids)}"
            raise ValueError(f"expected token ids of a vocabulary of {self._vocab_size}, got {got}")
        with self._lock:
            if self.disabled:
                return False
            record = Stored(key, stored.tobytes(), pack_mask(loss_mask), bytes(payload), draw_set, teacher_version)
            self._pending.append(record)
            self._pending_bytes += len(record.tokens) + len(record.mask) + len(payload)
            return self.flush() if self._pending_bytes >= self._limits[2] else True

    def flush(self) -> bool:
        """Write what is pending; return True if everything that was put is on disk."""
        with self._lock:
            if self._pending and not self.disabled:
                try:
                    self._append()
                except OSError as error:
                    self._disable(str(error))
            self._pending_bytes = 0
            self._pending.clear()
            return not self.disabled

    def look_around(self) -> bool:
        """Count what others wrote and deleted, and sync what this one wrote; return whether more can be written."""
        with self._lock:
            try:
                if self._shard is not None:  # so that the seal never has much to sync
                    self._shard.sync()
                self._unchecked_bytes, self._written_bytes = 0, tree_bytes(self.directory) + len(END_OF_STREAM)
                usage = shutil.disk_usage(self.directory)
                metrics.CACHE_DISK_FREE.labels(self._labels[1]).set(usage.free / usage.total)
            except OSError as error:
                self._disable(str(error))
            return not self.disabled

    def abandon(self) -> None:
        """Let go of the shard as the death of the process would: the next writer recovers it."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None

    def close(self) -> None:
        """Flush and seal; a second call does nothing."""
        with self._lock:
            self.flush()
            self._seal()
            self.disabled = self.disabled or "closed"
            if self._mirror is not None:
                self._mirror.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self) -> None:
        max_bytes, shard_bytes, _ = self._limits
        pending_bytes = bound_of_bytes(len(self._pending), self._pending_bytes)
        if max_bytes and self._written_bytes + pending_bytes > max_bytes:
            self._disable(f"cache.max_bytes = {max_bytes} is reached (`logitstream cache prune` makes room)")
            return
        if self._shard is not None and self._shard.num_bytes + self._pending_bytes > shard_bytes:
            self._seal()
        if self._shard is None:
            name = f"{self._writer_id}-{time.time_ns() // 1_000_000:013d}"
            self._shard = OpenShard.create(self.directory, name, self._manifest)
            self._written_bytes += self._shard.num_bytes
        before = self._shard.num_bytes
        self._shard.append(self._pending)
        self._written_bytes += self._shard.num_bytes - before
        self._unchecked_bytes += self._shard.num_bytes - before
        if self._unchecked_bytes > CHECK_BYTES:
            self.look_around()
        metrics.CACHE_BYTES.set(self._written_bytes)

    def _seal(self) -> None:
        shard, self._shard = self._shard, None
        if shard is None:
            return
        try:
            shard.seal()
        except OSError as error:
            shard.abandon()
            self._disable(f"sealing {shard.path}: {error}")
            return
        if self._mirror is not None:
            self._mirror.push_later(shard.path)

    def _disable(self, reason: str) -> None:
        if self.disabled:
            return
        self.disabled = reason
        metrics.CACHE_WRITE_ERRORS.inc()
        logger.warning("cache %s: nothing more is written, the run goes on without it: %s", self._labels[0], reason)
        self._seal()
