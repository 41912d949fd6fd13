"""Table: the scores of many runs as one score table, and the best of a sweep's cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlflow
import pandas as pd

from plw_mlflow.analysis.score_table import COLUMNS
from plw_mlflow.errors import UserError, first_line
from plw_mlflow.tracking import comparable
from plw_mlflow.tracking.comparable import Cell
from plw_mlflow.tracking.connection import address, check_reachable, get_run, patiently
from plw_mlflow.tracking.run import CELL_FIELDS, cell_columns, parameters

BEATEN_TOLD = 10  # cells that a model version's tag names as beaten


def score_table(
    *, sweep: str | None = None, experiment: str | None = None, also: tuple[str, ...] = (), where: str | None = None
) -> pd.DataFrame:
    """The score table of a sweep's cells, or of all cells of an experiment: scored runs only, the newest of each cell.

    also: parameters of runs that become columns, and tell cells apart. where: a search filter of MLflow, which runs
    have to pass. With several methods, a method counts as a model of its own. `attrs["left_out"]` lists the runs of
    cells that have no scores, or are not finished, `attrs["notes"]` what else differs between the cells.

    Raises UserError where there is nothing, and where the cells are not comparable (`comparable.py`).
    """
    return _Cells(sweep=sweep, experiment=experiment, also=also, where=where).table()


def generation_ratios(experiment: str, where: str | None = None) -> dict[str, float]:
    """The generation ratio of each data set that an experiment's scored cells were trained on, as they measured it."""
    ratios: dict[str, float] = {}
    for cell in _Cells(experiment=experiment, where=where).newest:
        name = cell.columns["dataset"]
        if name in ratios:
            continue
        try:
            ratio = mlflow.artifacts.load_dict(f"{cell.run.info.artifact_uri}/profile.json")["generation_ratio"]
        except mlflow.MlflowException:  # no profile: whoever asks can still be told the ratio
            continue
        if ratio is not None:
            ratios[name] = ratio
    return ratios


