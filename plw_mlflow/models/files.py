"""A model's files: whatever is wrong with them is said in one line, where possible before a model is built of them.

Files come from strangers. A config may ask for a model that takes hours or all memory to build, and an index may name
files anywhere on the disk.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.models.location import base_of

# Where the weights of a folder may be, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A model may hold this many numbers more than its files, as tables of positions need not be stored.
SPARE_NUMBERS = 2**26
# The largest whole number that a config may hold, by a part of its name. A larger one would take hours or all memory.
LARGEST = {"layer": 10_000, "head": 10_000, "position": 2**27, "seq": 2**27, "": 2**31}


@contextmanager
def reading(what: str, name: str) -> Iterator[None]:
    """Turn every error within the block into a UserError that says: WHAT NAME cannot be loaded, and why.

    The exceptions are interrupts, and memory that runs out, which are no fault of the files.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(_not_loaded(what, name, error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by libraries in Rust; the type cannot be imported
            raise
        raise UserError(_not_loaded(what, name, RuntimeError(*error.args))) from None


def check_finite(name: str, model: Any) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    for weight, parameter in model.named_parameters():
        # The sum of a tensor is not finite if any number in it is not, and takes no memory.
        if parameter.is_floating_point() and not parameter.sum().isfinite() and not parameter.isfinite().all():
            count = int((~parameter.isfinite()).sum())
            raise UserError(f"model {name!r} is damaged: {count} numbers of {weight} are NaN or infinite")


def _not_loaded(what: str, name: str, error: Exception) -> str:
    import transformers

    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = "it needs program code of its own, which is not run"
    elif "does not recognize this architecture" in reason:
        reason = f"{reason} This is transformers {transformers.__version__}."
    elif "ignore_mismatched_sizes" in reason:
        reason = "its weights have other shapes than its config.json says"
    elif isinstance(error, SafetensorError):
        reason = f"a file of its weights is damaged or cut short ({reason})"
    elif isinstance(error, pickle.UnpicklingError):
        reason = "a file of its weights is damaged, or holds more than weights"
    elif isinstance(error, json.JSONDecodeError):
        reason = f"one of its files is not JSON ({reason})"
    elif not isinstance(error, (OSError, RuntimeError, ValueError, ImportError, StrictDataclassError)):
        reason = repr(error)  # the message alone is often a single word
    return f"{what} {name!r} cannot be loaded: {reason}"


def check_folder(model: str, folder: Path) -> None:
    """Raise UserError where a folder's files show that it holds no whole model."""
    settings = folder / "adapter_config.json"
    if settings.is_file():
        raise UserError(
            f"folder {model} holds adapters on {base_of(settings)}, which can be scored, but not be a base; name that "
            f"model, or the folder of the merged one"
        )
    if not (folder / "config.json").is_file():
        has_gguf = any(folder.glob("*.gguf"))
        hint = "; GGUF files are not read, so name the model that they were made of" if has_gguf else ""
        raise UserError(f"folder {model} holds no model: it has no config.json{hint}")
    for index in folder.glob("*.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]
        except Exception as error:
            raise UserError(f"folder {model} holds a damaged {index.name}: {first_line(error)}") from None
        if outside:
            raise UserError(f"folder {model} has weights outside it: {index.name} names {outside[0]!r}")
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise UserError(
                f"folder {model} lacks {len(missing)} of the {len(shards)} files of its weights: {missing[0]}"
            )


def check_size(model: str, folder: Path, config: Any) -> None:
    """Raise UserError where a config describes a much larger model than the folder's files hold.

    config: of the model, as transformers has it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import load_state_dict

    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None or getattr(config, "transformers_weights", None):
        return  # transformers says what is missing; or the config names another file
    with reading("model", model):
        files = [name]
        if name.endswith(".index.json"):
            files = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
        # On the device "meta", only names and shapes are read.
        weights = [weight for file in files for weight in load_state_dict(folder / file, "meta").values()]
        stored = sum(weight.numel() for weight in weights)
        parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
        layers = [count for part in parts if (count := getattr(part, "num_hidden_layers", None)) is not None]
        impossible = next((count for count in layers if not 0 < count <= len(weights)), None)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        has_no_positions = positions is not None and positions < 1
    if has_no_positions:
        raise UserError(f"model {model!r} has {positions} positions by its config.json")
    if impossible is not None:
        raise UserError(
            f"model {model!r} has {impossible} layers by its config.json, but {len(weights)} weights in its files"
        )
    with reading("model", model), torch.device("meta"):
        built = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        count = sum(part.numel() for part in (*built.parameters(), *built.buffers()))
    # Where weights are stored in fewer bits, one stored number holds up to 8 weights.
    if count > SPARE_NUMBERS + stored * (2 if getattr(config, "quantization_config", None) is None else 8):
        raise UserError(f"model {model!r} has {count} numbers by its config.json, but {stored} in its files")


def too_large(settings: Any, name: str = "") -> Iterator[str]:
    """Every whole number in a config that is larger than any model's, as "NAME is NUMBER"."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from too_large(value, str(key))
    elif isinstance(settings, list):
        for value in settings:
            yield from too_large(value, name)
    elif isinstance(settings, int) and settings > min(largest for part, largest in LARGEST.items() if part in name):
        yield f"{name} is {settings}"
