"""Dropout: one probability for every dropout that a model has."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from plw_mlflow.errors import UserError


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability that a model's config has, before the model is made of it.

    Raises UserError where it has none, or takes no such value.
    """
    found = _dropouts(config)
    if not found:
        raise UserError(f"{config.model_type} has no dropout to set; leave --dropout out")
    for part, name in found:
        try:
            setattr(part, name, probability)
        except StrictDataclassError:  # transformers holds MPT's attn_pdrop for a whole number
            raise UserError(f"{config.model_type} takes no {name} of {probability}; leave --dropout out") from None


def _dropouts(config: Any) -> list[tuple[Any, str]]:
    """Each part of a config with the name of a dropout probability it has."""
    found = []
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):  # a config within the config
            found += _dropouts(value)
        # Other names: "resid_pdrop". Heads of other tasks have their own.
        elif ("dropout" in name or "pdrop" in name) and not name.startswith(("summary_", "classifier_")):
            found.append((config, name))
    return found
