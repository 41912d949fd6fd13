"""The gradients of others' models, by the names and shapes that transformers' LLaMA has for its parameters."""

from __future__ import annotations

import re

from torch import Tensor

HEADS, GROUPS = 4, 2  # of the tiny model's queries, and of its keys and values
LITGPT = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.ln_f.": "model.norm.",
    "transformer.h.": "model.layers.",
    ".norm_1.": ".input_layernorm.",
    ".norm_2.": ".post_attention_layernorm.",
    ".attn.proj.": ".self_attn.o_proj.",
    ".mlp.fc_1.": ".mlp.gate_proj.",
    ".mlp.fc_2.": ".mlp.up_proj.",
    ".mlp.proj.": ".mlp.down_proj.",
}


def as_transformers(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient by transformers' names; those of wrappers are taken off, litgpt's are translated."""
    found: dict[str, Tensor] = {}
    for name, values in gradient.items():
        name = re.sub(r"^(module\.|_orig_mod\.|_forward_module\.)+", "", name)
        for theirs, ours in LITGPT.items():
            name = name.replace(theirs, ours)
        if name.endswith(".attn.qkv.weight"):
            head = len(values) // (HEADS + 2 * GROUPS)
            parts = values.split([HEADS * head, GROUPS * head, GROUPS * head])
            layer = name.removesuffix(".attn.qkv.weight")
            found |= {f"{layer}.self_attn.{kind}_proj.weight": part for kind, part in zip("qkv", parts, strict=True)}
        else:
            found[name] = values
    return found
