"""Learner: a causal language model whose output is the loss.

Letters: B rows, T positions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from plw_mlflow.models import causal
from plw_mlflow.training import loss


class Learner(nn.Module):
    """A causal model whose forward pass gives the loss, so that wrappers (DDP, autocast) see the whole of it."""

    def __init__(self, model: Any, label_smoothing: float = 0.0, *, has_fused_loss: bool = False) -> None:
        """has_fused_loss: `is_fused` of `loss.weighted_nll`."""
        super().__init__()
        self.model, self._label_smoothing, self._has_fused_loss = model, label_smoothing, has_fused_loss

    def forward(
        self, tokens: Tensor, weights: Tensor, rows: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor]:
        """Give what `weighted_nll` does."""
        return weighted_nll(
            self.model,
            tokens,
            weights,
            rows,
            label_smoothing=self._label_smoothing,
            is_fused=self._has_fused_loss,
            **context,
        )


def weighted_nll(
    model: Any,
    tokens: Tensor,
    weights: Tensor,
    rows: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    is_fused: bool = False,
    **context: Any,
) -> tuple[Tensor, Tensor]:
    """Give the summed weighted loss of a batch, in nats, and the unweighted losses [B, T] behind it.

    model: a causal one, which may have adapters. tokens: [B, T]. weights: [B, T], with which each token is predicted.
    rows: `Batch.rows`, looked for if not given. label_smoothing, is_fused: as `loss.weighted_nll` has them. context:
    `Batch.context`. The loss of a token stands where the token before it does; the last is 0.

    Raises UserError for an example so long that it would change the losses of others (`check_length`).
    """
    causal.check_length(causal.unwrap(model).config, context.get("max_length_q", tokens.shape[1]))
    hidden = causal.hidden_states(model, tokens, **context)
    head = causal.head(model)  # after the body, as sharded weights are gathered by then
    # Shifted by the few numbers of targets and weights, since `hidden[:, :-1]` would copy all hidden states.
    targets, following = (nn.functional.pad(part[:, 1:], (0, 1)).flatten() for part in (tokens, weights))
    total, nll = loss.weighted_nll(
        hidden.flatten(0, 1),
        head.weight,
        head.bias,
        targets,
        following,
        rows,
        scale=head.scale,
        softcap=head.softcap,
        label_smoothing=label_smoothing,
        is_fused=is_fused,
    )
    return total, nll.view(weights.shape)
