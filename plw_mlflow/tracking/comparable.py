"""Comparable: whether the cells of a score table differ in nothing that the analysis does not take into account.

A curve over PLW is a claim about PLW only if nothing else differs between its cells. So the cells of one data set that
have the same model and method must have been trained by one recipe, and all cells of one data set must have been scored
in one way. Between models, methods and data sets, recipes may differ, as each has its own best learning rate: the
analysis gives a model a level of its own, and a data set a curve of its own. A note then says so.
"""

from __future__ import annotations

import functools
import typing
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import click
import mlflow
import pandas as pd

from plw_mlflow.config import (
    IN_DATA_NAME,
    TEXT_FIELDS,
    CellOptions,
    ScoreOptions,
    TrainConfig,
    shown_name,
    spell,
    split_list,
    without_effect,
)
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation.prompting import HARNESS
from plw_mlflow.tracking.cells import cell_columns, parameters
from plw_mlflow.tracking.run import Run
from plw_mlflow.tracking.scores import read_questions, read_scores

CELL_FIELDS = {field.name for field in fields(CellOptions)}
SCORE_FIELDS = {field.name for field in fields(ScoreOptions)}
# Columns of the score table that tell one way of scoring a task from another, and their names in messages.
SCORED_BY = {
    "metric": "metric",
    "n": "number of questions",
    "num_fewshot": "number of few-shot examples",
    "task_version": "version",
    "prompt": "kind of prompt",
    "harness_version": "version of the harness",
    "caveat": "caveat",
    "precision": "arithmetic",
}
MAX_NAMED = 3  # differences in one message
Facts = Mapping[str, Hashable]


@dataclass(frozen=True)
class Cell:
    """A scored cell: its run, and the columns that tell it from others."""

    run: mlflow.entities.Run
    params: Mapping[str, str]
    columns: Mapping[str, Any]  # model, dataset, plw, seed, method, and the parameters to compare by

    @functools.cached_property
    def scores(self) -> pd.DataFrame:
        """The run's score table."""
        return read_scores(Run(self.run_id))

    def questions(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Every question's scores of the run (`read_questions`), with the columns that tell the cell from others."""
        return read_questions(Run(self.run_id), columns).assign(**self.columns)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.run.info.run_id)


@dataclass(frozen=True)
class Difference:
    """One parameter or fact in which cells differ that should not."""

    name: str
    cells_by_value: dict[Any, list[Cell]]  # the most frequent value first

    def text(self) -> str:
        """The difference in words."""
        values = []
        for value, cells in self.cells_by_value.items():
            more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
            values.append(f"{_shown(value)} in run {cells[0].run_id}{more}")
        return f"{self.name} is {', but '.join(values)}"


class Naming:
    """How a table names models or data sets: by short names, and by the start of their content where those clash."""

    def __init__(
        self, kind: str, spelled: Sequence[str], shown: Sequence[str], contents: Sequence[str], tag: str
    ) -> None:
        """kind: "model" or "data set". tag: of the runs, that identifies the content.

        The lists hold of each run the name as it was given, the short name, and the value of the tag.

        Raises UserError where one given name had different contents.
        """
        by_spelling: dict[str, str] = {}
        for given, content in zip(spelled, contents, strict=True):
            if by_spelling.setdefault(given, content) != content:
                raise UserError(
                    f"{kind} {given} had other contents in some runs than in others ({_start(by_spelling[given])} and "
                    f"{_start(content)}), so their cells cannot be pooled; choose by "
                    f'--where \'tags."{tag}" = "{content}"\', or give them experiments of their own'
                )
        if kind == "model":  # one folder has many spellings, some of which look like a hub id
            shortest: dict[str, str] = {}
            for short, content in sorted(zip(shown, contents, strict=True), key=lambda pair: len(pair[0])):
                shortest.setdefault(content, short)
            shown = [shortest[content] for content in contents]
        contents_by_name: dict[str, set[str]] = {}
        for short, content in zip(shown, contents, strict=True):
            contents_by_name.setdefault(short, set()).add(content)
        self._names = {
            given: short if len(contents_by_name[short]) == 1 else f"{short} ({_start(content)})"
            for given, short, content in zip(spelled, shown, contents, strict=True)
        }

    def get(self, given: str, short: str) -> str:
        """The name of what was given as `given`, or `short` where no cell has it."""
        return self._names.get(given, short)


