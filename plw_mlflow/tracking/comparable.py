"""Comparable: whether the cells of a score table differ in nothing but what the analysis knows of.

A curve over PLW is a claim about PLW only if nothing else differs between its cells. So the cells of one data set that
have the same model and method must have been trained by one recipe, and all cells of one data set must have been scored
in one way. Between models, methods and data sets recipes may differ, as each has its own best learning rate: the
analysis gives a model a level of its own, and a data set a curve of its own. That is then told in a note.
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
    TEXT_FIELDS,
    CellOptions,
    ScoreOptions,
    TrainConfig,
    names,
    shown_name,
    spell,
    without_effect,
)
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation.prompting import HARNESS
from plw_mlflow.tracking.cells import cell_columns, parameters
from plw_mlflow.tracking.run import Run
from plw_mlflow.tracking.scores import read_scores

CELL_FIELDS = {field.name for field in fields(CellOptions)}
SCORE_FIELDS = {field.name for field in fields(ScoreOptions)}
IN_DATA_NAME = {"invert", "mix", "mix_invert", "mix_share"}  # a data set is named by them
# What tells one way of scoring a task from another, and how it reads.
SCORED_BY = {
    "metric": "metric",
    "n": "number of questions",
    "num_fewshot": "number of few-shot examples",
    "task_version": "version",
    "prompt": "kind of prompt",
    "harness_version": "version of the harness",
    "caveat": "caveat",
}
Facts = Mapping[str, Hashable]


@dataclass(frozen=True)
class Cell:
    """A scored cell: its run, and what it is told apart by."""

    run: mlflow.entities.Run
    params: Mapping[str, str]
    columns: Mapping[str, Any]  # model, dataset, plw, seed, method, and the parameters that are compared by

    @functools.cached_property
    def scores(self) -> pd.DataFrame:
        """The run's score table."""
        return read_scores(Run(self.run_id))

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.run.info.run_id)


@dataclass(frozen=True)
class Difference:
    """One thing in which cells differ that should not."""

    name: str  # of the parameter or fact
    values: dict[Any, list[Cell]]  # by value, the most frequent one first

    def text(self) -> str:
        """The difference in words."""
        named = []
        for value, cells in self.values.items():
            more = f" and {len(cells) - 1} more" if cells[1:] else ""
            named.append(f"{_told(value)} in run {cells[0].run_id}{more}")
        return f"{self.name} is {', but '.join(named)}"


class Naming:
    """How a table names models or data sets: as short as tells contents apart."""

    def __init__(
        self, what: str, spelled: Sequence[str], shown: Sequence[str], contents: Sequence[str], tag: str
    ) -> None:
        """Of each run: how it was given, its short name, and what identifies its content, as the run's tag says.

        Raises UserError where one that was given in the same way had different contents.
        """
        by_spelling: dict[str, str] = {}
        for given, content in zip(spelled, contents, strict=True):
            if by_spelling.setdefault(given, content) != content:
                raise UserError(
                    f"{what} {given} had other contents in some runs than in others ({_start(by_spelling[given])} and "
                    f"{_start(content)}), so their cells cannot be pooled; choose by "
                    f'--where \'tags."{tag}" = "{content}"\', or give them experiments of their own'
                )
        if what == "model":  # one folder has many spellings, some of which look like a hub id
            shortest: dict[str, str] = {}
            for short, content in sorted(zip(shown, contents, strict=True), key=lambda pair: len(pair[0])):
                shortest.setdefault(content, short)
            shown = [shortest[content] for content in contents]
        sharing: dict[str, set[str]] = {}
        for short, content in zip(shown, contents, strict=True):
            sharing.setdefault(short, set()).add(content)
        self._names = {
            given: short if len(sharing[short]) == 1 else f"{short} ({_start(content)})"
            for given, short, content in zip(spelled, shown, contents, strict=True)
        }

    def get(self, given: str, short: str) -> str:
        """The name of what was given as `given`; its short name where no cell has it."""
        return self._names.get(given, short)


def naming(runs: Sequence[mlflow.entities.Run]) -> tuple[Naming, Naming]:
    """The names of the runs' models and data sets. Raises UserError where one name had two contents."""
    listed = [parameters(run) for run in runs]
    spelled, shown = ([cell_columns(params, how) for params in listed] for how in (str, shown_name))
    found = []
    for what, column, tag in (("model", "model", "plw.base_model"), ("data set", "dataset", "plw.data_sha256")):
        given, short = ([one[column] for one in rows] for rows in (spelled, shown))
        contents = [run.data.tags.get(tag, name) for run, name in zip(runs, given, strict=True)]
        found.append(Naming(what, given, short, contents, tag))
    return found[0], found[1]


