"""For a training loop of one's own: weights of tokens, the summed loss of a batch, and what a step divides it by.

The loss of an optimiser step is sum_i w_i l_i over D, where i runs over the tokens of all micro-batches of all
processes, and D is one divisor for all of them. A mean for each micro-batch would be another loss, in which a token of
a short micro-batch counts more than one of a long one.

Letters: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from plw_mlflow.errors import UserError
from plw_mlflow.models import causal
from plw_mlflow.training import learner

DIVISORS = ("weights", "tokens")


def token_weights(
    is_completion: Tensor, plw: float, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """The weights with which tokens are predicted: float32, of the shape of `is_completion`.

    is_completion: [B, T] bool or 0 and 1, whether a token belongs to a completion; or [T] for one text. It is what
        others call a completion mask, an assistant mask, or `labels != -100`.
    plw: the weight of all other tokens, finite and not negative.
    attention_mask: [B, T], 0 on padding, which weighs nothing.
    position_ids: [B, T] of packed rows, 0 where a text begins.

    The first token of a text weighs nothing, as nothing stands before it that could predict it.

    Raises UserError for a PLW that cannot be used.

    Two texts, a padded one first, and then the same in one packed row:

    >>> labels = torch.tensor([[-100, -100, 7, 1, -100], [-100, -100, -100, 8, 1]])
    >>> attention_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    >>> token_weights(labels != -100, 0.1, attention_mask=attention_mask)
    tensor([[0.0000, 0.1000, 1.0000, 1.0000, 0.0000],
            [0.0000, 0.1000, 0.1000, 1.0000, 1.0000]])
    >>> labels = torch.tensor([[-100, -100, 7, 1, -100, -100, -100, 8, 1]])
    >>> position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    >>> token_weights(labels != -100, 0.1, position_ids=position_ids)
    tensor([[0.0000, 0.1000, 1.0000, 1.0000, 0.0000, 0.1000, 0.1000, 1.0000, 1.0000]])
    """
    check_plw(plw)
    is_token = torch.ones_like(is_completion, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    # As a tokenizer may pad on the left, a text begins with a token behind which there is none.
    is_first = is_token & ~nn.functional.pad(is_token[..., :-1], (1, 0), value=False)
    if position_ids is not None:
        is_first |= position_ids == 0
    weights = torch.where(is_completion.bool(), 1.0, plw)
    return weights.masked_fill(~is_token | is_first, 0)


def weighted_nll(
    model: Any, input_ids: Tensor, weights: Tensor, *, label_smoothing: float = 0.0, **rest: Any
) -> Tensor:
    """The summed weighted loss of a batch in nats, undivided, without the logits of the whole batch at any time.

    model: a causal transformers model, which may have peft's adapters in it and be wrapped for several processes (as by
        DistributedDataParallel, whose forward pass this is). Where accelerate has prepared it for mixed precision, call
        this within `accelerator.autocast()`.
    input_ids: [B, T]. weights: [B, T] float32, as `token_weights` gives them.
    label_smoothing: as torch's cross_entropy has it.
    rest: the other arguments of the model's forward pass, such as `attention_mask`, or `position_ids` of packed rows.

    Raises UserError for models whose loss this would not be.

    One step of two micro-batches:

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> batches = [torch.tensor([[2, 3, 4, 5, 1]]), torch.tensor([[2, 6, 1]])]
    >>> masks = [torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[0, 0, 1]])]
    >>> weights = [token_weights(mask, plw=0.1) for mask in masks]
    >>> whole = divisor(weights)
    >>> losses = [weighted_nll(model, tokens, weight) / whole for tokens, weight in zip(batches, weights)]
    >>> for loss in losses:
    ...     loss.backward()
    >>> bool(model.lm_head.weight.grad.any())
    True
    """
    check_model(model)
    bare = extract_model_from_parallel(model)
    with _summing(causal.unwrap(bare), label_smoothing):
        total = model(input_ids=input_ids, weights=weights, **rest)
    assert isinstance(total, Tensor)
    return total


def divisor(weights: Tensor | Sequence[Tensor], kind: str = "weights") -> Tensor:
    """What the summed losses of an optimiser step are divided by: a float64 scalar.

    weights: those of all micro-batches of this process. Where torch's processes are joined, all have to call this, and
        get the divisor of all. As DistributedDataParallel then averages gradients, multiply each loss by the number of
        processes.
    kind: "weights" for the sum of the weights, "tokens" for the number of those that are not 0.

    It is 0 where no token weighs anything. Raises UserError for another kind.

    >>> weights = [torch.tensor([[0, 0.5, 1, 1]]), torch.tensor([[0, 0.5]])]
    >>> divisor(weights)
    tensor(3., dtype=torch.float64)
    >>> divisor(weights, "tokens")
    tensor(4., dtype=torch.float64)
    """
    check_divisor(kind)
    parts = [weights] if isinstance(weights, Tensor) else weights
    total = torch.stack([mass(part, kind) for part in parts]).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def mass(weights: Tensor, kind: str) -> Tensor:
    """The sum of weights, or the number of those that are not 0: a float64 scalar."""
    if weights.device.type == "mps":  # which has no float64
        weights = weights.cpu()
    return weights.double().sum() if kind == "weights" else weights.count_nonzero().double()


def check_plw(plw: float) -> None:
    """Raise UserError for a PLW that is no weight."""
    try:
        is_weight = math.isfinite(plw) and plw >= 0
    except TypeError:
        is_weight = False
    if not is_weight:
        raise UserError(f"plw must be a finite number of at least 0, got {plw!r}")


def check_divisor(kind: str) -> None:
    """Raise UserError for what is not the name of a divisor."""
    if kind not in DIVISORS:
        raise UserError(f"the divisor must be one of {', '.join(DIVISORS)}, got {kind!r}")


def check_model(model: Any) -> None:
    """Raise UserError for a model whose loss `weighted_nll` would not be, as far as its parts tell."""
    if isinstance(model, nn.DataParallel):
        raise UserError("DataParallel is not supported; start a process for each GPU by torchrun")
    bare = extract_model_from_parallel(model)
    if getattr(getattr(bare, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError("peft's prompt tuning and prefix tuning are not supported; use adapters such as LoRA")
    if getattr(causal.unwrap(bare).config.get_text_config(), "output_router_logits", False):
        raise UserError(
            "the model adds a loss of its routers to its own, which is not supported; set output_router_logits=False "
            "in its config, or router_aux_loss_coef=0.0 in TRL's SFTConfig"
        )


@contextmanager
def _summing(model: Any, label_smoothing: float) -> Iterator[None]:
    """Within the block, a transformers model's forward pass gives the summed loss; afterwards it is as it was.

    Wrappers call the forward pass of what they wrap, and some, as those for several processes, lose gradients unless it
    is their own that is called.
    """

    def forward(input_ids: Tensor, weights: Tensor, **rest: Any) -> Tensor:
        given = {name: value for name, value in rest.items() if value is not None}  # peft passes on all that it knows
        return learner.weighted_nll(model, input_ids, weights, label_smoothing=label_smoothing, **given)[0]

    before = model.__dict__.get("forward")  # where accelerate has put one of its own
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
