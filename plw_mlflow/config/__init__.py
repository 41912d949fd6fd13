"""What each entry point can be told: one frozen dataclass each, a line of help under every field.

The command-line options (`cli.py`) are made from these fields, and MLproject repeats their names and defaults.
Defaults belong to the toy laboratory, which runs anywhere. Those that differ between recipes are unset, and become a
preset's (`presets.py`) when a config is made: whoever reads a config finds values only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import typing
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from plw_mlflow.config.presets import PRESETS
from plw_mlflow.data.formats import ENDINGS
from plw_mlflow.errors import UserError

# The default of a field that a preset sets. Unset has to be told from the preset's own value, given explicitly: it must
# not become an explicit choice by being passed on, as `mlflow run` passes on every default.
BY_PRESET: Any = None
UNSET = ("", "''")  # how an unset value is spelt; the second by `mlflow run`, which quotes values for a shell
Preset = Literal["toy", "huerta2024", "huerta2024-lora"]
Method = Literal["full", "lora", "dora", "qlora"]
MEASURES = ("weight_distance", "memorisation", "stability", "length", "kl")  # of measures.py
# Options that make tokens of text: two cells whose examples have the same digest agree in them, however they are spelt.
TEXT_FIELDS = (
    *("tokenizer", "format", "template", "prompt_border", "completion_turns"),
    *("max_records", "max_characters", "on_bad_record", "empty_completion"),
)
PUBLISHED_PLWS = (0.0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1.0)  # arXiv:2401.13586v1, 3.1


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all sets of options share: the fields left unset get the preset's values."""

    def __post_init__(self) -> None:
        preset = getattr(self, "preset", "toy")
        if preset not in PRESETS:
            raise UserError(f"preset must be {' or '.join(PRESETS)}, got {preset!r}")
        hints = typing.get_type_hints(type(self))
        for name, value in PRESETS[preset].items():
            if name in hints and getattr(self, name) is None:
                # A sweep has lists of values in place of some, as text.
                object.__setattr__(self, name, spell(value) if hints[name] is str else value)


@dataclass(frozen=True, kw_only=True)
class PresetOptions(Options):
    """Which recipe the unset fields follow."""

    preset: Preset = "toy"
    """Recipe whose values the options left unset have: the laboratory's, or the study's (README)."""


