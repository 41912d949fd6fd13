"""The loss: weighted next-token cross-entropy, summed here and divided once per optimiser step by the trainer.

The logits of a step never exist all at once. As the weights are known beforehand, each chunk of rows gives its loss and
its gradients in the forward pass, so nothing is computed twice: there are three matrix products, or two where the head
is frozen. Rows of weight 0 are dropped before the head, so that PLW 0 pays for completion tokens only. Everything else
is done in place, on blocks of rows that stay in the processor's cache, and costs a few per cent of the products.

Letters: N rows (positions of a batch, flattened), H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What the loss may allocate at a time, beside the gradients it returns and, where the products are made in another type
# than the head's, a copy of the head in that type. Larger chunks are no faster on a CPU; a GPU needs them to be busy.
BUDGET_BYTES = 256 * 2**20
BUDGET_BYTES_CUDA = 2**30


def weighted_nll(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    rows: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    is_fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum the weighted losses of all rows.

    hidden: [N, H] last hidden states; under autocast, the matrix products are made in its type.
    head: [V, H] vocabulary projection; bias: [V] or None.
    targets: [N] the token that follows each row.
    weights: [N] float32, the weight of that token.
    rows: int64, those whose weight is not 0, in order. If not given they are looked for, for which a GPU's host waits.
    scale, softcap: logits are x = scale (hidden head^T + bias), or softcap tanh(x / softcap) where there is one.
    label_smoothing: share E of the target distribution that is spread evenly over all V tokens, as in torch's
        cross_entropy: l_i becomes (1 - E) l_i + E mean_v(-log p_v).
    is_fused: on a GPU, let torch's compiler make few kernels of all that is not a matrix product.

    Returns (loss, nll). loss: float32 scalar sum_i w_i l_i in nats, undivided; its gradients in hidden, head and bias
    can be computed once. nll: [N] float32 unweighted losses l_i, detached; 0 in rows of weight 0, which are not
    computed. They are never smoothed, so that they compare between runs.

    Example, a token of a prompt and one of a completion at PLW 0.1:

    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> head = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> targets, weights = torch.tensor([0, 2]), torch.tensor([0.1, 1.0])
    >>> loss, nll = weighted_nll(hidden, head, None, targets, weights)
    >>> nll
    tensor([0.2395, 2.2395])
    >>> divided = loss / weights.sum()
    >>> round(divided.item(), 4)
    2.0577
    >>> divided.backward()
    >>> hidden.grad
    tensor([[-0.0387,  0.0194],
            [ 0.1936,  1.4309]])
    """
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not torch.is_grad_enabled():  # a parameter asks for its gradient all the same, and the head's is the largest
        hidden, head, bias = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    if rows is None:
        rows = weights.nonzero().squeeze(1)
    with torch.autocast(device, enabled=False):
        form = _Form(scale, softcap, label_smoothing, is_fused and device == "cuda")
        return _ChunkedNLL.apply(hidden, head, bias, targets, weights, rows, form, kind)


