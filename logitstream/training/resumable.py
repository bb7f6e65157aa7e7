"""A run that ends before its time, at a signal or an error, leaves a whole checkpoint from which it can go on."""

from __future__ import annotations

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
from transformers.trainer_utils import TrainOutput

from logitstream.data.documents import Batch
from logitstream.errors import LogitstreamError, RanksDiffer
from logitstream.training.checkpoints import NOTES, RUN_STATE, STAGING, rotate, seal, step_of
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
    """Remembers a signal or an error until all processes are between two steps, where `agree` raises it on each.

    Batches are waited for through `interruptible`, which a signal ends at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.failure: BaseException | None = None
        self.has_agreed = False
        self.epoch_rng: torch.Tensor | None = None
        """torch's random numbers from before the epoch's first step, None once that step is done."""
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
            raise Stopped(self.number)

    def interruptible(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches; end early at a signal or their failure, which `agree` then raises."""
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
        """Raise if this process or another one was told to end or failed. Call it on all at the same point."""
        if self.failure is None and self.number:
            self.failure = Stopped(self.number)
        mine = self.failure.number or 1 if isinstance(self.failure, Stopped) else _FAILED if self.failure else 0
        worst = torch.tensor([mine])
        if num_processes() > 1:
            if self._group is None:
                self._group = dist.new_group(backend="gloo")  # on the CPU, so that no GPU has to finish first
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._group)
        if worst.item():
            self.has_agreed = True
            raise self.failure or Stopped(0 if worst.item() >= _FAILED else int(worst.item()))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_rng = torch.get_rng_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_rng = None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agree()


class ResumableTrainer(Trainer):
    """Writes each checkpoint aside, on all processes, before it gets its name; `save_total_limit` counts whole ones.

    An optimizer step begins once all processes have its batches: `_get_num_items_in_batch` calls `stop.agree()`. If one
    of them was told to end before that, or its batches failed, `train` writes a checkpoint of the steps done and raises
    Stopped or that error on every process. A checkpoint is skipped if no token was trained on since the last one: a run
    that goes on from it would pass over sequences that were refused.
    """

    stats: Any
    """The run's statistics, a `RunStats`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop = StopRequest()
        self.add_callback(self.stop)
        self._is_saving = False
        self._saved_step = 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._saved_step = step_of(Path(resume_from_checkpoint)) if isinstance(resume_from_checkpoint, str) else 0
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except (CheckpointFailed, RanksDiffer):  # no process's student is the run's
            raise
        except (Stopped, LogitstreamError):
            self.keep_progress()
            raise

    def keep_progress(self) -> None:
        """Write a checkpoint of the steps done, if there is none; call it on all processes, between two steps.

        A failure to write is logged, because the caller raises the reason why the run ends.
        """
        if self.state.global_step <= self._saved_step:
            return
        if self.stop.epoch_rng is not None:  # a resumed epoch draws its order again
            torch.set_rng_state(self.stop.epoch_rng)
        assert isinstance(self.model, nn.Module)
        try:
            self._save_checkpoint(self.model, trial=None)
        except CheckpointFailed as error:
            logger.error("%s", error)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        if self.state.global_step >= self.state.max_steps:
            # A run killed between its last checkpoint and its end: the Trainer would stop only after one more step.
            self.control.should_training_stop = True
            return [], None
        try:
            samples: tuple[list[Batch], torch.Tensor | int | None]
            samples = super().get_batch_samples(self.stop.interruptible(epoch_iterator), num_batches, device)
        except Stopped as stopped:  # in the moment between the last batch and the agreement
            self.stop.failure = self.stop.failure or stopped
            if not self.stop.has_agreed:
                self.stop.agree()
            raise
        return samples

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(super()._get_output_dir(trial))
        return os.path.join(folder, STAGING) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write it aside, and give it its name once every process has written its part; raises CheckpointFailed."""
        states: Any = self.state.stateful_callbacks
        last, states[RUN_STATE] = states.get(RUN_STATE), self.stats.run_state()
        if states[RUN_STATE]["sums"]["tokens"] <= (last["sums"]["tokens"] if last else 0):
            return
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial))
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(folder / STAGING / name, folder / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointFailed(f"{name} cannot be written to {folder}: {error}") from error
        finally:
            self._is_saving = False
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best, with_optimizer = self.state.best_model_checkpoint, not self.args.save_only_model
            kept = {folder / name, *([Path(best)] if best else [])}
            rotate(folder, limit=self.args.save_total_limit, kept=kept, with_optimizer=with_optimizer)

    def _publish(self, staged: Path, final: Path) -> None:
        """Complete, seal and rename a checkpoint; another one of its name goes once this one stands."""
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        for note in NOTES:
            if (final.parent / note).exists():
                shutil.copy2(final.parent / note, staged / note)
        seal(staged)
        old = staged.with_name(f"{staged.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        staged.rename(final)
        shutil.rmtree(staged.parent, ignore_errors=True)
