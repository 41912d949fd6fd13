"""Sets of options: frozen dataclasses of which the entry points' configs are put together.

Each field has a line of help under it. Defaults are those of the toy laboratory, which runs anywhere. Where recipes
differ, the default is unset and becomes a preset's (`presets.py`) when a config is made: whoever reads a config finds
values only.
"""

from __future__ import annotations

import math
import os
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from plw_mlflow.config.presets import PRESETS
from plw_mlflow.config.values import flag, names, spell
from plw_mlflow.errors import UserError

# The default of a field that a preset sets. Unset has to be told from the preset's own value, given explicitly: it must
# not become an explicit choice by being passed on, as `mlflow run` passes on every default.
BY_PRESET: Any = None
Preset = Literal["toy", "huerta2024", "huerta2024-lora"]
Method = Literal["full", "lora", "dora", "qlora"]
MEASURES = ("weight_distance", "memorisation", "stability", "length", "kl")  # of evaluation/measures.py


# The next three mark fields that are no part of `TrainConfig.identity`, which tells one trained model from another and
# so is the key of its checkpoints. A field without a mark is a part of it.


def no_effect(default: Any, *, unless: Callable[[Mapping[str, Any]], bool] = lambda values: False) -> Any:
    """The default of a field that does not change the trained model, unless the values of all fields make it do so."""
    return field(default=default, metadata={"has_effect": unless})


def in_contents(default: Any) -> Any:
    """The default of a field whose effect is identified by contents, such as the SHA-256 of the data (`cell.py`)."""
    return field(default=default, metadata={"identified_by": "contents"})


def in_tokens(default: Any) -> Any:
    """The default of a field that helps to make tokens of text: the digest of the tokenised examples identifies it."""
    return field(default=default, metadata={"identified_by": "tokens"})


def trains_adapters(values: Mapping[str, Any]) -> bool:
    """Whether these values of options train adapters, and not all weights."""
    return bool(values["method"] != "full")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all sets of options share: the fields that are left unset take the preset's values."""

    def __post_init__(self) -> None:
        preset = getattr(self, "preset", "toy")
        if preset not in PRESETS:
            raise UserError(f"preset must be {' or '.join(PRESETS)}, got {preset!r}")
        hints = typing.get_type_hints(type(self))
        for name, value in PRESETS[preset].items():
            if name in hints and getattr(self, name) is None:
                # A sweep has lists in place of some values, as text.
                object.__setattr__(self, name, spell(value) if hints[name] is str else value)

    def faults(self) -> list[str]:
        """What is wrong with the values of this class's own fields, one phrase each."""
        return []


