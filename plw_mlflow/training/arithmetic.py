"""Arithmetic: LoRA's layers and RMS norms, computed with fewer passes over memory than peft and transformers take.

Both give what the modules give that they stand in for, up to rounding (float32: 1e-6 of a gradient). A LoRA layer casts
its input once, adds the adapter's product onto the base's in one call, and keeps for the backward pass the input in the
type of the products alone. An RMS norm whose input is float32 and whose output goes into products gives it in their
type, so that it is cast once for all of them and not by each.

Only layers that are recognised are replaced: plain LoRA without dropout on a linear layer, and norms whose output is
the same to the bit. Everything else (DoRA, dropout, GPT-2's transposed layers, 4 bits) is left to its own module.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Forward = Callable[..., Tensor]


@contextmanager
def fewer_passes(model: nn.Module) -> Iterator[None]:
    """Have the layers of a model that are recognised compute by this module's functions within the block."""
    found = {layer: forward for layer in model.modules() if (forward := _lora(layer) or _norm(layer))}
    for layer, forward in found.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in found:
            del layer.forward  # which uncovers the method of its class


def _kind(input: Tensor) -> torch.dtype:
    """The type in which products of this input are computed."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def _lora(layer: Any) -> Forward | None:
    """What computes a layer with plain LoRA; None for any other layer."""
    if not hasattr(layer, "lora_A"):
        return None
    from peft.tuners import lora

    is_plain = type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear and len(layer.lora_A) == 1
    if not is_plain or layer.lora_variant or layer.merged or layer.disable_adapters or layer.fan_in_fan_out:
        return None
    (name,) = layer.lora_A
    has_more = any(layer.lora_bias.values()) or not isinstance(layer.lora_dropout[name], nn.Identity)
    return None if has_more or layer.active_adapters != [name] else partial(_lora_forward, layer, name)


def _lora_forward(layer: Any, name: str, input: Tensor) -> Tensor:
    base, factors = layer.base_layer, (layer.lora_A[name].weight, layer.lora_B[name].weight)
    kind = _kind(input)
    with torch.autocast(input.device.type, enabled=False):
        return _LoraProduct.apply(input, base.weight, base.bias, *factors, layer.scaling[name], kind)


class _LoraProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T in a type; W and b are frozen.

    x: [..., in]. W: [out, in]. b: [out] or None. A: [r, in]. B: [out, r].
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, a, b, scaling, kind = inputs
        rows, weight, a, scaled_b = x.flatten(0, -2).to(kind), weight.to(kind), a.to(kind), (b * scaling).to(kind)
        inner = rows @ a.T
        output = nn.functional.linear(rows, weight, None if bias is None else bias.to(kind))
        output.addmm_(inner, scaled_b.T)
        ctx.save_for_backward(rows, inner, weight, a, scaled_b)
        ctx.scaling, ctx.shape, ctx.types = scaling, x.shape, (x.dtype, inputs[3].dtype, b.dtype)
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, scaled_b = ctx.saved_tensors
        gradient = grads[0].reshape(len(rows), -1)
        inner_gradient = gradient @ scaled_b
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(inner_gradient, a).view(ctx.shape)
        of_a, of_b = inner_gradient.T @ rows, gradient.T @ inner
        types = zip((of_x, of_a, of_b), ctx.types, strict=True)
        of_x, of_a, of_b = (None if part is None else part.to(kind) for part, kind in types)
        return of_x, None, None, of_a, of_b * ctx.scaling, None, None


def _norm(layer: Any) -> Forward | None:
    """What computes an RMS norm; None for a layer that is none, or another one."""
    weight, epsilon = getattr(layer, "weight", None), getattr(layer, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return None
    if any(True for _ in layer.buffers()) or len(inspect.signature(layer.forward).parameters) > 1:  # such as a gate
        return None
    # Tried with other weights, since those of the processes that assist in a training may have no numbers yet.
    trial, alike = torch.linspace(-2, 3, 3 * len(weight)).view(1, 3, -1), copy.deepcopy(layer).to_empty(device="cpu")
    with torch.no_grad():
        alike.weight.copy_(torch.linspace(-1, 2, len(weight)))
        is_the_same = torch.equal(_RMSNorm.apply(trial, alike.weight, epsilon, torch.float32), alike(trial))
    return partial(_norm_forward, layer, layer.forward, epsilon) if is_the_same else None


def _norm_forward(layer: Any, own: Forward, epsilon: float, input: Tensor) -> Tensor:
    kind = _kind(input)
    # Where input or arithmetic are otherwise, the output may be meant for something else than products.
    if input.dtype != torch.float32 or kind == torch.float32:
        return own(input)
    with torch.autocast(input.device.type, enabled=False):
        return _RMSNorm.apply(input, layer.weight, epsilon, kind)


class _RMSNorm(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + epsilon), computed in float32 and given in another type. x: [..., H] float32. w: [H]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, epsilon, kind = inputs
        reciprocal = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, reciprocal)
        return (x * reciprocal).mul_(weight).to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, reciprocal = ctx.saved_tensors
        gradient = grads[0].float()
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * x * reciprocal).flatten(0, -2).sum(0)
        # d/dx of x r is r (g - x r^2 mean(g x)), g being the gradient in x r.
        gradient = gradient * weight
        share = (gradient * x).mean(-1, keepdim=True) * reciprocal.square()
        return gradient.addcmul_(x, share, value=-1).mul_(reciprocal), of_weight, None, None
