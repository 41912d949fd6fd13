"""Adapters: LoRA, DoRA and QLoRA on a frozen base, and merging them into a plain model again.

DoRA (arXiv:2402.09353) trains the norm of each row of a layer beside LoRA's product. QLoRA (arXiv:2305.14314) is LoRA
on a base whose linear layers are held in 4 bits (`pretrained.load`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plw_mlflow import seeding
from plw_mlflow.config import Method, RecipeOptions, split_list
from plw_mlflow.errors import UserError
from plw_mlflow.models import held, stored

# Layers of a state-space mixer whose weights its kernels read directly. Adapters on them would be passed over,
# always or where the fast kernels are installed.
READ_BY_KERNELS = {"x_proj", "dt_proj", "out_proj"}


# README.md in the folder of adapters with an added token, which peft cannot load on the base as it is.
PAGE = """# Adapters with an added token

They hold embeddings and head of {rows} tokens, so the base has to be given as many before peft can load them:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({name!r}{revision})
base.resize_token_embeddings({rows}, mean_resizing=False)
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def adapt(model: Any, method: Method, recipe: RecipeOptions, seed: int) -> Any:
    """The model as `method` trains it: as it is, or frozen and with adapters, which at first change nothing.

    Raises UserError where `recipe.lora_targets` names a layer that the model lacks, or that cannot have an adapter.
    """
    if method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    seeding.seed_global(seed, "lora")
    chosen = targets(model, recipe.lora_targets)
    settings = LoraConfig(
        revision=getattr(model.config, "_commit_hash", None),  # the commit, where the base is from the hub
        task_type="CAUSAL_LM",
        target_modules=list(chosen),
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.lora_dropout,
        use_dora=method == "dora",
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in chosen.values()),  # GPT-2's weights are [in, out]
    )
    with warnings.catch_warnings(), held.taken_for_float32(chosen.values()):
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers
        adapted = get_peft_model(model, settings)
    if held.is_held(model):
        _start_norms(adapted)
    return adapted


@torch.no_grad()
def _start_norms(model: Any) -> None:
    """Have DoRA's norms begin as those of the rows of weights that peft has not seen."""
    for layer in model.modules():
        for norms in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = layer.get_base_layer().weight.float()
            norms.weight.copy_((weight.T if layer.fan_in_fan_out else weight).norm(dim=1))


def targets(model: Any, layers: str) -> dict[str, nn.Module]:
    """The linear layers that get adapters, by their full names.

    layers: "all-linear", which is every one but the head; or names separated by commas, full ones or their last parts.
    """
    head = model.get_output_embeddings()
    linear: dict[str, nn.Module] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    }
    usable = {name: layer for name, layer in linear.items() if not _is_read_by_kernels(model, name)}
    if layers == "all-linear":
        return usable
    chosen: dict[str, nn.Module] = {}
    for wanted in split_list(layers):
        matching = {name: layer for name, layer in usable.items() if f".{name}".endswith(f".{wanted}")}
        if not matching:
            available = ", ".join(sorted({name.rpartition(".")[2] for name in usable}))
            reason = f" (kernels read the weights of {wanted} past any adapter)" if wanted in READ_BY_KERNELS else ""
            raise UserError(
                f"lora-targets names {wanted!r}, but the linear layers of {model.config.model_type} that can have "
                f"adapters are {available}{reason}"
            )
        chosen |= matching
    return chosen


def save(model: Any, folder: Path, *, with_embeddings: bool = False, kind: torch.dtype = torch.float32) -> None:
    """Save a trained model's adapters to a folder; nothing is saved of a model without any.

    with_embeddings: save embeddings and head with the adapters, as they differ from the base's (`pad_token.py`), and a
        page that says how peft loads them.
    kind: the type in which the adapters are saved, and to which the model's own are rounded.
    """
    if not hasattr(model, "get_base_model"):
        return
    rounded = [weight for weight in model.parameters() if weight.requires_grad and kind != torch.float32]
    for weight in rounded:
        weight.data = weight.data.to(kind)
    # peft's own choice would ask the hub.
    model.save_pretrained(str(folder), save_embedding_layers=with_embeddings)
    for weight in rounded:
        weight.data = weight.data.float()
    if with_embeddings:
        settings, rows = model.active_peft_config, model.get_input_embeddings().num_embeddings
        revision = f", revision={settings.revision!r}" if settings.revision else ""
        page = PAGE.format(rows=rows, name=settings.base_model_name_or_path, revision=revision)
        (folder / "README.md").write_text(page, encoding="utf-8")


def merge(model: Any, folder: Path, held_in: torch.dtype = torch.float32) -> Any:
    """A trained model without peft's wrapper, its adapters, if it has any, merged into the base.

    folder: where `save` has put the adapters.
    held_in: the type in which linear layers hold the sums.

    A sum is that of the base's weight as its files have it, also where it was held in bfloat16 (`stored.py`), and of
    the product of the adapters, in float32. What qlora has trained is what the adapters add to the rounded weights of a
    base in 4 bits, so these are brought back to float32 instead.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(model.get_base_model(), "is_quantized", False):
        from peft import PeftModel  # not above, as it imports bitsandbytes, which takes 2 seconds

        quantized: Any = model.unload()
        return PeftModel.from_pretrained(quantized.dequantize(dtype=torch.float32), str(folder)).merge_and_unload()
    if held.is_held(model.get_base_model()):
        model.cpu()  # in float32 it may be too large for the GPU that it was trained on
    settings = model.active_peft_config
    base = "@".join(filter(None, (settings.base_model_name_or_path, settings.revision)))
    return stored.merge(model, base, held_in)


def _is_read_by_kernels(model: Any, name: str) -> bool:
    mixer, _, last = name.rpartition(".")
    return last in READ_BY_KERNELS and hasattr(model.get_submodule(mixer), "ssm_state_size")