class _ChunkedNLL(torch.autograd.Function):
    """weighted_nll with products in type `kind`; gradients are made in forward and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        hidden, head, bias, targets, weights, rows, form, kind = inputs
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        grad_bias = torch.zeros_like(head[:, 0], dtype=torch.float32) if needs_bias else None
        nll = torch.zeros_like(weights)
        smoothed = torch.zeros_like(weights) if form.smoothing else nll
        projection = head.to(kind)
        sizes = _sizes(len(rows), hidden, head, kind)
        differentiate, block_rows = _differentiate, sizes.block_rows
        if form.is_fused:  # nothing is left in between, so a chunk is a block
            differentiate, block_rows = _compiled(), sizes.chunk_rows
        buffer = torch.empty(min(sizes.chunk_rows, len(rows)), len(head), dtype=kind, device=hidden.device)
        for chunk in rows.split(sizes.chunk_rows):
            states = hidden[chunk].to(kind)
            products = torch.mm(states, projection.T, out=buffer[: len(chunk)])
            for part, block in zip(products.split(block_rows), chunk.split(block_rows), strict=True):
                nll[block], smoothed[block] = differentiate(part, bias, targets[block], weights[block], form)
                if grad_bias is not None:
                    grad_bias += part.sum(0, dtype=torch.float32)
            gradient = products  # which `_differentiate` has replaced in place
            if grad_head is not None:
                _add_product(grad_head, gradient.T, states, sizes.spare_bytes)
            if grad_hidden is not None:
                grad_hidden[chunk] = torch.mm(gradient, projection, out=states).to(hidden.dtype)
        ctx.gradients = grad_hidden, grad_head, grad_bias
        ctx.dtypes = hidden.dtype, head.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll)
        return (smoothed * weights).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of weighted_nll are scaled in place, so they can be computed once only")
        gradients, ctx.gradients = ctx.gradients, None  # autograd copies gradients to which anything else refers
        for gradient in gradients:
            # The incoming gradient holds 1 / divisor: applied last, so that low-precision products stay near 1, and
            # in float32, as a rounded divisor would scale the whole step.
            for part in () if gradient is None else gradient.split(1024):
                part.copy_(part.float().mul_(grads[0]))
        return *(None if g is None else g.to(kind) for g, kind in zip(gradients, ctx.dtypes, strict=True)), *[None] * 5


class _Form(NamedTuple):
    """How logits are made of products, and losses of logits."""

    scale: float
    softcap: float | None
    smoothing: float
    is_fused: bool


class _Sizes(NamedTuple):
    """How the work is cut so that it stays within the budget."""

    chunk_rows: int  # whose products exist at a time
    block_rows: int  # of a chunk, whose softmax is computed at a time
    spare_bytes: int  # for float32 copies of a part of a chunk


def _sizes(rows: int, hidden: Tensor, head: Tensor, kind: torch.dtype) -> _Sizes:
    is_cuda = hidden.device.type == "cuda"
    budget = BUDGET_BYTES_CUDA if is_cuda else BUDGET_BYTES
    vocabulary, width = head.shape
    # Three quarters of the budget are for a chunk: logits, hidden states, and their gradient in its own type.
    row_bytes = (vocabulary + width) * kind.itemsize + width * hidden.itemsize
    chunks = math.ceil(rows * row_bytes / (budget * 3 / 4))
    chunk_rows = math.ceil(rows / max(1, chunks)) or 1  # all alike, as a short last one would be slow
    # An eighth is for two float32 blocks. A core's cache holds 1 MiB or so; a GPU needs more work at a time.
    spare_bytes = budget // 8
    block_rows = max(1, spare_bytes // (2 if is_cuda else 64) // (4 * vocabulary))
    return _Sizes(chunk_rows, block_rows, spare_bytes)


def _differentiate(
    products: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, form: _Form
) -> tuple[Tensor, Tensor]:
    """Losses of a block of rows, plain and smoothed; `products` becomes the gradient of the weighted, smoothed loss.

    products: [R, V] hidden head^T of R rows, changed in place. targets, weights: [R].
    """
    scale, softcap, smoothing, _ = form
    target, weight = targets.unsqueeze(1), weights.unsqueeze(1)
    logits = products.float()  # the products themselves where they are float32
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    if softcap:
        logits.div_(softcap).tanh_()
        slope = logits.square().neg_().add_(1)
        logits *= softcap
    highest, own = logits.amax(1, keepdim=True), logits.gather(1, target)
    logits.sub_(highest)
    mean = logits.mean(1, keepdim=True) if smoothing else own  # as yet less `highest`
    total = logits.exp_().sum(1, keepdim=True)
    # d(w l) / d(logits) = w (softmax - target distribution); then scale and cap by the chain rule.
    logits.mul_(weight * scale / total)
    if smoothing:
        logits -= weight * (scale * smoothing / logits.shape[1])
    logits.scatter_add_(1, target, -weight * (scale * (1 - smoothing)))
    if softcap:
        logits *= slope
    products.copy_(logits)
    nll = (total.log() + (highest - own)).squeeze(1)
    # (1 - E) (lse - x_target) + E (lse - mean x) = nll + E (x_target - mean x)
    return nll, nll + smoothing * (own - highest - mean).squeeze(1) if smoothing else nll


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_differentiate_whole`, compiled for any number of rows."""
    return torch.compile(_differentiate_whole, dynamic=True)


def _differentiate_whole(
    products: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, form: _Form
) -> tuple[Tensor, Tensor]:
    """The same as `_differentiate`, out of place and without scattering, as a compiler makes few kernels of it."""
    scale, softcap, smoothing, _ = form
    target, weight = targets.unsqueeze(1), weights.unsqueeze(1)
    logits = products.float() if bias is None else products.float() + bias
    logits = logits * scale
    if softcap:
        capped = torch.tanh(logits / softcap)
        logits = capped * softcap
    highest, own = logits.amax(1, keepdim=True), logits.gather(1, target)
    exponentials = (logits - highest).exp()
    total = exponentials.sum(1, keepdim=True)
    is_target = torch.arange(logits.shape[1], device=logits.device) == target
    gradient = exponentials / total - torch.where(is_target, 1 - smoothing, 0.0)
    if smoothing:
        gradient = gradient - smoothing / logits.shape[1]
    gradient = gradient * (weight * scale)
    if softcap:
        gradient = gradient * (1 - capped * capped)
    products.copy_(gradient)
    nll = total.log() + (highest - own)
    smoothed = nll + smoothing * (own - logits.mean(1, keepdim=True)) if smoothing else nll
    return nll.squeeze(1), smoothed.squeeze(1)


def _add_product(total: Tensor, left: Tensor, right: Tensor, spare_bytes: int) -> None:
    """total += left @ right, in place; a product of lower precision and its cast take `spare_bytes` at most."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
        return
    if total.device.type == "cuda":  # whose kernels add products of lower precision to float32
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    rows = max(1, spare_bytes // (right.shape[1] * (right.itemsize + total.itemsize)))
    for part, factor in zip(total.split(rows), left.split(rows), strict=True):
        part += factor @ right
