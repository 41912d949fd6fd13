"""Models: a pinned base, and the loss it is trained on.

Weights are float32 throughout (transformers would otherwise keep a half-precision checkpoint's own type, in which
small updates round to nothing); lower precision is the arithmetic's, chosen in train.py. Only the frozen base of QLoRA
is held in less.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
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

# What transformers, tokenizers and torch raise where a file is damaged, lacks something or needs a package.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
# How the names of transformers' classes end that are made for something else than the next token.
OTHER_TASKS = ("Classification", "MaskedLM", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")

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
        return AutoTokenizer.from_pretrained(where.path, revision=where.revision or "main", trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other type for a damaged file
        what = "tokenizer" if tokenizer else "the tokenizer of model"
        raise ValueError(_not_loaded(what, tokenizer or model, error)) from None


def load_config(model: str) -> Any:
    """The config of a causal language model, as transformers has it.

    Raises ValueError for whatever can be known to be no such model before its weights are read.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    where = locate(model)
    if where.is_folder:
        _check_folder(model, Path(where.path))
    try:
        config = AutoConfig.from_pretrained(where.path, revision=where.revision or "main", trust_remote_code=False)
    except UNREADABLE as error:
        raise ValueError(_not_loaded("model", model, error)) from None
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder model, whose prompt has no loss to weight")
    made_for = [name for name in config.architectures or [] if name.endswith(OTHER_TASKS)]
    if made_for or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = made_for[0] if made_for else f"of type {config.model_type}"
        raise ValueError(f"model {model!r} is {kind}, which is no causal language model; choose a decoder-only one")
    return config


def length_limit(config: Any) -> int | None:
    """Up to how many tokens a text's computation does not depend on the other texts of its batch; None: any number.

    The rotary frequencies of the types that `dynamic_rope_update` of transformers knows follow the longest text that
    the model is given at once, and so, beyond this many tokens, what it computes for all the others.

    config: of a model, as transformers has it.
    """
    text = config.get_text_config()
    told = getattr(text, "rope_parameters", None) or {}
    limits: list[int] = []
    for part in (told, *told.values()):  # some models have one for each type of layer
        kind = part.get("rope_type") or "" if isinstance(part, dict) else ""
        if "dynamic" in kind:
            limits.append(text.max_position_embeddings)
        elif kind == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min(limits, default=None)


def check_length(config: Any, longest: int) -> None:
    """Raise ValueError where a text of so many tokens would change what the model computes for others beside it."""
    limit = length_limit(config)
    if limit is not None and longest > limit:
        raise ValueError(
            f"an example has {longest} tokens, but beyond {limit} tokens the position frequencies of this "
            f"{config.model_type} model follow the longest example beside another, so that a step would depend on how "
            f"it is cut; set --max-tokens to {limit} or less"
        )


