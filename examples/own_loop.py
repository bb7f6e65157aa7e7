"""Distil a teacher into a student in a loop of your own: draw sparse targets, train on them. Needs no server."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from logitstream import TargetSpec, TokenSequence, sample, sparse_kl

VOCAB_SIZE, STEPS = 97, 60


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, **sizes))


def main() -> list[float]:
    teacher, student = tiny_model(seed=0).eval(), tiny_model(seed=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    spec = TargetSpec(sampler="systematic", num_samples=50)
    losses = []
    for _ in range(STEPS):
        token_ids = torch.randint(VOCAB_SIZE, (64,))
        with torch.no_grad():
            teacher_logits = teacher(token_ids[None]).logits[0]
        targets = sample(teacher_logits, spec, TokenSequence(token_ids=token_ids.int().numpy()))
        loss = sparse_kl(student(token_ids[None]).logits[0], targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"distillation loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
