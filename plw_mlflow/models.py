"""Models: a pinned base, and the loss it is trained on.

Weights are float32 throughout (transformers would otherwise keep a half-precision checkpoint's own type, in which
small updates round to nothing); lower precision is the arithmetic's, chosen in train.py. Only the frozen base of QLoRA
is held in less.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from plw_mlflow import loss, regularisers
from plw_mlflow.errors import first_line
from plw_mlflow.presets import MODELS

TOY_FOLDER = Path(__file__).resolve().parent / "assets" / "toy"


@dataclass(frozen=True)
class Location:
    """Where a base model comes from."""

    path: str  # folder or hub id
    revision: str | None  # of a hub id; None for a folder

    @property
    def is_folder(self) -> bool:
        """Whether the model lies on this machine's disk."""
        return Path(self.path).is_dir()


def locate(name: str) -> Location:
    """`toy`, a model of the study, a folder, or ID@REVISION, as a Location. Raises ValueError for what can be none."""
    if name == "toy":
        return Location(str(TOY_FOLDER), None)
    name = MODELS.get(name, name)
    if Path(name).is_dir():
        return Location(str(Path(name).resolve()), None)
    path, _, revision = name.partition("@")
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"model {name!r} is not a folder on this machine")
    return Location(path, revision or None)