def naming(runs: Sequence[mlflow.entities.Run]) -> tuple[Naming, Naming]:
    """The names of the runs' models and data sets. Raises UserError where one name had two contents."""
    params = [parameters(run) for run in runs]
    spelled, shown = ([cell_columns(values, how) for values in params] for how in (str, shown_name))

    def name(kind: str, column: str, tag: str) -> Naming:
        given, short = ([columns[column] for columns in rows] for rows in (spelled, shown))
        contents = [run.data.tags.get(tag, name) for run, name in zip(runs, given, strict=True)]
        return Naming(kind, given, short, contents, tag)

    return name("model", "model", "plw.base_model"), name("data set", "dataset", "plw.data_sha256")


def check(cells: Sequence[Cell], also: tuple[str, ...], place: str, where: str | None = None) -> list[str]:
    """Notes on how cells differ, where the differences do not forbid to compare them.

    also: the parameters to compare by, which may differ. place: where the cells are from, for messages. where: the
        filter that they have passed.

    Raises UserError where cells of one data set differ in their recipe, their tokenised examples or their scoring.
    """
    recipes: dict[str, dict[tuple[str, str], Facts]] = {}  # by data set, then model and method
    for dataset, of_dataset in _grouped(cells, [cell.columns["dataset"] for cell in cells]).items():
        kinds = [(cell.columns["model"], cell.columns["method"]) for cell in of_dataset]
        for kind, of_kind in _grouped(of_dataset, kinds).items():
            facts = {cell.run_id: recipe(cell, also) for cell in of_kind}
            if not {*also} & {*TEXT_FIELDS}:
                facts = _with_tokens(facts, of_kind)
            _refuse(differences(of_kind, facts), f"{place}: the cells of {kind[0]} on {dataset}", of_kind, where)
            recipes.setdefault(dataset, {})[kind] = facts[of_kind[0].run_id]
        # A parameter of the scoring that is compared by makes ways of scoring that may differ.
        ways = [tuple(cell.columns[name] for name in also if name in SCORE_FIELDS) for cell in of_dataset]
        for of_way in _grouped(of_dataset, ways).values():
            scorings = {cell.run_id: scoring(cell) for cell in of_way}
            _refuse(differences(of_way, scorings), f"{place}: the scores on {dataset}", of_way, where)
    return _notes_of_recipes(recipes) + _notes_of_code(cells)


def recipe(cell: Cell, also: tuple[str, ...] = ()) -> dict[str, Hashable]:
    """The options that decide how a cell is trained, by value, without those that tell it from other cells.

    An option that did not exist when the run was made has its default, with which the code does what it did then.
    """
    hints = _hints()
    spelled = {**_defaults(cell.params.get("preset") or "toy"), **cell.params}
    values = {name: by_value(spelled[name], hints[name]) for name in hints}
    leave_out = CELL_FIELDS | {*IN_DATA_NAME, *also} | without_effect(values)
    facts = {name: value for name, value in values.items() if name not in leave_out}
    if "precision" in facts:
        facts["precision"] = cell.run.data.tags.get("plw.precision", facts["precision"])  # what auto stood for
    if (saved := cell.run.data.tags.get("plw.save_precision")) is not None:  # older runs have saved all in float32
        facts["save_precision"] = saved  # to which the scored weights were rounded
    return facts


