"""A teacher that keeps learning: trains a tiny model on a pattern and saves checkpoints in place, as trainers do.

python -m tests.learning_teacher MODEL CHECKPOINTS NUM_CHECKPOINTS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny_models import VOCAB_SIZE

STEPS_A_CHECKPOINT = 30
PAUSE_SECONDS = 2.0


def pattern(num_sequences: int, num_tokens: int, *, seed: int) -> Tensor:
    """int64 [num_sequences, num_tokens]: from a random start, each token is 5 times the one before plus 1."""
    tokens = [torch.randint(0, VOCAB_SIZE, (num_sequences,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(num_tokens - 1):
        tokens.append((tokens[-1] * 5 + 1) % VOCAB_SIZE)
    return torch.stack(tokens, 1)


def main() -> None:
    model_folder, folder, num_checkpoints = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for number in range(1, num_checkpoints + 1):
        for step in range(STEPS_A_CHECKPOINT):
            ids = pattern(16, 24, seed=number * 1000 + step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / f"checkpoint-{number}")
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
