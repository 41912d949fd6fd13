"""Prompt loss weights for other people's training loops and trainers, importable without MLflow or a benchmark.

`PLWTrainer` is transformers' Trainer, and `PLWSFTTrainer` TRL's SFTTrainer, with this package's loss. `token_weights`,
`weighted_nll` and `divisor` are for a loop of one's own, and `PLWCollator` makes batches for either.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plw_mlflow.integrations.collator import PLWCollator
from plw_mlflow.integrations.own_loop import divisor, token_weights, weighted_nll

if TYPE_CHECKING:
    from plw_mlflow.integrations.sft_trainer import PLWSFTTrainer as PLWSFTTrainer
    from plw_mlflow.integrations.trainer import PLWTrainer

# Without PLWSFTTrainer, which needs TRL.
__all__ = ["PLWCollator", "PLWTrainer", "divisor", "token_weights", "weighted_nll"]

_ASKED_FOR = {"PLWTrainer": "trainer", "PLWSFTTrainer": "sft_trainer"}  # slow to import, or not there


def __getattr__(name: str) -> Any:
    if name not in _ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ASKED_FOR[name]}"), name)
