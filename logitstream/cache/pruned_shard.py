"""One shard of a cache that is being pruned: which of its records stay, what it takes then, and how to get there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstream.cache.manifest import file_bytes
from logitstream.cache.open_shard import SHARD_NAME, shard_bytes
from logitstream.cache.shard import END_OF_STREAM, SPAN_DTYPE, Spans, scan, scanned_spans, token_width
from logitstream.cache.shard_file import ShardFile
from logitstream.cache.shard_rewrite import (
    BATCH_BYTES,
    DISK_BLOCK,
    NO_SPACE,
    lock,
    newest_within,
    remove,
    rewrite,
    rewrite_within,
    rewritten_bytes,
    sidecar_bytes,
)
from logitstream.cache.shard_state import shard_spans, unreadable
from logitstream.cache.verify import Damage, check_sealed
from logitstream.errors import CacheError

MOST_AROUND_BATCHES = 64 << 10
"""More than the head of an open shard and a torn tail take; where more is missing, batches were cut out of it."""


@dataclass(slots=True, kw_only=True)
class Pruned:
    """What went, or would go, of how much; `left` names what was left as it was, and why, `notes` what is others'."""

    total_bytes: int
    num_bytes: int = 0
    total_records: int = 0
    records: int = 0
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class PrunedShard:
    """A sealed shard, or with `fd` a locked open one whose writer is dead."""

    def __init__(self, path: Path, manifest: dict[str, Any], fd: int | None) -> None:
        self.path = path
        self.num_bytes = shard_bytes(path) if fd is None else file_bytes(path)
        self.spans: Spans = np.zeros(0, SPAN_DTYPE)
        self._manifest, self._fd = manifest, fd
        self._stays: npt.NDArray[np.bool_] = np.zeros(0, bool)
        self._is_sound, self._is_readable = True, True
        self._most: int | None = None

    def choose(self, before_draw_set: int | None, damaged: bool, result: Pruned) -> None:
        """Find the records, and which of them stay as far as draw sets and damage go."""
        bad: list[int] = []
        if problem := unreadable(self.path):
            self._is_readable = False
            result.left.append(problem)
        if self._fd is not None:  # a prune that was killed may have cut records out of it
            width = token_width(self._manifest)
            self.spans = scanned_spans(self.path, width)
            for _ in ShardFile(str(self.path), width).records(self.spans, bad.append):
                pass
            taken = sum(message.size for message in scan(self.path, width))
            self._is_sound = not bad and taken + MOST_AROUND_BATCHES > self.num_bytes
        elif damaged and self._is_readable:
            damage = Damage()
            self.spans, bad = check_sealed(self.path, self._manifest, damage)
            self._is_sound = not damage.problems
        else:
            self.spans = shard_spans(self.path, self._manifest)[0]
        self._stays = np.ones(len(self.spans), bool)
        if before_draw_set is not None:
            self._stays = self.spans["draw_set"] >= before_draw_set
        self._stays[bad] = False

    def leave_out(self, keys: set[bytes]) -> None:
        """Of a dead writer's shard, drop what others of that kind hold already, and add the rest to it.

        A prune that was killed has written some records anew that it had not cut out of the old shard yet.
        """
        if self._fd is not None:
            self._stays &= np.array([key not in keys for key in self.spans["key"].tolist()], bool)
            keys.update(self.spans["key"][self._stays].tolist())  # whole ones alone

    def limit(self, max_bytes: int) -> None:
        """Let the oldest records go until the rest takes no more."""
        self._most = max_bytes

    def kept(self, batch_bytes: int = BATCH_BYTES) -> Spans:
        """The records that stay, written in batches of this size where it is written anew."""
        spans = self.spans[self._stays]
        if self._most is None:
            return spans
        if not self._is_readable:  # none of its records can be written anew
            return spans[:0]
        return newest_within(self.path, spans, self._most, self._manifest, batch_bytes)

    @property
    def is_untouched(self) -> bool:
        return self._most is None and self._is_sound and bool(self._stays.all())

    def next_bytes(self) -> int:
        """What it will take, with its sidecars."""
        if not self.is_untouched:
            return rewritten_bytes(self.path, self.kept(), self._manifest)
        if self._fd is None:
            return self.num_bytes
        size = self.num_bytes + len(END_OF_STREAM)
        return size + sidecar_bytes(self.path, self.spans, size)

    def carry_out(self, *, drop_unreadable: bool, result: Pruned) -> None:
        """Remove it or write it anew; an error is noted, and the shard left with all that was to be kept."""
        if self.is_untouched:
            return
        kept = self.kept()
        try:
            damaged = 0
            if not len(kept):
                self._remove()
            else:
                try:
                    damaged = rewrite(self.path, kept, self._manifest, drop_unreadable=drop_unreadable)
                except OSError as error:
                    if error.errno not in NO_SPACE:
                        raise
                    kept, damaged = self._carry_out_within()
            result.records += len(self.spans) - len(kept) + damaged
        except (OSError, CacheError) as error:
            result.left.append(f"{self.path.name} was left as it is: {error}")

    def _remove(self) -> None:
        if not len(self.spans) and not SHARD_NAME.search(self.path.name.split(".")[0]):
            raise CacheError("it holds no records that can be read, and is not named like a shard")
        remove(self.path)

    def _carry_out_within(self) -> tuple[Spans, int]:
        """Write it anew in the room that its dropped records leave: the less, the smaller the batches have to be."""
        fd = lock(self.path) if self._fd is None else self._fd
        try:
            batch_bytes = BATCH_BYTES
            while not self._has_room(kept := self.kept(batch_bytes), batch_bytes) and batch_bytes > DISK_BLOCK:
                batch_bytes //= 2
            if not len(kept):
                remove(self.path)
                return kept, 0
            return kept, rewrite_within(self.path, fd, kept, self._manifest, batch_bytes)
        finally:
            if self._fd is None:
                os.close(fd)

    def _has_room(self, kept: Spans, batch_bytes: int) -> bool:
        """Whether a batch fits into what is free, what the sidecars take and what goes before the first kept record."""
        if not len(kept):
            return True
        start = int(np.flatnonzero(self.spans["payload_start"] == kept[0]["payload_start"])[0])
        gone = self.spans[:start]
        width = token_width(self._manifest)
        dropped = int(gone["payload_count"].sum(dtype=np.int64) + width * gone["tokens_count"].sum(dtype=np.int64))
        disk = os.statvfs(self.path)
        room = disk.f_bavail * disk.f_frsize + dropped + self.num_bytes - file_bytes(self.path)
        needed = batch_bytes + 6 * DISK_BLOCK  # the head, what blocks do not fit, and the sidecars
        return room >= needed and rewritten_bytes(self.path, kept, self._manifest, batch_bytes) <= self.num_bytes
