"""What a run says: first what it trains, last what came of it or why it ended, and the commands that go on."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from student_worker.config import StudentConfig

if TYPE_CHECKING:  # slow to import, and this module also tells of mistakes in the settings
    from transformers import Trainer, TrainingArguments

    from logitstream.types import TeacherInfo

logger = logging.getLogger(__name__)

SECONDS_FOR_THE_FIRST_PROCESS = 5.0
"""How long the other processes of torchrun keep their error back: the first one's ends them meanwhile."""
_RESUME = "--training.resume_from_checkpoint"


def what_runs(config: StudentConfig, arguments: TrainingArguments, trainer: Trainer, checkpoint: Path | None) -> str:
    """Return one line: model, data, where targets come from, output."""
    model: Any = trainer.model
    num_sequences, num_heldout = (len(part) for part in (trainer.train_dataset, trainer.eval_dataset))  # type: ignore[arg-type]
    cache, teacher = config.cache.path, f"the teacher {', '.join(config.teacher.addresses)}"
    source = {
        "online": teacher + (f", kept in {cache}" if cache else ""),
        "cache": f"the cache {cache} alone",
        "cache_then_online": f"the cache {cache}, else from {teacher}",
    }[config.source]
    size = model.num_parameters()
    power = min(int(math.log10(max(size, 1)) // 3), 3)
    return (
        f"training {config.model.path or f'an untrained {type(model).__name__} of {config.model.config}'} "
        f"({size / 1000**power:.3g} {('', 'thousand', 'M', 'B')[power]} parameters) on {num_sequences:,} sequences of "
        f"{', '.join(config.data.text) or f'the cache {cache}'}, {num_heldout:,} held out; targets from {source}; "
        f"output: {arguments.output_dir}" + (f", going on from {checkpoint.name}" if checkpoint else "")
    )


def warn_of_refusals(info: TeacherInfo | None, sequence_tokens: int) -> None:
    """Warn if the teacher, when it is known by now, takes no sequences of the run's length."""
    if info is not None and info.max_sequence_tokens < sequence_tokens:
        logger.warning(
            "the teacher refuses sequences of more than %d tokens, data.sequence_tokens is %d: longer ones are left "
            "out of the loss; lower it, or raise limits.max_sequence_tokens at the teacher if its model allows it",
            info.max_sequence_tokens,
            sequence_tokens,
        )


def what_came_of_it(report: dict[str, Any], config: StudentConfig, folder: Path, words: Sequence[str]) -> str:
    """Return a few lines: held-out loss before and after, where the student lies, the commands that go on."""
    before, after = report["heldout_loss_before"], report["heldout_loss_after"]
    known = None not in (before, after)
    loss = f"held-out loss {before:.3f} → {after:.3f} nats a token" if known else "no held-out loss"
    lines = [f"{loss}; the student is in {folder}, the run's figures in {folder / 'report.json'}"]
    if any(folder.glob("checkpoint-*")):
        lines.append(f"train longer: {resuming(words)} --training.num_train_epochs N")
    if config.cache.path and config.source != "cache":
        alone = "--targets.source cache --training.output_dir ANOTHER"
        lines.append(f"again, without a teacher: {command(words)} {alone}")
    return "\n".join(lines)


def command(words: Sequence[str], *more: str) -> str:
    """Return the command that started this run, to be typed again, with `more` in place of what it says of resuming."""
    kept: list[str] = []
    skip = False
    for word in words:
        if word.startswith("--"):
            skip = word.split("=")[0].replace("-", "_").lstrip("_") == _RESUME.lstrip("-")
        if not skip:
            kept.append(word)
    launcher = "torchrun … -m student_worker" if "TORCHELASTIC_RUN_ID" in os.environ else "student-worker"
    return " ".join([launcher, shlex.join([*kept, *more])])


def resuming(words: Sequence[str]) -> str:
    """Return the command that goes on from the newest checkpoint."""
    return command(words, _RESUME, "latest")


def starting_over(words: Sequence[str], folder: Path) -> str:
    """Return the commands that forget the checkpoints and begin again."""
    return f"rm -r {shlex.quote(str(folder))}/checkpoint-* && {command(words)}"


def fail(message: str, *, status: int = 1, quiet: bool = False) -> NoReturn:
    """End this process with one line on stderr, which the processes of one run do not repeat."""
    line = f"student-worker: {' '.join(message.split())}"
    rank = os.environ.get("RANK", "0")
    sys.stdout.flush()
    if not quiet:
        if rank != "0":
            line = line.replace(":", f" (process {rank}):", 1)
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        print(line, file=sys.stderr, flush=True)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints it in its table
            with contextlib.suppress(OSError):
                Path(file).write_text(json.dumps({"message": line}), encoding="utf-8")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a process group's threads may abort an interpreter that ends
        os._exit(status)
    raise SystemExit(status)
