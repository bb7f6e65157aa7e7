"""A run ends at a signal or an error with a whole checkpoint, and goes on from one as if it had never stopped.

A checkpoint is written aside and renamed once it is whole.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput, sort_checkpoints

from logitstream.errors import LogitstreamError, RanksDiffer
from logitstream.files import sync_folder
from logitstream.training.distributed import of_all_processes

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


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders named checkpoint-N, the highest N first."""
    found = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def choose_checkpoint(folder: Path, named: str | bool | None, *, with_optimizer: bool = True) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` means in this output folder, None to start anew.

    `latest` and `true` are the newest checkpoint, None without any. Raises ResumeUndecided if checkpoints lie here and
    nothing is named, ValueError if no run can go on from the one named.
    """
    word = "" if named is None else str(named)
    checkpoints = checkpoints_in(folder)
    if word.lower() in ("", "false", "no", "none"):
        if checkpoints:
            raise ResumeUndecided(f"{folder} holds {checkpoints[0].name} of an earlier run")
        return None
    if word.lower() in ("latest", "true"):
        for checkpoint in checkpoints:
            if not (fault := _fault_of(checkpoint, with_optimizer=with_optimizer)):
                return checkpoint
            logger.warning("%s is passed over: %s", checkpoint, fault)
        return None
    if fault := _fault_of(Path(word), with_optimizer=with_optimizer):
        raise ValueError(
            f"resume_from_checkpoint: expected `latest`, `true` or the folder of a checkpoint, got {word!r}: {fault}"
        )
    return Path(word)


def _fault_of(checkpoint: Path, *, with_optimizer: bool) -> str:
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it holds no {TRAINER_STATE_NAME}"
    if with_optimizer and not any(any(checkpoint.glob(name)) for name in ("optimizer*", "global_step*")):
        return "it holds the model alone"
    return ""


def resumed_state(state: Any) -> Any:
    """Return the run's statistics in the checkpoint that a TrainerState comes from, {} if it comes from none."""
    return (state.stateful_callbacks or {}).get(RUN_STATE, {})


def publish(staged: Path, final: Path) -> None:
    """Bring a whole checkpoint to the disk and give it its name, in place of another one that had it."""
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


def rotate(folder: Path, *, limit: int, best: str | None) -> None:
    """Take away the oldest checkpoints beyond a limit, never the newest or the best."""
    found = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)]
    num_protected = 1 if best is None or found[-1] == Path(best) else 2
    for old in found[: -max(limit, num_protected)]:
        old.rename(folder / STAGING / old.name)


class StopRequest(TrainerCallback):
    """Remembers a signal until all processes are between two steps, where each of them raises Stopped."""

    def __init__(self) -> None:
        self.number = 0
        self._is_waiting = False

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
        everyone = of_all_processes((number, num_batches))
        if told := [number for number, _ in everyone if number is not None]:
            raise failure or Stopped(min(told))
        if len({taken for _, taken in everyone}) > 1:
            raise RanksDiffer(f"expected as many batches on every rank, got {[taken for _, taken in everyone]}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agree()


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
        self.add_callback(self.stop)
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
            if self.args.save_total_limit:
                rotate(final.parent, limit=self.args.save_total_limit, best=self.state.best_model_checkpoint)
            shutil.rmtree(staged.parent, ignore_errors=True)