@dataclass(frozen=True, kw_only=True)
class LocalOptions(Options):
    """What is on this machine already."""

    data_dir: Path | None = None
    """Folder with local copies of data sets and benchmark files, read instead of the network (README)."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        if self.data_dir is not None and not os.path.isdir(self.data_dir):
            return [f"data-dir {self.data_dir} is not a folder"]
        return []


@dataclass(frozen=True, kw_only=True)
class DataOptions(PresetOptions, LocalOptions):
    """How records become examples."""

    tokenizer: str | None = None
    """Tokenizer folder or hub id (unset: the model's own)."""
    format: Literal["auto", "alpaca", "prompt-completion", "chat", "dolly"] = "auto"
    """Fields of the records; auto finds them out from the first records, and says so."""
    template: str = "alpaca"
    """Text around a record: alpaca, chat (the tokenizer's own), none, or a FILE.json or FILE.jinja (README)."""
    prompt_border: Literal["offsets", "separate"] = BY_PRESET
    """The prompt's end: its last character's token, or as many as it has alone (toy offsets, huerta2024 separate)."""
    completion_turns: Literal["last", "every"] = "last"
    """Which of a conversation's assistant turns are completion."""
    invert: bool = False
    """Turn the data set's long completions into short ones (prompt inversion, as AlpacaDataShort was made)."""
    mix: str | None = None
    """Second data set, blended into the first; read and templated like it (unset: none)."""
    mix_invert: bool = False
    """Invert the second data set's prompts; where both are the same one, its records occur in both forms."""
    mix_share: float = 0.5
    """Share of the records that come from the second data set; as many records as can be had without repeating any."""
    drop_duplicates: bool = False
    """Leave out a record whose text has occurred before; exact duplicates are counted in any case."""
    max_records: int | None = None
    """Use only the first so many records of each data set (unset: all)."""
    max_characters: int = 1_000_000
    """Longest record in characters, as its file spells it with all its fields; a longer one is bad."""
    max_tokens: int = 512
    """Longest example in tokens, template and end of text included."""
    on_long: Literal["drop", "truncate"] = BY_PRESET
    """What happens to an example longer than max-tokens (toy drop, huerta2024 truncate)."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What happens to a record that cannot be used; skipped ones are counted and listed."""
    empty_completion: Literal["bad", "keep"] = BY_PRESET
    """A record with an empty completion is bad, or kept to train on its end alone (toy bad, huerta2024 keep)."""
    validation_share: float = BY_PRESET
    """Share of records kept for validation, chosen by a hash of their text (toy 0.02, huerta2024 0.001)."""
    cache_dir: Path | None = None
    """Folder for tokenised data and the study's sets; the hub's go to HF_HOME (unset: plw_mlflow in ~/.cache)."""
    output: Path | None = None
    """Folder for what was found or made, as files: profile, model, adapter, scores (unset: MLflow alone has them)."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        found = _below(self, 1, "max_records", "max_characters") + _below(self, 2, "max_tokens")
        for name in ("validation_share", "mix_share"):
            if not 0 < getattr(self, name) < 1:
                found.append(f"{_flag(name)} must lie between 0 and 1, got {getattr(self, name)}")
        if self.mix is None:
            for name in ("mix_invert", "mix_share"):
                if getattr(self, name) != getattr(DataOptions, name):
                    found.append(
                        f"{_flag(name)} is {spell(getattr(self, name))}, but there is no second data set: --mix"
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
    micro_batch_examples: int = BY_PRESET
    """Examples per device and forward pass; lower it when memory is short (toy 16, huerta2024 4)."""
    packing: bool = BY_PRESET
    """Put examples behind one another in a row, each seeing itself alone; or pad them (toy true, huerta2024 false)."""
    micro_batch_tokens: int | None = None
    """Longest packed row; lower it when memory is short (unset: micro-batch-examples x max-tokens)."""
    processes: int = 1
    """Processes that train together on this machine, one a GPU; for several machines see docs/cloud.md."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """Of several processes, each holds the whole model (ddp), or its share of every weight (fsdp2)."""
    add_pad_token: bool = BY_PRESET
    """Add [PAD] if the tokenizer has no padding token (toy false, huerta2024 true, huerta2024-lora false; README)."""
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
    base_penalty_order: float = 2.0
    """Order of the distance to the base weights; 1 or more."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    lora_rank: int = 16
    """Rank of the adapters of lora, dora and qlora."""
    lora_alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters."""
    lora_targets: str = "all-linear"
    """Linear layers that have adapters: all-linear (every one but the head), or names, comma-separated."""
    precision: Literal["auto", "float32", "bfloat16"] = BY_PRESET
    """Arithmetic of the forward pass; auto is bfloat16 where the device has it (toy auto, huerta2024 bfloat16)."""
    eval_every: int = 50
    """Steps between passes over the validation examples."""
    save_every: int = 50
    """Steps between checkpoints."""
    keep: int = 1
    """Checkpoints kept of an unfinished cell, the newest ones."""
    checkpoint_dir: Path = Path("checkpoints")
    """Folder for checkpoints of unfinished cells; the same command goes on from them after a crash."""
    store_checkpoints: bool = True
    """Copy each checkpoint into the MLflow run too, so that the same command goes on from it on any machine."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        found = _below(self, 1, "batch_examples", "micro_batch_examples", "lora_rank", "processes")
        found += _below(self, 1, "eval_every", "save_every", "keep", "base_penalty_order")
        found += _below(self, 0, "template_weight", "completion_weight", "warmup_ratio", "weight_decay", "base_penalty")
        for name in ("learning_rate", "epochs", "max_grad_norm", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"{_flag(name)} must be a number above 0, got {getattr(self, name)}")
        for name in ("dropout", "label_smoothing", "lora_dropout"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                found.append(f"{_flag(name)} must be at least 0 and below 1, got {value}")
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
    model: str = "toy"
    """Base model: toy, llama-7b or llama-2-7b (the study's), a Hugging Face folder, or a hub id[@REVISION]."""
    dataset: str = "toy-short"
    """Data set: toy-short, toy-long, AlpacaData, AlpacaDataCleaned, AlpacaDataShort, Dolly, a file, or a hub id."""
    seed: int = BY_PRESET
    """Number from which every random choice is derived (toy 1234, huerta2024 42)."""
    method: Method = BY_PRESET
    """Train all weights, or adapters; qlora: on a 4-bit base (toy full, huerta2024 full, huerta2024-lora lora)."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
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
        """Everything that is wrong with the values, a phrase each."""
        found = _below(self, 1, "limit", "eval_batch_tokens", "measure_prompts")
        if not names(self.tasks):
            found.append("tasks must name at least one task")
        if unknown := [name for name in names(self.measures or "") if name not in MEASURES]:
            found.append(f"measures must be among {', '.join(MEASURES)}, got {', '.join(unknown)}")
        return found


@dataclass(frozen=True, kw_only=True)
class Checked(Options):
    """Every entry point's: runs each `faults` a config has inherited, and reports what they find at once."""

    allow_stale_image: bool = False
    """In Docker, run the image's code even where it is not the code of the project's folder or commit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = []
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal and getattr(self, name) not in typing.get_args(hint):
                found.append(f"{_flag(name)} must be {' or '.join(typing.get_args(hint))}, got {getattr(self, name)!r}")
        for part in type(self).__mro__:
            if "faults" in vars(part):
                found += vars(part)["faults"](self)
        if found:
            raise UserError("; ".join(found))


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Checked, DataOptions):
    """Look at a data set before training on it."""

    model: str = "toy"
    """Model whose tokenizer counts the tokens, unless tokenizer is set."""
    dataset: str = "toy-short"
    """Data set: toy-short, toy-long, AlpacaData, AlpacaDataCleaned, AlpacaDataShort, Dolly, a file, or a hub id."""
    show: int | None = None
    """Print the first so many training examples token by token, with the weight of each (unset: none)."""
    plw: float = 0.242
    """Prompt loss weight of the tokens shown."""
    template_weight: float | None = None
    """Loss weight of the template's own tokens shown (unset: as the prompt)."""
    completion_weight: float = 1.0
    """Loss weight of the completion tokens shown."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        return _below(self, 1, "show") + _below(self, 0, "plw", "template_weight", "completion_weight")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked, RecipeOptions, DataOptions, CellOptions):
    """Fine-tune one model at one prompt loss weight."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        found = _below(self, self.max_tokens, "micro_batch_tokens")
        if self.micro_batch_tokens is not None and (self.divisor_scope == "micro-batch" or not self.packing):
            found.append("micro-batch-tokens is for packed rows under divisor-scope step; lower micro-batch-examples")
        if self.method == "qlora" and self.parallel == "fsdp2":
            found.append("the 4-bit base of method qlora cannot be sharded; use parallel ddp")
        heaviest = max(self.plw, self.template_weight or 0, self.completion_weight)
        return [*found, "with these weights no token counts"] if heaviest == 0 else found

    def identity(self) -> dict[str, Any]:
        """The values that decide what comes out of training, but for model, data and tokenizer.

        Those three are told apart by their contents (`cell.py`): one file has many paths. The examples' digest covers
        whatever makes tokens of text.
        """
        leave_out = {"model", "dataset", "invert", "mix", "mix_invert", "precision", *TEXT_FIELDS}
        leave_out |= without_effect(vars(self))
        return {field.name: getattr(self, field.name) for field in fields(TrainConfig) if field.name not in leave_out}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked, ScoreOptions):
    """Score a cell's checkpoint, or any model folder."""

    run_id: str | None = None
    """MLflow run of the cell to score; its scores are added to that run."""
    model: str | None = None
    """Model to score where there is no run: toy, a folder (of LoRA adapters, too), a hub id, models:/NAME/VERSION."""
    base: str | None = None
    """Base of a model that is a folder of adapters (unset: the one that they name)."""
    endpoint: str | None = None
    """OpenAI-compatible completions server that has the model, by its name there, such as http://127.0.0.1:8000/v1."""
    endpoint_key_env: str | None = None
    """Environment variable that holds the endpoint's key, sent to https or this machine alone (unset: none is sent)."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id of an endpoint's model (unset: the model's name)."""
    checkpoint_dir: Path = Path("checkpoints")
    """Folder for finished requests of an unfinished scoring; the same command goes on from them after a crash."""
    output: Path | None = None
    """Folder for scores.csv (unset: MLflow alone has it)."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        found = []
        if (self.run_id is None) == (self.model is None):
            found.append("give either run-id or model")
        if self.base is not None and (self.model is None or self.endpoint or self.model.startswith("models:/")):
            found.append("base is of a folder of adapters: give it as model")
        if self.endpoint is not None and self.model is None:
            found.append("endpoint needs the model's name there")
        if self.endpoint is not None:
            found += _wrong_address(self.endpoint)
        if self.endpoint_key_env is not None and self.endpoint is None:
            found.append("endpoint-key-env names an endpoint's key: give endpoint")
        if self.tokenizer is not None and self.endpoint is None:
            found.append("tokenizer is of an endpoint's model; other models have their own")
        if self.measures is not None and self.run_id is None:
            found.append("measures are of a cell, its training and its base: give run-id")
        return found


@dataclass(frozen=True, kw_only=True)
class MainConfig(ScoreOptions, TrainConfig):
    """Prepare, train and evaluate one cell in one MLflow run."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Checked, RecipeOptions, ScoreOptions, DataOptions):
    """Run every combination of the listed values as a cell, then analyse their scores."""

    plw: str = ",".join(f"{plw:g}" for plw in PUBLISHED_PLWS)
    """Prompt loss weights, comma-separated; the published ten."""
    model: str = "toy"
    """Base models, comma-separated."""
    dataset: str = "toy-short,toy-long"
    """Data sets, comma-separated."""
    seed: str = BY_PRESET
    """Seeds, comma-separated (toy 1234, huerta2024 42)."""
    method: str = BY_PRESET
    """Methods, comma-separated: full, lora, dora, qlora (toy full, huerta2024 full, huerta2024-lora lora)."""

    def cells(self) -> list[MainConfig]:
        """One `main` per combination, in an order that fills whole curves first."""
        shared = {
            field.name: getattr(self, field.name)
            for part in (DataOptions, RecipeOptions, ScoreOptions)
            for field in fields(part)
            if field.name != "output"
        }
        shared["allow_stale_image"] = self.allow_stale_image
        return [MainConfig(**asdict(cell), **shared) for cell in self._cells()]

    def _cells(self) -> list[CellOptions]:
        return [
            CellOptions(plw=float(plw), model=model, dataset=dataset, seed=int(seed), method=method)  # type: ignore[arg-type]
            for model in names(self.model)
            for seed in names(self.seed)
            for dataset in names(self.dataset)
            for method in names(self.method)
            for plw in names(self.plw)
        ]

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        kinds: dict[str, Callable[[str], Any]] = {
            "plw": float,
            "model": str,
            "dataset": str,
            "seed": int,
            "method": str,
        }
        found = []
        for name, kind in kinds.items():
            listed = names(getattr(self, name))
            try:
                values = [kind(part) for part in listed]
            except ValueError:
                found.append(f"{name} must be {'whole numbers' if kind is int else 'numbers'}, got {', '.join(listed)}")
                continue
            if not values:
                found.append(f"{name} names nothing")
            if len(set(values)) < len(values):
                found.append(f"{name} names a value twice: {', '.join(listed)}")
        methods = typing.get_args(Method)
        found += [
            f"method must be {' or '.join(methods)}, got {name}" for name in names(self.method) if name not in methods
        ]
        if not found:
            found = [fault for cell in self._cells() for fault in cell.faults()]
        return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(Checked):
    """Fit score against prompt loss weight."""

    scores: Path | None = None
    """Score table as CSV: model,dataset,plw,seed,task,metric,score."""
    run_id: str | None = None
    """MLflow run of a sweep, whose cells are analysed."""
    experiment: str | None = None
    """MLflow experiment (its name), all of whose finished cells are analysed."""
    where: str | None = None
    """Only runs that this search filter of MLflow finds, such as "params.epochs = '3.0'" (unset: all)."""
    scale: Literal["none", "fraction", "minmax", "zscore"] = "none"
    """Scale of scores: as they are; those of 0..100 divided by 100; or each task to 0..1, or to mean 0 and SD 1."""
    transform: Literal["power", "logit", "rank", "none"] = "power"
    """From PLW to w_p, on which curves are parabolas: PLW^0.30103, its logit, its rank, or PLW itself."""
    by: str | None = None
    """Columns between whose values curves are compared, comma-separated; data sets always are."""
    margin: float | None = None
    """Difference of scores that is as good as none: is PLW's effect shown to be smaller? (unset: not tested)"""
    bootstrap: int = 2000
    """Draws of each bootstrap of the best PLW; 0 for none."""
    parametric: int = 0
    """Draws of the parametric bootstraps of the mixed models' likelihood ratios (0: none; 999 take a minute or so)."""
    power: bool = False
    """Simulate how many tasks, seeds and PLWs find the optimum within width, scores being made as these seem to be."""
    width: float = 0.2
    """Width of the optimum's 95 % interval, in PLW, that power wants at most."""
    assume: str | None = None
    """What makes the scores that power simulates, instead of a table, as power prints it (docs/power.md)."""
    next: int | None = None
    """Propose so many PLWs to run next, those that tell most about where the optimum is (unset: none)."""
    output: Path | None = None
    """Folder for fit.json, report.html, figures, power.csv and next.json (unset: MLflow alone has them)."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        given = [value for value in (self.scores, self.run_id, self.experiment, self.assume) if value is not None]
        found = _below(self, 0, "bootstrap", "parametric") + _below(self, 1, "next")
        if self.margin is not None and not 0 < self.margin < math.inf:
            found.append(f"margin must be a number above 0, got {self.margin}")
        if len(given) != 1:
            found.append("give one of scores, run-id or experiment (or assume, for power alone)")
        if self.where is not None and self.run_id is None and self.experiment is None:
            found.append("where chooses among MLflow's runs: give run-id or experiment")
        if not 0 < self.width < math.inf:
            found.append(f"width must be a number above 0, got {self.width}")
        if not self.power:
            for name in ("width", "assume"):
                if (value := getattr(self, name)) != getattr(AnalyzeConfig, name):
                    found.append(f"{name} is {spell(value)}, but that is for power: give --power")
        if self.assume is not None and self.next is not None:
            found.append("next needs scores, not assume")
        return found


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(Checked, DataOptions):
    """Suggest a PLW for a data set from what is known of others, and from runs of one's own."""

    ratio: float | None = None
    """Generation ratio of the data set: its completion tokens over its prompt tokens (unset: measured on dataset)."""
    dataset: str | None = None
    """Data set asked about, as prepare takes it; with ratio, the name it has among the scores, and it is not read."""
    model: str = "toy"
    """Model whose tokenizer counts the tokens, unless tokenizer is set."""
    task_types: str | None = None
    """Types of task that matter, comma-separated, such as multiple-choice (unset: all); see docs/study.md."""
    scores: Path | None = None
    """Score table of one's own runs, as analyze reads it."""
    experiment: str | None = None
    """MLflow experiment (its name) of one's own runs, all of whose finished cells count."""
    where: str | None = None
    """Only runs that this search filter of MLflow finds, such as "params.epochs = '3.0'" (unset: all)."""
    ratios: str | None = None
    """Generation ratios of the data sets among one's own runs, comma-separated: mine=0.5,other=7 (unset: from them)."""
    scale: Literal["none", "fraction", "minmax", "zscore"] = "none"
    """Scale of one's own scores, as in analyze."""

    def asked(self) -> tuple[str, ...]:
        """The names that the data set asked about may have among scores."""
        if self.dataset is None:
            return ()
        return tuple(dict.fromkeys(data_name(self.dataset, self, shown) for shown in (shown_name, str, short_name)))

    def given_ratios(self) -> dict[str, float]:
        """The ratios of own data sets by name."""
        pairs = [pair.rpartition("=") for pair in names(self.ratios or "")]
        return {name.strip(): float(ratio) for name, _, ratio in pairs}

    def faults(self) -> list[str]:
        """Everything that is wrong with the values, a phrase each."""
        found = []
        if self.ratio is None and self.dataset is None:
            found.append("give the data set's generation ratio, or dataset to measure it on")
        if self.ratio is not None and not 0 < self.ratio < math.inf:
            found.append(f"ratio must be a number above 0, got {self.ratio}")
        if self.scores is not None and self.experiment is not None:
            found.append("give one of scores and experiment")
        if self.where is not None and self.experiment is None:
            found.append("where chooses among MLflow's runs: give experiment")
        if self.ratios is not None and self.scores is None and self.experiment is None:
            found.append("ratios are of one's own runs: give scores or experiment")
        try:
            given = self.given_ratios()
            is_wrong = not all(name and 0 < ratio < math.inf for name, ratio in given.items())
        except ValueError:
            is_wrong = True
        if is_wrong:
            found.append(f"ratios must be like mine=0.5,other=7, got {self.ratios}")
        elif len(given) < len(names(self.ratios or "")):
            found.append(f"ratios must name each data set once, got {self.ratios}")
        return found


CONFIGS: dict[str, type[Checked]] = {
    "main": MainConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "analyze": AnalyzeConfig,
    "advise": AdviseConfig,
    "sweep": SweepConfig,
}


def without_effect(values: Mapping[str, Any]) -> set[str]:
    """The names of the options that change nothing about the model that is trained with these values.

    values: at least mix, divisor_scope, method and base_penalty of a TrainConfig, unset ones None or empty.
    """
    found = {"cache_dir", "data_dir", "output", "checkpoint_dir", "store_checkpoints", "save_every", "eval_every"}
    found |= {"allow_stale_image", "keep", "packing", "micro_batch_tokens", "processes", "parallel", "preset"}
    if not values["mix"]:
        found |= {"mix_share", "mix_invert"}
    if values["divisor_scope"] == "step":  # how a step is cut then changes nothing
        found |= {"micro_batch_examples"}
    if values["method"] == "full":
        found |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
    if not values["base_penalty"]:
        found |= {"base_penalty_order"}
    return found


def names(listed: str) -> list[str]:
    """The parts of a comma-separated list, without blanks."""
    return [part.strip() for part in listed.split(",") if part.strip()]


def data_name(dataset: str, options: DataOptions, shown: Callable[[str], str] = str) -> str:
    """What tells the data of one cell from another's: "toy-long inverted", "toy-long + 0.7 toy-short".

    shown: how each data set's own name is to be written.
    """
    name = shown(dataset) + " inverted" * options.invert
    if options.mix is None:
        return name
    return f"{name} + {options.mix_share:g} {shown(options.mix)}{' inverted' * options.mix_invert}"


def shown_name(name: str) -> str:
    """A data set or model as tables and titles name it: a file or folder without the folders it lies in.

    A hub id and the names that this package gives stay as they are.
    """
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[^@\s]+)?", name) and not name.lower().endswith(ENDINGS)
    return name if is_hub_id else Path(name).name or name


