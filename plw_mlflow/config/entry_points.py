"""The configs of the entry points: one frozen dataclass each.

The command-line options (`command_line/cli.py`) are made from the fields, and MLproject repeats their names and
defaults.
"""

from __future__ import annotations

import itertools
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from plw_mlflow.config import limits
from plw_mlflow.config.options import (
    BY_PRESET,
    AdapterOptions,
    CellOptions,
    DataOptions,
    LocalOptions,
    LossOptions,
    OptimizerOptions,
    Options,
    PresetOptions,
    RecipeOptions,
    ScoreOptions,
    WeightOptions,
    no_effect,
    no_share,
    too_small,
)
from plw_mlflow.config.values import (
    IN_DATA_NAME,
    data_name,
    digest,
    flag,
    read,
    short_name,
    shown_name,
    spell,
    split_list,
)
from plw_mlflow.errors import UserError
from plw_mlflow.study import PUBLISHED_PLWS


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What every command has."""

    allow_stale_image: bool = no_effect(False)
    """In Docker, run the image's code even where it is not the code of the project's folder or commit."""

    def __post_init__(self) -> None:
        """Raise UserError with all that is wrong with the values: what each class says of its own fields."""
        super().__post_init__()
        faults = self._unknown_words(typing.get_type_hints(type(self)))
        for part in type(self).__mro__:
            if "faults" in vars(part):
                faults += vars(part)["faults"](self)
        if faults:
            raise UserError("; ".join(faults))

    def _unknown_words(self, names: Iterable[str]) -> list[str]:
        """A phrase for each of these fields whose value is none of the words that it may be."""
        hints = typing.get_type_hints(type(self))
        return [
            f"{flag(name)} must be {' or '.join(words)}, got {value!r}"
            for name in names
            if typing.get_origin(hints[name]) is Literal
            and (value := getattr(self, name)) not in (words := typing.get_args(hints[name]))
        ]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(PresetOptions, DataOptions, WeightOptions, Config):
    """Look at a data set before training on it."""

    model: str = "toy"
    """Model whose tokenizer counts the tokens, unless tokenizer is set."""
    dataset: str = "toy-short"
    """Data set: toy-short, toy-long, AlpacaData, AlpacaDataCleaned, AlpacaDataShort, Dolly, a file, or a hub id."""
    show: int | None = None
    """Print the first so many training examples token by token, with the weight of each (unset: none)."""
    plw: float = 0.242
    """Prompt loss weight of the tokens shown, and whose equals under other losses are printed."""
    fail_if: str | None = None
    """Conditions on which the command fails, such as 'no_end > 0, prompt_cut > 1%' (unset: none; docs/data.md)."""

    def faults(self) -> list[str]:
        faults = too_small(self, 1, "show") + too_small(self, 0, "plw") + no_share(self)
        try:
            limits.parse(self.fail_if or "")
        except UserError as error:
            faults.append(str(error))
        return faults


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CellOptions, PresetOptions, DataOptions, RecipeOptions, Config):
    """Fine-tune one model at one prompt loss weight."""

    def faults(self) -> list[str]:
        faults = [] if self.micro_batch_tokens == "auto" else too_small(self, self.max_tokens, "micro_batch_tokens")
        if self.micro_batch_tokens is not None and (self.divisor_scope == "micro-batch" or not self.packing):
            faults.append(
                "micro-batch-tokens is for packed rows under divisor-scope step or example; lower micro-batch-examples"
            )
        if self.method == "qlora" and self.parallel == "fsdp2":
            faults.append("the 4-bit base of method qlora cannot be sharded; use parallel ddp")
        if self.optimizer == "adamw8bit" and self.parallel == "fsdp2":
            faults.append("the blocks of optimizer adamw8bit cannot be sharded; use optimizer adamw or parallel ddp")
        faults += no_share(self)
        if self.compile and self.activation_checkpointing:
            faults.append("compile does nothing for layers that activation-checkpointing computes again; choose one")
        if self.log_model == "adapter" and (reason := self._why_no_adapter()):
            faults.append(f"log-model adapter cannot be had: {reason}; use --log-model merged, or none")
        heaviest = max(self.plw, self.template_weight or 0, self.completion_weight)
        return (
            [*faults, "plw, template-weight and completion-weight leave every token a weight of 0"]
            if heaviest == 0
            else faults
        )

    def logged(self) -> Literal["merged", "adapter", "none"]:
        """What MLflow keeps of the trained model: `log_model`, where auto has become one of the others."""
        if self.log_model != "auto":
            return self.log_model
        return "merged" if self._why_no_adapter() else "adapter"

    def _why_no_adapter(self) -> str | None:
        """Why the trained model is not its base with an adapter on it; None if it is."""
        if self.method == "full":
            return "method full trains all weights"
        if self.method == "qlora":
            return "an adapter of qlora is trained on the base's weights rounded to 4 bits, not on the base"
        if self.add_pad_token:
            return "a base cannot take an adapter with the token that add-pad-token gives the model"
        return None

    def cell_name(self, differing: Sequence[str] = ()) -> str:
        """What MLflow's list of runs calls the cell. The list cuts long names off, so what differs comes first.

        differing: the options in which it differs from other cells of its sweep.
        """
        parts = {
            "plw": f"plw {self.plw:g}",
            "dataset": data_name(self.dataset, self, short_name),
            "model": short_name(self.model),
            "method": self.method,
            "seed": f"seed {self.seed}",
        }
        first = {name: parts.get(name, f"{flag(name)} {spell(getattr(self, name))}") for name in differing}
        return " ".join(({"plw": parts["plw"]} | first | parts).values())

    def identity(self) -> dict[str, Any]:
        """The values that decide what comes out of training, without those that are identified by contents (`cell.py`).

        One file has many paths, so models, data and tokenizers are told apart by what is in them.
        """
        left_out = {field.name for field in fields(TrainConfig) if "identified_by" in field.metadata}
        left_out |= without_effect(vars(self))
        return {field.name: getattr(self, field.name) for field in fields(TrainConfig) if field.name not in left_out}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoreOptions, Config):
    """Score the model of a cell, or any other model."""

    run_id: str | None = None
    """MLflow run of the cell to score; its scores are added to that run."""
    model: str | None = None
    """Model to score where there is no run: toy, a folder (of LoRA adapters, too), a hub id, models:/NAME/VERSION."""
    base: str | None = None
    """Base of a model that is an adapter, as a folder or in MLflow (unset: the one that it names)."""
    endpoint: str | None = None
    """OpenAI-compatible completions server that has the model, by its name there, such as http://127.0.0.1:8000/v1."""
    endpoint_key_env: str | None = None
    """Environment variable that holds the endpoint's key, sent to https or this machine alone (unset: none is sent)."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id of an endpoint's model (unset: the model's name)."""
    checkpoint_dir: Path = Path("checkpoints")
    """Folder for finished requests of an unfinished scoring; the same command goes on from them after a crash."""
    output: Path | None = None
    """Folder for scores.csv and questions.parquet (unset: MLflow alone has them)."""

    def faults(self) -> list[str]:
        faults = []
        if (self.run_id is None) == (self.model is None):
            faults.append("give either run-id or model")
        if self.base is not None and self.endpoint is not None:
            faults.append("base belongs to adapters that are loaded here, and an endpoint has its model itself")
        if self.endpoint is not None and self.model is None:
            faults.append("endpoint needs the name that its server has for the model: give model")
        if self.endpoint is not None:
            faults += _wrong_address(self.endpoint)
        if self.endpoint_key_env is not None and self.endpoint is None:
            faults.append("endpoint-key-env names the key of an endpoint: give endpoint")
        if self.tokenizer is not None and self.endpoint is None:
            faults.append("tokenizer is for the model of an endpoint; other models have their own")
        if self.eval_precision != "auto" and self.endpoint is not None:
            faults.append(
                "eval-precision is for a model that is computed here, and an endpoint's server computes its own"
            )
        if self.measures is not None and self.run_id is None:
            faults.append("measures compare a cell with its base and its training data: give run-id")
        if self.held_out is not None and self.run_id is None:
            faults.append("held-out data stand in a cell's template: give run-id")
        return faults