def check(cells: Sequence[Cell], also: tuple[str, ...], what: str, where: str | None = None) -> list[str]:
    """Notes on what else differs between cells that may be compared.

    also: the parameters that are compared by, and may differ. what: says to a person where the cells are from.
    where: the filter that they have passed.
    Raises UserError where cells of one data set differ in their recipe or their scoring, or where examples do.
    """
    notes = []
    recipes: dict[str, dict[tuple[str, str], Facts]] = {}  # by data set, then model and method
    for dataset, here in _grouped(cells, [one.columns["dataset"] for one in cells]).items():
        kinds = [(one.columns["model"], one.columns["method"]) for one in here]
        for kind, alike in _grouped(here, kinds).items():
            of_kind = {one.run_id: recipe(one, also) for one in alike}
            if not {*also} & {*TEXT_FIELDS}:
                of_kind = _with_tokens(of_kind, alike)
            _refuse(differences(alike, of_kind), f"{what}: the cells of {kind[0]} on {dataset}", alike, where)
            recipes.setdefault(dataset, {})[kind] = of_kind[alike[0].run_id]
        # A parameter of the scoring that is compared by makes ways of scoring that may differ.
        by = [tuple(one.columns[name] for name in also if name in SCORE_FIELDS) for one in here]
        for alike in _grouped(here, by).values():
            scorings = {one.run_id: scoring(one) for one in alike}
            _refuse(differences(alike, scorings), f"{what}: the scores on {dataset}", alike, where)
    notes += _notes_of_recipes(recipes)
    notes += _notes_of_code(cells)
    return notes


def recipe(cell: Cell, also: tuple[str, ...] = ()) -> dict[str, Hashable]:
    """What decides how a cell is trained, but for what tells it from other cells: options by value.

    An option that the run was made before is at its default, by which later code does as the earlier one did.
    """
    hints = _hints()
    spelled = {**_defaults(cell.params.get("preset") or "toy"), **cell.params}
    values = {name: by_value(spelled[name], hints[name]) for name in hints}
    leave_out = CELL_FIELDS | IN_DATA_NAME | set(also) | without_effect(values)
    found = {name: value for name, value in values.items() if name not in leave_out}
    if "precision" in found:
        found["precision"] = cell.run.data.tags.get("plw.precision", found["precision"])  # what auto has come to
    return found


def scoring(cell: Cell, tasks: Collection[str] | None = None) -> dict[str, Hashable]:
    """How a cell was scored: which tasks, and of each what SCORED_BY has. tasks: of these alone."""
    rows = cell.scores if tasks is None else cell.scores[cell.scores["task"].isin(tasks)]
    found: dict[str, Hashable] = {"the tasks": ", ".join(sorted(rows["task"]))}
    for row in rows.to_dict("records"):
        values = {name: "" if pd.isna(row.get(name)) else row[name] for name in SCORED_BY}
        values["prompt"] = values["prompt"] or HARNESS  # as it was before there was another
        found |= {f"the {SCORED_BY[name]} of task {row['task']}": value for name, value in values.items()}
    if "num_fewshot" in rows and (rows["num_fewshot"] > 0).any():
        found["fewshot_seed"] = by_value(cell.params.get("fewshot_seed", str(ScoreOptions.fewshot_seed)), int)
    return found


def differences(cells: Sequence[Cell], facts: Mapping[str, Facts]) -> list[Difference]:
    """In what cells differ. facts: by run id."""
    found = []
    for name in dict.fromkeys(name for one in facts.values() for name in one):
        having = [one for one in cells if name in facts[one.run_id]]
        values = _grouped(having, [facts[one.run_id][name] for one in having])
        if len(values) > 1:
            ordered = sorted(values.items(), key=lambda item: -len(item[1]))
            found.append(Difference(name, dict(ordered)))
    return found


def by_value(spelled: str, hint: Any) -> Hashable:
    """An option's value; hint: its type. 1e-2 and 0.01 are one number, and the order of a list's names says nothing."""
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
    return ",".join(sorted(names(spelled))) if "," in spelled else spelled


def _refuse(found: Sequence[Difference], which: str, cells: Sequence[Cell], where: str | None) -> None:
    """Raise UserError where there are differences."""
    if not found:
        return
    told = "; ".join(one.text() for one in found[:3]) + (f"; {len(found) - 3} differences more" if found[3:] else "")
    raise UserError(f"{which} cannot be pooled: {told}; {_ways_out(found, cells, where)}")


