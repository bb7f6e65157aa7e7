"""Token batches in, (tokens, targets) out, in order: targets are asked for and decoded ahead of the training."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from logitstream import codec, metrics
from logitstream.errors import LogitstreamError, RequestError
from logitstream.id_model import IdModel
from logitstream.types import ReceivedTargets, SparseTargets, TargetSpec, TokenSequence
from student_worker.teacher_client import TeacherClient

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(slots=True, eq=False)
class _Pending:
    """One batch whose targets are on their way. rows: which flattened rows each sequence fills."""

    batch: Batch
    rows: list[npt.NDArray[np.int64]]
    sequences: list[TokenSequence]
    futures: list[Future[ReceivedTargets]] = field(default_factory=list)


class TargetStream:
    """Wraps an iterable of batches; each comes back with `targets`, the SparseTargets of its flattened [B*T] rows.

    A batch is a dict with input_ids [B, T] and, optionally, attention_mask (padding is not sent), labels as in
    transformers (row t is wanted where labels[t + 1] is not -100) or loss_mask (bool, row t is wanted where it is set).
    Unwanted rows, padding and the rows of refused sequences are empty. draw_set: None draws anew each epoch.
    """

    def __init__(
        self,
        dataloader: Iterable[Batch],
        client: TeacherClient,
        *,
        spec: TargetSpec,
        prefetch_batches: int = 8,
        draw_set: int | None = None,
        on_refused: str = "skip",
    ) -> None:
        """on_refused: `skip` leaves a refused sequence out of the loss and logs it, `raise` ends the stream."""
        if prefetch_batches < 1:
            raise ValueError(f"prefetch_batches must be at least 1, got {prefetch_batches}")
        self.dataloader = dataloader
        self.client = client
        self.spec = spec
        self.prefetch_batches = prefetch_batches
        self.draw_set = draw_set
        self.on_refused = on_refused
        self.epoch = 0
        self.waiting_seconds = 0.0
        self.decoding_seconds = 0.0
        self.refused_sequences = 0
        self._skip = 0
        self._run: _Run | None = None

    def __len__(self) -> int:
        return len(self.dataloader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """What the stream does not know itself, the wrapped dataloader does: dataset, batch_sampler, …"""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    @property
    def queue_depth(self) -> int:
        """Batches whose targets are ready and not yet consumed."""
        return len(self._run.ready) if self._run else 0

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
        """The batches of another iterator over the same epoch, with targets."""
        self.close()
        draw_set = self.epoch if self.draw_set is None else self.draw_set
        run = self._run = _Run(self, batches, draw_set=draw_set, first_step=first_step)
        self.epoch += 1
        try:
            yield from run.consume()
        finally:
            run.close()

    def close(self) -> None:
        """Cancel what is in flight and end the threads; the next iteration starts anew."""
        if self._run is not None:
            self._run.close()
            self._run = None


class _Run:
    """One pass over the batches: one thread asks ahead, another decodes in order, the caller consumes."""

    def __init__(self, stream: TargetStream, batches: Iterator[Batch], *, draw_set: int, first_step: int) -> None:
        self.ready: deque[Batch] = deque()
        self._stream = stream
        self._batches = batches
        self._draw_set = draw_set
        self._step = first_step
        self._id_model: IdModel | None = None
        self._pending: deque[_Pending] = deque()
        self._ahead = 0
        self._exhausted = self._finished = self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def consume(self) -> Iterator[Batch]:
        """Start the threads; the first batch is drawn here, where an accelerate dataloader synchronises its workers."""
        info = self._stream.client.info
        self._id_model = IdModel.from_bytes(info.id_model) if info.id_model else None
        self._vocab_size = info.vocab_size
        if not self._ask():
            return
        for target in (self._ask_ahead, self._decode_all):
            thread = threading.Thread(target=self._guard, args=(target,), name="target-stream", daemon=True)
            self._threads.append(thread)
            thread.start()
        while (batch := self._next_ready()) is not None:
            yield batch

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            futures = [future for pending in self._pending for future in pending.futures]
        for future in futures:
            future.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self.ready.clear()
        metrics.STUDENT_QUEUE_BATCHES.set(0)

    def _next_ready(self) -> Batch | None:
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._finished or self._error or self._closed)
            if self._error is not None and not self.ready:
                raise self._error
            if not self.ready:
                return None
            batch = self.ready.popleft()
            self._ahead -= 1
            self._changed.notify_all()
            metrics.STUDENT_QUEUE_BATCHES.set(len(self.ready))
        waited = time.perf_counter() - started
        self._stream.waiting_seconds += waited
        metrics.STUDENT_WAITING_SECONDS.inc(waited)
        return batch

    def _guard(self, work: Any) -> None:
        """An error in a thread is raised where the batches are consumed, after those that came before it."""
        try:
            work()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _ask_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ahead < self._stream.prefetch_batches or self._closed)
                if self._closed:
                    return
            if not self._ask():
                return

    def _ask(self) -> bool:
        """Take the next batch and ask for its targets; whether there was one."""
        batch = next(self._batches, None)
        if batch is None:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()
            return False
        pending = _Pending(batch, *split_batch(batch))
        with self._changed:
            self._pending.append(pending)
            self._ahead += 1
        for sequence in pending.sequences:
            if self._closed:
                break
            future = self._stream.client.submit(sequence, draw_set=self._draw_set, priority=self._step)
            pending.futures.append(future)
        self._step += 1
        with self._changed:
            self._changed.notify_all()
        return True

    def _decode_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending_is_asked() or self._exhausted or self._closed)
                if self._closed or not self._pending:
                    self._finished = True
                    self._changed.notify_all()
                    return
                pending = self._pending[0]
            batch = self._complete(pending)
            with self._changed:
                if self._pending:
                    self._pending.popleft()
                self.ready.append(batch)
                metrics.STUDENT_QUEUE_BATCHES.set(len(self.ready))
                self._changed.notify_all()

    def _pending_is_asked(self) -> bool:
        return bool(self._pending) and len(self._pending[0].futures) == len(self._pending[0].sequences)

    def _complete(self, pending: _Pending) -> Batch:
        """Wait for a batch's targets and decode them."""
        parts: list[tuple[npt.NDArray[np.int64], SparseTargets]] = []
        refused: list[npt.NDArray[np.int64]] = []
        for rows, future in zip(pending.rows, pending.futures, strict=True):
            try:
                received = future.result()
            except RequestError as error:
                if self._stream.on_refused == "raise":
                    raise
                self._stream.refused_sequences += 1
                logger.warning("a sequence of %d tokens is left out of the loss: %s", len(rows), error)
                refused.append(rows)
                continue
            started = time.perf_counter()
            parts.append((rows, codec.decode(received.payload, id_model=self._id_model)))
            self._count(time.perf_counter() - started)
        started = time.perf_counter()
        batch = dict(pending.batch)
        num_rows = int(np.prod(batch["input_ids"].shape))
        batch["targets"] = place_rows(parts, num_rows=num_rows, vocab_size=self._vocab_size)
        if refused:
            _leave_out(batch, np.concatenate(refused))
        self._count(time.perf_counter() - started)
        return batch

    def _count(self, seconds: float) -> None:
        self._stream.decoding_seconds += seconds
        metrics.STUDENT_DECODING_SECONDS.inc(seconds)


