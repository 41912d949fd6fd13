"""Saved adapters: LoRA adapters in a folder, how they are put on a loaded base, and which base they were trained on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from plw_mlflow import __version__
from plw_mlflow.errors import UserError
from plw_mlflow.models.files import check_finite, reading

# Settings of adapters that use modules of another library, repeat layers, or cannot be merged.
REFUSED_SETTINGS = ("megatron_config", "layer_replication", "alora_invocation_tokens", "arrow_config")
BASE_FILE = "plw-base.json"  # beside an adapter: which base it was trained on


def attach(base: Any, folder: Path) -> Any:
    """Put the LoRA adapters of a folder on a loaded base, which is changed; returns peft's wrapper around it.

    Adapters that were trained with an added token hold embeddings and head, too, which replace those of the base.

    Raises UserError where the folder holds no LoRA adapters, or they do not fit the base.
    """
    from peft import PeftModel

    rows = _embedding_rows(base, folder)
    with reading("the adapter of", str(folder)):
        if rows is not None and rows != base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(rows, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers
            adapter = PeftModel.from_pretrained(base, str(folder)).eval()
        report = adapter.load_adapter(str(folder), "default")  # loaded again, as only this says what did not fit
    for names, fault in (
        (report.missing_keys, "lacks"),
        (report.unexpected_keys, "does not fit its base: it also has"),
    ):
        if names:
            raise UserError(f"the adapter of {str(folder)!r} {fault} the weights {min(names)}")
    check_finite(str(folder), adapter)
    return adapter


def _embedding_rows(base: Any, folder: Path) -> int | None:
    """How many tokens the embeddings in a folder of adapters are for; None where there are none in it.

    Raises UserError where the folder cannot be read, or holds adapters other than LoRA's.
    """
    from peft.utils import load_peft_weights

    if not any((folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        # Or peft would ask the hub for a model of the folder's name.
        raise UserError(f"the adapter of {str(folder)!r} cannot be loaded: it has no adapter_model.safetensors")
    with reading("the adapter of", str(folder)):
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, refused = settings.get("peft_type"), [name for name in REFUSED_SETTINGS if settings.get(name)]
        ranks = [settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()]
        weights = load_peft_weights(str(folder), device="cpu")
        largest = max(max(weight.shape, default=0) for weight in weights.values())
        is_too_large = max(ranks) > largest
    if kind != "LORA" or refused:
        fault = f"asks for {refused[0]}" if refused else f"is of type {kind}"
        raise UserError(f"the adapter of {str(folder)!r} {fault}, which is not supported; plain LoRA is")
    if is_too_large:
        raise UserError(f"the adapter of {str(folder)!r} has rank {max(ranks)}, but its weights have no such shape")
    embedding = base.get_input_embeddings().weight
    (name,) = (name for name, parameter in base.named_parameters() if parameter is embedding)
    own = weights.get(f"base_model.model.{name}")
    return None if own is None else len(own)


def changes_base(folder: Path) -> bool:
    """Whether peft changes the base's weights when it puts the adapters of a folder on it, as it does for PiSSA's."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return settings.get("init_lora_weights", True) not in (True, False, "gaussian")


def note_base(folder: Path, base: str, digest: str, precision: str = "float32") -> None:
    """Write beside an adapter which model it was trained on, by name and digest; `load_adapted` compares them.

    precision: in which the whole model would be saved.
    """
    note = {"base": base, "digest": digest, "precision": precision, "plw_mlflow": __version__}
    (folder / BASE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def trained_on(folder: Path) -> dict[str, str] | None:
    """Name and digest that `note_base` has written beside an adapter, None for one from elsewhere.

    Raises UserError where that file is damaged.
    """
    file = folder / BASE_FILE
    if not file.is_file():
        return None
    with reading("the file", str(file)):
        note = json.loads(file.read_text(encoding="utf-8"))
        return {name: str(note[name]) for name in ("base", "digest")}
