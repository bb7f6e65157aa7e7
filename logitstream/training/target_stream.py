"""Token batches in, (tokens, targets) out, in order: targets are asked for and decoded ahead of the training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from accelerate.data_loader import DataLoaderDispatcher

from logitstream.client.teacher_client import TeacherClient
from logitstream.data.documents import Batch
from logitstream.training.prefetch import Prefetch
from logitstream.training.target_cache import TargetCache
from logitstream.training.target_source import StreamStats, TargetSource
from logitstream.types import TargetSpec

Mode = Literal["online", "cache", "cache_then_online"]


class TargetStream:
    """Wraps an iterable of batches; each comes back with `targets`, the SparseTargets of its flattened [B*T] rows.

    A batch is a dict with input_ids [B, T] and, optionally, what says which rows are wanted (`supervision`) and which
    tokens are one document's (`documents`): each document is scored alone, without padding. Unwanted rows, padding and
    the rows of refused sequences are empty. Each iteration is the next epoch, unless set_epoch says otherwise. Raises
    ValueError where a batch holds something that the teacher cannot be told of.

    spec: ValueError where the client's or the cache's targets are drawn otherwise; None: only those two are compared.
    mode: `online` asks the teacher for everything and writes it to the cache, if there is one; `cache_then_online` asks
        it for what the cache does not hold; `cache` never asks it, and raises CacheMiss for what is not there.
    draw_set: None draws anew each epoch (draw set = epoch), a number uses the same draws in every epoch.
    prefetch_batches: batches asked for ahead of the caller and held in memory; spill_batches: further ones, whose
        targets wait in the cache on disk.
    on_refused: `skip` takes a sequence that the teacher refuses, or whose record is damaged in mode `cache`, out of the
        loss and its tokens (id 0 then) out of the batch, logs and counts it; `raise` ends the stream with its error.
    """

    def __init__(
        self,
        dataloader: Iterable[Batch],
        client: TeacherClient | None,
        *,
        spec: TargetSpec | None = None,
        cache: TargetCache | None = None,
        mode: Mode = "online",
        prefetch_batches: int = 8,
        spill_batches: int = 0,
        draw_set: int | None = None,
        on_refused: Literal["skip", "raise"] = "skip",
    ) -> None:
        if prefetch_batches < 1 or spill_batches < 0:
            raise ValueError(
                f"expected prefetch_batches >= 1 and spill_batches >= 0: {prefetch_batches}, {spill_batches}"
            )
        if (client is None and mode != "cache") or (cache is None and (mode != "online" or spill_batches)):
            needs = "a client" if client is None and mode != "cache" else "a cache"
            raise ValueError(f"mode {mode!r} with spill_batches = {spill_batches} needs {needs}")
        if isinstance(dataloader, DataLoaderDispatcher):
            raise ValueError("batches dispatched by one process cannot be prefetched: set `dispatch_batches: false`")
        _check_spec(spec, client, cache)
        self.dataloader = dataloader
        self.client = client
        self.cache = cache
        self.mode = mode
        self.prefetch_batches = prefetch_batches
        self.spill_batches = spill_batches
        self.draw_set = draw_set
        self.on_refused = on_refused
        self.epoch = 0
        self.stats = StreamStats()
        self._skip = 0
        self._current: Prefetch | None = None

    def __len__(self) -> int:
        return len(self.dataloader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """What the stream does not know itself, the wrapped dataloader does: dataset, batch_sampler, …"""
        if name.startswith("_") or name == "dataloader":
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    @property
    def waiting_seconds(self) -> float:
        """How long the caller has waited for batches, in all."""
        return self.stats.waiting_seconds

    @property
    def decoding_seconds(self) -> float:
        """CPU seconds that decoding has taken, in a thread beside the caller's, in all."""
        return self.stats.decoding_seconds

    @property
    def queue_depth(self) -> int:
        """Batches whose targets are ready and not yet taken."""
        return len(self._current.ready) if self._current else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataloader, "set_epoch"):
            self.dataloader.set_epoch(epoch)

    def skip_batches(self, num_batches: int) -> None:
        """The next iteration starts after that many batches; nothing is asked for them."""
        self._skip = num_batches

    def __iter__(self) -> Iterator[Batch]:
        skip, self._skip = self._skip, 0
        return self.over(itertools.islice(iter(self.dataloader), skip, None), first_step=skip)

    def over(self, batches: Iterator[Batch], *, first_step: int = 0) -> Iterator[Batch]:
        """The rest of this epoch's batches, with targets, from another iterator over them."""
        self.close()
        source = TargetSource(
            None if self.mode == "cache" else self.client,
            self.cache,
            look_up=self.mode != "online",
            draw_set=self.epoch if self.draw_set is None else self.draw_set,
            stats=self.stats,
        )
        self.epoch += 1
        current = self._current = Prefetch(
            source,
            batches,
            self.stats,
            prefetch_batches=self.prefetch_batches,
            spill_batches=self.spill_batches,
            raise_refused=self.on_refused == "raise",
            first_step=first_step,
        )
        try:
            yield from current.consume()
        finally:
            current.close()

    def close(self) -> None:
        """Cancel what is in flight and end the threads; the next iteration starts anew."""
        if self._current is not None:
            self._current.close()
            self._current = None


def _check_spec(spec: TargetSpec | None, client: TeacherClient | None, cache: TargetCache | None) -> None:
    """ValueError where the client's targets, the cache's and the spec that was asked for are not drawn alike."""
    drawn = {
        "the spec given": spec and spec.canonical(),
        "the client": client and client.spec.canonical(),
        "the cache": cache and cache.fingerprint.spec,
    }
    known = {name: one for name, one in drawn.items() if one is not None}
    if any(one != next(iter(known.values())) for one in known.values()):
        raise ValueError("expected one way to draw targets, got " + ", ".join(f"{n}: {s}" for n, s in known.items()))
