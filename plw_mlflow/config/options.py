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
from plw_mlflow.config.values import flag, spell, split_list
from plw_mlflow.errors import UserError

# The default of a field that a preset sets. Unset has to be told from the preset's own value, given explicitly: it must
# not become an explicit choice by being passed on, as `mlflow run` passes on every default.
BY_PRESET: Any = None
Preset = Literal["toy", "huerta2024", "huerta2024-lora"]
LossDivisor = Literal["weights", "tokens", "segments", "share"]  # docs/plw.md
DivisorScope = Literal["step", "micro-batch", "example"]
Method = Literal["full", "lora", "dora", "qlora"]
MEASURES = ("weight_distance", "memorisation", "stability", "length", "kl")  # of evaluation/measures.py
HELD_OUT = "held_out_"  # how the names of tasks begin that are of held-out records


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
class CellOptions(Options):
    """What tells one cell from another."""

    plw: float = 0.242
    """Prompt loss weight: the loss weight of a prompt token, where a completion token weighs 1."""
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
class PresetOptions(Options):
    """Which recipe the unset options follow."""

    preset: Preset = no_effect("toy")
    """The toy laboratory's recipe, or the study's; an option that is given wins over it (docs/training.md)."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions(Options):
    """What is read from this machine instead of the network."""

    data_dir: Path | None = no_effect(None)
    """Folder with local copies of data sets (docs/data.md) and benchmark files (docs/evaluation.md)."""

    def faults(self) -> list[str]:
        if self.data_dir is not None and not os.path.isdir(self.data_dir):
            return [f"data-dir {self.data_dir} is not a folder"]
        return []


@dataclass(frozen=True, kw_only=True)
class DataOptions(LocalOptions):
    """How records become examples."""

    template: str = in_tokens("alpaca")
    """Text around a record: alpaca, chat (the tokenizer's own), none, or a FILE.json or FILE.jinja (docs/data.md)."""
    max_tokens: int = 512
    """Longest example in tokens, template and end of text included."""
    max_records: int | None = in_tokens(None)
    """Use only the first so many records of each data set (unset: all)."""
    validation_share: float = BY_PRESET
    """Share of records kept for validation, chosen by a hash of their text (toy 0.02, huerta2024 0.001)."""
    output: Path | None = no_effect(None)
    """Folder for results as files, such as profile, model, adapter, scores, report (unset: MLflow alone has them)."""
    cache_dir: Path | None = no_effect(None)
    """Folder for tokenised data and the study's sets; the hub's go to HF_HOME (unset: plw_mlflow in ~/.cache)."""
    invert: bool = in_contents(False)
    """Turn the data set's long completions into short ones (prompt inversion, as AlpacaDataShort was made)."""
    mix: str | None = in_contents(None)
    """Second data set, whose records are mixed with the first's; read and templated like it (unset: none)."""
    mix_share: float = no_effect(0.5, unless=lambda values: bool(values["mix"]))
    """Share of the records that come from the second data set; as many records as can be had without repeating any."""
    mix_invert: bool = in_contents(False)
    """Invert the second data set's prompts; where both are the same one, its records occur in both forms."""
    drop_duplicates: bool = False
    """Leave out a record whose text has occurred before; exact duplicates are counted in any case."""
    format: Literal["auto", "alpaca", "prompt-completion", "chat", "dolly"] = in_tokens("auto")
    """Fields of the records; auto finds the format by the first records, and prints it."""
    tokenizer: str | None = in_tokens(None)
    """Tokenizer folder or hub id (unset: the model's own)."""
    prompt_border: Literal["offsets", "separate"] = in_tokens(BY_PRESET)
    """Prompt's end: its last token, or as many as it has alone (toy offsets, huerta2024 separate; docs/data.md)."""
    completion_turns: Literal["last", "every"] = in_tokens("last")
    """Which of a conversation's assistant turns are completion."""
    on_long: Literal["drop", "truncate"] = BY_PRESET
    """What happens to an example longer than max-tokens (toy drop, huerta2024 truncate)."""
    on_bad_record: Literal["error", "skip"] = in_tokens("error")
    """What happens to a record that cannot be used; skipped ones are counted and listed."""
    empty_completion: Literal["bad", "keep"] = in_tokens(BY_PRESET)
    """A record with an empty completion is bad, or kept to train on its end alone (toy bad, huerta2024 keep)."""
    max_characters: int = in_tokens(1_000_000)
    """Longest record in characters, with all its fields as its file has them; a longer one cannot be used."""

    def faults(self) -> list[str]:
        faults = too_small(self, 1, "max_records", "max_characters") + too_small(self, 2, "max_tokens")
        for name in ("validation_share", "mix_share"):
            if not 0 < getattr(self, name) < 1:
                faults.append(f"{flag(name)} must lie between 0 and 1, got {getattr(self, name)}")
        if self.mix is None:
            for name in ("mix_invert", "mix_share"):
                if getattr(self, name) != getattr(DataOptions, name):
                    value = spell(getattr(self, name))
                    faults.append(f"{flag(name)} is {value}, but there is no second data set: --mix")
        return faults


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """How the weights are trained."""

    optimizer: Literal["adamw", "adamw8bit"] = no_effect("adamw", unless=lambda values: values["optimizer"] != "adamw")
    """AdamW with averages in float32, or in 8 bits (bitsandbytes): 2 bytes a trained weight, not 8, and less exact."""
    learning_rate: float = BY_PRESET
    """Peak learning rate of AdamW (toy 0.001, huerta2024 0.00002, huerta2024-lora 0.0002)."""
    epochs: float = 3.0
    """Passes over the training examples."""
    batch_examples: int = BY_PRESET
    """Examples per optimiser step, over all devices (toy 16, huerta2024 128)."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises; it then falls along a cosine to 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices alone."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    dropout: float | None = None
    """Probability for every dropout the model has, in attention and elsewhere (unset: as the model's config says)."""
    add_pad_token: bool = BY_PRESET
    """Add [PAD] if the tokenizer has no padding token (toy false, huerta2024 true, huerta2024-lora false)."""
    eval_every: int = no_effect(50)
    """Steps between passes over the validation examples."""

    def faults(self) -> list[str]:
        faults = not_positive(self, "learning_rate", "epochs", "max_grad_norm")
        faults += too_small(self, 1, "batch_examples", "eval_every") + too_small(
            self, 0, "warmup_ratio", "weight_decay"
        )
        if self.warmup_ratio > 1:
            faults.append(f"warmup-ratio must be at most 1, got {self.warmup_ratio}")
        return faults + no_probability(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class WeightOptions(Options):
    """What the loss of each token weighs beside the PLW, and by what a step's loss is divided."""

    template_weight: float | None = None
    """Loss weight of the template's own tokens (unset: as the prompt)."""
    completion_weight: float = 1.0
    """Loss weight of completion tokens and their end of text."""
    loss_divisor: LossDivisor = "weights"
    """By the sum of weights, the tokens that weigh, these of each side, or PLW as the prompts' share (docs/plw.md)."""
    divisor_scope: DivisorScope = BY_PRESET
    """Divide once a step, or each micro-batch or example alone and average (toy step, huerta2024 micro-batch)."""

    def faults(self) -> list[str]:
        return too_small(self, 0, "template_weight", "completion_weight")


@dataclass(frozen=True, kw_only=True)
class LossOptions(WeightOptions):
    """How the loss is computed."""

    label_smoothing: float = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary."""
    base_penalty: float = 0.0
    """Factor of a penalty in each step's loss: the sum of |weight - base weight| ^ base-penalty-order."""
    base_penalty_order: float = no_effect(2.0, unless=lambda values: bool(values["base_penalty"]))
    """Order of the distance to the base weights; 1 or more."""

    def faults(self) -> list[str]:
        faults = too_small(self, 0, "base_penalty")
        return faults + too_small(self, 1, "base_penalty_order") + no_probability(self, "label_smoothing")


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Options):
    """Which adapters the methods lora, dora and qlora train."""

    lora_rank: int = no_effect(16, unless=trains_adapters)
    """Rank of the adapters."""
    lora_alpha: float = no_effect(32.0, unless=trains_adapters)
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    lora_dropout: float = no_effect(0.0, unless=trains_adapters)
    """Dropout before the adapters."""
    lora_targets: str = no_effect("all-linear", unless=trains_adapters)
    """Linear layers that have adapters: all-linear (every one but the head), or names, comma-separated."""

    def faults(self) -> list[str]:
        faults = too_small(self, 1, "lora_rank") + not_positive(self, "lora_alpha")
        if not split_list(self.lora_targets):
            faults.append("lora-targets must name at least one layer, or be all-linear")
        return faults + no_probability(self, "lora_dropout")


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Options):
    """How training uses the machine."""

    micro_batch_examples: int = no_effect(BY_PRESET, unless=lambda values: values["divisor_scope"] == "micro-batch")
    """Examples per device and forward pass; lower it when memory is short (toy 16, huerta2024 4)."""
    packing: bool = no_effect(BY_PRESET)
    """Pack examples into rows, each seeing itself alone, or pad each to a row (toy true, huerta2024 false)."""
    micro_batch_tokens: int | Literal["auto"] | None = no_effect(None)
    """Longest packed row; auto: what fits the GPU (unset: micro-batch-examples x max-tokens, or less on a CPU)."""
    activation_checkpointing: bool = no_effect(False)
    """Keep only the inputs of the layers, and compute each again in the backward pass: less memory, more time."""
    compile: bool = no_effect(False)
    """Compile the decoder layers before the first step, which takes a minute or so; results change by rounding."""
    precision: Literal["auto", "float32", "bfloat16"] = in_contents(BY_PRESET)
    """Arithmetic of the forward pass; auto is bfloat16 where that is fast (toy auto, huerta2024 bfloat16)."""
    processes: int = no_effect(1)
    """Processes that train together on this machine, one a GPU; for several machines see docs/cloud.md."""
    parallel: Literal["ddp", "fsdp2"] = no_effect("ddp")
    """Whether each of several processes holds the whole model (ddp), or its share of every weight (fsdp2)."""
    checkpoint_dir: Path = no_effect(Path("checkpoints"))
    """Folder for checkpoints of unfinished cells; the same command goes on from them after a crash."""
    save_every: int = no_effect(50)
    """Steps between checkpoints."""
    keep: int = no_effect(1)
    """Checkpoints kept of an unfinished cell, the newest ones."""
    store_checkpoints: bool = no_effect(True)
    """Copy each checkpoint into the MLflow run too, so that the same command goes on from it on any machine."""

    def faults(self) -> list[str]:
        return too_small(self, 1, "micro_batch_examples", "processes", "save_every", "keep")


@dataclass(frozen=True, kw_only=True)
class SavingOptions(Options):
    """What is kept of a trained model."""

    log_model: Literal["auto", "merged", "adapter", "none"] = no_effect("auto")
    """What MLflow keeps: the whole model, its adapter alone, or nothing; auto is adapter for lora and dora."""
    save_precision: Literal["auto", "float32", "bfloat16"] = no_effect("auto")
    """Type of the saved weights; auto is the arithmetic's for whole models, and float32 for adapters."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(OptimizerOptions, LossOptions, AdapterOptions, MachineOptions, SavingOptions):
    """How a cell is trained; the same for every cell of a sweep."""

    def faults(self) -> list[str]:
        batch, micro_batch = self.batch_examples, self.micro_batch_examples
        if batch > micro_batch > 0 and batch % micro_batch:
            return [f"batch-examples ({batch}) must be a multiple of micro-batch-examples ({micro_batch})"]
        return []


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(LocalOptions):
    """How a model is scored."""

    tasks: str = "toy"
    """Task sets (toy, huerta2024-v1, huerta2024-v4) and tasks or groups of lm-evaluation-harness, comma-separated."""
    limit: int | None = None
    """Score only the first so many documents of each task (unset: all)."""
    apply_template: bool = False
    """Put the harness's prompts into the cell's own template (of a model without a cell, its tokenizer's)."""
    measures: str | None = None
    """Measures beside scores: weight_distance, memorisation, stability, length, kl, comma-separated (unset: none)."""
    measure_prompts: int = 200
    """Prompts that memorisation, length and kl are measured on; the study took 10,000."""
    held_out: str | None = None
    """Data sets that the cell is not trained on, whose completions are measured in its template, comma-separated."""
    fewshot_seed: int = 1234
    """Number from which the choice of few-shot examples is derived; the harness's default, and the same at any seed."""
    eval_batch_tokens: int | None = None
    """Tokens per forward pass in scoring (unset: 2048 on a CPU, 16384 on a GPU); halved where memory is short."""
    eval_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of scoring; auto is that of the cell's training, for other models bfloat16 where that is fast."""

    def faults(self) -> list[str]:
        faults = too_small(self, 1, "limit", "eval_batch_tokens", "measure_prompts")
        if not split_list(self.tasks):
            faults.append("tasks must name at least one task")
        if unknown := [name for name in split_list(self.measures or "") if name not in MEASURES]:
            faults.append(f"measures must be among {', '.join(MEASURES)}, got {', '.join(unknown)}")
        return faults


# Two cells whose tokenised examples have the same digest agree in these, however they are spelt.
TEXT_FIELDS = tuple(field.name for field in fields(DataOptions) if field.metadata.get("identified_by") == "tokens")


def recorded_data_options(recorded: Mapping[str, Any], data_dir: Path | None) -> DataOptions:
    """The options by which an earlier cell made its examples. data_dir: in place of the cell's, if there is one."""
    given = {name.name: recorded[name.name] for name in fields(DataOptions) if recorded.get(name.name) is not None}
    given |= {name: Path(given[name]) for name in ("cache_dir", "data_dir") if name in given}
    if data_dir is not None:
        given["data_dir"] = data_dir
    return DataOptions(**given | {"output": None})


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


def not_positive(config: object, *field_names: str) -> list[str]:
    """A phrase for each of these fields whose value is not a finite number above 0."""
    return [
        f"{flag(name)} must be a number above 0, got {value}"
        for name in field_names
        if not 0 < (value := getattr(config, name)) < math.inf
    ]


def no_share(config: Any) -> list[str]:
    """A phrase for each weight that cannot be where the PLW is the prompts' share of the loss."""
    faults = []
    if config.loss_divisor == "share":
        if config.plw > 1:
            faults.append(f"plw must be at most 1 under loss-divisor share, got {config.plw}")
        if config.template_weight not in (None, 0):
            faults.append(f"template-weight under loss-divisor share must be 0 or unset, got {config.template_weight}")
        if config.completion_weight != 1:
            faults.append(
                f"completion-weight is {config.completion_weight}, but under loss-divisor share completions have what "
                "the PLW leaves them"
            )
    return faults


def no_probability(config: object, *field_names: str) -> list[str]:
    """A phrase for each of these fields whose value is not at least 0 and below 1; unset ones are right."""
    return [
        f"{flag(name)} must be at least 0 and below 1, got {value}"
        for name in field_names
        if (value := getattr(config, name)) is not None and not 0 <= value < 1
    ]
