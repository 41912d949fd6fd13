"""Stored weights: those of a base as its files have them, read one at a time, in place of weights that were rounded.

A frozen base is held in bfloat16 where the arithmetic is. What its adapters are merged into must not have been rounded
before, so that the merged model is rounded once at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from plw_mlflow.errors import UserError
from plw_mlflow.models import pretrained
from plw_mlflow.models.files import reading
from plw_mlflow.models.location import folder_of


def restore(model: nn.Module, base: str) -> None:
    """Give a base model that may have adapters its weights in float32, where they are held in fewer bits.

    base: the name that it was loaded by. It is read from its safetensors files one weight at a time. Where they have
    other names or forms than the model's weights, the whole base is loaded again.

    Raises UserError where the base is not what the model was loaded from.
    """
    rounded = {
        name.replace(".base_layer.", "."): weight
        for name, weight in model.named_parameters()
        if weight.dtype in (torch.bfloat16, torch.float16)
    }
    if not rounded:
        return
    places = _places(folder_of(base))
    whole: dict[str, Tensor] | None = None
    for name, weight in rounded.items():
        stored = None
        if name in places:
            with reading("model", base), safe_open(places[name], "pt") as file:
                stored = file.get_tensor(name).float()
        if stored is None or not _rounds_to(stored, weight):
            if whole is None:
                whole = pretrained.load(base).state_dict()
            stored = whole[name]
            if not _rounds_to(stored, weight):
                raise UserError(f"model {base!r} has changed since it was loaded: {name} has other numbers now")
        weight.data = stored.to(weight.device)


def _rounds_to(stored: Tensor, weight: Tensor) -> bool:
    return stored.shape == weight.shape and torch.equal(stored.to(weight.dtype), weight.detach().to(stored.device))


def _places(folder: Path) -> dict[str, Path]:
    """The safetensors file of each weight in a model's folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / shard for name, shard in shards.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)
