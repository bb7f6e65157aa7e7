"""Ending a run before its time: at a signal or an error, on all processes between the same two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitstream.errors import LogitstreamError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAILED = 1 << 10

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """The run was told to end; `number` is the signal's, 0 where another process was told or failed."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" if number else "another process ended the run")
        self.number = number


class StopRequest(TrainerCallback):
    """Remembers a signal or an error until all processes are between two steps, where `agree` raises it on each.

    Batches are waited for through `interruptible`, which a signal ends at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.failure: BaseException | None = None
        self.has_agreed = False
        self.epoch_rng: torch.Tensor | None = None
        """torch's random numbers as they were before the epoch's first step; None once that is done."""
        self._is_waiting = False
        self._group: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGHUP, as far as they are not ignored; in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._is_waiting:
            raise Stopped(self.number)

    def interruptible(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; ends early where a signal came or they fail, which `agree` then raises."""
        while self.failure is None:
            try:
                self._is_waiting = True
                if self.number:
                    raise Stopped(self.number)
                batch = next(batches)
            except StopIteration:
                return
            except (Stopped, LogitstreamError) as error:
                self.failure = error
                return
            finally:
                self._is_waiting = False
            yield batch

    def agree(self) -> None:
        """Raise where this process or another one was told to end or failed. Call it on all at the same point."""
        if self.failure is None and self.number:
            self.failure = Stopped(self.number)
        mine = self.failure.number or 1 if isinstance(self.failure, Stopped) else _FAILED if self.failure else 0
        worst = torch.tensor([mine])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:
                self._group = dist.new_group(backend="gloo")  # on the CPU, so that no GPU has to finish first
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._group)
        if worst.item():
            self.has_agreed = True
            raise self.failure or Stopped(0 if worst.item() >= _FAILED else int(worst.item()))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch_rng = torch.get_rng_state()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.epoch_rng = None

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.agree()