def load(model: str, *, dropout: float | None = None, four_bit: torch.dtype | None = None) -> Any:
    """A causal language model with float32 weights, in evaluation mode.

    dropout: probability for all of its dropouts, in place of its config's.
    four_bit: hold the linear layers but the head in 4 bits (NF4, with their scales in 8), and calculate with them in
        this type; on this process's GPU, if there is one. The rest stays float32.

    Raises ValueError where there is none, for encoder-decoder models (their prompt has no loss), where a weight is no
    finite number, where a token's outputs depend on what follows it or on padding, where the model makes its logits
    in a way that `project` does not know, so that the loss would not be the model's own, and where there is no dropout
    to set.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; the bar a person needs is training's
    where, config = locate(model), load_config(model)
    if dropout is not None:
        regularisers.set_dropout(config, dropout)
    try:
        loaded_and_found: Any = AutoModelForCausalLM.from_pretrained(
            where.path,
            config=config,
            revision=where.revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **({} if four_bit is None else _four_bit(four_bit)),
        )
    except UNREADABLE as error:
        raise ValueError(_not_loaded("model", model, error)) from None
    loaded, found = loaded_and_found
    if found["missing_keys"]:  # transformers would draw them at random, and train on
        raise ValueError(f"model {model!r} lacks weights, among them {min(found['missing_keys'])}")
    _check_finite(model, loaded)
    loaded.eval()
    try:
        with torch.no_grad():
            reason = _trial(loaded)
    except UNREADABLE as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{config.model_type} cannot be used here; a trial of a few tokens ended with {what}"
        ) from None
    if reason:
        raise ValueError(f"{config.model_type} {reason}")
    return loaded


def _trial(model: Any) -> str | None:
    """Why the loss of a model would not be its own, or not that of each text alone; None where both are right."""
    tokens = torch.arange(4, device=model.device).unsqueeze(0)  # any do
    logits = model(tokens, use_cache=False).logits[0]
    if not logits.isfinite().all():
        return "gives logits that are no finite numbers"
    hidden, projection = project(model, tokens, attention_mask=torch.ones_like(tokens))
    # The same text, followed by others in the first row, by padding in the second.
    longer = torch.arange(7, device=model.device).repeat(2, 1)
    is_token = torch.ones_like(longer)
    longer[1, 4:] = is_token[1, 4:] = 0
    beside, _ = project(model, longer, attention_mask=is_token)
    # What follows changes a token by a good part of itself; a base in 4 bits calculates in bfloat16.
    tolerance = (0.1 if getattr(model, "is_quantized", False) else 1e-3) * hidden.abs().max()
    for row, cause in enumerate(("the tokens that follow", "padding")):
        if not (beside[row, :4] - hidden[0]).abs().max() <= tolerance:
            return f"lets {cause} change what it says of a token, so it is no causal language model"
    for targets in (logits.argmax(1), logits.argmin(1)):  # the ends of the range show a scale, a cap and a shift
        own = nn.functional.cross_entropy(logits, targets, reduction="none")
        _, nll = loss.weighted_nll(hidden[0], **projection, targets=targets, weights=torch.ones_like(own))
        if not torch.allclose(nll, own, atol=1e-4):
            return "changes its logits in a way that the loss does not follow"
    return None


def load_adapter(base: Any, folder: Path) -> Any:
    """A loaded base with the LoRA adapters of a folder on it; `unload()` of what this gives takes them off again.

    Adapters that were trained with an added token hold embeddings and head, too: these replace the base's for good.

    Raises ValueError where the folder holds none, or such as do not fit the base.
    """
    from peft import PeftModel

    rows = _embedding_rows(base, folder)
    if rows is not None and rows != base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(rows, mean_resizing=False)
    try:
        adapter = PeftModel.from_pretrained(base, str(folder)).eval()
    except UNREADABLE as error:
        raise ValueError(_not_loaded("the adapter of", str(folder), error)) from None
    _check_finite(str(folder), adapter)
    return adapter


@contextmanager
def adapted(base: Any, folder: Path) -> Iterator[Any]:
    """Within the block, a loaded base with the LoRA adapters of a folder on it; then the base is as it was.

    Raises ValueError as `load_adapter` does.
    """
    parts = (base.get_input_embeddings, base.get_output_embeddings)  # resizing puts others into their places
    rows = base.get_input_embeddings().num_embeddings
    adapter_rows = _embedding_rows(base, folder)
    before = [copy.deepcopy(part().state_dict()) for part in parts] if adapter_rows is not None else []
    adapter = load_adapter(base, folder)
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

    Raises ValueError where the folder cannot be read.
    """
    from peft.utils import load_peft_weights

    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except UNREADABLE as error:
        raise ValueError(_not_loaded("the adapter of", str(folder), error)) from None
    embedding = base.get_input_embeddings().weight
    (name,) = (name for name, parameter in base.named_parameters() if parameter is embedding)
    found = weights.get(f"base_model.model.{name}")
    return None if found is None else len(found)


