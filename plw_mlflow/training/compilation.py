"""Compilation: decoder layers as programs of torch's compiler, made once and run on rows of every length.

What a layer does between its matrix products (norms, rotary embedding, casts, sums) is read and written again and again
by one small kernel after another; compiled, it is a few. All layers share one program, whose number of tokens is a
variable. Sums are made in another order, so losses and gradients change by rounding.

Attention that goes from example to example stays outside, since a program would be made for each number of examples.
The kernel for packed rows on a GPU is inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.models import causal
from plw_mlflow.training import attention


@contextmanager
def of_layers(model: Any, arithmetic: torch.dtype, *, backend: Any = "inductor") -> Iterator[None]:
    """Have a model's decoder layers compiled when they are first called within the block; afterwards it is as it was.

    model: if it takes packed rows, it does so already (`attention.over_examples`).
    backend: as torch.compile has it.

    Raises UserError where the model names no decoder layers.
    """
    inner = causal.unwrap(model)
    layers = causal.decoder_layers(inner)
    if not layers:
        raise UserError(
            f"compile is not to be had with a {inner.config.model_type} model, which names no decoder layers"
        )
    before = inner.config._attn_implementation
    if before == attention.NAME and not attention.is_one_kernel(inner.config, arithmetic):
        inner.set_attn_implementation(attention.apart())
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            f"compile failed on this machine; leave --compile out. What it says: {first_line(error)}"
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        inner.set_attn_implementation(before)
        torch.compiler.reset()
