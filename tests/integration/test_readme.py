"""The README's Python blocks run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).parents[2] / "README.md"
VOCAB_SIZE = 97


def block(heading: str) -> str:
    """The first Python block after a heading in bold."""
    found = re.search(rf"\*\*{heading}\.\*\*.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"README.md has no Python block under **{heading}.**"
    return found[1]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.2,
        )
    )


def kl_to_teacher(student: LlamaForCausalLM, teacher: LlamaForCausalLM, token_ids: torch.Tensor) -> float:
    """Mean KL(teacher‖student) over full distributions, in nats."""
    with torch.no_grad():
        student_logprobs, teacher_logprobs = (
            torch.log_softmax(model(token_ids[None]).logits[0], -1) for model in (student, teacher)
        )
    return float((teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum(-1).mean())


def test_the_library_alone_distils_in_somebodys_own_loop() -> None:
    teacher, student = tiny_llama(0).eval(), tiny_llama(1)
    generator = torch.Generator().manual_seed(2)
    heldout = torch.randint(VOCAB_SIZE, (64,), generator=generator)
    before = kl_to_teacher(student, teacher, heldout)
    scope = {
        "teacher": teacher,
        "student": student,
        "optimizer": torch.optim.AdamW(student.parameters(), lr=3e-3),
        "sequences": [torch.randint(VOCAB_SIZE, (64,), generator=generator) for _ in range(60)],
    }
    source = block("Your own loop")
    assert len([line for line in source.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    exec(source, scope)
    assert kl_to_teacher(student, teacher, heldout) < 0.7 * before


@pytest.mark.parametrize("heading", ["Trainer", "Your own loop"])
def test_the_blocks_compile(heading: str) -> None:
    compile(block(heading), heading, "exec")