def scoring(cell: Cell, tasks: Collection[str] | None = None) -> dict[str, Hashable]:
    """How a cell was scored: on which tasks, and for each of them what SCORED_BY lists. tasks: for these alone."""
    rows = cell.scores if tasks is None else cell.scores[cell.scores["task"].isin(tasks)]
    facts: dict[str, Hashable] = {"the tasks": ", ".join(sorted(rows["task"]))}
    for row in rows.to_dict("records"):
        values = {name: "" if pd.isna(row.get(name)) else row[name] for name in SCORED_BY}
        # Older tables lack these columns, when there was no other kind.
        values["prompt"] = values["prompt"] or HARNESS
        values["precision"] = values["precision"] or "float32"
        facts |= {f"the {SCORED_BY[name]} of task {row['task']}": value for name, value in values.items()}
    if "num_fewshot" in rows and (rows["num_fewshot"] > 0).any():
        facts["fewshot_seed"] = by_value(cell.params.get("fewshot_seed", str(ScoreOptions.fewshot_seed)), int)
    return facts


def differences(cells: Sequence[Cell], facts: Mapping[str, Facts]) -> list[Difference]:
    """In what cells differ. facts: by run id. A fact that a cell does not have is no difference."""
    result = []
    for name in dict.fromkeys(name for of_cell in facts.values() for name in of_cell):
        having = [cell for cell in cells if name in facts[cell.run_id]]
        by_value = _grouped(having, [facts[cell.run_id][name] for cell in having])
        if len(by_value) > 1:
            result.append(Difference(name, dict(sorted(by_value.items(), key=lambda item: -len(item[1])))))
    return result


def by_value(spelled: str, hint: Any) -> Hashable:
    """An option's value, so that 1e-2 and 0.01 are one number, and lists of the same names are equal in any order.

    hint: the option's type.
    """
    kinds = typing.get_args(hint) or (hint,)
    if spelled == "":
        return ""
    try:
        if bool in kinds:
            return bool(click.BOOL(spelled))
        if int in kinds or float in kinds:
            return float(spelled)
    except (ValueError, click.BadParameter):
        return spelled
    return ",".join(sorted(split_list(spelled))) if "," in spelled else spelled


def _refuse(differing: Sequence[Difference], which: str, cells: Sequence[Cell], where: str | None) -> None:
    """Raise UserError if there are differences; the message names the first ones, and what to do."""
    if not differing:
        return
    texts = [difference.text() for difference in differing[:MAX_NAMED]]
    if len(differing) > MAX_NAMED:
        texts.append(f"{len(differing) - MAX_NAMED} differences more")
    raise UserError(f"{which} cannot be pooled: {'; '.join(texts)}; {_ways_out(differing, cells, where)}")


def _ways_out(differing: Sequence[Difference], cells: Sequence[Cell], where: str | None) -> str:
    """What the caller can do about differences, as one phrase."""
    by_param = {name: _grouped(cells, [cell.params.get(name, "") for cell in cells]) for name in cells[0].params}
    params = [difference.name for difference in differing if difference.name in by_param]
    # Where the scoring differs, one of these is the parameter that has caused it.
    causes = ("limit", "tasks", "apply_template", "fewshot_seed", "eval_precision")
    params += [name for name in causes if len(by_param.get(name, {})) > 1]
    ways = []
    if params:
        name = params[0]
        most_frequent = max(by_param[name].values(), key=len)[0].run.data.params[name]
        if "'" not in most_frequent:
            before = f"{where} and " if where else ""
            ways.append(f"choose by --where \"{before}params.{name} = '{most_frequent}'\"")
        ways.append(f"compare them (analyze --by {name})")
    else:
        ways.append("choose by --where, which takes a search filter of MLflow")
    return ", ".join([*ways, "or analyse a sweep by itself (analyze --run-id)"])


def _with_tokens(recipes: dict[str, dict[str, Hashable]], cells: Sequence[Cell]) -> dict[str, dict[str, Hashable]]:
    """Recipes with the digest of the tokenised examples, where all cells have it.

    If it is the same for all cells, the options that make tokens of text cannot matter, and are left out. A template
    may be given by two paths, for example.
    """
    tokens = {cell.run_id: cell.run.data.tags.get("plw.examples_sha256") for cell in cells}
    if None in tokens.values():
        return recipes
    if len(set(tokens.values())) == 1:
        return {
            run_id: {name: value for name, value in facts.items() if name not in TEXT_FIELDS}
            for run_id, facts in recipes.items()
        }
    return {run_id: {**facts, "digest of the tokenised examples": tokens[run_id]} for run_id, facts in recipes.items()}


