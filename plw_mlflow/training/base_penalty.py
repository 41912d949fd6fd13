"""Base penalty: the distance to the base weights, added to the loss of a step.

It is one of the regularisers that the study's fourth version compared with PLW; the others are dropout
(`models/dropout.py`), weight decay (AdamW's own) and label smoothing (`loss.py`). All apply at any PLW. Their strengths
in that comparison are not known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class BasePenalty:
    """`strength` times the sum over all weights of |weight - base weight| ^ order, added to the loss of a step.

    What counts is how far the model's weights have moved: with adapters, by the product that they add to each layer's
    weights (with DoRA, by what the product and the norms of the rows change together). The penalty's gradient is added
    once a step to the gradients. So it needs no graph, and costs the same however the step is cut.

    Parameters may be shards (FSDP2's DTensors); the copy of the base is then sharded likewise. It takes 4 bytes for
    each trained weight on its device, beside the 16 of weight, gradient and AdamW's averages. Adapters need no copy,
    but for a moment about four times the memory of the largest layer.
    """

    def __init__(self, model: Any, strength: float, order: float) -> None:
        """model: as it will be trained, with adapters and sharded, but before a checkpoint is loaded into it."""
        self._strength, self._order = strength, order
        self._adapters = [module for module in model.modules() if hasattr(module, "lora_A")]
        self._bases = [
            (parameter, parameter.detach().clone())
            for parameter in model.parameters()
            if parameter.requires_grad and not self._adapters
        ]

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Add the penalty's gradient to that of every parameter; returns its value, a scalar on their device.

        To be called once a step by every process, after the gradients are summed over micro-batches and processes and
        before they are clipped.
        """
        values = []
        # The model may have moved to a GPU.
        self._bases = [(parameter, base.to(parameter.device)) for parameter, base in self._bases]
        for parameter, base in self._bases:
            value, gradient = self._of(parameter.detach() - base)
            values.append(value)
            _add(parameter, gradient)
        for layer in self._adapters:
            parameters = _parameters(layer)
            leaves = [_whole(parameter.detach()).requires_grad_() for parameter in parameters]
            with torch.enable_grad():
                deviation = _deviation(layer, *leaves)
            value, gradient = self._of(deviation.detach())
            values.append(value)
            for parameter, part in zip(parameters, torch.autograd.grad(deviation, leaves, gradient), strict=True):
                _add(parameter, part)
        return _whole(sum(values[1:], values[0]))

    def _of(self, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty of a deviation of weights, and its gradient in them."""
        distance = deviation.abs()
        gradient = deviation.sign() * distance.pow(self._order - 1) * (self._strength * self._order)
        return self._strength * distance.pow(self._order).sum(), gradient


def _parameters(layer: Any) -> list[Tensor]:
    """The trained parameters of a layer's adapter: A [r, in], B [out, r], and DoRA's norms [out]."""
    (name,) = layer.active_adapters
    norms = [layer.lora_magnitude_vector[name].weight] if name in layer.lora_magnitude_vector else []
    return [layer.lora_A[name].weight, layer.lora_B[name].weight, *norms]


def _deviation(layer: Any, a: Tensor, b: Tensor, norms: Tensor | None = None) -> Tensor:
    """What an adapter adds to its layer's weights, [out, in]."""
    (name,) = layer.active_adapters
    product = layer.scaling[name] * (b @ a)
    if norms is None:
        return product
    base = _whole(layer.get_base_layer().weight.detach())
    if layer.fan_in_fan_out:
        base = base.T
    moved = base + product
    return norms.unsqueeze(1) * moved / moved.norm(dim=1, keepdim=True) - base


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, or a partial sum summed, over the processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if isinstance(parameter, DTensor) and not isinstance(gradient, DTensor):
        # Each process has computed the whole gradient, and keeps its own part.
        mesh, placements = parameter.device_mesh, parameter.placements
        gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient
