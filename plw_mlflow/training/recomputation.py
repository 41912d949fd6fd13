"""Activation checkpointing: a decoder layer keeps its input alone, and the backward pass computes the layer again.

Memory for activations falls to one row of hidden states a layer and what a single layer needs; a forward pass more is
the price. Random numbers (dropout) are drawn again from the same state, so the gradients are the same to the bit. The
vocabulary projection and the loss lie outside: `loss.py` needs no recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer

from plw_mlflow.errors import UserError
from plw_mlflow.models import causal


def check(settings: Any) -> None:
    """Raise UserError where a model of these settings (`pretrained.load_config`) has no layers to compute again.

    To be called before the model is loaded.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    if not model_class.supports_gradient_checkpointing:
        raise _unsupported(settings)


@contextmanager
def of_layers(model: Any) -> Iterator[None]:
    """Have a model's layers computed again in each backward pass within the block; afterwards it is as it was.

    Raises UserError where the model has no layers of that kind.
    """
    inner = causal.unwrap(model)
    if not inner.supports_gradient_checkpointing or not any(
        isinstance(part, GradientCheckpointingLayer) for part in inner.modules()
    ):
        raise _unsupported(inner.config)
    inner.activation_checkpointing_enable({"use_reentrant": False})
    # transformers has embeddings ask for gradients, which only torch's reentrant way needs below frozen weights.
    inner.disable_input_require_grads()
    try:
        yield
    finally:
        inner.activation_checkpointing_disable()


def _unsupported(settings: Any) -> UserError:
    return UserError(
        f"activation-checkpointing is not to be had with a model of type {settings.model_type}, whose layers "
        f"transformers cannot compute again; leave it out, and lower --micro-batch-tokens instead"
    )
