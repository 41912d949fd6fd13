"""Dropout: one probability for every dropout that a model has."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from plw_mlflow.errors import UserError


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability in a config, before a model is made of it.

    Raises UserError where it has none, or does not take that value.
    """
    dropouts = _dropouts(config)
    if not dropouts:
        raise UserError(f"{config.model_type} has no dropout to set; leave --dropout out")
    for part, name in dropouts:
        try:
            setattr(part, name, probability)
        except StrictDataclassError:  # transformers takes MPT's attn_pdrop for a whole number
            raise UserError(f"{config.model_type} takes no {name} of {probability}; leave --dropout out") from None


def _dropouts(config: Any) -> list[tuple[Any, str]]:
    """The dropout probabilities of a config: the part of it that has one, and its name there."""
    dropouts = []
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):  # a config within the config
            dropouts += _dropouts(value)
        # Other names: "resid_pdrop". Heads of other tasks have their own.
        elif ("dropout" in name or "pdrop" in name) and not name.startswith(("summary_", "classifier_")):
            dropouts.append((config, name))
    return dropouts