def short_name(name: str) -> str:
    """The last part of a path or hub id, without a data file's endings, fit for a registered model's name.

    It keeps the letters and digits of all scripts.
    """
    last = re.sub(
        r"(\.(jsonl?|ndjson|csv|tsv|parquet))?(\.(gz|zst))?$", "", Path(name.partition("@")[0]).name, flags=re.I
    )
    letters = unicodedata.normalize("NFC", last)
    kept = "".join(one if one in "._-" or unicodedata.category(one)[0] in "LMN" else " " for one in letters)
    return "-".join(kept.split()).strip("-.") or "unnamed"


def cache_folder(options: DataOptions) -> Path:
    """The folder for downloads and stored examples, which may not exist. Raises UserError where no home is known."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise UserError("there is no home folder to keep prepared data in; name a folder with --cache-dir") from None
    return options.cache_dir or home / "plw_mlflow"


def spell(value: Any) -> str:
    """A value as MLproject and MLflow have it: unset is empty, truth is in small letters, floats are written out."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def digest(values: dict[str, Any]) -> str:
    """A short, stable name for a set of values: the start of the SHA-256 of their sorted JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _wrong_address(address: str) -> list[str]:
    """What is wrong with a server's address, which is logged as it is."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return ["endpoint must be an address like http://127.0.0.1:8000/v1"]
    if "@" in parts.netloc or parts.query or parts.fragment:
        return [
            "endpoint must hold no user name, password or query; put a key into an environment variable, and name that "
            "one: --endpoint-key-env NAME"
        ]
    return []


def _below(config: object, least: float, *fields_: str) -> list[str]:
    return [
        f"{_flag(name)} must be {least} or more, got {value}"
        for name in fields_
        if (value := getattr(config, name)) is not None and not least <= value < math.inf
    ]
