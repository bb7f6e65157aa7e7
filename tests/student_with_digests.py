"""`student-worker` whose processes each print a digest of the student they end with; same arguments."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from student_worker.__main__ import main


class Digest(TrainerCallback):
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = b"".join(parameter.detach().numpy().tobytes() for parameter in kwargs["model"].parameters())
        print(f"\nrank {os.environ.get('RANK', '0')} {hashlib.sha256(parameters).hexdigest()}", flush=True)


if __name__ == "__main__":
    callbacks: list[Any] = DEFAULT_CALLBACKS
    callbacks.append(Digest)
    main()
