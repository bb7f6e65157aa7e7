"""What a run says first, of what it trains, and last, of what came of it and what can be done next."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from logitstream.training.checkpoints import checkpoints_in
from logitstream.types import TeacherInfo
from student_worker.config import StudentConfig
from student_worker.ending import command, resuming

logger = logging.getLogger(__name__)


def what_runs(config: StudentConfig, arguments: TrainingArguments, trainer: Trainer, checkpoint: Path | None) -> str:
    """Model, data, where targets come from, output: one line."""
    model: Any = trainer.model
    num_sequences, num_heldout = (len(part) for part in (trainer.train_dataset, trainer.eval_dataset))  # type: ignore[arg-type]
    student = config.model.path or f"an untrained {type(model).__name__} of {config.model.config}"
    data = ", ".join(config.data.text) or f"the cache {config.cache.path}"
    start = f", going on from {checkpoint.name}" if checkpoint else ""
    return (
        f"training {student} ({_count(model.num_parameters())} parameters) on {num_sequences:,} sequences of {data}, "
        f"{num_heldout:,} held out; {_source(config)}; "
        f"output: {arguments.output_dir}{start}"
    )


def warn_of_refusals(info: TeacherInfo | None, sequence_tokens: int) -> None:
    """Log it where the teacher, as far as it is known by now, takes no sequences of the run's length."""
    if info is not None and info.max_sequence_tokens < sequence_tokens:
        logger.warning(
            "the teacher refuses sequences of more than %d tokens, data.sequence_tokens is %d: longer ones are left "
            "out of the loss; lower it, or raise limits.max_sequence_tokens at the teacher if its model allows it",
            info.max_sequence_tokens,
            sequence_tokens,
        )


def what_came_of_it(report: dict[str, Any], config: StudentConfig, folder: Path, words: Sequence[str]) -> str:
    """Held-out loss before and after, where the student lies, and the commands that go on: a few lines."""
    before, after = report["heldout_loss_before"], report["heldout_loss_after"]
    known = None not in (before, after)
    loss = f"held-out loss {before:.3f} → {after:.3f} nats a token" if known else "no held-out loss"
    lines = [f"{loss}; the student is in {folder}, the run's figures in {folder / 'report.json'}"]
    if checkpoints_in(folder):
        lines.append(f"train longer: {resuming(words)} --training.num_train_epochs N")
    if config.cache.path and config.source != "cache":
        lines.append(f"again, without a teacher: {command(words)} --targets.source cache --training.output_dir ANOTHER")
    return "\n".join(lines)


def _source(config: StudentConfig) -> str:
    teacher = f"the teacher {', '.join(config.teacher.addresses)}"
    if config.source == "online":
        return f"targets from {teacher}" + (f", kept in {config.cache.path}" if config.cache.path else "")
    if config.source == "cache":
        return f"targets from the cache {config.cache.path} alone"
    return f"targets from the cache {config.cache.path}, else from {teacher}"


def _count(number: int) -> str:
    """124 M, 1.5 B: three digits."""
    power = min(int(math.log10(max(number, 1)) // 3), 3)
    return f"{number / 1000**power:.3g} {('', 'thousand', 'M', 'B')[power]}".strip()
