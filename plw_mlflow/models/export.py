"""Export: the trained model as plain Hugging Face folders, for whoever has no MLflow.

OUTPUT/model loads with transformers' AutoModelForCausalLM and AutoTokenizer; OUTPUT/adapter, where there are adapters,
with peft on the base. `outputs.py` decides what they may replace.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from plw_mlflow.environment import outputs
from plw_mlflow.errors import first_line


def write(model: Any, tokenizer: Any, adapter: Path, output: Path | None) -> None:
    """Write a plain model with its tokenizer, and a copy of its adapter's folder unless that is empty.

    They replace those of an earlier export. Raises as `outputs.write_folders` does.
    """
    if output is None:
        return

    def save(folder: Path) -> None:
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # such as a full disk
            raise OSError(first_line(error)) from None

    def copy(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)

    outputs.write_folders(output, {outputs.MODEL: save, outputs.ADAPTER: copy if any(adapter.iterdir()) else None})
