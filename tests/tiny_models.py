"""Randomly initialised causal LMs of several families, small enough to be made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 96
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "head_dim": 16, "sliding_window": 8},
    "granite": {"logits_scaling": 0.25, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 4.0},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(family: str, *, seed: int = 0, sharpness: float = 8.0) -> Any:
    """A model whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    options = FAMILIES[family]
    common = {name: value for name, value in COMMON.items() if family != "gpt2" or "size" not in name}
    config = AutoConfig.for_model(family, **common | {"vocab_size": VOCAB_SIZE} | options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
    return model


def save_tiny_teacher(folder: Path, *, family: str = "llama", seed: int = 0) -> Path:
    """A folder that `teacher-server --model` takes: safetensors and a word-level tokenizer."""
    model = tiny_model(family, seed=seed)
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder
