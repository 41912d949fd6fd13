"""Table: the scores of many runs as one score table, and the best of a sweep's cells."""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd

from plw_mlflow.statistics.table import COLUMNS
from plw_mlflow.tracking.connection import address, check_reachable, get_run
from plw_mlflow.tracking.run import CELL_FIELDS, Run, cell_columns, parameters


def score_table(*, sweep: str | None = None, experiment: str | None = None, also: tuple[str, ...] = ()) -> pd.DataFrame:
    """The score table of a sweep's cells, or of all cells of an experiment: scored runs only, the newest of each cell.

    also: parameters of runs that become columns, and tell cells apart.
    With several methods, a method counts as a model of its own. `attrs["left_out"]` lists the runs of cells that have
    no scores, or are not finished. Raises ValueError where there is nothing.
    """
    check_reachable()
    client = mlflow.MlflowClient()
    if sweep is not None:
        experiment_id = get_run(sweep).info.experiment_id
        wanted, what, ended = f"tags.`mlflow.parentRunId` = '{sweep}'", f"sweep {sweep}", None
    else:
        experiment_id, wanted = _experiment_id(str(experiment)), ""
        what, ended = f"experiment {experiment}", "FINISHED"
    runs = client.search_runs(
        [experiment_id], filter_string=wanted, order_by=["attributes.start_time DESC"], max_results=50_000
    )
    newest: dict[tuple[Any, ...], mlflow.entities.Run] = {}
    others: list[mlflow.entities.Run] = []
    for run in runs:
        is_scored = "plw.cell" in run.data.tags and run.data.tags.get("plw.status") == "scored"
        if not is_scored or ended not in (None, run.info.status):
            others.append(run)
        else:
            # By value, as parameters keep their caller's spelling: 1e-2 and 0.01 are one PLW.
            params = parameters(run)
            if unknown := [name for name in also if name not in params and name not in COLUMNS]:
                raise ValueError(f"{what}: run {run.info.run_id} has no parameter {unknown[0]} to compare by")
            key = _key(params, also)
            other = newest.setdefault(key, run)
            if other.data.tags["plw.cell"] != run.data.tags["plw.cell"]:
                raise ValueError(
                    f"{what} holds two kinds of cell that differ in more than {', '.join(CELL_FIELDS)}, such as runs "
                    f"{other.info.run_id} and {run.info.run_id}; delete one kind, or give them experiments of their own"
                )
    if not newest:
        raise ValueError(f"{what} holds no scored cell")
    tables = [Run(run.info.run_id).scores().assign(**_columns(parameters(run), also)) for run in newest.values()]
    table = pd.concat(tables, ignore_index=True)
    if table["method"].nunique() > 1:
        table["model"] += " (" + table["method"] + ")"
    if "method" not in also:
        table = table.drop(columns="method")
    table.attrs["source"] = what
    table.attrs["left_out"] = _left_out(others, set(newest), also)
    return table


def _key(params: dict[str, str], also: tuple[str, ...]) -> tuple[Any, ...]:
    """What tells a cell apart."""
    return (*cell_columns(params).values(), params["method"], *(_value(params.get(name)) for name in also))


def _value(spelled: str | None) -> str | float | None:
    """A parameter by its value, as 2e-5 and 0.00002 are one number."""
    try:
        return spelled if spelled is None else float(spelled)
    except ValueError:
        return spelled


def _columns(params: dict[str, str], also: tuple[str, ...]) -> dict[str, Any]:
    """What a run's parameters add to the rows of its scores."""
    own = {"dataset": cell_columns(params)["dataset"], "method": params["method"]}
    return {name: _value(params[name]) for name in also if name not in COLUMNS} | own


def _left_out(runs: list[mlflow.entities.Run], scored: set[tuple[Any, ...]], also: tuple[str, ...]) -> list[str]:
    """The runs of cells that no other run has scored, in words."""
    found = []
    for run in runs:
        params = parameters(run)
        if not {*CELL_FIELDS} <= params.keys() or "plw.superseded_by" in run.data.tags:
            continue  # of another kind, or another run has gone on from it
        try:
            cell = cell_columns(params)
        except ValueError:  # it failed for that
            continue
        if _key(params, also) not in scored:
            status = run.info.status if run.info.status != "FINISHED" else run.data.tags.get("plw.status", "FINISHED")
            found.append(
                f"run {run.info.run_id} ({status.lower()}): {cell['model']} on {cell['dataset']}, "
                f"PLW {cell['plw']:g}, seed {cell['seed']}"
            )
    return found


def generation_ratios(experiment: str) -> dict[str, float]:
    """The generation ratio of each data set that an experiment's scored cells were trained on, as they measured it."""
    check_reachable()
    is_scored = "tags.`plw.status` = 'scored'"
    ratios: dict[str, float] = {}
    for run in mlflow.MlflowClient().search_runs([_experiment_id(experiment)], is_scored, max_results=50_000):
        name = cell_columns(parameters(run))["dataset"]
        if name in ratios:
            continue
        try:
            ratio = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/profile.json")["generation_ratio"]
        except mlflow.MlflowException:  # no profile: whoever asks can still be told the ratio
            continue
        if ratio is not None:
            ratios[name] = ratio
    return ratios


def _experiment_id(name: str) -> str:
    found = mlflow.MlflowClient().get_experiment_by_name(name)
    if found is None:
        raise ValueError(f"there is no experiment {name!r} in {address()}")
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise ValueError(f"experiment {name!r} in {address()} was deleted; restore it by {restore}")
    return str(found.experiment_id)


def mark_best(run_id: str) -> str:
    """Give the model version a cell has registered the alias `best`; returns the model's name."""
    name, _, version = get_run(run_id).data.tags["plw.model_version"].rpartition("/")
    mlflow.MlflowClient().set_registered_model_alias(name, "best", version)
    return name


def best_cells(sweep: str) -> dict[tuple[str, str], str]:
    """The run with the highest score for each (model, dataset) of a sweep."""
    client = mlflow.MlflowClient()
    runs = client.search_runs(
        [get_run(sweep).info.experiment_id],
        filter_string=f"tags.`mlflow.parentRunId` = '{sweep}' and tags.`plw.status` = 'scored'",
        order_by=["metrics.score DESC"],
        max_results=50_000,  # MLflow's limit
    )
    best: dict[tuple[str, str], str] = {}
    for run in runs:
        best.setdefault((run.data.params["model"], run.data.params["dataset"]), run.info.run_id)
    return best
