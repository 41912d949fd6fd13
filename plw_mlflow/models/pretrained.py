"""Models: a pinned base, and the loss it is trained on.

Weights are float32 throughout (transformers would otherwise keep a half-precision checkpoint's own type, in which
small updates round to nothing); lower precision is the arithmetic's, chosen in train.py. Only the frozen base of QLoRA
is held in less.
"""

from __future__ import annotations

import os
import re
import warnings
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.models import causal, files, saved_adapters
from plw_mlflow.models.dropout import set_dropout
from plw_mlflow.models.files import reading
from plw_mlflow.models.location import base_of, digest, locate

# How the names of transformers' classes end that are made for something else than the next token.
OTHER_TASKS = ("Classification", "MaskedLM", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")

# Of the weights that transformers does not use, those that make the logits: a numbered layer's, and the head's.
MAKES_LOGITS = re.compile(r"(^|\.)\d+\.|^lm_head\.")
# And among their like, those that do not: other modalities, heads for several tokens at once, tables that are computed.
BESIDE_THE_LOGITS = re.compile(r"vision|visual|image|audio|mtp|nextn|inv_freq|masked_bias|position_ids")


def load_tokenizer(model: str, tokenizer: str | None = None) -> Any:
    """The tokenizer of a model, or another one. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    where = locate(tokenizer or model)
    with reading("tokenizer" if tokenizer else "the tokenizer of model", tokenizer or model):
        loaded = AutoTokenizer.from_pretrained(where.path, revision=where.revision or "main", trust_remote_code=False)
        loaded("any text")  # some settings are not looked at before
    return loaded


def load_config(model: str) -> Any:
    """The config of a causal language model, as transformers has it.

    Raises UserError for whatever can be known to be no such model before its weights are read.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

    where = locate(model)
    if where.is_folder:
        files.check_folder(model, Path(where.path))
    with reading("model", model):
        settings, _ = PreTrainedConfig.get_config_dict(where.path, revision=where.revision or "main")
        too_large = next(files.too_large(settings), None)
    if too_large is not None:  # some configs make lists of this length, so it comes before them
        raise UserError(f"model {model!r} cannot be loaded: in its config.json, {too_large}, more than any model's")
    with reading("model", model):
        config = AutoConfig.from_pretrained(where.path, revision=where.revision or "main", trust_remote_code=False)
        made_for = [name for name in config.architectures or [] if name.endswith(OTHER_TASKS)]
    if config.is_encoder_decoder:
        raise UserError(f"{config.model_type} is an encoder-decoder model, whose prompt has no loss to weight")
    if made_for or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = made_for[0] if made_for else f"of type {config.model_type}"
        raise UserError(f"model {model!r} is {kind}, which is no causal language model; choose a decoder-only one")
    if where.is_folder:
        files.check_size(model, Path(where.path), config)
    return config


def load(model: str, *, dropout: float | None = None, four_bit: torch.dtype | None = None) -> Any:
    """A causal language model with float32 weights, in evaluation mode.

    dropout: probability for all of its dropouts, in place of its config's.
    four_bit: hold the linear layers but the head in 4 bits (NF4, with their scales in 8), and calculate with them in
        this type; on this process's GPU, if there is one. The rest stays float32.

    Raises UserError where there is none, for encoder-decoder models (their prompt has no loss), where a weight is no
    finite number, where a token's outputs depend on what follows it or on padding, where the model makes its logits
    in a way that `causal.head` does not know, so that loss and scores would not be the model's own, and where there is
    no dropout to set.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; the bar a person needs is training's
    # On some processors it asks the hub for a kernel as it is imported, and says at length that there is none.
    getLogger("bitsandbytes").setLevel(ERROR)
    where, config = locate(model), load_config(model)
    if dropout is not None:
        set_dropout(config, dropout)
    with reading("model", model):
        loaded_and_found: Any = AutoModelForCausalLM.from_pretrained(
            where.path,
            config=config,
            revision=where.revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **({} if four_bit is None else _four_bit(four_bit)),
        )
    loaded, found = loaded_and_found
    if found["missing_keys"]:  # transformers would draw them at random, and train on
        raise UserError(f"model {model!r} lacks weights, among them {min(found['missing_keys'])}")
    unused = [
        name for name in found["unexpected_keys"] if MAKES_LOGITS.search(name) and not BESIDE_THE_LOGITS.search(name)
    ]
    if unused and getattr(config, "quantization_config", None) is None:  # those have weights beside the weights
        raise UserError(f"model {model!r} has weights that its config.json does not use, among them {min(unused)}")
    files.check_finite(model, loaded)
    loaded.eval()
    try:
        with torch.no_grad():
            reason = _trial(loaded)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model {model!r} cannot be used here; a trial of a few tokens ended with {what}") from None
    if reason:
        raise UserError(f"model {model!r} cannot be used here: {config.model_type} {reason}")
    return loaded


def _trial(model: Any) -> str | None:
    """Why the loss of a model would not be its own, or not that of each text alone; None where both are right."""
    tokens = torch.arange(4, device=model.device).unsqueeze(0)  # any do
    logits = model(tokens, use_cache=False).logits[0]
    if not logits.isfinite().all():
        return "gives logits that are no finite numbers"
    hidden = causal.hidden_states(model, tokens, attention_mask=torch.ones_like(tokens))
    # The same text, followed by others in the first row, by padding in the second.
    longer = torch.arange(7, device=model.device).repeat(2, 1)
    is_token = torch.ones_like(longer)
    longer[1, 4:] = is_token[1, 4:] = 0
    beside = causal.hidden_states(model, longer, attention_mask=is_token)
    # What follows changes a token by a good part of itself; a base in 4 bits calculates in bfloat16.
    tolerance = (0.1 if getattr(model, "is_quantized", False) else 1e-3) * hidden.abs().max()
    for row, cause in enumerate(("the tokens that follow", "padding")):
        if not (beside[row, :4] - hidden[0]).abs().max() <= tolerance:
            return f"lets {cause} change what it says of a token, so it is no causal language model"
    from_parts = causal.head(model).logits(hidden[0])
    for targets in (logits.argmax(1), logits.argmin(1)):  # the ends of the range show a scale, a cap and a shift
        own, ours = (nn.functional.cross_entropy(x, targets, reduction="none") for x in (logits, from_parts))
        if not torch.allclose(ours, own, atol=1e-4):
            return "changes its logits in a way that the loss does not follow"
    return None


def load_for_scoring(model: str, base: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer; a folder of LoRA adapters stands for the base it names, with them merged in.

    base: the adapters' base, in place of the one that they name. If it is known that they were trained on other
        weights, a warning says so.

    Raises UserError as `load` does, where an adapter's base is not to be had, and where it is known to have other
    weights than the one that the adapter was trained on.
    """
    folder = Path(model)
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        if base is not None:
            raise UserError(f"base is of adapters, but there is no adapter_config.json in {model}")
        return load(model), load_tokenizer(model)
    named, trained_on = base_of(settings), saved_adapters.trained_on(folder)
    if base is None and trained_on is not None and Path(named).is_absolute() and not Path(named).is_dir():
        named = trained_on["base"]  # the folder has another place on this machine, or it was ours; the digest tells
    chosen = base or named
    try:
        locate(chosen)
    except ValueError as error:
        raise UserError(f"{settings} names its base so: {error}; say by --base where that is now") from None
    loaded = load(chosen)
    if trained_on is not None and (found := digest(chosen)) != trained_on["digest"]:
        differs = f"the adapter of {model} was trained on {trained_on['digest']}, but its base {chosen} is {found}"
        if base is None:
            raise UserError(f"{differs}; name the right one by --base")
        warnings.warn(f"{differs}, so the scores may be of a model that nobody has trained", stacklevel=2)
    adapter = saved_adapters.attach(loaded, folder)
    has_own = (folder / "tokenizer_config.json").is_file()
    with reading("the adapter of", model):
        merged = adapter.merge_and_unload()
    return merged, load_tokenizer(chosen, model if has_own else None)


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