@dataclass(frozen=True, kw_only=True)
class MainConfig(TrainConfig, ScoreOptions):
    """Prepare, train and evaluate one cell in one MLflow run."""

    def definition(self) -> dict[str, Any]:
        """The values that decide the trained model and its scores. What they name is not looked into."""
        scoring = {"tasks", "limit", "apply_template", "fewshot_seed", "eval_precision", "measures"}
        scoring |= {"measure_prompts"} if self.measures else set()
        scoring |= {"held_out"} if self.held_out else set()
        training = {field.name for field in fields(TrainConfig)} - without_effect(vars(self))
        return {name: getattr(self, name) for name in sorted(training | scoring)}


_CELL_HINTS = typing.get_type_hints(MainConfig)
_AXES = ("plw", "dataset", "model", "seed", "method")  # the fields of SweepAxes
LISTED_IN_NAME = 6  # PLWs, in the name of a sweep
# What a sweep may list several values of: options that decide what comes out of a cell, but for those whose commas are
# their own, and those that name folders.
LISTABLE = (
    *_AXES,
    *(
        field.name
        for part in (DataOptions, OptimizerOptions, LossOptions, AdapterOptions)
        for field in fields(part)
        if field.name not in ("data_dir", "cache_dir", "output", "eval_every", "lora_targets")
    ),
    *("precision", "limit", "apply_template", "fewshot_seed", "eval_precision"),
)