def load_tokenizer(model: str, tokenizer: str | None = None) -> Any:
    """The tokenizer of a model, or another one. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    where = locate(tokenizer or model)
    try:
        return AutoTokenizer.from_pretrained(where.path, revision=where.revision or "main")
    except Exception as error:  # a damaged file may raise anything, in tokenizers an Exception of no kind
        what = "tokenizer" if tokenizer else "the tokenizer of model"
        raise ValueError(_not_loaded(what, tokenizer or model, error)) from None


def load(model: str, *, dropout: float | None = None, four_bit: torch.dtype | None = None) -> Any:
    """A causal language model with float32 weights, in evaluation mode.

    dropout: probability for all of its dropouts, in place of its config's.
    four_bit: hold the linear layers but the head in 4 bits (NF4, with their scales in 8), and calculate with them in
        this type; on this process's GPU, if there is one. The rest stays float32.

    Raises ValueError where there is none, for encoder-decoder models (their prompt has no loss), where the
    model makes its logits in a way that `project` does not know, so that the loss would not be the model's own, and
    where there is no dropout to set.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; the bar a person needs is training's
    where = locate(model)
    if where.is_folder and not (Path(where.path) / "config.json").is_file():
        raise ValueError(f"folder {model} holds no model: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(where.path, revision=where.revision or "main")
        if config.is_encoder_decoder:
            raise ValueError(f"{config.model_type} is an encoder-decoder model, whose prompt has no loss to weight")
        if dropout is not None:
            regularisers.set_dropout(config, dropout)
        loaded_and_found: Any = AutoModelForCausalLM.from_pretrained(
            where.path,
            config=config,
            revision=where.revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            **({} if four_bit is None else _four_bit(four_bit)),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:  # damaged files, too
        raise ValueError(_not_loaded("model", model, error)) from None
    loaded, found = loaded_and_found
    if found["missing_keys"]:  # transformers would draw them at random, and train on
        raise ValueError(f"model {model!r} lacks weights, among them {min(found['missing_keys'])}")
    loaded.eval()
    tokens = torch.arange(4, device=loaded.device).unsqueeze(0)  # any do
    with torch.no_grad():
        logits = loaded(tokens).logits[0]
        hidden, projection = project(loaded, tokens, attention_mask=torch.ones_like(tokens))
        for targets in (logits.argmax(1), logits.argmin(1)):  # the ends of the range show a scale, a cap and a shift
            own = nn.functional.cross_entropy(logits, targets, reduction="none")
            _, nll = loss.weighted_nll(hidden[0], **projection, targets=targets, weights=torch.ones_like(own))
            if not torch.allclose(nll, own, atol=1e-4):
                raise ValueError(f"{config.model_type} changes its logits in a way that the loss does not follow")
    return loaded


def load_adapter(base: Any, folder: Path) -> Any:
    """A loaded base with the LoRA adapters of a folder on it; `unload()` of what this gives takes them off again.

    Raises ValueError where the folder holds none, or such as do not fit the base.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(_not_loaded("the adapter of", str(folder), error)) from None


def load_for_scoring(model: str) -> tuple[Any, Any]:
    """A model and its tokenizer; a folder of LoRA adapters stands for the base it names, with them merged in.

    Raises ValueError as `load` does, and where an adapter's base is not to be had.
    """
    settings = Path(model) / "adapter_config.json"
    if not settings.is_file():
        return load(model), load_tokenizer(model)
    try:
        named = json.loads(settings.read_text())
        base = "@".join(filter(None, (named["base_model_name_or_path"], named.get("revision"))))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{settings} names no base model: {type(error).__name__} {error}") from None
    adapted = load_adapter(load(base), Path(model))
    has_own = (Path(model) / "tokenizer_config.json").is_file()
    return adapted.merge_and_unload(), load_tokenizer(base, model if has_own else None)


def digest(model: str) -> str:
    """What identifies a base model that was loaded: the hub's commit, or a SHA-256 of its config and weight files."""
    where = locate(model)
    if not where.is_folder:
        from huggingface_hub import hf_hub_download

        # The file is in the cache by now, in a folder that has the commit's name.
        config = hf_hub_download(where.path, "config.json", revision=where.revision, local_files_only=True)
        return f"{where.path}@{Path(config).parent.name}"
    found = hashlib.sha256()
    folder = Path(where.path)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in (folder / "config.json", *weights):
        found.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**24):
                found.update(block)
    return found.hexdigest()


def project(model: Any, tokens: Tensor, **context: Any) -> tuple[Tensor, dict[str, Any]]:
    """Last hidden states [B, T, H] of a causal model, and what makes logits of them, as loss.weighted_nll takes it.

    context: what the model is told beside tokens [B, T], as `Batch.context` has it.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.base_model(input_ids=tokens, use_cache=False, **context).last_hidden_state
    head, config = causal.get_output_embeddings(), causal.config.get_text_config()
    # Cohere and Falcon-H1 multiply their logits, Granite divides them, Gemma caps them; others took over their names.
    powers = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
    scale = math.prod((getattr(config, name, None) or 1) ** power for name, power in powers.items())
    softcap = getattr(config, "final_logit_softcapping", None)
    return hidden, {"head": head.weight, "bias": getattr(head, "bias", None), "scale": scale, "softcap": softcap}


class Learner(nn.Module):
    """A causal model whose forward pass gives the loss, so that wrappers (DDP, autocast) see the whole of it."""

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self._label_smoothing = model, label_smoothing

    def forward(self, tokens: Tensor, weights: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """tokens, weights: [B, T]. Returns the summed weighted loss and the losses [B, T-1] behind it."""
        hidden, projection = project(self.model, tokens, **context)
        # Shifted by the few numbers of targets and weights, since `hidden[:, :-1]` would copy all hidden states.
        targets, following = (nn.functional.pad(given[:, 1:], (0, 1)).flatten() for given in (tokens, weights))
        total, nll = loss.weighted_nll(
            hidden.flatten(0, 1),
            **projection,
            targets=targets,
            weights=following,
            label_smoothing=self._label_smoothing,
        )
        return total, nll.view(weights.shape)[:, :-1]


def _four_bit(arithmetic: torch.dtype) -> dict[str, Any]:
    """The settings of QLoRA's paper (arXiv:2305.14314), as from_pretrained takes them."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=arithmetic,
    )
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def _not_loaded(what: str, name: str, error: Exception) -> str:
    return f"{what} {name!r} cannot be loaded: {first_line(error)}"