def split_batch(batch: Batch) -> tuple[list[npt.NDArray[np.int64]], list[TokenSequence]]:
    """A batch's sequences without padding, and the flattened rows that each one's targets belong to."""
    input_ids = _numpy(batch["input_ids"])
    num_sequences, num_tokens = input_ids.shape
    present = _numpy(batch["attention_mask"]).astype(bool) if "attention_mask" in batch else None
    wanted = _wanted(batch, input_ids.shape)
    rows, sequences = [], []
    for index in range(num_sequences):
        keep = np.flatnonzero(present[index]) if present is not None else np.arange(num_tokens)
        if len(keep) == 0 or (wanted is not None and not wanted[index, keep].any()):
            continue
        mask = None if wanted is None or wanted[index, keep].all() else wanted[index, keep]
        sequences.append(TokenSequence(token_ids=input_ids[index, keep].astype(np.int32), loss_mask=mask))
        rows.append(index * num_tokens + keep)
    return rows, sequences


def _wanted(batch: Batch, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """bool [B, T]: the rows that will be trained on; None: all."""
    if batch.get("loss_mask") is not None:
        return _numpy(batch["loss_mask"]).astype(bool)
    if batch.get("labels") is None:
        return None
    wanted = np.zeros(shape, dtype=bool)
    wanted[:, :-1] = _numpy(batch["labels"])[:, 1:] != -100
    return wanted


def place_rows(
    parts: list[tuple[npt.NDArray[np.int64], SparseTargets]], *, num_rows: int, vocab_size: int
) -> SparseTargets:
    """Targets of several sequences, each on its rows, in rising order; every other row is empty."""
    if not parts:
        nothing = np.zeros(0, np.int32)
        offsets = np.zeros(num_rows + 1, np.int64)
        return SparseTargets(vocab_size=vocab_size, units=1, row_offsets=offsets, token_ids=nothing, counts=nothing)
    joined = SparseTargets.concatenate([targets for _, targets in parts])
    entries = np.zeros(num_rows, np.int64)
    for rows, targets in parts:
        if targets.num_rows != len(rows):
            raise LogitstreamError(f"expected targets of {len(rows)} rows, got {targets.num_rows}")
    entries[np.concatenate([rows for rows, _ in parts])] = np.diff(joined.row_offsets)
    return SparseTargets(
        vocab_size=joined.vocab_size,
        units=joined.units,
        tail_units=joined.tail_units,
        row_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(entries)]),
        token_ids=joined.token_ids,
        counts=joined.counts,
    )


def _leave_out(batch: Batch, rows: npt.NDArray[np.int64]) -> None:
    """Take the rows out of the loss, without changing the tensors of the caller's batch."""
    index = torch.from_numpy(rows)
    for name, value in (("labels", -100), ("loss_mask", 0)):
        if batch.get(name) is not None:
            tensor = torch.as_tensor(batch[name]).clone()
            tensor.view(-1)[index.to(tensor.device)] = value
            batch[name] = tensor


def _numpy(values: Any) -> npt.NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
