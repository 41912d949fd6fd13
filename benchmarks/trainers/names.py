"""The parameters of others' models, by the names that transformers' LLaMA has for them."""

from __future__ import annotations

from torch import Tensor

WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "model.model.model.")


def as_transformers(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient by transformers' names."""
    return gradient
