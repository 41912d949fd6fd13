"""Pretrained models and tokenizers by name; a model whose loss or scores would not be its own raises UserError.

Weights are float32: transformers would otherwise keep the type of a half-precision checkpoint, in which small updates
round to nothing. Lower precision is a matter of the arithmetic (`environment/precision.py`). Only the linear layers of
a frozen base are held in fewer bits: in bfloat16 where the arithmetic is (`held.py`), in 4 bits for QLoRA.
"""

from __future__ import annotations

import os
import re
import warnings
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.models import causal, files, held, saved_adapters, stored
from plw_mlflow.models.dropout import set_dropout
from plw_mlflow.models.files import reading
from plw_mlflow.models.location import base_of, digest, folder_of, locate

# How the names of those classes of transformers end that predict something else than the next token.
OTHER_TASKS = ("Classification", "MaskedLM", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")

# Names of weights that take part in the logits, being of a numbered layer or of the head.
MAKES_LOGITS = re.compile(r"(^|\.)\d+\.|^lm_head\.")
# Names like those of weights that do not: other modalities, heads for several tokens at once, tables that are computed.
BESIDE_THE_LOGITS = re.compile(r"vision|visual|image|audio|mtp|nextn|inv_freq|masked_bias|position_ids")


def load_tokenizer(model: str, tokenizer: str | None = None) -> Any:
    """The tokenizer of a model, or of another name if one is given. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    place = locate(tokenizer or model)
    with reading("tokenizer" if tokenizer else "the tokenizer of model", tokenizer or model):
        loaded = AutoTokenizer.from_pretrained(place.path, revision=place.revision or "main", trust_remote_code=False)
        loaded("any text")  # some settings are read only here
    return loaded


def load_config(model: str) -> Any:
    """The config of a causal language model, as transformers has it.

    Raises UserError where it shows before any weights are read that the model cannot be loaded.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

    place = locate(model)
    if place.is_folder:
        files.check_folder(model, Path(place.path))
    with reading("model", model):
        settings, _ = PreTrainedConfig.get_config_dict(place.path, revision=place.revision or "main")
        too_large = next(files.too_large(settings), None)
    if too_large is not None:  # before the config is made, as some make lists of this length
        raise UserError(f"model {model!r} cannot be loaded: in its config.json, {too_large}, more than any model's")
    with reading("model", model):
        config = AutoConfig.from_pretrained(place.path, revision=place.revision or "main", trust_remote_code=False)
        made_for = [name for name in config.architectures or [] if name.endswith(OTHER_TASKS)]
    if config.is_encoder_decoder:
        raise UserError(f"{config.model_type} is an encoder-decoder model, whose prompt has no loss to weight")
    if made_for or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = made_for[0] if made_for else f"of type {config.model_type}"
        raise UserError(f"model {model!r} is {kind}, which is no causal language model; choose a decoder-only one")
    if place.is_folder:
        files.check_size(model, Path(place.path), config)
    return config


def load(
    model: str,
    *,
    dropout: float | None = None,
    four_bit: torch.dtype | None = None,
    held_in: torch.dtype | None = None,
) -> Any:
    """A causal language model with float32 weights, in evaluation mode.

    dropout: probability of all its dropouts, in place of those in its config.
    four_bit: hold all linear layers but the head in 4 bits (NF4, with their scales in 8), and compute with them in this
        type; on this process's GPU, if there is one. The rest stays float32.
    held_in: the type in which linear layers hold their weights (`held.holding`), for a model that stays frozen; None
        for float32.

    Raises UserError
        where no causal language model can be loaded by that name; an encoder-decoder model is none, as its prompt has
        no loss;
        where weights are missing, are not used, or are not finite;
        where what the model gives for a token depends on the tokens that follow it, or on padding;
        where `causal.head` does not make the model's own logits, so that loss and scores would not be the model's own;
        where `dropout` is given and the model has none.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; training has one of its own
    # On some processors it asks the hub for a kernel when it is imported, and warns at length that there is none.
    getLogger("bitsandbytes").setLevel(ERROR)
    place, config = locate(model), load_config(model)
    if dropout is not None:
        set_dropout(config, dropout)
    with reading("model", model), held.holding(held_in):
        loaded_with_report: Any = AutoModelForCausalLM.from_pretrained(
            place.path,
            config=config,
            revision=place.revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **({} if four_bit is None else _four_bit(four_bit)),
        )
    loaded, report = loaded_with_report
    if not place.is_folder:  # adapters name the commit of their base; transformers itself no longer keeps it
        loaded.config._commit_hash = folder_of(model).name
    if report["missing_keys"]:  # which transformers has drawn at random
        raise UserError(f"model {model!r} lacks weights, among them {min(report['missing_keys'])}")
    unused = [
        name for name in report["unexpected_keys"] if MAKES_LOGITS.search(name) and not BESIDE_THE_LOGITS.search(name)
    ]
    if unused and getattr(config, "quantization_config", None) is None:  # quantised models have more than weights
        raise UserError(f"model {model!r} has weights that its config.json does not use, among them {min(unused)}")
    files.check_finite(model, loaded)
    loaded.eval()
    try:
        with torch.no_grad(), held.in_float32():
            reason = _trial(loaded)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"a trial of a few tokens ended with {type(error).__name__}: {first_line(error)}"
        raise UserError(f"model {model!r} cannot be used here; {reason}") from None
    if reason:
        raise UserError(f"model {model!r} cannot be used here: {config.model_type} {reason}")
    return loaded


def outline(model: str, *, dropout: float | None = None) -> Any:
    """What `load` gives of a model, but its parameters lie on the device "meta", without numbers. No weights are read.

    For a process that is given the numbers by another one, which has loaded and tried the model. One that is stored in
    fewer bits is more than its parameters, and is loaded.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    if getattr(config, "quantization_config", None) is not None:
        return load(model, dropout=dropout)
    if dropout is not None:
        set_dropout(config, dropout)
    with reading("model", model), init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    made.tie_weights()  # which has been undone, as each parameter has been moved
    return made.eval()


def _trial(model: Any) -> str | None:
    """Try a model on a few tokens: why loss and scores would be wrong, or None.

    They are right where a text has the same hidden states whatever follows it and however it is padded, and where body
    and head (`causal.py`) make the model's own logits of them.
    """
    tokens = torch.arange(4, device=model.device).unsqueeze(0)  # any tokens do
    logits = model(tokens, use_cache=False).logits[0]
    if not logits.isfinite().all():
        return "gives logits that are no finite numbers"
    hidden = causal.hidden_states(model, tokens, attention_mask=torch.ones_like(tokens))
    # The same text, followed by others in the first row, by padding in the second.
    longer = torch.arange(7, device=model.device).repeat(2, 1)
    is_token = torch.ones_like(longer)
    longer[1, 4:] = is_token[1, 4:] = 0
    beside = causal.hidden_states(model, longer, attention_mask=is_token)
    # A difference that matters is a good part of the numbers themselves; a base in 4 bits computes in bfloat16.
    tolerance = (0.1 if getattr(model, "is_quantized", False) else 1e-3) * hidden.abs().max()
    for row, cause in enumerate(("the tokens that follow", "padding")):
        if not (beside[row, :4] - hidden[0]).abs().max() <= tolerance:
            return f"lets {cause} change what it gives for a token, so it is no causal language model"
    if not causal.makes_own_logits(model, hidden[0], logits):
        return "makes its logits in a way that is not known here, so loss and scores would not be its own"
    return None


def load_for_scoring(model: str, base: str | None = None, held_in: torch.dtype | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer. A folder of LoRA adapters stands for the base that it names, with them merged in.

    base: the base of the adapters, in place of the one that they name. A warning says where it is known to have other
        weights than those that the adapters were trained on.
    held_in: as of `load`. Adapters are merged in float32, a layer at a time, so that each sum is rounded once.

    Raises UserError as `load` does, and where the base that the adapters name cannot be loaded, or is known to have
    other weights than those that they were trained on.
    """
    folder = Path(model)
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise UserError(f"base is an option for adapters, but there is no adapter_config.json in {model}")
        return load(model, held_in=held_in), load_tokenizer(model)
    merged, chosen = load_adapted(folder, base, held_in=held_in)
    has_own_tokenizer = (folder / "tokenizer_config.json").is_file()
    return merged, load_tokenizer(chosen, model if has_own_tokenizer else None)


def load_adapted(
    folder: Path, base: str | None = None, *, is_same: bool = False, held_in: torch.dtype | None = None
) -> tuple[Any, str]:
    """The model that a folder of LoRA adapters stands for, with them merged into its base, and the base's name.

    The base is compared with the one that the adapters were trained on before its weights are loaded.

    base, held_in and errors: as of `load_for_scoring`. is_same: a given base, too, has to be the very one that the
        adapters were trained on.
    """
    settings = folder / "adapter_config.json"
    named, trained_on = base_of(settings), saved_adapters.trained_on(folder)
    if base is None and trained_on is not None and Path(named).is_absolute() and not Path(named).is_dir():
        named = trained_on["base"]  # a folder of another machine; the digest below shows whether this is the same base
    chosen = base or named
    try:
        locate(chosen)
    except ValueError as error:
        raise UserError(
            f"{settings} names a base that cannot be found: {error}; say by --base where it is now"
        ) from None
    load_config(chosen)  # the hub's tells the commit
    if trained_on is not None and (chosen_digest := digest(chosen)) != trained_on["digest"]:
        differs = (
            f"the adapter of {folder} was trained on {trained_on['digest']}, but its base {chosen} is {chosen_digest}"
        )
        if base is None or is_same:
            raise UserError(f"{differs}; name the right one by --base")
        warnings.warn(f"{differs}, so the scores may be of a model that nobody has trained", stacklevel=3)
    loaded = load(chosen, held_in=None if saved_adapters.changes_base(folder) else held_in)
    adapter = saved_adapters.attach(loaded, folder)
    with reading("the adapter of", str(folder)):
        merged = stored.merge(adapter, chosen, held_in or torch.float32)
    return merged, chosen


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
