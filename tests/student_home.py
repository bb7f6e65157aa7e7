"""A folder with all that a run of the student's command needs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serving import teacher_process
from tests.tiny_models import VOCAB_SIZE, save_tiny_teacher


@contextmanager
def student_home(folder: Path, *, num_words: int) -> Iterator[Path]:
    """Serve a tiny teacher and yield the folder of its text, its address and an untrained student's config."""
    save_tiny_teacher(folder / "teacher")
    words = random.Random(0).choices([f"w{index}" for index in range(3, VOCAB_SIZE)], k=num_words)
    (folder / "corpus.txt").write_text(" ".join(words))
    config = json.loads((folder / "teacher" / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "student").mkdir()
    (folder / "student" / "config.json").write_text(json.dumps(config))
    with teacher_process("--model.path", str(folder / "teacher")) as (_, address):
        (folder / "address").write_text(address)
        yield folder