class _Cells:
    """The scored cells of a sweep or an experiment."""

    def __init__(
        self,
        *,
        sweep: str | None = None,
        experiment: str | None = None,
        also: tuple[str, ...] = (),
        where: str | None = None,
    ) -> None:
        check_reachable()
        self._also, self._where = also, where
        if sweep is not None:
            experiment_id = str(get_run(sweep).info.experiment_id)
            filters, self.what, ended = [f"tags.`mlflow.parentRunId` = '{sweep}'"], f"sweep {sweep}", None
        else:
            experiment_id = _experiment_id(str(experiment))
            filters, self.what, ended = [], f"experiment {experiment}", "FINISHED"
        self.scored = scored = list[mlflow.entities.Run]()  # newest first, as all of them
        self._others: list[mlflow.entities.Run] = []
        for run in _search(experiment_id, [*filters, *([where] if where else [])]):
            is_scored = "plw.cell" in run.data.tags and run.data.tags.get("plw.status") == "scored"
            (scored if is_scored and ended in (None, run.info.status) else self._others).append(run)
        if not scored:
            raise UserError(f"{self.what} holds no scored cell{' that passes --where ' + where if where else ''}")
        try:
            self._models, self._datasets = comparable.naming(scored)
        except ValueError as error:
            raise UserError(f"{self.what}: {error}") from None
        newest: dict[tuple[Any, ...], Cell] = {}
        self._of_other_kind: list[tuple[Cell, Cell]] = []  # of one cell, what a newer run has, and what an older one
        for run in scored:
            cell = self._cell(run)
            newer = newest.setdefault(tuple(cell.columns.values()), cell)
            if newer.run.data.tags["plw.cell"] != run.data.tags["plw.cell"]:
                self._of_other_kind.append((newer, cell))
        self.newest = list(newest.values())

    def check(self) -> list[str]:
        """Notes on what else differs between the cells. Raises UserError where they are not comparable."""
        older = [cell for _, cell in self._of_other_kind]
        notes = comparable.check([*self.newest, *older], self._also, self.what, self._where)
        if self._of_other_kind:
            newer, cell = self._of_other_kind[0]
            raise UserError(
                f"{self.what} holds two kinds of cell that differ in more than {', '.join(CELL_FIELDS)}, such as runs "
                f"{newer.run_id} and {cell.run_id}; delete one kind, choose by --where, or give them experiments of "
                "their own"
            )
        return notes

    def table(self) -> pd.DataFrame:
        """The score table."""
        notes = self.check()
        table = pd.concat([cell.scores.assign(**cell.columns) for cell in self.newest], ignore_index=True)
        if table["method"].nunique() > 1:
            table["model"] += " (" + table["method"] + ")"
        for name in self._also:
            if (table[name] == "").any():  # beside values, of which one is to be told
                table[name] = table[name].astype(str).replace("", "unset")
        if "method" not in self._also:
            table = table.drop(columns="method")
        table.attrs |= {"source": self.what, "left_out": self._left_out(), "notes": notes}
        return table

    def _cell(self, run: mlflow.entities.Run) -> Cell:
        params = parameters(run)
        if unknown := [name for name in self._also if name not in params and name not in COLUMNS]:
            raise UserError(f"{self.what}: run {run.info.run_id} has no parameter {unknown[0]} to compare by")
        return Cell(run, params, self._columns(params))

    def _columns(self, params: dict[str, str]) -> dict[str, Any]:
        """What tells a cell apart, by value: 1e-2 and 0.01 are one PLW."""
        given, own = cell_columns(params, str), cell_columns(params)
        for name, naming in (("model", self._models), ("dataset", self._datasets)):
            own[name] = naming.get(given[name], own[name])
        more = {name: _value(params.get(name)) for name in self._also if name not in COLUMNS}
        return own | {"method": params["method"]} | more

    def _left_out(self) -> list[str]:
        """The runs of cells that no other run has scored, in words."""
        scored = {tuple(cell.columns.values()) for cell in self.newest}
        found = []
        for run in self._others:
            params = parameters(run)
            if not {*CELL_FIELDS} <= params.keys() or "plw.superseded_by" in run.data.tags:
                continue  # of another kind, or another run has gone on from it
            try:
                cell = self._columns(params)
            except ValueError:  # it failed for that
                continue
            if tuple(cell.values()) not in scored:
                is_over = run.info.status == "FINISHED"
                status = run.data.tags.get("plw.status", "FINISHED") if is_over else run.info.status
                found.append(
                    f"run {run.info.run_id} ({status.lower()}): {cell['model']} on {cell['dataset']}, "
                    f"PLW {cell['plw']:g}, seed {cell['seed']}"
                )
        return found


def _search(experiment_id: str, filters: Sequence[str]) -> Sequence[mlflow.entities.Run]:
    """An experiment's runs that pass the filters, the newest first. Raises UserError for what is no filter."""
    wanted = " and ".join(filters)
    try:
        return list(
            mlflow.MlflowClient().search_runs(
                [experiment_id], filter_string=wanted, order_by=["attributes.start_time DESC"], max_results=50_000
            )
        )
    except mlflow.MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UserError(f"--where is no search filter that MLflow takes: {first_line(error)}") from None


def _value(spelled: str | None) -> str | float | None:
    """A parameter by its value, as 2e-5 and 0.00002 are one number."""
    try:
        return spelled if spelled is None else float(spelled)
    except ValueError:
        return spelled


def _experiment_id(name: str) -> str:
    found = mlflow.MlflowClient().get_experiment_by_name(name)
    if found is None:
        raise UserError(f"there is no experiment {name!r} in {address()}")
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise UserError(f"experiment {name!r} in {address()} was deleted; restore it by {restore}")
    return str(found.experiment_id)


def mark_best(sweep: str, cells: int) -> list[str]:
    """Give the alias `best` of each registered model to the sweep's best version of it; says a sentence of each.

    cells: how many the sweep has. Only a whole sweep of two cells or more whose scores are comparable, with one another
    and with those of the benchmarks, has a best one. It takes the alias from another version that scored less in the
    same tasks, or that has no comparable score itself. One that was scored otherwise keeps it: which is better is then
    not known. The version's tags plw.best_... say what it was the best of.
    """
    try:
        found = _Cells(sweep=sweep)
        found.check()
    except ValueError as error:
        return [f"the alias best stays where it is: {error}"]
    if len(finished := [run for run in found.scored if run.info.status == "FINISHED"]) < cells:
        return [f"the alias best stays where it is, as {len(finished)} of {cells} cells are finished and scored"]
    by_name: dict[str, list[Cell]] = {}
    for cell in found.newest:
        by_name.setdefault(_version(cell)[0], []).append(cell)
    return [_mark_best(name, group, sweep) for name, group in by_name.items()]