def _ways_out(found: Sequence[Difference], cells: Sequence[Cell], where: str | None) -> str:
    """What the caller can do about differences, as one phrase."""
    of_cells = {name: _grouped(cells, [one.params.get(name, "") for one in cells]) for name in cells[0].params}
    told_by = [one.name for one in found if one.name in of_cells]
    told_by += [
        name for name in ("limit", "tasks", "apply_template", "fewshot_seed") if len(of_cells.get(name, {})) > 1
    ]
    ways = []
    if told_by:
        name = told_by[0]
        most = max(of_cells[name].values(), key=len)[0].run.data.params[name]
        if "'" not in most:
            before = f"{where} and " if where else ""
            ways.append(f"choose by --where \"{before}params.{name} = '{most}'\"")
        ways.append(f"compare them (analyze --by {name})")
    else:
        ways.append("choose by --where, which takes a search filter of MLflow")
    return ", ".join([*ways, "or analyse a sweep by itself (analyze --run-id)"])


def _with_tokens(recipes: dict[str, dict[str, Hashable]], cells: Sequence[Cell]) -> dict[str, dict[str, Hashable]]:
    """Recipes with the digest of the tokenised examples, where all cells have it.

    Where it is the same for all, it stands for the options that make tokens of text: a template has many paths.
    """
    tokens = {one.run_id: one.run.data.tags.get("plw.examples_sha256") for one in cells}
    if None in tokens.values():
        return recipes
    if len(set(tokens.values())) == 1:
        return {
            run_id: {name: value for name, value in one.items() if name not in TEXT_FIELDS}
            for run_id, one in recipes.items()
        }
    return {run_id: {**one, "digest of the tokenised examples": tokens[run_id]} for run_id, one in recipes.items()}


def _told(value: Hashable) -> str:
    """A value in words."""
    if value in ("", None):
        return "unset"
    return f"{value:g}" if isinstance(value, float) else spell(value)


def _notes_of_recipes(recipes: Mapping[str, Mapping[tuple[str, str], Facts]]) -> list[str]:
    """What differs between the recipes of models, methods and data sets."""
    listed = {
        f"{model} ({method}) on {dataset}": facts
        for dataset, kinds in recipes.items()
        for (model, method), facts in kinds.items()
    }
    notes = []
    for name in sorted(set.intersection(*(set(facts) for facts in listed.values()))):
        values: dict[str, list[str]] = {}
        for which, facts in listed.items():
            values.setdefault(_told(facts[name]), []).append(which)
        if len(values) > 1:
            told = ", but ".join(f"{value} for {' and '.join(of)}" for value, of in values.items())
            notes.append(f"Differences between these may come of the recipe: {name} is {told}.")
    return notes


def _notes_of_code(cells: Sequence[Cell]) -> list[str]:
    """What differs in the code and the packages that the cells were run by."""
    notes = []
    commits = Counter(one.run.data.tags.get("plw.git_commit", "unknown") for one in cells)
    code = {one.run.data.tags.get("plw.code_sha256") for one in cells}
    if len(code) > 1 or (code == {None} and len(commits) > 1):
        listed = (f"{commit[:10]}{'-dirty' * commit.endswith('-dirty')} ({n})" for commit, n in commits.items())
        notes.append(f"The cells were not all run by the same code. Commits (cells): {', '.join(listed)}.")
    environments = _grouped(cells, [one.run.data.tags.get("plw.environment", one.run_id) for one in cells])
    if len(environments) > 1:
        versions: dict[str, set[str]] = {}
        for alike in environments.values():
            for name, version in _environment(alike[0].run).items():
                versions.setdefault(name, set()).add(version)
        differing = [f"{name} {' and '.join(sorted(found))}" for name, found in versions.items() if len(found) > 1]
        if differing:
            notes.append(f"The cells were run in different environments: {', '.join(differing)}.")
    return notes


def _environment(run: mlflow.entities.Run) -> dict[str, str]:
    """What a run's environment.json says, nothing where there is none."""
    try:
        found: dict[str, str] = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/environment.json")
    except (mlflow.MlflowException, OSError):
        return {}
    return found


def _grouped(cells: Sequence[Cell], keys: Sequence[Hashable]) -> dict[Any, list[Cell]]:
    """Cells by their keys, in the order in which those occur."""
    found: dict[Any, list[Cell]] = {}
    for one, key in zip(cells, keys, strict=True):
        found.setdefault(key, []).append(one)
    return found


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