@dataclass(frozen=True, kw_only=True)
class SweepAxes(Options):
    """Axes, each a comma-separated list: every combination of the values is a cell."""

    plw: str = ",".join(f"{plw:g}" for plw in PUBLISHED_PLWS)
    """Prompt loss weights, comma-separated; by default the published ten."""
    dataset: str = "toy-short,toy-long"
    """Data sets, comma-separated."""
    model: str = "toy"
    """Base models, comma-separated."""
    seed: str = BY_PRESET
    """Seeds, comma-separated (toy 1234, huerta2024 42)."""
    method: str = BY_PRESET
    """Methods, comma-separated: full, lora, dora, qlora (toy full, huerta2024 full, huerta2024-lora lora)."""


# Of sbatch: what a job runs, and where what it writes goes.
SLURM_OPTIONS_OF_SWEEPS = {"array", "chdir", "error", "input", "output", "test_only", "wait", "wrap"}


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """How the cells are run; options of data, training and scoring may be comma-separated lists, too."""

    engine: Literal["local", "ray", "slurm"] = "local"
    """Where cells run: on this machine, as tasks of a Ray cluster, or as an array of SLURM jobs (docs/cloud.md)."""
    ray_address: str | None = None
    """Ray cluster, as HOST:PORT or auto (unset: RAY_ADDRESS, or else a Ray of this machine alone)."""
    slurm: str | None = None
    """Options of sbatch as key=value, comma-separated: partition=gpu,time=2:00:00; cluster=local: without SLURM."""
    jobs: int = 1
    """Cells that run at the same time."""
    gpus_per_cell: int | None = None
    """GPUs that each cell has for itself (unset: all cells see all of this machine's; none on a cluster)."""
    cores_per_cell: int | None = None
    """Processor cores that each cell has for itself (unset: all cells share all of this machine's; 1 on a cluster)."""
    retry_failed: bool = False
    """Run again the cells that have failed; without it, the same command runs only what is missing."""
    dry_run: bool = False
    """Show the cells, and which of them are finished already; run nothing."""
    run_id: str | None = None
    """MLflow run of the sweep to go on with, or new (unset: the experiment's sweep of the same cells, if any)."""

    def faults(self) -> list[str]:
        faults = too_small(self, 1, "jobs", "gpus_per_cell", "cores_per_cell")
        for name, engine in (("ray_address", "ray"), ("slurm", "slurm")):
            if getattr(self, name) is not None and self.engine != engine:
                faults.append(f"{flag(name)} is for another engine: give --engine {engine}")
        if not all(map(re.compile(r"[a-z][a-z_-]*=.+").fullmatch, self._slurm_pairs())):
            faults.append(f"slurm must be like partition=gpu,time=2:00:00, got {self.slurm}")
        elif self.slurm_options().get("cluster", "slurm") not in ("slurm", "local"):
            faults.append(f"the cluster of slurm must be slurm or local, got {self.slurm_options()['cluster']}")
        elif taken := sorted(SLURM_OPTIONS_OF_SWEEPS & self.slurm_options().keys()):
            faults.append(f"slurm must leave what a job runs and writes to the sweep, got {', '.join(taken)}")
        return faults

    def slurm_options(self) -> dict[str, Any]:
        """The values of `slurm` by name, which has underscores. A comma that no key= follows belongs to the value."""
        pairs = (pair.partition("=") for pair in self._slurm_pairs())
        return {key.replace("-", "_"): value for key, _, value in pairs}

    def _slurm_pairs(self) -> list[str]:
        return [pair.strip() for pair in re.split(r",(?=\s*[\w-]+=)", self.slurm or "") if pair.strip()]


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions(Options):
    """A sweep that runs only the cells that narrow the interval of the best PLW most."""

    adaptive: bool = False
    """Begin with 4 PLWs, and run of the other cells only those that narrow the interval of the best PLW most."""
    width: float = 0.2
    """Width of the optimum's 95 % interval, in PLW, at which adaptive ends."""
    budget: int | None = None
    """Cells that adaptive runs at most, in all (unset: those of all combinations)."""

    def faults(self) -> list[str]:
        faults = too_small(self, 1, "budget")
        if not 0 < self.width < math.inf:
            faults.append(f"width must be a number above 0, got {self.width}")
        if not self.adaptive:
            for name in ("width", "budget"):
                if (value := getattr(self, name)) != getattr(AdaptiveOptions, name):
                    faults.append(f"{name} is {spell(value)}, but that is for adaptive: give --adaptive true")
        return faults


