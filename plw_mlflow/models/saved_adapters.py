"""Saved adapters: LoRA adapters in a folder, put on a loaded base and taken off again, and which base they are of."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plw_mlflow import __version__
from plw_mlflow.errors import UserError
from plw_mlflow.models.files import check_finite, reading

# What an adapter's settings must not ask for: modules of another library, layers that are there several times, and
# adapters that cannot be merged.
REFUSED_SETTINGS = ("megatron_config", "layer_replication", "alora_invocation_tokens", "arrow_config")
BASE_FILE = "plw-base.json"  # beside an adapter: what it was trained on


def attach(base: Any, folder: Path) -> Any:
    """A loaded base with the LoRA adapters of a folder on it; `unload()` of what this gives takes them off again.

    Adapters that were trained with an added token hold embeddings and head, too: these replace the base's for good.

    Raises UserError where the folder holds none, or such as do not fit the base.
    """
    from peft import PeftModel

    rows = _embedding_rows(base, folder)
    with reading("the adapter of", str(folder)):
        if rows is not None and rows != base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(rows, mean_resizing=False)
        adapter = PeftModel.from_pretrained(base, str(folder)).eval()
        found = adapter.load_adapter(str(folder), "default")  # the same again, as only this tells what did not fit
    for names, fault in ((found.missing_keys, "lacks"), (found.unexpected_keys, "does not fit its base: it also has")):
        if names:
            raise UserError(f"the adapter of {str(folder)!r} {fault} the weights {min(names)}")
    check_finite(str(folder), adapter)
    return adapter


@contextmanager
def attached(base: Any, folder: Path) -> Iterator[Any]:
    """Within the block, a loaded base with the LoRA adapters of a folder on it; then the base is as it was.

    Raises UserError as `attach` does.
    """
    parts = (base.get_input_embeddings, base.get_output_embeddings)  # resizing puts others into their places
    rows = base.get_input_embeddings().num_embeddings
    adapter_rows = _embedding_rows(base, folder)
    before = [copy.deepcopy(part().state_dict()) for part in parts] if adapter_rows is not None else []
    adapter = attach(base, folder)
    try:
        yield adapter
    finally:
        adapter.unload()
        if before:
            base.resize_token_embeddings(rows, mean_resizing=False)
            for part, state in zip(parts, before, strict=True):
                part().load_state_dict(state)


def _embedding_rows(base: Any, folder: Path) -> int | None:
    """How many tokens the embeddings know that a folder of adapters holds; None where it holds none.

    Raises UserError where the folder cannot be read, or holds other adapters than those of LoRA.
    """
    from peft.utils import load_peft_weights

    if not any((folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        # peft would ask the hub for what has the folder's name.
        raise UserError(f"the adapter of {str(folder)!r} cannot be loaded: it has no adapter_model.safetensors")
    with reading("the adapter of", str(folder)):
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, asked = settings.get("peft_type"), [name for name in REFUSED_SETTINGS if settings.get(name)]
        ranks = [settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()]
        weights = load_peft_weights(str(folder), device="cpu")
        largest = max(max(weight.shape, default=0) for weight in weights.values())
        is_too_large = max(ranks) > largest
    if kind != "LORA" or asked:
        what = f"asks for {asked[0]}" if asked else f"is of type {kind}"
        raise UserError(f"the adapter of {str(folder)!r} {what}, which is not loaded here; plain LoRA is")
    if is_too_large:
        raise UserError(f"the adapter of {str(folder)!r} has rank {max(ranks)}, but its weights have no such shape")
    embedding = base.get_input_embeddings().weight
    (name,) = (name for name, parameter in base.named_parameters() if parameter is embedding)
    found = weights.get(f"base_model.model.{name}")
    return None if found is None else len(found)


def note_base(folder: Path, base: str, content: str) -> None:
    """Write beside an adapter which model it was trained on, by name and digest; `load_for_scoring` compares."""
    noted = {"base": base, "digest": content, "plw_mlflow": __version__}
    (folder / BASE_FILE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def trained_on(folder: Path) -> dict[str, str] | None:
    """What `note_base` has written beside an adapter; None for one from elsewhere. Raises UserError where damaged."""
    file = folder / BASE_FILE
    if not file.is_file():
        return None
    with reading("the file", str(file)):
        noted = json.loads(file.read_text(encoding="utf-8"))
        return {name: str(noted[name]) for name in ("base", "digest")}
