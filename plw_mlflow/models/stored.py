"""Stored weights: those of a base as its files have them, read one at a time, in place of weights that were rounded.

A frozen base is held in bfloat16 where the arithmetic is. What its adapters are merged into must not have been rounded
before, so that the merged model is rounded once at most.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from plw_mlflow.errors import UserError
from plw_mlflow.models.files import reading
from plw_mlflow.models.location import folder_of

ROUNDED = (torch.bfloat16, torch.float16)


def merge(model: Any, base: str, kind: torch.dtype = torch.float32) -> Any:
    """The base within peft's wrapper, its adapters merged into the weights that the base's files have, in float32.

    base: the name that it was loaded by. kind: the type in which linear layers hold the sums, which are rounded once.
        Layers are summed one at a time, so a model that is held in bfloat16 never exists in float32 if it is to be in
        bfloat16 again.

    Raises UserError where the base is not what the model was loaded from.
    """
    layers = dict(model.get_base_model().named_modules())
    stored = Stored(base)
    for name, layer in layers.items():
        weight, has_adapter = getattr(layer, "weight", None), name.endswith(".base_layer")
        if not isinstance(weight, nn.Parameter) or not (has_adapter or weight.dtype in ROUNDED):
            continue
        if weight.dtype in ROUNDED and (has_adapter or weight.dtype != kind):
            plain = name.removesuffix(".base_layer").replace(".base_layer.", ".")
            weight.data = stored.read(f"{plain}.weight", weight).to(weight.device)
        if has_adapter:
            layers[name.removesuffix(".base_layer")].merge()
            if kind in ROUNDED:
                weight.data = weight.data.to(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return model.merge_and_unload()


class Stored:
    """The weights of a base by their names in the model, read from its safetensors files one at a time.

    Where the files have other names or forms than the model's weights, the whole base is loaded again.
    """

    def __init__(self, base: str) -> None:
        self._base = base
        self._places: dict[str, Path] | None = None
        self._whole: dict[str, Tensor] | None = None

    def read(self, name: str, rounded: Tensor) -> Tensor:
        """A weight in float32. Raises UserError unless `rounded` is what it is rounded to."""
        if self._places is None:
            self._places = _places(folder_of(self._base))
        if name in self._places:
            with reading("model", self._base), safe_open(self._places[name], "pt") as file:
                found = file.get_tensor(name).float()
            if _rounds_to(found, rounded):
                return found
        if self._whole is None:
            from plw_mlflow.models import pretrained  # which imports this module

            self._whole = pretrained.load(self._base).state_dict()
        if not _rounds_to(self._whole[name], rounded):
            raise UserError(f"model {self._base!r} has changed since it was loaded: {name} has other numbers now")
        return self._whole[name]


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
