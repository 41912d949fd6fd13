"""The loss: weighted next-token cross-entropy, summed here and divided once per optimiser step by its caller.

The logits of a step never exist at once. Since the weights are known beforehand, each chunk of rows yields its
loss and its gradients in the forward pass, so nothing is computed twice: three matrix products, two with a frozen
head. Rows of weight 0 are dropped before the head, so that PLW 0 pays for completion tokens only.

Letters: N rows (positions of a batch, flattened), H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

LOGITS_BYTES = 256 * 2**20  # of float32 logits at a time; more is no faster, and 256 MiB fits any device


def weighted_nll(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum the weighted losses of all rows.

    hidden: [N, H] last hidden states; under autocast, the products are made in its type.
    head: [V, H] vocabulary projection; bias: [V] or None.
    targets: [N] the token that follows each row.
    weights: [N] float32, the weight of that token.

    Returns (loss, nll). loss: float32 scalar sum_i w_i l_i in nats, undivided, and differentiable in hidden, head
    and bias. nll: [N] float32 unweighted losses l_i, detached; 0 where the weight is 0, as those rows are not computed.
    """
    rows = weights.nonzero().squeeze(1)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if not torch.is_grad_enabled():  # a parameter asks for its gradient all the same, and the head's is the largest
        hidden, head, bias = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    with torch.autocast(device, enabled=False):
        loss, kept = _ChunkedNLL.apply(hidden[rows], head, bias, targets[rows], weights[rows])
    return loss, torch.zeros_like(weights).index_copy(0, rows, kept)


def divisor(weights: Tensor, kind: Literal["weights", "tokens"]) -> Tensor:
    """What a loss is divided by, a float64 scalar: the sum of weights, or how many are not 0 (arXiv:2507.07817)."""
    return weights.double().sum() if kind == "weights" else weights.count_nonzero().double()


class _ChunkedNLL(torch.autograd.Function):
    """weighted_nll on rows that all count; gradients are made in forward and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        projection = head.to(hidden.dtype)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        grad_bias = torch.zeros_like(head[:, 0], dtype=torch.float32) if needs_bias else None
        chunk = max(1, LOGITS_BYTES // (4 * len(head)))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ projection.T).float()
            if bias is not None:
                logits += bias.float()
            target = targets[rows].unsqueeze(1)
            log_total = logits.logsumexp(1, keepdim=True)
            nll[rows] = (log_total - logits.gather(1, target)).squeeze(1)
            if grad_hidden is None and grad_head is None and grad_bias is None:
                continue
            # d(w l)/d(logits) = w (softmax - one at the target), in place of the logits.
            gradient = logits.sub_(log_total).exp_()
            gradient.scatter_add_(1, target, torch.full_like(log_total, -1.0))
            gradient *= weights[rows].unsqueeze(1)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ projection
            if grad_head is not None:
                grad_head += gradient.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.dtypes = head.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The incoming gradient holds 1 / divisor: applied last, so that low-precision products stay near 1, and in
        # float32, as a rounded divisor would scale the whole step.
        grad_hidden, grad_head, grad_bias = ctx.saved_tensors
        head_type, bias_type = ctx.dtypes
        return (
            None if grad_hidden is None else (grad_hidden.float() * grads[0]).to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * grads[0]).to(head_type),
            None if grad_bias is None else (grad_bias * grads[0]).to(bias_type),
            None,
            None,
        )
