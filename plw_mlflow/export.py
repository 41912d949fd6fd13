"""Export: the trained model as plain Hugging Face folders, for whoever has no MLflow.

OUTPUT/model loads with transformers' AutoModelForCausalLM and AutoTokenizer; OUTPUT/adapter, where there are adapters,
with peft on the base.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

MODEL, ADAPTER = "model", "adapter"
MARKS = {MODEL: "config.json", ADAPTER: "adapter_config.json"}  # what tells the folder of an earlier export


def check(output: Path | None, base: Path | None) -> None:
    """Raise ValueError, before the training, where an export would replace something else than an earlier one.

    base: the folder of the base model, if it has one.
    """
    if output is None:
        return
    for name, mark in MARKS.items():
        folder = output / name
        if base is not None and base.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the trained model would replace its base in {folder}; give another --output")
        if folder.exists() and not (folder / mark).is_file():
            raise ValueError(f"{folder} exists and is no earlier export (it has no {mark}); give another --output")


def write(model: Any, tokenizer: Any, adapter: Path, output: Path | None) -> None:
    """Write a plain model with its tokenizer, and a copy of its adapter's folder unless that is empty.

    An earlier export there is replaced; the model's folder is whole from the moment it has its name.
    """
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / f"{MODEL}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for name in MARKS:
        shutil.rmtree(output / name, ignore_errors=True)
    unfinished.rename(output / MODEL)
    if any(adapter.iterdir()):
        shutil.copytree(adapter, output / ADAPTER)
