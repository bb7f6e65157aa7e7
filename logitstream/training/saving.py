"""A Trainer whose checkpoints are whole or not there, and which leaves one behind where it ends before its time."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from logitstream.data.documents import Batch
from logitstream.errors import LogitstreamError, RanksDiffer
from logitstream.training.checkpoints import RUN_FILES, RUN_STATE, STAGING, rotate, step_of
from logitstream.training.stopping import Stopped, StopRequest

logger = logging.getLogger(__name__)


class CheckpointFailed(LogitstreamError):
    """A checkpoint could not be written; those before it are as they were."""


class ResumableTrainer(Trainer):
    """Writes each checkpoint aside, on all processes, before it gets its name; `save_total_limit` counts whole ones.

    An optimizer step begins once all processes have its batches: `_get_num_items_in_batch` calls `stop.agree()`. Where
    one of them was told to end before that, or its batches failed, `train` writes a checkpoint of the steps done and
    raises Stopped or that error on every process.
    """

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

        One that cannot be written is logged: why the run ends is what its caller is told.
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

    def run_state(self) -> dict[str, Any]:
        """What a resumed run goes on counting from: each callback's own `run_state`, as JSON, by the class's name."""
        counting = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "run_state")]
        return {type(one).__name__: one.run_state() for one in counting} | {"num_processes": self.args.world_size}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Aside first, then under its name, once every process has written its part; raises CheckpointFailed."""
        name = f"checkpoint-{self.state.global_step}"
        final = Path(self._get_output_dir(trial)) / name
        staged = final.parent / STAGING / name
        states: Any = self.state.stateful_callbacks
        states[RUN_STATE] = self.run_state()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._complete(staged, final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _publish(staged, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointFailed(f"{name} cannot be written to {final.parent}: {error}") from error
        finally:
            self._is_saving = False
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            kept = {final, *([Path(best)] if best else [])}
            rotate(
                final.parent, limit=self.args.save_total_limit, kept=kept, with_optimizer=not self.args.save_only_model
            )

    def _complete(self, staged: Path, final: Path) -> None:
        """Name the checkpoint in its own state as it will be found, and lay the run's other files beside."""
        if not self.args.should_save:
            return
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        for file in RUN_FILES:
            if (final.parent / file).exists():
                shutil.copy2(final.parent / file, staged / file)


def _publish(staged: Path, final: Path) -> None:
    """Give a checkpoint whose files are on the disk its name; another one of that name goes once this one stands."""
    for path in staged.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = staged.with_name(f"{staged.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staged.rename(final)
    shutil.rmtree(staged.parent, ignore_errors=True)
