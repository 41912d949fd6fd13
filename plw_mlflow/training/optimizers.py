"""Optimisers: AdamW, whose two averages take 8 bytes a trained weight, and AdamW with both in 8 bits, which take 2.

The second (arXiv:2110.02861, by bitsandbytes) keeps the averages in blocks of 256 numbers with a scale each; those of
tensors with fewer than 4,096 numbers stay float32. Its steps are approximate, so it is a part of a cell's identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import ERROR, getLogger
from typing import Any, Literal

import torch
from torch import Tensor

from plw_mlflow.errors import UserError, first_line


def check(optimizer: Literal["adamw", "adamw8bit"]) -> None:
    """Raise UserError where this machine cannot train by an optimiser. To be called before anything is loaded."""
    if optimizer == "adamw":
        return
    # Whether it has a kernel for this device shows in a step alone. Fewer than 4,096 numbers would stay float32.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        make(optimizer, [weight], learning_rate=1.0, weight_decay=0.0).step()
        fault = None if weight.isfinite().all() and weight.any() else "a step of it gives no numbers"
    except Exception as error:  # whatever a package says that was built for another machine
        fault = f"{type(error).__name__}: {first_line(error)}"
    if fault is not None:
        raise UserError(f"optimizer adamw8bit cannot run on this machine's {device} ({fault}); use --optimizer adamw")


def make(
    optimizer: Literal["adamw", "adamw8bit"],
    trained: Sequence[Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    is_fused: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser of trained parameters. As in transformers, vectors (norms, biases) do not decay.

    is_fused: whether AdamW is one kernel, which can be told on the device to leave everything as it is.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=is_fused or None)
    getLogger("bitsandbytes").setLevel(ERROR)  # it says at length that it has no 4-bit kernel for some processors
    from bitsandbytes.optim import AdamW8bit  # slow to import

    return AdamW8bit(groups, lr=learning_rate)
