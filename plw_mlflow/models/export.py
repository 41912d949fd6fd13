"""Export: the trained model as plain Hugging Face folders, for whoever has no MLflow.

OUTPUT/model loads with transformers' AutoModelForCausalLM and AutoTokenizer; OUTPUT/adapter, where there are adapters,
with peft on the base. `outputs.py` decides what they may replace.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from plw_mlflow.environment import outputs
from plw_mlflow.errors import first_line


def write(model: Any, tokenizer: Any, adapter: Path, output: Path | None, kind: torch.dtype = torch.float32) -> None:
    """Write a plain model with its tokenizer, and a copy of its adapter's folder unless that is empty.

    kind: the type of the model's weights in its folder; the model itself stays as it is.

    They replace those of an earlier export. Raises as `outputs.write_folders` does.
    """
    if output is None:
        return

    def save(folder: Path) -> None:
        try:
            in_type(model, kind).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # such as a full disk
            raise OSError(first_line(error)) from None

    def copy(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)

    outputs.write_folders(output, {outputs.MODEL: save, outputs.ADAPTER: copy if any(adapter.iterdir()) else None})


def in_type(model: Any, kind: torch.dtype) -> Any:
    """The model itself if its weights are of a type, else a copy with weights rounded to it; tied ones stay tied.

    Weights that are of the type already are not copied.
    """
    # A copy takes over what is said to be copied already, so that the weights are not copied as they are first.
    rounded: dict[int, Any] = {
        id(weight): weight if weight.dtype == kind else nn.Parameter(weight.detach().to(kind), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, rounded) if any(weight.dtype != kind for weight in model.parameters()) else model