@dataclass(frozen=True, kw_only=True)
class SweepConfig(
    SweepAxes, EngineOptions, AdaptiveOptions, PresetOptions, DataOptions, RecipeOptions, ScoreOptions, Config
):
    """Run every combination of the listed values as a cell, then analyse their scores.

    Most options of data, training and scoring may list several values, separated by commas.
    """

    def __post_init__(self) -> None:
        """Raise UserError with all that is wrong with the values, before the first cell."""
        Options.__post_init__(self)
        faults = EngineOptions.faults(self) + AdaptiveOptions.faults(self)
        faults += self._unknown_words(name for name in typing.get_type_hints(SweepConfig) if name not in LISTABLE)
        for name in LISTABLE:
            try:
                values = self.values(name)
            except UserError as error:
                faults.append(str(error))
            else:
                if len(values) == 1 and name not in _AXES:
                    object.__setattr__(self, name, values[0])
        if not faults and self.adaptive and len(self.values("plw")) <= 4:
            faults.append(f"adaptive chooses among more than 4 values of plw, got {self.plw}")
        if not faults:
            for combination in self._combinations():
                try:
                    self._cell(combination)
                except UserError as error:
                    faults.append(str(error))
        if faults:
            raise UserError("; ".join(dict.fromkeys(faults)))

    def values(self, name: str) -> list[Any]:
        """The values that an option lists. Raises UserError where it lists none, or some that it cannot have."""
        given = getattr(self, name)
        if not isinstance(given, str):
            return [given]
        hint, listed = _CELL_HINTS[name], split_list(given)
        if not listed:
            if name in _AXES or given.strip() or type(None) not in typing.get_args(hint):
                raise UserError(f"{flag(name)} names nothing")
            return [None]
        if len(listed) != given.count(",") + 1:
            raise UserError(f"{flag(name)} has an empty place in its list, got {given}; write each value once")
        try:
            values = [read(text, hint) for text in listed]
        except ValueError:
            kinds = {int: "whole numbers", float: "numbers", bool: "true or false"}
            kind = next(word for kind, word in kinds.items() if kind in (hint, *typing.get_args(hint)))
            raise UserError(f"{flag(name)} must be {kind}, got {', '.join(listed)}") from None
        if len(set(values)) < len(values):
            raise UserError(f"{flag(name)} names a value twice: {', '.join(listed)}")
        words = typing.get_args(hint) if typing.get_origin(hint) is Literal else values
        if unknown := [value for value in values if value not in words]:
            raise UserError(f"{flag(name)} must be {' or '.join(words)}, got {unknown[0]}")
        return values

    def listed(self) -> list[str]:
        """The names of the options that list several values, beside those that tell cells apart everywhere."""
        return [name for name in LISTABLE if name not in _AXES and len(self.values(name)) > 1]

    def differing(self) -> list[str]:
        """The names of the options in which cells differ; dataset stands for those that make the data set's name."""
        names = [name for name in LISTABLE if len(self.values(name)) > 1]
        return list(dict.fromkeys("dataset" if name in IN_DATA_NAME else name for name in names))

    def sweep_name(self) -> str:
        """What MLflow's list of runs calls the sweep: its data and its PLWs."""
        plws = sorted(self.values("plw"))
        some = ",".join(f"{plw:g}" for plw in plws)
        of_many = f"{plws[0]:g} to {plws[-1]:g} ({len(plws)})"
        data = dict.fromkeys(data_name(cell.dataset, cell, short_name) for cell in self.cells())
        return f"{', '.join(data)} plw {some if len(plws) <= LISTED_IN_NAME else of_many}"

    def by(self) -> tuple[str, ...]:
        """The listed options that have curves of their own, since the name of the data does not contain them."""
        return tuple(name for name in self.listed() if name not in IN_DATA_NAME)

    def cells(self) -> list[MainConfig]:
        """One `main` per combination, in an order that completes one curve over PLW after another.

        A combination that differs from an earlier one only in options that do not matter to it, such as the rank of
        adapters where all weights are trained, is left out.
        """
        by_definition: dict[str, MainConfig] = {}
        for combination in self._combinations():
            cell = self._cell(combination)
            by_definition.setdefault(digest(cell.definition()), cell)
        return list(by_definition.values())

    def _combinations(self) -> Iterator[dict[str, Any]]:
        names = ("model", "seed", "dataset", "method", *self.listed(), "plw")
        for values in itertools.product(*map(self.values, names)):
            yield dict(zip(names, values, strict=True))

    def _cell(self, combination: Mapping[str, Any]) -> MainConfig:
        shared = {field.name: getattr(self, field.name) for field in fields(MainConfig) if field.name not in _AXES}
        return MainConfig(**{**shared, **combination, "output": None})


