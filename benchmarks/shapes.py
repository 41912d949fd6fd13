"""Shapes of LLaMAs that the benchmarks make with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig


def llama(shape: Sequence[int], **more: Any) -> LlamaConfig:
    """The settings of a LLaMA.

    shape: hidden size, inner size, layers, heads, key heads, vocabulary. more: settings beside these.
    """
    hidden, inner, layers, heads, key_heads, vocabulary = shape
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        **more,
    )
