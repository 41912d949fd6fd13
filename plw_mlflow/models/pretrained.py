"""Models: a pinned base, and the loss it is trained on.

Weights are float32 throughout (transformers would otherwise keep a half-precision checkpoint's own type, in which
small updates round to nothing); lower precision is the arithmetic's, chosen in train.py. Only the frozen base of QLoRA
is held in less.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from plw_mlflow import __version__
from plw_mlflow.config.presets import MODELS
from plw_mlflow.errors import UserError, first_line
from plw_mlflow.models import causal, regularisers
from plw_mlflow.toy import TOY_FOLDER

# How the names of transformers' classes end that are made for something else than the next token.
OTHER_TASKS = ("Classification", "MaskedLM", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")

# Of the weights that transformers does not use, those that make the logits: a numbered layer's, and the head's.
MAKES_LOGITS = re.compile(r"(^|\.)\d+\.|^lm_head\.")
# And among their like, those that do not: other modalities, heads for several tokens at once, tables that are computed.
BESIDE_THE_LOGITS = re.compile(r"vision|visual|image|audio|mtp|nextn|inv_freq|masked_bias|position_ids")
# Where a folder's weights are, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A model may have so many numbers more than its files, for what they have no need to hold (tables of positions).
SPARE_NUMBERS = 2**26
# What no model has more of, by what is in a setting's name: building one that has takes hours, or all memory.
LARGEST = {"layer": 10_000, "head": 10_000, "position": 2**27, "seq": 2**27, "": 2**31}
# What an adapter's settings must not ask for: modules of another library, layers that are there several times, and
# adapters that cannot be merged.
REFUSED_SETTINGS = ("megatron_config", "layer_replication", "alora_invocation_tokens", "arrow_config")
BASE_FILE = "plw-base.json"  # beside an adapter: what it was trained on


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
    """`toy`, a model of the study, a folder, or ID@REVISION, as a Location. Raises UserError for what can be none."""
    if name == "toy":
        return Location(str(TOY_FOLDER), None)
    name = MODELS.get(name, name)
    if Path(name).is_dir():
        return Location(str(Path(name).resolve()), None)
    path, _, revision = name.partition("@")
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UserError(f"model {name!r} is not a folder on this machine")
    return Location(path, revision or None)


def load_tokenizer(model: str, tokenizer: str | None = None) -> Any:
    """The tokenizer of a model, or another one. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    where = locate(tokenizer or model)
    with _reading("tokenizer" if tokenizer else "the tokenizer of model", tokenizer or model):
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
        _check_folder(model, Path(where.path))
    with _reading("model", model):
        settings, _ = PreTrainedConfig.get_config_dict(where.path, revision=where.revision or "main")
        too_large = next(_too_large(settings), None)
    if too_large is not None:  # some configs make lists of this length, so it comes before them
        raise UserError(f"model {model!r} cannot be loaded: in its config.json, {too_large}, more than any model's")
    with _reading("model", model):
        config = AutoConfig.from_pretrained(where.path, revision=where.revision or "main", trust_remote_code=False)
        made_for = [name for name in config.architectures or [] if name.endswith(OTHER_TASKS)]
    if config.is_encoder_decoder:
        raise UserError(f"{config.model_type} is an encoder-decoder model, whose prompt has no loss to weight")
    if made_for or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = made_for[0] if made_for else f"of type {config.model_type}"
        raise UserError(f"model {model!r} is {kind}, which is no causal language model; choose a decoder-only one")
    if where.is_folder:
        _check_size(model, Path(where.path), config)
    return config