def _given_ratios(spelled: str | None) -> dict[str, float]:
    """Generation ratios by the data set's name, of "mine=0.5,other=7"; ValueError where a number is none."""
    pairs = [pair.rpartition("=") for pair in split_list(spelled or "")]
    return {name.strip(): float(ratio) for name, _, ratio in pairs}


def _faults_of_ratios(spelled: str | None) -> list[str]:
    try:
        given = _given_ratios(spelled)
        is_wrong = not all(name and 0 < ratio < math.inf for name, ratio in given.items())
    except ValueError:
        is_wrong = True
    if is_wrong:
        return [f"ratios must be like mine=0.5,other=7, got {spelled}"]
    if len(given) < len(split_list(spelled or "")):
        return [f"ratios must name each data set once, got {spelled}"]
    return []


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(Config):
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
    axis: Literal["w_p", "plw", "logit", "rank", "share", "w_share", "w_odds"] = "w_p"
    """What curves are parabolas in: w_p = PLW^0.30103, PLW, its logit or rank, or the prompts' share of loss weight."""
    ratios: str | None = None
    """Generation ratios of data sets, comma-separated, where runs do not tell the share: mine=0.5,other=7."""
    by: str | None = None
    """Columns between whose values curves are compared, comma-separated; data sets always are."""
    margin: float | None = None
    """Difference of scores that counts as none; tests whether PLW's effect is smaller (unset: not tested)."""
    against: str | None = None
    """PLW that the others are compared with, question by question (0,0.1: these two alone; docs/analysis.md)."""
    claims: bool = False
    """Judge the study's claims (paper/claims.json) by these scores: reproduced, contradicted, or cannot tell."""
    bootstrap: int = 2000
    """Draws of each bootstrap of the best PLW; 0 for none."""
    parametric: int = 0
    """Draws of the parametric bootstraps of the mixed models' likelihood ratios (0: none; 999 take a minute or so)."""
    power: bool = False
    """Simulate scores like these, to find how many tasks, seeds and PLWs locate the optimum within width."""
    width: float = 0.2
    """Width of the optimum's 95 % interval, in PLW, that power looks for."""
    assume: str | None = None
    """Numbers by which power simulates scores, in place of a table, as power prints them (docs/analysis.md)."""
    next: int | None = None
    """Propose so many PLWs to run next: those that say most about where the optimum is (unset: none)."""
    output: Path | None = None
    """Folder for fit.json, report.html, figures, against.csv, claims.csv, power.csv, next.json (unset: only MLflow)."""

    def compared(self) -> tuple[float, float | None]:
        """The PLW that others are compared with, and the only other one, if `against` names two. Raises ValueError."""
        against, *others = (float(text) for text in (self.against or "").split(","))
        if (
            len({against, *others}) != 1 + len(others)
            or len(others) > 1
            or not all(map(math.isfinite, [against, *others]))
        ):
            raise ValueError
        return against, others[0] if others else None

    def given_ratios(self) -> dict[str, float]:
        """The generation ratios that are given, by the data set's name."""
        return _given_ratios(self.ratios)

    def subject(self) -> str:
        """What is analysed, in a word or two."""
        sweep = None if self.run_id is None else f"sweep {self.run_id[:8]}"
        return str(self.scores or sweep or self.experiment or "assumed scores")

    def faults(self) -> list[str]:
        given = [value for value in (self.scores, self.run_id, self.experiment, self.assume) if value is not None]
        faults = too_small(self, 0, "bootstrap", "parametric") + too_small(self, 1, "next")
        if self.margin is not None and not 0 < self.margin < math.inf:
            faults.append(f"margin must be a number above 0, got {self.margin}")
        if len(given) != 1:
            faults.append("give one of scores, run-id or experiment (or assume, for power alone)")
        if self.where is not None and self.run_id is None and self.experiment is None:
            faults.append("where selects runs of MLflow: give run-id or experiment")
        if not 0 < self.width < math.inf:
            faults.append(f"width must be a number above 0, got {self.width}")
        if not self.power:
            for name in ("width", "assume"):
                if (value := getattr(self, name)) != getattr(AnalyzeConfig, name):
                    faults.append(f"{name} is {spell(value)}, but that is for power: give --power")
        if self.assume is not None and self.next is not None:
            faults.append("next needs scores, not assume")
        if self.against is not None:
            try:
                self.compared()
            except ValueError:
                faults.append(f"against must be a PLW, or two different ones like 0,0.1, got {self.against}")
            if self.assume is not None:
                faults.append("against needs questions of runs, not assume")
        if self.assume is not None and self.claims:
            faults.append("claims needs scores, not assume")
        return faults + _faults_of_ratios(self.ratios)


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(PresetOptions, DataOptions, Config):
    """Suggest a PLW for a data set, from the published curves of others and from your own runs."""

    ratio: float | None = None
    """Generation ratio of the data set: its completion tokens over its prompt tokens (unset: measured on dataset)."""
    dataset: str | None = None
    """Data set to advise on, as prepare takes it; with ratio it is not read, and is its name among the scores."""
    model: str = "toy"
    """Model whose tokenizer counts the tokens, unless tokenizer is set."""
    task_types: str | None = None
    """Types of task that matter, comma-separated, such as multiple-choice (unset: all); see docs/study.md."""
    scores: Path | None = None
    """Score table of your own runs, as analyze reads it."""
    experiment: str | None = None
    """MLflow experiment (its name) of your own runs, all of whose finished cells count."""
    where: str | None = None
    """Only runs that this search filter of MLflow finds, such as "params.epochs = '3.0'" (unset: all)."""
    ratios: str | None = None
    """Generation ratios of the data sets in your own runs, comma-separated: mine=0.5,other=7 (unset: from the runs)."""
    scale: Literal["none", "fraction", "minmax", "zscore"] = "none"
    """Scale of your own scores, as in analyze."""

    def dataset_names(self) -> tuple[str, ...]:
        """The names that the data set to advise on may have in a score table."""
        if self.dataset is None:
            return ()
        return tuple(dict.fromkeys(data_name(self.dataset, self, shown) for shown in (shown_name, str, short_name)))

    def given_ratios(self) -> dict[str, float]:
        """The generation ratios that are given, by the data set's name."""
        return _given_ratios(self.ratios)

    def faults(self) -> list[str]:
        faults = []
        if self.ratio is None and self.dataset is None:
            faults.append("give the data set's generation ratio, or dataset to measure it on")
        if self.ratio is not None and not 0 < self.ratio < math.inf:
            faults.append(f"ratio must be a number above 0, got {self.ratio}")
        if self.scores is not None and self.experiment is not None:
            faults.append("give one of scores and experiment")
        if self.where is not None and self.experiment is None:
            faults.append("where selects runs of MLflow: give experiment")
        if self.ratios is not None and self.scores is None and self.experiment is None:
            faults.append("ratios belong to your own runs: give scores or experiment")
        return faults + _faults_of_ratios(self.ratios)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(LocalOptions, Config):
    """Run a recorded cell again from what MLflow holds of it, and say what differs."""

    run_id: str | None = None
    """MLflow run of the cell to verify; nothing that it holds is changed, but for the tag plw.verified."""
    scores: bool = False
    """Only score the logged model again, and train nothing."""
    data: bool = False
    """Only compare digests, of data, base, code and logged model; train and score nothing."""
    base: str | None = None
    """Folder of the base model, where the one that the cell was trained on lies elsewhere now."""
    cache_dir: Path | None = None
    """Folder for tokenised data and the study's sets; the hub's go to HF_HOME (unset: plw_mlflow in ~/.cache)."""
    output: Path | None = None
    """Folder for verification.json (unset: it is printed alone)."""

    def faults(self) -> list[str]:
        faults = [] if self.run_id else ["give the run to verify: run-id"]
        if self.scores and self.data:
            faults.append("give one of scores and data")
        return faults


