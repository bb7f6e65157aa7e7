"""Randomly initialised causal LMs of several families, small enough to be made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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


SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "embedding_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "projection_size", "head_dim"), 16),
    **dict.fromkeys(("word_embed_proj_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_group", "topk_group", "num_memory_blocks"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("state_size", "mamba_d_state", "hidden_size_per_layer_input", "sliding_window", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "mamba_d_ssm": 64,
    "lru_width": 32,
    "top_k_experts": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Whatever of these a configuration knows makes most families small."""
SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4, "n_embd": 64},
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 2, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "n_groups": 1},
}


def any_family(model_type: str, *, vocab_size: int, seed: int = 0) -> Any:
    """A small model of any causal family that transformers knows; raises whatever its configuration does."""
    cls = CONFIG_MAPPING[model_type]
    known = cls().to_dict()
    options = _small(known, vocab_size) | {
        name: _small(value, vocab_size) | {"model_type": value["model_type"]}
        for name, value in known.items()
        if name.endswith("_config") and isinstance(value, dict) and "model_type" in value
    }
    torch.manual_seed(seed)
    config = cls(**options | SPECIAL.get(model_type, {}))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _small(known: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    options = {name: value for name, value in SMALL.items() if name in known}
    options |= {name: vocab_size for name in ("vocab_size", "vocab_size_per_layer_input") if name in known}
    kinds = ("layer_types", "layers_block_type")
    return options | {name: known[name][:2] for name in kinds if isinstance(known.get(name), list)}


def save_tiny_teacher(folder: Path, *, family: str = "llama", seed: int = 0) -> Path:
    """A folder that `teacher-server --model` takes: safetensors and a word-level tokenizer."""
    model = tiny_model(family, seed=seed)
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder
