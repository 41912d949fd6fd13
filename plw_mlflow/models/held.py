"""Linear layers held in bfloat16: frozen weights in the type of the arithmetic take half the memory and no casts.

Under autocast a product rounds its float32 weights to bfloat16 each time. Weights that nothing changes may as well be
rounded once, and every product gives the same bits. Embeddings (and a head that is tied to them), norms and biases stay
float32, as they take part in sums too, or hardly count. What is rounded is gone: `stored.py` reads it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

# All that modules call with the weight of a linear layer.
PRODUCTS: set[Any] = {nn.functional.linear, torch.addmm, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__}


def hold(model: nn.Module, kind: torch.dtype, *, with_head: bool = False) -> None:
    """Round the weights of a model's frozen linear layers to a type, in place, and hold them in it.

    Layers whose weight asks for a gradient (such as those of adapters) stay as they are. Afterwards the model computes
    under autocast in that type, with the bits that it would give with float32 weights; or in float32 with the rounded
    weights, within `in_float32`.

    with_head: round the head, too, unless its weights are also the embeddings; so does `holding`.
    """
    for layer in _linear(model, with_head=with_head):
        if not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(kind)


@contextmanager
def holding(kind: torch.dtype | None) -> Iterator[None]:
    """Within the block, transformers loads models whose linear layers (all but a tied head) hold a type.

    A tensor is cast when it is read, so the float32 model never exists. None changes nothing.
    """

    def cast(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # transformers makes a model without numbers, and gives each of its weights the type that it finds there. A
        # weight that replaces another is a loaded or a tied one.
        is_new = parameter is not None and parameter.is_meta and module._parameters.get(name) is None
        if is_new and name == "weight" and isinstance(module, (nn.Linear, Conv1D)):
            return nn.Parameter(parameter.to(kind), parameter.requires_grad)
        return None

    hook = None if kind is None else register_module_parameter_registration_hook(cast)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def is_held(model: nn.Module) -> bool:
    """Whether any linear layer holds its weight in a type other than float32."""
    return any(layer.weight.dtype in (torch.bfloat16, torch.float16) for layer in _linear(model))


@contextmanager
def taken_for_float32(layers: Iterable[Any]) -> Iterator[None]:
    """Within the block, the weights of these layers are float32 and their numbers are not there.

    peft gives adapters the type of the layer that they are put on, and so would round where they begin.
    """
    weights = [(layer, layer.weight) for layer in layers if layer.weight.dtype == torch.bfloat16]
    for layer, weight in weights:
        layer.weight = nn.Parameter(
            weight.new_zeros((), dtype=torch.float32).expand(weight.shape), weight.requires_grad
        )
    try:
        yield
    finally:
        for layer, weight in weights:
            layer.weight = weight.requires_grad_(layer.weight.requires_grad)


def round_weights(model: nn.Module, kind: torch.dtype) -> None:
    """Round all weights of a model to a type, in place.

    `model.to` would round what is computed and in no file, too, such as the frequencies of rotary positions.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(kind)


def widen(model: nn.Module, but_linear: bool) -> None:
    """Give all weights of a model float32, in place.

    but_linear: leave those of linear layers, all but the head, in the type that they are held in.
    """
    left = {layer.weight for layer in _linear(model)} if but_linear else set()
    for weight in model.parameters():
        if weight not in left:
            weight.data = weight.data.float()


class in_float32(TorchFunctionMode):
    """Within the block, products take the weights that are held in another type as float32; for trials of a model."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            args = [arg.float() if isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 else arg for arg in args]
        return function(*args, **kwargs or {})


def _linear(model: Any, *, with_head: bool = False) -> Iterator[Any]:
    """The linear layers of a model but its head; with_head: the head, too, unless it is tied to the embeddings."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if with_head and head is not None and head.weight is not model.get_input_embeddings().weight:
        head = None
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head:
            yield layer
