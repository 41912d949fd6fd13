"""Score table: the scores of a sweep's or an experiment's cells, as the analysis takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import mlflow
import pandas as pd

from plw_mlflow.analysis.score_table import COLUMNS
from plw_mlflow.errors import UserError, did_you_mean, first_line
from plw_mlflow.tracking import comparable
from plw_mlflow.tracking.cells import CELL_FIELDS, cell_columns, parameters
from plw_mlflow.tracking.comparable import Cell
from plw_mlflow.tracking.connection import address, check_reachable, get_run

MAX_RUNS = 50_000  # of an experiment; MLflow gives no more at once
PARAMETER = re.compile(r"""\bparam(?:eter)?s?\.(?:(\w+)|`([^`]+)`|"([^"]+)")""", re.I)  # as a search filter names one


def score_table(
    *,
    sweep: str | None = None,
    experiment: str | None = None,
    also: tuple[str, ...] = (),
    where: str | None = None,
    only: Collection[str] | None = None,
) -> pd.DataFrame:
    """The score table of a sweep's cells, or of all cells of an experiment: scored runs only, the newest of each cell.

    also: parameters of runs that become columns, and tell cells apart. where: a search filter of MLflow, which runs
    have to pass. only: ids of runs; others do not count. With several methods, a method counts as a model of its own.
    `attrs["left_out"]` lists the runs of cells that have no scores, or are not finished, `attrs["notes"]` what else
    differs between the cells.

    Raises UserError where there is no scored cell, and where the cells are not comparable (`comparable.py`).
    """
    return ScoredCells(sweep=sweep, experiment=experiment, also=also, where=where, only=only).table()


def questions(
    *,
    sweep: str | None = None,
    experiment: str | None = None,
    also: tuple[str, ...] = (),
    where: str | None = None,
    only: Collection[str] | None = None,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Every question's scores of the cells that `score_table` has, with its columns of cells.

    columns: those of questions to read (unset: all). `attrs["metrics"]` has the metric by which the score table takes
    each task, and `attrs["notes"]` a line on each run that has kept no questions.

    Raises UserError as `score_table` does, and where no run has kept any.
    """
    cells = ScoredCells(sweep=sweep, experiment=experiment, also=also, where=where, only=only)
    scores = cells.table()
    return cells.questions(columns, dict(zip(scores["task"], scores["metric"], strict=True)))


def generation_ratios(experiment: str | None, where: str | None = None, sweep: str | None = None) -> dict[str, float]:
    """The generation ratio of each data set that scored cells were trained on, as they measured it.

    The cells are those of an experiment, or of a sweep.
    """
    ratios: dict[str, float] = {}
    for cell in ScoredCells(sweep=sweep, experiment=experiment, where=where).newest:
        name = cell.columns["dataset"]
        if name in ratios:
            continue
        try:
            ratio = mlflow.artifacts.load_dict(f"{cell.run.info.artifact_uri}/profile.json")["generation_ratio"]
        except mlflow.MlflowException:  # the run has no profile; the caller may know the ratio from elsewhere
            continue
        if ratio is not None:
            ratios[name] = ratio
    return ratios


class ScoredCells:
    """The scored cells of a sweep or an experiment."""

    def __init__(
        self,
        *,
        sweep: str | None = None,
        experiment: str | None = None,
        also: tuple[str, ...] = (),
        where: str | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        """Raises UserError where there is no scored cell, and where one model or data set had two contents."""
        check_reachable()
        self._also, self._where = also, where
        if sweep is not None:
            experiment_id = _experiment_of_sweep(sweep)
            self._place, has_to_be_finished = f"sweep {sweep}", False
            # Sweeps of earlier versions have only the first and the second tag on their own and on adopted cells.
            names = ("mlflow.parentRunId", f"plw.also_in.{sweep}", f"plw.cell_of.{sweep}")
            ways = [f"tags.`{name}` = '{value}'" for name, value in zip(names, (sweep, "true", "true"), strict=True)]
        else:
            experiment_id = _experiment_id(str(experiment))
            self._place, has_to_be_finished = f"experiment {experiment}", True
            ways = []
        self.runs: list[mlflow.entities.Run] = []  # of scored cells, the newest first
        self._other_runs: list[mlflow.entities.Run] = []
        for run in _found(experiment_id, ways, where):
            if only is not None and run.info.run_id not in only:
                continue
            is_scored = "plw.cell" in run.data.tags and run.data.tags.get("plw.status") == "scored"
            is_taken = is_scored and (run.info.status == "FINISHED" or not has_to_be_finished)
            (self.runs if is_taken else self._other_runs).append(run)
        if not self.runs:
            that_passes = (
                f" that passes --where {where}{_unknown_parameter(experiment_id, ways, where)}" if where else ""
            )
            raise UserError(f"{self._place} holds no scored cell{that_passes}")
        try:
            self._models, self._datasets = comparable.naming(self.runs)
        except ValueError as error:
            raise UserError(f"{self._place}: {error}") from None
        newest: dict[tuple[Any, ...], Cell] = {}
        self._contradictions: list[tuple[Cell, Cell]] = []  # newer and older runs that say to be one cell, but are not
        for run in self.runs:
            cell = self._cell(run)
            newer = newest.setdefault(tuple(cell.columns.values()), cell)
            if newer.run.data.tags["plw.cell"] != run.data.tags["plw.cell"]:
                self._contradictions.append((newer, cell))
        self.newest = list(newest.values())

    def check(self) -> list[str]:
        """Notes on what else differs between the cells. Raises UserError where they are not comparable."""
        older = [cell for _, cell in self._contradictions]
        notes = comparable.check([*self.newest, *older], self._also, self._place, self._where)
        if self._contradictions:
            newer, cell = self._contradictions[0]
            raise UserError(
                f"{self._place} holds two kinds of cell that differ in more than {', '.join(CELL_FIELDS)}, such as "
                f"runs {newer.run_id} and {cell.run_id}; delete one kind, choose by --where, or give them experiments "
                "of their own"
            )
        return notes

    def table(self) -> pd.DataFrame:
        """The score table. Raises UserError where the cells are not comparable."""
        notes = self.check()
        parts = [
            cell.scores.assign(**cell.columns, prompt_share=cell.run.data.metrics.get("prompt_share", math.nan))
            for cell in self.newest
        ]
        table = self._named(pd.concat(parts, ignore_index=True))
        table.attrs |= {"source": self._place, "left_out": self._left_out(), "notes": notes}
        return table

    def questions(self, columns: Sequence[str] | None, metrics: dict[str, str]) -> pd.DataFrame:
        """As the function of this name; metrics: of each task, the one in the score table."""
        parts, notes = [], []
        for cell in self.newest:
            part = cell.questions(columns)
            if part.empty:
                where = f"PLW {cell.columns['plw']:g}, seed {cell.columns['seed']} on {cell.columns['dataset']}"
                notes.append(f"run {cell.run_id} ({where}) has kept no questions; score it again by evaluate --run-id")
            else:
                parts.append(part)
        if not parts:
            raise UserError(
                f"{self._place}: no run has kept its questions, as runs of earlier versions; score them again by "
                "evaluate --run-id"
            )
        table = self._named(pd.concat(parts, ignore_index=True))
        table.attrs |= {"metrics": metrics, "notes": notes}
        return table

    def _named(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table of cells, with the method in the model's name if there are several, and unset values named."""
        if len({cell.columns["method"] for cell in self.newest}) > 1:
            table["model"] += " (" + table["method"] + ")"
        for name in self._also:
            if (table[name] == "").any():  # the reports have to name this value beside the others
                table[name] = table[name].astype(str).replace("", "unset")
        return table if "method" in self._also else table.drop(columns="method")

    def _cell(self, run: mlflow.entities.Run) -> Cell:
        params = parameters(run)
        if unknown := [name for name in self._also if name not in params and name not in COLUMNS]:
            raise UserError(f"{self._place}: run {run.info.run_id} has no parameter {unknown[0]} to compare by")
        return Cell(run, params, self._columns(params))

    def _columns(self, params: dict[str, str]) -> dict[str, Any]:
        """What tells a cell apart, by value: 1e-2 and 0.01 are one PLW."""
        spelled, columns = cell_columns(params, str), cell_columns(params)
        for name, naming in (("model", self._models), ("dataset", self._datasets)):
            columns[name] = naming.get(spelled[name], columns[name])
        also = {name: _value(params.get(name)) for name in self._also if name not in COLUMNS}
        return columns | {"method": params["method"]} | also

    def _left_out(self) -> list[str]:
        """A sentence on each run of a cell that no other run has scored."""
        scored = {tuple(cell.columns.values()) for cell in self.newest}
        sentences = []
        for run in self._other_runs:
            params = parameters(run)
            if not {*CELL_FIELDS} <= params.keys() or "plw.superseded_by" in run.data.tags:
                continue  # it is no cell's run, or another run has gone on from it
            try:
                columns = self._columns(params)
            except ValueError:  # its parameters were no valid values, and it has failed because of that
                continue
            if tuple(columns.values()) not in scored:
                is_over = run.info.status == "FINISHED"
                status = run.data.tags.get("plw.status", "FINISHED") if is_over else run.info.status
                sentences.append(
                    f"run {run.info.run_id} ({status.lower()}): {columns['model']} on {columns['dataset']}, "
                    f"PLW {columns['plw']:g}, seed {columns['seed']}"
                )
        return sentences


def _found(experiment_id: str, ways: Sequence[str], where: str | None) -> list[mlflow.entities.Run]:
    """An experiment's runs that pass `where` and one of several filters, if there are any, the newest first."""
    also = [where] if where else []
    found = {run.info.run_id: run for way in ways or [""] for run in _search(experiment_id, [way] * bool(way) + also)}
    return sorted(found.values(), key=lambda run: run.info.start_time, reverse=True)


def _search(experiment_id: str, filters: Sequence[str]) -> Sequence[mlflow.entities.Run]:
    """An experiment's runs that pass all filters, the newest first. Raises UserError for an invalid filter."""
    try:
        return list(
            mlflow.MlflowClient().search_runs(
                [experiment_id],
                filter_string=" and ".join(filters),
                order_by=["attributes.start_time DESC"],
                max_results=MAX_RUNS,
            )
        )
    except mlflow.MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UserError(f"--where is no search filter that MLflow takes: {first_line(error)}") from None


def _unknown_parameter(experiment_id: str, ways: Sequence[str], where: str) -> str:
    """The end of a message about a search filter that finds nothing: the first parameter that no run there has."""
    known = {name for run in _found(experiment_id, ways, None) for name in run.data.params}
    named = ["".join(groups) for groups in PARAMETER.findall(where)]
    return next(
        (f"; no run has a parameter {name}{did_you_mean(name, known)}" for name in named if name not in known), ""
    )


def _value(spelled: str | None) -> str | float | None:
    """A parameter by its value, as 2e-5 and 0.00002 are one number."""
    try:
        return spelled if spelled is None else float(spelled)
    except ValueError:
        return spelled


def _experiment_of_sweep(run_id: str) -> str:
    """The id of a sweep's experiment. Raises UserError for the run of a cell, which holds no cells."""
    run = get_run(run_id)
    if "plw.cell" in run.data.tags:
        parent = run.data.tags.get("mlflow.parentRunId")
        way_out = f"give --run-id {parent}" if parent else "it belongs to no sweep; give --experiment"
        raise UserError(f"run {run_id} is that of a cell, and a sweep's is needed: {way_out}")
    return str(run.info.experiment_id)


def _experiment_id(name: str) -> str:
    """The id of an experiment. Raises UserError where there is none of that name, or it was deleted."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = [other.name for other in client.search_experiments()]
        raise UserError(f"there is no experiment {name!r} in {address()}{did_you_mean(name, known)}")
    if experiment.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise UserError(f"experiment {name!r} in {address()} was deleted; restore it by {restore}")
    return str(experiment.experiment_id)
