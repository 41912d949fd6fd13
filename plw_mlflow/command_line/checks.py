"""Checks: do the files, folders, models and tasks that a command names exist on this machine?

A config checks its values by itself. These checks come next, before anything heavy is imported or loaded, and take
well under a second, so that a misspelt name costs no wait and leaves no failed run. The hub is asked last. Only names
that a tracking server may know are looked up later.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from plw_mlflow.config import (
    HUB_ID,
    MODELS,
    AdviseConfig,
    AnalyzeConfig,
    Config,
    DataOptions,
    EvaluateConfig,
    MainConfig,
    PrepareConfig,
    RecipeOptions,
    ScoreOptions,
    SweepConfig,
    TrainConfig,
    VerifyConfig,
    cache_folder,
)
from plw_mlflow.data import sources, templates
from plw_mlflow.environment import abilities, outputs, precision
from plw_mlflow.environment.processes import is_first_process
from plw_mlflow.errors import Unreachable, UserError, did_you_mean
from plw_mlflow.evaluation import local_documents, task_sets
from plw_mlflow.models import hub, location
from plw_mlflow.toy import TOY_FOLDER

# What the entry points write into --output, but for the figures of a report, whose names depend on the data.
PROFILE, SCORES, ADVICE = (
    ("profile.json", "profile.png"),
    ("scores.csv", "questions.parquet"),
    ("advice.json", "advice.png"),
)
VERIFICATION = ("verification.json",)
REPORT = (
    "fit.json",
    "report.html",
    "fits.csv",
    "answers.csv",
    "tasks.csv",
    "against.csv",
    "axes.csv",
    "claims.csv",
    "power.csv",
    "next.json",
)
FIGURES = (
    "answer-*",
    "curve-*",
    "tasks-*",
    "optimum-*",
    "residuals-*",
    "overview.*",
    "no-effect.*",
)  # of a report, by data set
TRAINED = (*PROFILE, outputs.MODEL, outputs.ADAPTER)
OUTPUTS: dict[type[Config], tuple[str, ...]] = {
    PrepareConfig: PROFILE,
    TrainConfig: TRAINED,
    MainConfig: (*TRAINED, *SCORES),
    EvaluateConfig: SCORES,
    SweepConfig: (*SCORES, *REPORT),
    AnalyzeConfig: REPORT,
    AdviseConfig: ADVICE,
    VerifyConfig: VERIFICATION,
}
# A folder holds weights if it has a file of one of these names.
WEIGHTS = ("*.safetensors", "*.bin")
NO_TOKENIZER = SimpleNamespace(added_tokens_decoder={}, special_tokens_map={})  # enough to read a template's file


def check(config: Config) -> None:
    """Raise UserError that lists all that a config names and this machine does not have, or cannot write to.

    If nothing it reads is missing, the folders that it writes to are made.
    """
    _raise_all(_references(config))
    _raise_all(_folders(config))


def check_hub(config: Config) -> None:
    """Raise UserError that lists the models and tokenizers that a config names and the hub does not have.

    Raises Unreachable where it cannot be asked (`hub.check`).
    """
    _raise_all(_on_hub(config))


def _raise_all(checks: Iterable[Callable[[], None]]) -> None:
    """Make all checks, and raise UserError that lists what they have found."""
    faults = []
    for check_one in checks:
        try:
            check_one()
        except UserError as error:
            faults.append(str(error))
        except Unreachable:
            raise
        except OSError as error:  # a name that is too long, or lies in a folder that may not be read
            faults.append(f"{error.filename}: {error.strerror}")
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))


@contextmanager
def reserved_output(config: Any) -> Iterator[None]:
    """Within the block, a command's --output folder is reserved for this process (`outputs.reserve`), if it has one."""
    folder, names = config.output if is_first_process() else None, [*OUTPUTS[type(config)]]
    if folder is not None and "report.html" in names:  # names of figures depend on the data: those that exist are known
        names += [path.name for pattern in FIGURES for path in sorted(folder.glob(pattern))]
    with outputs.reserve(folder, names, _inputs(config)):
        yield