def load_for_scoring(model: str) -> tuple[Any, Any]:
    """A model and its tokenizer; a folder of LoRA adapters stands for the base it names, with them merged in.

    Raises ValueError as `load` does, and where an adapter's base is not to be had.
    """
    settings = Path(model) / "adapter_config.json"
    if not settings.is_file():
        return load(model), load_tokenizer(model)
    base = _base_of(settings)
    adapter = load_adapter(load(base), Path(model))
    has_own = (Path(model) / "tokenizer_config.json").is_file()
    return adapter.merge_and_unload(), load_tokenizer(base, model if has_own else None)


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
    causal = _causal(model)
    hidden = body(causal)(input_ids=tokens, use_cache=False, **context).last_hidden_state
    head, config = causal.get_output_embeddings(), causal.config.get_text_config()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(f"{config.model_type} has no head whose weights make its logits")
    # Cohere and Falcon-H1 multiply their logits, Granite divides them, Gemma caps them; others took over their names.
    powers = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
    scale = math.prod((getattr(config, name, None) or 1) ** power for name, power in powers.items())
    softcap = getattr(config, "final_logit_softcapping", None)
    return hidden, {"head": head.weight, "bias": getattr(head, "bias", None), "scale": scale, "softcap": softcap}


def body(causal: Any) -> Any:
    """The part of a causal transformers model that gives hidden states.

    Raises ValueError where it has no known name.
    """
    found = causal.base_model
    if found is causal:  # Llama 4's text model bears another name than the one that `base_model` looks for
        found = getattr(causal, "model", causal)
    if found is causal:
        raise ValueError(f"{causal.config.model_type} has no part of a known name that gives hidden states")
    return found


def _causal(model: Any) -> Any:
    """The model itself, without the adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Learner(nn.Module):
    """A causal model whose forward pass gives the loss, so that wrappers (DDP, autocast) see the whole of it."""

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self._label_smoothing = model, label_smoothing

    def forward(self, tokens: Tensor, weights: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """tokens, weights: [B, T]. Returns the summed weighted loss and the losses [B, T-1] behind it.

        Raises ValueError for an example so long that it would change the losses of others (`check_length`).
        """
        check_length(_causal(self.model).config, context.get("max_length_q", tokens.shape[1]))
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


def _check_folder(model: str, folder: Path) -> None:
    """Raise ValueError where a folder's files show that it holds no whole model."""
    settings = folder / "adapter_config.json"
    if settings.is_file():
        raise ValueError(
            f"folder {model} holds adapters on {_base_of(settings)}, which can be scored, but not be a base; name that "
            f"model, or the folder of the merged one"
        )
    if not (folder / "config.json").is_file():
        gguf = (
            "; GGUF files are not read, so name the model that they were made of" if any(folder.glob("*.gguf")) else ""
        )
        raise ValueError(f"folder {model} holds no model: it has no config.json{gguf}")
    for index in folder.glob("*.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"folder {model} holds a damaged {index.name}: {first_line(error)}") from None
        if lacking := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ValueError(
                f"folder {model} lacks {len(lacking)} of the {len(shards)} files of its weights: {lacking[0]}"
            )


def _base_of(settings: Path) -> str:
    """The base that an adapter's settings name, with its revision. Raises ValueError where they name none."""
    try:
        named = json.loads(settings.read_text())
        base, revision = named["base_model_name_or_path"], named.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{settings} names no base model: {type(error).__name__} {first_line(error)}") from None
    if not base:
        raise ValueError(f"{settings} names no base model: base_model_name_or_path is empty")
    return f"{base}@{revision}" if revision else str(base)


def _check_finite(name: str, model: Any) -> None:
    """Raise ValueError where a weight is NaN or infinite."""
    for weight, parameter in model.named_parameters():
        # A sum is as good a sign as any, and makes no array of the weights' size.
        if parameter.is_floating_point() and not parameter.sum().isfinite() and not parameter.isfinite().all():
            count = int((~parameter.isfinite()).sum())
            raise ValueError(f"model {name!r} is damaged: {count} numbers of {weight} are NaN or infinite")


def _not_loaded(what: str, name: str, error: Exception) -> str:
    import transformers

    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = "it needs program code of its own, which is never run here"
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