@dataclass(frozen=True, kw_only=True)
class PresetOptions(Options):
    """Which recipe the unset fields follow."""

    preset: Preset = no_effect("toy")
    """Recipe whose values the options left unset have: the laboratory's, or the study's (docs/training.md)."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions(Options):
    """What is on this machine already."""

    data_dir: Path | None = no_effect(None)
    """Folder with local data sets (docs/data.md) and benchmark files (docs/evaluation.md), read instead of the hub."""

    def faults(self) -> list[str]:
        if self.data_dir is not None and not os.path.isdir(self.data_dir):
            return [f"data-dir {self.data_dir} is not a folder"]
        return []


@dataclass(frozen=True, kw_only=True)
class DataOptions(PresetOptions, LocalOptions):
    """How records become examples."""

    tokenizer: str | None = in_tokens(None)
    """Tokenizer folder or hub id (unset: the model's own)."""
    format: Literal["auto", "alpaca", "prompt-completion", "chat", "dolly"] = in_tokens("auto")
    """Fields of the records; auto finds them out from the first records, and says so."""
    template: str = in_tokens("alpaca")
    """Text around a record: alpaca, chat (the tokenizer's own), none, or a FILE.json or FILE.jinja (docs/data.md)."""
    prompt_border: Literal["offsets", "separate"] = in_tokens(BY_PRESET)
    """The prompt's end: its last character's token, or as many as it has alone (toy offsets, huerta2024 separate)."""
    completion_turns: Literal["last", "every"] = in_tokens("last")
    """Which of a conversation's assistant turns are completion."""
    invert: bool = in_contents(False)
    """Turn the data set's long completions into short ones (prompt inversion, as AlpacaDataShort was made)."""
    mix: str | None = in_contents(None)
    """Second data set, blended into the first; read and templated like it (unset: none)."""
    mix_invert: bool = in_contents(False)
    """Invert the second data set's prompts; where both are the same one, its records occur in both forms."""
    mix_share: float = no_effect(0.5, unless=lambda values: bool(values["mix"]))
    """Share of the records that come from the second data set; as many records as can be had without repeating any."""
    drop_duplicates: bool = False
    """Leave out a record whose text has occurred before; exact duplicates are counted in any case."""
    max_records: int | None = in_tokens(None)
    """Use only the first so many records of each data set (unset: all)."""
    max_characters: int = in_tokens(1_000_000)
    """Longest record in characters, as its file spells it with all its fields; a longer one is bad."""
    max_tokens: int = 512
    """Longest example in tokens, template and end of text included."""
    on_long: Literal["drop", "truncate"] = BY_PRESET
    """What happens to an example longer than max-tokens (toy drop, huerta2024 truncate)."""
    on_bad_record: Literal["error", "skip"] = in_tokens("error")
    """What happens to a record that cannot be used; skipped ones are counted and listed."""
    empty_completion: Literal["bad", "keep"] = in_tokens(BY_PRESET)
    """A record with an empty completion is bad, or kept to train on its end alone (toy bad, huerta2024 keep)."""
    validation_share: float = BY_PRESET
    """Share of records kept for validation, chosen by a hash of their text (toy 0.02, huerta2024 0.001)."""
    cache_dir: Path | None = no_effect(None)
    """Folder for tokenised data and the study's sets; the hub's go to HF_HOME (unset: plw_mlflow in ~/.cache)."""
    output: Path | None = no_effect(None)
    """Folder for what was found or made, as files: profile, model, adapter, scores (unset: MLflow alone has them)."""

    def faults(self) -> list[str]:
        found = too_small(self, 1, "max_records", "max_characters") + too_small(self, 2, "max_tokens")
        for name in ("validation_share", "mix_share"):
            if not 0 < getattr(self, name) < 1:
                found.append(f"{flag(name)} must lie between 0 and 1, got {getattr(self, name)}")
        if self.mix is None:
            for name in ("mix_invert", "mix_share"):
                if getattr(self, name) != getattr(DataOptions, name):
                    found.append(
                        f"{flag(name)} is {spell(getattr(self, name))}, but there is no second data set: --mix"
                    )
        return found


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(PresetOptions):
    """How a cell is trained; the same for every cell of a sweep."""

    loss_divisor: Literal["weights", "tokens"] = "weights"
    """Divide a step's loss by the sum of its token weights, or by the number of tokens of non-zero weight."""
    divisor_scope: Literal["step", "micro-batch"] = BY_PRESET
    """Divide once a step, or each micro-batch by its own and then average (toy step, huerta2024 micro-batch)."""
    template_weight: float | None = None
    """Loss weight of the template's own tokens (unset: as the prompt)."""
    completion_weight: float = 1.0
    """Loss weight of completion tokens and their end of text."""
    learning_rate: float = BY_PRESET
    """Peak learning rate of AdamW (toy 0.001, huerta2024 0.00002, huerta2024-lora 0.0002)."""
    epochs: float = 3.0
    """Passes over the training examples."""
    batch_examples: int = BY_PRESET
    """Examples per optimiser step, over all devices (toy 16, huerta2024 128)."""
    micro_batch_examples: int = no_effect(BY_PRESET, unless=lambda values: values["divisor_scope"] != "step")
    """Examples per device and forward pass; lower it when memory is short (toy 16, huerta2024 4)."""
    packing: bool = no_effect(BY_PRESET)
    """Put examples behind one another in a row, each seeing itself alone; or pad them (toy true, huerta2024 false)."""
    micro_batch_tokens: int | None = no_effect(None)
    """Longest packed row; lower it when memory is short (unset: micro-batch-examples x max-tokens)."""
    processes: int = no_effect(1)
    """Processes that train together on this machine, one a GPU; for several machines see docs/cloud.md."""
    parallel: Literal["ddp", "fsdp2"] = no_effect("ddp")
    """Of several processes, each holds the whole model (ddp), or its share of every weight (fsdp2)."""
    add_pad_token: bool = BY_PRESET
    """Add [PAD] if the tokenizer has no padding token (toy false, huerta2024 true, huerta2024-lora false)."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises; it then falls along a cosine to 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices alone."""
    dropout: float | None = None
    """Probability for every dropout the model has, in attention and elsewhere (unset: as the model's config says)."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary."""
    base_penalty: float = 0.0
    """Adds so much times the sum of |weight - base weight| ^ base-penalty-order to the loss of a step."""
    base_penalty_order: float = no_effect(2.0, unless=lambda values: bool(values["base_penalty"]))
    """Order of the distance to the base weights; 1 or more."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    lora_rank: int = no_effect(16, unless=trains_adapters)
    """Rank of the adapters of lora, dora and qlora."""
    lora_alpha: float = no_effect(32.0, unless=trains_adapters)
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    lora_dropout: float = no_effect(0.0, unless=trains_adapters)
    """Dropout before the adapters."""
    lora_targets: str = no_effect("all-linear", unless=trains_adapters)
    """Linear layers that have adapters: all-linear (every one but the head), or names, comma-separated."""
    precision: Literal["auto", "float32", "bfloat16"] = in_contents(BY_PRESET)
    """Arithmetic of the forward pass; auto is bfloat16 where the device has it (toy auto, huerta2024 bfloat16)."""
    eval_every: int = no_effect(50)
    """Steps between passes over the validation examples."""
    save_every: int = no_effect(50)
    """Steps between checkpoints."""
    keep: int = no_effect(1)
    """Checkpoints kept of an unfinished cell, the newest ones."""
    checkpoint_dir: Path = no_effect(Path("checkpoints"))
    """Folder for checkpoints of unfinished cells; the same command goes on from them after a crash."""
    store_checkpoints: bool = no_effect(True)
    """Copy each checkpoint into the MLflow run too, so that the same command goes on from it on any machine."""

    def faults(self) -> list[str]:
        found = too_small(self, 1, "batch_examples", "micro_batch_examples", "lora_rank", "processes")
        found += too_small(self, 1, "eval_every", "save_every", "keep", "base_penalty_order")
        found += too_small(
            self, 0, "template_weight", "completion_weight", "warmup_ratio", "weight_decay", "base_penalty"
        )
        for name in ("learning_rate", "epochs", "max_grad_norm", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"{flag(name)} must be a number above 0, got {getattr(self, name)}")
        for name in ("dropout", "label_smoothing", "lora_dropout"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                found.append(f"{flag(name)} must be at least 0 and below 1, got {value}")
        if not names(self.lora_targets):
            found.append("lora-targets must name at least one layer, or be all-linear")
        if self.warmup_ratio > 1:
            found.append(f"warmup-ratio must be at most 1, got {self.warmup_ratio}")
        if (
            self.micro_batch_examples > 0
            and self.batch_examples % self.micro_batch_examples
            and self.batch_examples > self.micro_batch_examples
        ):
            found.append(
                f"batch-examples ({self.batch_examples}) must be a multiple of "
                f"micro-batch-examples ({self.micro_batch_examples})"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class CellOptions(Options):
    """What tells one cell from another."""

    plw: float = 0.242
    """Prompt loss weight: the loss weight of prompt tokens, a completion token weighing 1."""
    model: str = in_contents("toy")
    """Base model: toy, llama-7b or llama-2-7b (the study's), a Hugging Face folder, or a hub id[@REVISION]."""
    dataset: str = in_contents("toy-short")
    """Data set: toy-short, toy-long, AlpacaData, AlpacaDataCleaned, AlpacaDataShort, Dolly, a file, or a hub id."""
    seed: int = BY_PRESET
    """Number from which every random choice is derived (toy 1234, huerta2024 42)."""
    method: Method = BY_PRESET
    """Train all weights, or adapters; qlora: on a 4-bit base (toy full, huerta2024 full, huerta2024-lora lora)."""

    def faults(self) -> list[str]:
        if not 0 <= self.plw < math.inf:
            return [f"plw must be a number of 0 or more, got {self.plw}"]
        if self.plw > 1:
            warnings.warn(f"plw {self.plw} is above 1: prompt tokens weigh more than completion tokens", stacklevel=4)
        return []


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(LocalOptions):
    """How a model is scored."""

    tasks: str = "toy"
    """Task sets (toy, huerta2024-v1, huerta2024-v4) and tasks or groups of lm-evaluation-harness, comma-separated."""
    apply_template: bool = False
    """Put the harness's prompts into the cell's own template (of a model without a cell, its tokenizer's)."""
    fewshot_seed: int = 1234
    """Number from which the choice of few-shot examples is derived; the harness's default, and the same at any seed."""
    limit: int | None = None
    """Score only the first so many documents of each task (unset: all)."""
    eval_batch_tokens: int | None = None
    """Tokens per forward pass in scoring (unset: 2048 on a CPU, 16384 on a GPU); halved where memory is short."""
    measures: str | None = None
    """Measures beside scores: weight_distance, memorisation, stability, length, kl, comma-separated (unset: none)."""
    measure_prompts: int = 200
    """Prompts that memorisation, length and kl are measured on; the study took 10,000."""

    def faults(self) -> list[str]:
        found = too_small(self, 1, "limit", "eval_batch_tokens", "measure_prompts")
        if not names(self.tasks):
            found.append("tasks must name at least one task")
        if unknown := [name for name in names(self.measures or "") if name not in MEASURES]:
            found.append(f"measures must be among {', '.join(MEASURES)}, got {', '.join(unknown)}")
        return found


# Two cells whose tokenised examples have the same digest agree in these, however they are spelt.
TEXT_FIELDS = tuple(field.name for field in fields(DataOptions) if field.metadata.get("identified_by") == "tokens")


def cache_folder(options: DataOptions) -> Path:
    """The folder for downloads and stored examples, which may not exist. Raises UserError where no home is known."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise UserError("there is no home folder to keep prepared data in; name a folder with --cache-dir") from None
    return options.cache_dir or home / "plw_mlflow"


def too_small(config: object, least: float, *field_names: str) -> list[str]:
    """A phrase for each of these fields whose value is below the least, or no finite number; unset ones are right."""
    return [
        f"{flag(name)} must be {least} or more, got {value}"
        for name in field_names
        if (value := getattr(config, name)) is not None and not least <= value < math.inf
    ]
