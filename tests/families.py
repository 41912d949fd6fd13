"""Tiny random models of many families, the same every time."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# What a family names otherwise; and caps and scales of logits that show on models so small.
SETTINGS = {
    "cohere": {"logit_scale": 0.3},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": None},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32},
    "gptj": {"n_embd": 16, "n_head": 2, "n_layer": 1, "rotary_dim": 4},  # its head has a bias
    "granite": {"logits_scaling": 4.0},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2},
    "mamba": {"state_size": 4, "intermediate_size": 32},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "qwen3_next": {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
}

# Families that differ in how they make logits of hidden states.
MAKERS_OF_LOGITS = ("cohere", "gemma2", "gemma3_text", "gpt2", "gptj", "granite", "llama4_text", "mistral", "qwen2")


def tiny(family, **changes):
    """A random model of a family."""
    torch.manual_seed(0)
    settings = SIZES | SETTINGS.get(family, {}) | changes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
