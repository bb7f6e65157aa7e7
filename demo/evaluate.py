"""Exact held-out figures: both models' full next-token distributions side by side, none of the product's own code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def evaluate(student: Path, teacher: Path, sequences: Iterable[list[int]]) -> dict[str, float]:
    """Means per predicted token over token-id sequences, in nats: teacher's and student's loss, KL(teacher‖student).

    Also top-1 agreement and speculative acceptance Σ min(p, t), both shares of 1. One sequence's [T, V] at a time.
    """
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    sums: dict[str, float] = {}
    num_tokens = 0
    for ids in sequences:
        input_ids = torch.tensor([ids])
        student_logprobs, teacher_logprobs = (F.log_softmax(m(input_ids).logits[0, :-1], dim=-1) for m in models)
        for name, value in _compare(student_logprobs, teacher_logprobs, input_ids[0, 1:]).items():
            sums[name] = sums.get(name, 0.0) + value
        num_tokens += len(ids) - 1
    return {name: value / num_tokens for name, value in sums.items()} | {"heldout_tokens": num_tokens}


def _compare(
    student_logprobs_TV: torch.Tensor, teacher_logprobs_TV: torch.Tensor, next_ids_T: torch.Tensor
) -> dict[str, float]:
    """Sums over the positions of one sequence."""
    vocab_size = teacher_logprobs_TV.shape[1]
    student_T = student_logprobs_TV[:, :vocab_size]
    teacher_probs = teacher_logprobs_TV.exp()
    return {
        "heldout_loss_after": float(F.nll_loss(student_logprobs_TV, next_ids_T, reduction="sum")),
        "teacher_heldout_loss": float(F.nll_loss(teacher_logprobs_TV, next_ids_T, reduction="sum")),
        "heldout_kl_to_teacher": float((teacher_probs * (teacher_logprobs_TV - student_T)).sum()),
        "heldout_top1_agreement": float((student_T.argmax(-1) == teacher_logprobs_TV.argmax(-1)).sum()),
        "heldout_speculative_acceptance": float(torch.minimum(student_T.exp(), teacher_probs).sum()),
    }