def _mark_best(name: str, group: list[Cell], sweep: str) -> str:
    client = mlflow.MlflowClient()
    stays = f"the alias best of {name} stays where it is"
    for cell in group:
        if not _is_comparable(cell.run):
            why = cell.run.data.tags.get("plw.score_caveat", "it does not say why")
            return f"{stays}, as the score of run {cell.run_id} is not comparable ({why})"
        if cell.run.data.tags.get("plw.score_tasks") != group[0].run.data.tags.get("plw.score_tasks"):
            return f"{stays}, as the scores of runs {cell.run_id} and {group[0].run_id} are of other tasks"
    if len(group) == 1:
        return f"{stays}, as one cell alone is no best one"
    best, *others = sorted(group, key=_score, reverse=True)
    version = _version(best)[1]
    holder = _holder(name)
    before = "no version"
    if holder is not None:
        before = f"version {holder.version}"
        if str(holder.version) == version:
            return f"the alias best of {name} stays with version {version}: {_described(best)}"
        try:
            held = Cell(run := get_run(str(holder.run_id)), parameters(run), {})
        except ValueError:
            before += ", whose run is no longer there"
        else:
            if not _is_comparable(held.run) or "score" not in held.run.data.metrics:
                before += ", which has no comparable score"
            elif _scored_by(held) != _scored_by(best):
                return (
                    f"{stays}, with version {holder.version}, which was scored by other tasks, questions or versions "
                    f"than this sweep, so that nobody knows which is better; to move it nevertheless: mlflow."
                    f"MlflowClient().set_registered_model_alias({name!r}, 'best', '{version}')"
                )
            elif _score(held) >= _score(best):
                return f"{stays}, with version {holder.version}: {_described(held)}; here {_described(best)}"
            else:
                before += f": {_described(held)}"
    told = [_described(cell) for cell in others]
    beaten = "; ".join(told[:BEATEN_TOLD]) + (f"; and {len(told) - BEATEN_TOLD} more" if told[BEATEN_TOLD:] else "")
    tags = {"score": repr(_score(best)), "sweep": sweep, "of": f"{len(group)} cells", "beat": beaten, "before": before}

    def mark() -> None:
        for key, value in tags.items():
            client.set_model_version_tag(name, version, f"plw.best_{key}", value)
        client.set_registered_model_alias(name, "best", version)

    patiently("marking the best model", mark)
    return (
        f"best: models:/{name}@best is version {version} now, before {before}; it is the best of {len(group)} cells: "
        f"{_described(best)}; next {told[0]}"
    )


def _holder(name: str) -> mlflow.entities.model_registry.ModelVersion | None:
    """The version that has the alias."""
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, "best")
    except mlflow.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _version(cell: Cell) -> tuple[str, str]:
    """The name and the number that a cell's model is registered under. Raises UserError where it is not."""
    name, _, version = cell.run.data.tags.get("plw.model_version", "").rpartition("/")
    if not name:
        raise UserError(f"run {cell.run_id} has registered no model")
    return name, version


def _score(cell: Cell) -> float:
    return float(cell.run.data.metrics["score"])


def _described(cell: Cell) -> str:
    """A cell and its score in words."""
    params = cell_columns(dict(cell.params))
    return (
        f"{_score(cell):.4g} (PLW {params['plw']:g}, {cell.params['method']}, seed {params['seed']}, run {cell.run_id})"
    )


def _is_comparable(run: mlflow.entities.Run) -> bool:
    return run.data.tags.get("plw.score_comparable") == "true"


def _scored_by(cell: Cell) -> dict[str, Any]:
    """How the tasks that count in a cell's score were scored."""
    counted = [key.rpartition("/")[0] for key in cell.run.data.tags.get("plw.score_tasks", "").split(",")]
    return comparable.scoring(cell, counted)