def _inputs(config: Any) -> list[Path]:
    """The files and folders on this machine that a command reads."""
    given: list[Any] = []
    for name in ("dataset", "model", "mix", "template", "tokenizer"):
        if getattr(config, name, None):
            given += _listed(config, name)
    given += [getattr(config, name, None) for name in ("scores", "data_dir", "base")]
    return [Path(path) for path in given if isinstance(path, str | Path) and path and os.path.exists(path)]


def _references(config: Any) -> Iterator[Callable[[], None]]:
    """The checks of all that a command reads."""
    if _reads_data(config):
        for dataset in filter(None, [*_listed(config, "dataset"), *_listed(config, "mix")]):
            yield partial(sources.check, dataset, config.data_dir)
        for tokenizer, model, template in itertools.product(
            _listed(config, "tokenizer"), _listed(config, "model"), _listed(config, "template")
        ):
            yield partial(_template, template, tokenizer or model)
    if isinstance(config, RecipeOptions):  # main, train and sweep
        if not isinstance(config, SweepConfig) or config.engine == "local":  # else cells run on other machines
            yield from _abilities(config)
        for model in _listed(config, "model"):
            yield partial(_model, model)
    if _reads_data(config) and config.tokenizer is None:
        for model in _listed(config, "model"):
            yield partial(_tokenizer, "model", model)
    if isinstance(config, EvaluateConfig) and config.endpoint is None and config.model is not None:
        yield partial(_model, config.model, is_scored=True)
    if (_reads_data(config) or isinstance(config, EvaluateConfig)) and config.tokenizer is not None:
        for tokenizer in filter(None, _listed(config, "tokenizer")):
            yield partial(_tokenizer, "tokenizer", tokenizer)
    if any("bfloat16" in _listed(config, name) for name in ("precision", "eval_precision") if hasattr(config, name)):
        yield _bfloat16
    if isinstance(config, ScoreOptions):
        yield partial(task_sets.check, config.tasks)
        if config.data_dir is not None:
            yield partial(_documents, config.tasks, config.data_dir)
    if isinstance(config, AnalyzeConfig | AdviseConfig) and config.scores is not None:
        yield partial(_table, config.scores)


def _abilities(config: Any) -> Iterator[Callable[[], None]]:
    """The checks of what this machine has to be able to do for a training."""
    for method in _listed(config, "method"):
        yield partial(abilities.check_method, method)
    for optimizer in _listed(config, "optimizer"):
        yield partial(abilities.check_optimizer, optimizer)
    if config.compile:
        yield abilities.check_compilers


def _bfloat16() -> None:
    if abilities.has_gpu():  # a CPU without it is slow at it, but right
        precision.resolve("bfloat16", "")


def _on_hub(config: Any) -> Iterator[Callable[[], None]]:
    """The checks of all that may be on the hub."""
    is_scored = isinstance(config, EvaluateConfig) and config.endpoint is None and config.model is not None
    if is_scored and not config.model.startswith("models:/"):
        yield partial(hub.check, "model", config.model)
    if isinstance(config, RecipeOptions):
        for model in _listed(config, "model"):
            yield partial(hub.check, "model", model)
    if not _reads_data(config) and not isinstance(config, EvaluateConfig):
        return
    if config.tokenizer is not None:
        for tokenizer in filter(None, _listed(config, "tokenizer")):
            yield partial(hub.check, "tokenizer", tokenizer)
    elif not isinstance(config, EvaluateConfig | RecipeOptions):  # prepare and advise, which need no more of a model
        for model in _listed(config, "model"):
            yield partial(hub.check, "tokenizer", model)


def _folders(config: Any) -> Iterator[Callable[[], None]]:
    """The checks of all folders that a command writes to."""
    for name in ("output", "checkpoint_dir", "cache_dir"):
        folder = getattr(config, name, None)
        # A cache that exists may be read-only.
        if folder is not None and not (name == "cache_dir" and os.path.isdir(folder)):
            yield partial(_folder, name.replace("_", "-"), folder)
    if _reads_data(config) and config.cache_dir is None and not os.path.isdir(cache_folder(config)):
        yield lambda: _folder("cache-dir", cache_folder(config))