CONFIGS: dict[str, type[Config]] = {
    "main": MainConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "analyze": AnalyzeConfig,
    "advise": AdviseConfig,
    "sweep": SweepConfig,
    "verify": VerifyConfig,
}


def without_effect(values: Mapping[str, Any]) -> set[str]:
    """The names of the options that change nothing about the model that is trained with these values.

    values: those of a TrainConfig by name, unset ones None or empty.
    """
    return {
        field.name
        for field in fields(TrainConfig)
        if "has_effect" in field.metadata and not field.metadata["has_effect"](values)
    }


# The options that may have no effect though they are given, each with the one that gives it an effect.
_EFFECT_BY = {**{field.name: "method" for field in fields(AdapterOptions)}, "base_penalty_order": "base_penalty"}


def idle_options(config: TrainConfig | SweepConfig) -> list[str]:
    """A line on each option that was given, and that has no effect on any cell of a config.

    An option counts as given where its value is not its default: `mlflow run` passes every default on.
    """
    cells: Sequence[TrainConfig] = config.cells() if isinstance(config, SweepConfig) else [config]
    without = set.intersection(*(without_effect(vars(cell)) for cell in cells))
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    return [
        f"{flag(name)} is {spell(getattr(config, name))}, but has no effect with "
        f"--{flag(by)} {spell(getattr(config, by))}"
        for name, by in _EFFECT_BY.items()
        if name in without and getattr(config, name) != defaults[name]
    ]


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