def _shown(value: Hashable) -> str:
    """A value as messages show it."""
    if value in ("", None):
        return "unset"
    return f"{value:g}" if isinstance(value, float) else spell(value)


def _notes_of_recipes(recipes: Mapping[str, Mapping[tuple[str, str], Facts]]) -> list[str]:
    """A note on each option in which the recipes of models, methods and data sets differ."""
    facts_by_kind = {
        f"{model} ({method}) on {dataset}": facts
        for dataset, kinds in recipes.items()
        for (model, method), facts in kinds.items()
    }
    notes = []
    for name in sorted(set.intersection(*(set(facts) for facts in facts_by_kind.values()))):
        kinds_by_value: dict[str, list[str]] = {}
        for kind, facts in facts_by_kind.items():
            kinds_by_value.setdefault(_shown(facts[name]), []).append(kind)
        if len(kinds_by_value) > 1:
            values = ", but ".join(f"{value} for {' and '.join(kinds)}" for value, kinds in kinds_by_value.items())
            notes.append(f"Differences between these may come of the recipe: {name} is {values}.")
    return notes


def _notes_of_code(cells: Sequence[Cell]) -> list[str]:
    """Notes on how the code and the packages differ that the cells were run by."""
    notes = []
    commits = Counter(cell.run.data.tags.get("plw.git_commit", "unknown") for cell in cells)
    code = {cell.run.data.tags.get("plw.code_sha256") for cell in cells}
    if len(code) > 1 or (code == {None} and len(commits) > 1):
        listed = (f"{commit[:10]}{'-dirty' * commit.endswith('-dirty')} ({n})" for commit, n in commits.items())
        notes.append(f"The cells were not all run by the same code. Commits (cells): {', '.join(listed)}.")
    environments = _grouped(cells, [cell.run.data.tags.get("plw.environment", cell.run_id) for cell in cells])
    if len(environments) > 1:
        versions: dict[str, set[str]] = {}  # by package
        for of_environment in environments.values():
            for package, version in _environment(of_environment[0].run).items():
                versions.setdefault(package, set()).add(version)
        differing = [f"{package} {' and '.join(sorted(of))}" for package, of in versions.items() if len(of) > 1]
        if differing:
            notes.append(f"The cells were run in different environments: {', '.join(differing)}.")
    return notes


def _environment(run: mlflow.entities.Run) -> dict[str, str]:
    """The contents of a run's environment.json; empty where the run has none."""
    try:
        environment: dict[str, str] = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/environment.json")
    except (mlflow.MlflowException, OSError):
        return {}
    return environment


def _grouped(cells: Sequence[Cell], keys: Sequence[Hashable]) -> dict[Any, list[Cell]]:
    """Cells by their keys, in the order in which those occur."""
    groups: dict[Any, list[Cell]] = {}
    for cell, key in zip(cells, keys, strict=True):
        groups.setdefault(key, []).append(cell)
    return groups


def _start(content: str) -> str:
    """The start of each digest in a list of them, or a hub id with its commit as it is."""
    return "+".join(part[:8] if len(part) == 64 and part.isalnum() else part for part in content.split(","))


@functools.cache
def _hints() -> dict[str, Any]:
    return {name: hint for name, hint in typing.get_type_hints(TrainConfig).items()}


@functools.cache
def _defaults(preset: str) -> dict[str, str]:
    """The spelling of every option that a preset's cell has unless it is given."""
    config = TrainConfig(preset=preset)  # type: ignore[arg-type]
    return {field.name: spell(getattr(config, field.name)) for field in fields(TrainConfig)}
