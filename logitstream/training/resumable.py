"""A run that ends before its time, at a signal or an error, leaves a whole checkpoint from which it can go on."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from logitstream.errors import LogitstreamError, RanksDiffer
from logitstream.training.checkpoints import RUN_STATE, STAGING, publish, resumed_state, rotate
from logitstream.training.distributed import num_processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAILED = 1 << 10

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointFailed(LogitstreamError):
    """A checkpoint could not be written; those before it are as they were."""


class Stopped(KeyboardInterrupt):
    """The run was told to end; `number` is the signal's, 0 if another process was told or failed."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" if number else "another process ended the run")
        self.number = number


class StopRequest(TrainerCallback):
    """Remembers a signal until all processes are between two steps, where each of them raises Stopped."""

    def __init__(self) -> None:
        self.number = 0
        self._is_waiting = False
        self._group: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take those of SIGINT, SIGTERM and SIGHUP that are not ignored; does nothing outside the main thread."""
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
            self._is_waiting = False
            raise Stopped(self.number)

    def take(self, batches: Iterator[T], number: int) -> list[T]:
        """Return a step's batches once all processes have theirs; call it on all of them.

        Raises Stopped, or what the batches raised, on every process if one of them was told to end or failed.
        """
        taken: list[T] = []
        failure: BaseException | None = None
        rng_state = torch.get_rng_state()
        try:
            self._is_waiting = True  # until then a signal raises
            if not self.number:
                taken.extend(itertools.islice(batches, number))
            self._is_waiting = False
        except (Stopped, LogitstreamError) as error:
            self._is_waiting = False
            failure = error
        try:
            self.agree(failure, num_batches=len(taken))
        except BaseException:
            torch.set_rng_state(rng_state)  # the first batch of an epoch draws its order, and will once more
            raise
        return taken

    def agree(self, failure: BaseException | None = None, *, num_batches: int = 0) -> None:
        """Raise if this process or another one was told to end or failed; call it on all at the same point."""
        if failure is None and self.number:
            failure = Stopped(self.number)
        code = failure.number or 1 if isinstance(failure, Stopped) else _FAILED if failure else 0
        mine = torch.tensor([code, num_batches])
        everyone = [mine]
        if num_processes() > 1:
            if self._group is None:
                self._group = dist.new_group(backend="gloo")  # on the CPU, so that no GPU has to finish first
            everyone = [torch.empty_like(mine) for _ in range(num_processes())]
            dist.all_gather(everyone, mine, group=self._group)
        codes, numbers = torch.stack(everyone).unbind(1)
        if worst := int(codes.max()):
            raise failure or Stopped(0 if worst >= _FAILED else worst)
        if numbers.min() < numbers.max():
            raise RanksDiffer(f"expected as many batches on every rank as on rank 0, got {numbers.tolist()}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agree()


class ResumableTrainer(Trainer):
    """Writes each checkpoint aside, on all processes, before it gets its name.

    If one process is told to end or fails between two steps, `train` writes a checkpoint of the steps done and raises
    Stopped or that error on every process.
    """

    stats: Any
    """The run's statistics, a `RunStats`."""
    _is_saving = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop = StopRequest()
        self.add_callback(self.stop)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        except (CheckpointFailed, RanksDiffer):  # no process's student is the run's
            raise
        except (Stopped, LogitstreamError):
            self.keep_progress()
            raise

    def keep_progress(self) -> None:
        """Write a checkpoint of the steps done; call it on all processes, between two steps.

        A failure to write is logged, because the caller raises the reason why the run ends.
        """
        assert isinstance(self.model, nn.Module)
        try:
            self._save_checkpoint(self.model, trial=None)
        except CheckpointFailed as error:
            logger.error("%s", error)

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(super()._get_output_dir(trial))
        return os.path.join(folder, STAGING) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, whole or not at all; raises CheckpointFailed.

        None is written if no token was trained on since the last one: a run that goes on from it would pass over
        sequences that were refused.
        """
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        before, now = resumed_state(self.state), self.stats.run_state()
        if now["tokens"] <= before.get("tokens", 0):
            return
        states: Any = self.state.stateful_callbacks
        states[RUN_STATE] = now
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._publish(folder / STAGING / name, folder / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointFailed(f"{name} cannot be written to {folder}: {error}") from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()

    def _publish(self, staged: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            publish(staged, final)
            rotate(final.parent, limit=self.args.save_total_limit, best=self.state.best_model_checkpoint)
            shutil.rmtree(staged.parent, ignore_errors=True)
