"""A run ends at a signal or an error with a whole checkpoint, and goes on from one as if it had never stopped.

A checkpoint is written aside and renamed once it is whole.
"""

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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints

from logitstream.errors import LogitstreamError, RanksDiffer
from logitstream.files import sync_folder
from logitstream.training.distributed import num_processes, of_all_processes

if TYPE_CHECKING:
    from logitstream.training.stats import RunStats

logger = logging.getLogger(__name__)

T = TypeVar("T")

STAGING = ".saving"
"""Folder in the output folder for what is being written or deleted."""
RUN_STATE = "logitstream"
"""The run's statistics among a checkpoint's `stateful_callbacks`."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ResumeUndecided(LogitstreamError):
    """The output folder holds checkpoints, and the settings do not say whether to go on from them."""


class CheckpointFailed(LogitstreamError):
    """A checkpoint could not be written; those before it are as they were."""


class Stopped(KeyboardInterrupt):
    """The run was told to end; `number` is the signal's, 0 if another process was told or failed."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" if number else "another process ended the run")
        self.number = number


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the folder checkpoint-N with the highest N, None without any."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # type: ignore[no-untyped-call]
    return Path(found) if found else None


def choose_checkpoint(folder: Path, named: str | bool | None, *, with_optimizer: bool = True) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` means in this output folder, None to start anew.

    `latest` and `true` are the newest checkpoint, None without any. Raises ResumeUndecided if checkpoints lie here and
    nothing is named, ValueError if no run can go on from the one named.
    """
    word, newest = "" if named is None else str(named), newest_checkpoint(folder)
    if word.lower() in ("", "false", "no", "none"):
        if newest is not None:
            raise ResumeUndecided(f"{folder} holds {newest.name} of an earlier run")
        return None
    chosen = newest if word.lower() in ("latest", "true") else Path(word)
    if chosen is None:
        return None
    if not (chosen / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint: expected `latest`, `true` or the folder of a checkpoint, got {str(chosen)!r}"
        )
    if with_optimizer and not any(any(chosen.glob(name)) for name in ("optimizer*", "global_step*")):
        raise ValueError(f"resume_from_checkpoint: {chosen} holds the model alone, from which no run can go on")
    return chosen


def resumed_state(state: Any) -> Any:
    """Return the run's statistics in the checkpoint that a TrainerState comes from, {} if it comes from none."""
    return (state.stateful_callbacks or {}).get(RUN_STATE, {})


class StopRequest:
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
            self._is_waiting = True  # for now, a signal raises
            if not self.number:
                taken.extend(itertools.islice(batches, number))
        except (Stopped, LogitstreamError) as error:
            failure = error
        try:
            self._is_waiting = False
            self.agree(failure, num_batches=len(taken))
        except BaseException:
            torch.set_rng_state(rng_state)  # the first batch of an epoch draws its order, and will once more
            raise
        return taken

    def agree(self, failure: BaseException | None = None, *, num_batches: int = 0) -> None:
        """Raise if this process or another one was told to end or failed; call it on all at the same point."""
        if failure is None and self.number:
            failure = Stopped(self.number)
        number = None if failure is None else getattr(failure, "number", 0)
        if self._group is None and num_processes() > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU, so that no GPU has to finish first
        everyone = of_all_processes((number, num_batches), group=self._group)
        if told := [number for number, _ in everyone if number is not None]:
            raise failure or Stopped(min(told))
        if len({taken for _, taken in everyone}) > 1:
            raise RanksDiffer(f"expected as many batches on every rank, got {[taken for _, taken in everyone]}")


class ResumableTrainer(Trainer):
    """Trains as if nothing had come before, and writes each checkpoint aside before it gets its name.

    If one process is told to end or fails between two steps, `train` writes a checkpoint of the steps done and raises
    Stopped or that error on every process.
    """

    stats: RunStats
    _is_saving = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop = StopRequest()
        self._order = torch.Generator()
        """The order by length, the same in every process; seeded for each epoch before its first batch is drawn."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        """Return a sampler that follows from settings: processes may have drawn different random numbers before."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.accelerator.dataloader_config.data_seed = seed
        sampler: Sampler[Any] | None = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator, sampler.batch_size = self._order, self.get_total_train_batch_size(self.args)
        return sampler

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Begin from the bare student, for accelerate puts no DDP around one that an evaluation has marked as prepared.

        A DDP from an earlier call does not know parameters that were added or unfrozen since.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            vars(self.model).pop("_is_accelerate_prepared", None)
            self.model_wrapped = self.model
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]

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
            if self.state.best_model_checkpoint == str(folder / STAGING / name):
                self.state.best_model_checkpoint = str(folder / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(folder / STAGING / name, folder / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointFailed(f"{name} cannot be written to {folder}: {error}") from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()

    def _publish(self, staged: Path, final: Path) -> None:
        """Bring a whole checkpoint to the disk and give it its name, in place of another one that had it."""
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        for path in [*staged.rglob("*"), staged]:
            if path.is_dir():
                sync_folder(path)
            else:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if final.exists():
            final.rename(staged.with_name("replaced"))
        staged.rename(final)
        sync_folder(final.parent)
        shutil.rmtree(staged.parent, ignore_errors=True)
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        rotate_checkpoints(str(final.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)
