"""`student-worker`: parse, train, say how it ended. What takes seconds to import waits until the settings are read."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence

from logitstream.settings import parse_settings
from student_worker.config import StudentConfig

DESCRIPTION = (
    "Train a student on sparse targets from teacher servers. Settings of the training loop are "
    "transformers.TrainingArguments. Several processes: torchrun --nproc_per_node=N -m student_worker …"
)


def main(argv: Sequence[str] | None = None) -> None:
    import torch
    from transformers import TrainingArguments

    if not torch.accelerator.is_available():  # else accelerate takes each of torchrun's processes for the only one
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    config, arguments = parse_settings(
        (StudentConfig, TrainingArguments), command="student-worker", description=DESCRIPTION, argv=argv
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from student_worker.run import run

    run(config, arguments)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Threads of a group that is still there when the interpreter ends abort the process now and then (torch 2.13);
        # the trainer, whose model holds the group, is garbage in cycles.
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