def _reads_data(config: Config) -> bool:
    """Whether a command reads a data set. Of those that can, advise does not if it is given a ratio."""
    return isinstance(config, DataOptions) and not (isinstance(config, AdviseConfig) and config.ratio is not None)


def _listed(config: Any, name: str) -> list[str]:
    """The values of an option that is a list in a sweep, and one value elsewhere."""
    return config.values(name) if isinstance(config, SweepConfig) else [getattr(config, name)]


def _template(name: str, tokenizer: str) -> None:
    if name == "chat":
        folder = TOY_FOLDER if tokenizer == "toy" else Path(tokenizer)
        if folder.is_dir() and not _has_chat_template(folder):
            raise UserError(f"tokenizer {tokenizer} has no chat template; give one: --template FILE.jinja")
        return
    templates.load(name, NO_TOKENIZER)
    path = templates.file(name)
    if path is not None and path.suffix == ".jinja":
        try:
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(path.read_text(encoding="utf-8"))
        except TemplateSyntaxError as error:
            if "unknown tag" not in str(error.message):  # transformers adds tags of its own
                raise UserError(f"template {path} is no Jinja: line {error.lineno}: {error.message}") from None


def _has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer's folder has a chat template in one of the places where transformers looks for it."""
    settings = folder / "tokenizer_config.json"
    return (
        _has(folder, ("chat_template.*", "additional_chat_templates"))
        or not settings.is_file()
        or "chat_template" in settings.read_text(encoding="utf-8", errors="replace")
    )


def _model(name: str, *, is_scored: bool = False) -> None:
    """is_scored: a model that is only scored may also be a folder of adapters, or a model in MLflow's registry."""
    if is_scored and name.startswith("models:/"):
        return
    folder = _place("model", name)
    if folder is None or (is_scored and (folder / "adapter_config.json").is_file()):
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"folder {name} holds no model: it has no config.json")
    if not _has(folder, WEIGHTS):
        raise UserError(f"folder {name} holds no weights: it has no file {' or '.join(WEIGHTS)}")


def _tokenizer(kind: str, name: str) -> None:
    folder = _place(kind, name)
    if folder is not None and not _has(folder, location.TOKENIZERS):
        raise UserError(f"folder {name} holds no tokenizer; name one with --tokenizer")


def _place(kind: str, name: str) -> Path | None:
    """The folder that the name of a model or tokenizer means; None for toy, and for what may be on the hub."""
    known = ["toy", *MODELS]
    if name in known:
        return None
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"{kind} {name} is a file; give the folder that holds it")
    near = did_you_mean(name, known)
    # The hub's oldest models have ids without an owner, such as gpt2.
    if HUB_ID.fullmatch(name) or (HUB_ID.fullmatch(f"owner/{name}") and not near):
        return None
    raise UserError(
        f"{kind} {name!r} is not a folder on this machine, nor a hub id (OWNER/NAME@REVISION), nor one of "
        f"{', '.join(known)}{did_you_mean(name, known, folders=[])}"
    )


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _documents(tasks: str, folder: Path) -> None:
    """Raise UserError where a task that would read a folder's files lacks one."""
    for benchmark in task_sets.select(tasks):
        if benchmark.task in local_documents.LOCAL:
            local_documents.locate(benchmark.task, folder)


def _table(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"scores {path} is a folder; give a CSV file")
    if not path.is_file():
        raise UserError(f"scores {path} is not a file{did_you_mean(str(path), folders=[])}")
    path.open("rb").close()


def _folder(name: str, folder: Path) -> None:
    """Make a folder, and raise UserError where it cannot be written to.

    Trying is the only way to know: permissions do not tell of a disk that is full or read-only, nor hold for root.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError:
        raise UserError(f"{name} {folder} is not a folder") from None
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written to: {error.strerror}") from None