def _too_large(settings: Any, name: str = "") -> Iterator[str]:
    """Every whole number in a config that is larger than such a one can be, as NAME is NUMBER."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _too_large(value, str(key))
    elif isinstance(settings, list):
        for value in settings:
            yield from _too_large(value, name)
    elif isinstance(settings, int) and settings > min(most for part, most in LARGEST.items() if part in name):
        yield f"{name} is {settings}"


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
        regularisers.set_dropout(config, dropout)
    with _reading("model", model):
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
    _check_finite(model, loaded)
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


def load_adapter(base: Any, folder: Path) -> Any:
    """A loaded base with the LoRA adapters of a folder on it; `unload()` of what this gives takes them off again.

    Adapters that were trained with an added token hold embeddings and head, too: these replace the base's for good.

    Raises UserError where the folder holds none, or such as do not fit the base.
    """
    from peft import PeftModel

    rows = _embedding_rows(base, folder)
    with _reading("the adapter of", str(folder)):
        if rows is not None and rows != base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(rows, mean_resizing=False)
        adapter = PeftModel.from_pretrained(base, str(folder)).eval()
        found = adapter.load_adapter(str(folder), "default")  # the same again, as only this tells what did not fit
    for names, fault in ((found.missing_keys, "lacks"), (found.unexpected_keys, "does not fit its base: it also has")):
        if names:
            raise UserError(f"the adapter of {str(folder)!r} {fault} the weights {min(names)}")
    _check_finite(str(folder), adapter)
    return adapter


@contextmanager
def adapted(base: Any, folder: Path) -> Iterator[Any]:
    """Within the block, a loaded base with the LoRA adapters of a folder on it; then the base is as it was.

    Raises UserError as `load_adapter` does.
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

    Raises UserError where the folder cannot be read, or holds other adapters than those of LoRA.
    """
    from peft.utils import load_peft_weights

    if not any((folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        # peft would ask the hub for what has the folder's name.
        raise UserError(f"the adapter of {str(folder)!r} cannot be loaded: it has no adapter_model.safetensors")
    with _reading("the adapter of", str(folder)):
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
    named, trained_on = _base_of(settings), _trained_on(folder)
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
    adapter = load_adapter(loaded, folder)
    has_own = (folder / "tokenizer_config.json").is_file()
    with _reading("the adapter of", model):
        merged = adapter.merge_and_unload()
    return merged, load_tokenizer(chosen, model if has_own else None)


def note_base(folder: Path, base: str, content: str) -> None:
    """Write beside an adapter which model it was trained on, by name and digest; `load_for_scoring` compares."""
    noted = {"base": base, "digest": content, "plw_mlflow": __version__}
    (folder / BASE_FILE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def _trained_on(folder: Path) -> dict[str, str] | None:
    """What `note_base` has written beside an adapter; None for one from elsewhere. Raises UserError where damaged."""
    file = folder / BASE_FILE
    if not file.is_file():
        return None
    with _reading("the file", str(file)):
        noted = json.loads(file.read_text(encoding="utf-8"))
        return {name: str(noted[name]) for name in ("base", "digest")}


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
    """Raise UserError where a folder's files show that it holds no whole model."""
    settings = folder / "adapter_config.json"
    if settings.is_file():
        raise UserError(
            f"folder {model} holds adapters on {_base_of(settings)}, which can be scored, but not be a base; name that "
            f"model, or the folder of the merged one"
        )
    if not (folder / "config.json").is_file():
        gguf = (
            "; GGUF files are not read, so name the model that they were made of" if any(folder.glob("*.gguf")) else ""
        )
        raise UserError(f"folder {model} holds no model: it has no config.json{gguf}")
    for index in folder.glob("*.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]
        except Exception as error:
            raise UserError(f"folder {model} holds a damaged {index.name}: {first_line(error)}") from None
        if outside:
            raise UserError(f"folder {model} has its weights in another one: {index.name} names {outside[0]!r}")
        if lacking := [shard for shard in shards if not (folder / shard).is_file()]:
            raise UserError(
                f"folder {model} lacks {len(lacking)} of the {len(shards)} files of its weights: {lacking[0]}"
            )


def _check_size(model: str, folder: Path, config: Any) -> None:
    """Raise UserError where a config is of a much larger model than its folder's files, before that is built."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import load_state_dict

    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None or getattr(config, "transformers_weights", None):
        return  # transformers says what it lacks; and may be told of another file in the folder
    with _reading("model", model):
        files = [name]
        if name.endswith(".index.json"):
            files = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
        # Of files on the device "meta", names and shapes alone are read.
        weights = [weight for file in files for weight in load_state_dict(folder / file, "meta").values()]
        stored = sum(weight.numel() for weight in weights)
        parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
        layers = [count for part in parts if (count := getattr(part, "num_hidden_layers", None)) is not None]
        wrong = next((count for count in layers if not 0 < count <= len(weights)), None)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        has_none = positions is not None and positions < 1
    if has_none:
        raise UserError(f"model {model!r} has {positions} positions by its config.json")
    if wrong is not None:
        raise UserError(
            f"model {model!r} has {wrong} layers by its config.json, but {len(weights)} weights in its files"
        )
    with _reading("model", model), torch.device("meta"):
        built = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        count = sum(part.numel() for part in (*built.parameters(), *built.buffers()))
    # Where weights are stored in fewer bits, a stored number holds up to 8 of them.
    if count > SPARE_NUMBERS + stored * (2 if getattr(config, "quantization_config", None) is None else 8):
        raise UserError(f"model {model!r} has {count} numbers by its config.json, but {stored} in its files")


def _base_of(settings: Path) -> str:
    """The base that an adapter's settings name, with its revision. Raises UserError where they name none."""
    try:
        named = json.loads(settings.read_text(encoding="utf-8"))
        base, revision = named["base_model_name_or_path"], named.get("revision")
    except Exception as error:
        raise UserError(f"{settings} names no base model: {type(error).__name__} {first_line(error)}") from None
    if not base or (isinstance(base, str) and not base.strip()):
        raise UserError(f"{settings} names no base model: base_model_name_or_path is empty")
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise UserError(f"{settings} names no base model: {base!r} with revision {revision!r} is no name")
    if base.startswith("."):  # as it was to whoever trained, who was elsewhere
        raise UserError(f"{settings} names its base by a path of another place: {base!r}; say by --base where it is")
    return f"{base}@{revision}" if revision else base


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Whatever goes wrong within is the fault of the files that are read: UserError, which names them.

    But not where this machine has no memory left, and not an interrupt.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(_not_loaded(what, name, error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; its type is nowhere to be imported
            raise
        raise UserError(_not_loaded(what, name, RuntimeError(*error.args))) from None


def _check_finite(name: str, model: Any) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    for weight, parameter in model.named_parameters():
        # A sum is as good a sign as any, and makes no array of the weights' size.
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
