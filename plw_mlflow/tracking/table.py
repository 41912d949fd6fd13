"""Table: the scores of many runs as one score table, and the best of a sweep's cells."""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd

from plw_mlflow.tracking.connection import check_reachable, get_run
from plw_mlflow.tracking.run import CELL_FIELDS, Run, cell_columns, parameters


def score_table(*, sweep: str | None = None, experiment: str | None = None) -> pd.DataFrame:
    """The score table of a sweep's cells, or of all cells of an experiment: scored runs only, the newest of each cell.

    With several methods, a method counts as a model of its own. Raises ValueError where there is nothing.
    """
    check_reachable()
    client = mlflow.MlflowClient()
    if sweep is not None:
        experiment_id = get_run(sweep).info.experiment_id
        wanted, what = f"tags.`mlflow.parentRunId` = '{sweep}'", f"sweep {sweep}"
    else:
        found = client.get_experiment_by_name(str(experiment))
        if found is None:
            raise ValueError(f"there is no experiment {experiment!r} in {mlflow.get_tracking_uri()}")
        experiment_id, wanted, what = found.experiment_id, "attributes.status = 'FINISHED'", f"experiment {experiment}"
    runs = client.search_runs(
        [experiment_id], filter_string=wanted, order_by=["attributes.start_time DESC"], max_results=50_000
    )
    newest: dict[tuple[Any, ...], mlflow.entities.Run] = {}
    for run in runs:
        if "plw.cell" in run.data.tags and run.data.tags.get("plw.status") == "scored":
            # By value, as parameters keep their caller's spelling: 1e-2 and 0.01 are one PLW.
            params = parameters(run)
            key = (*cell_columns(params).values(), params["method"])
            other = newest.setdefault(key, run)
            if other.data.tags["plw.cell"] != run.data.tags["plw.cell"]:
                raise ValueError(
                    f"{what} holds two kinds of cell that differ in more than {', '.join(CELL_FIELDS)}, such as runs "
                    f"{other.info.run_id} and {run.info.run_id}; delete one kind, or give them experiments of their own"
                )
    if not newest:
        raise ValueError(f"{what} holds no scored cell")
    tables = [
        Run(run.info.run_id)
        .scores()
        .assign(dataset=cell_columns(parameters(run))["dataset"], method=parameters(run)["method"])
        for run in newest.values()
    ]
    table = pd.concat(tables, ignore_index=True)
    if table["method"].nunique() > 1:
        table["model"] += " (" + table["method"] + ")"
    table = table.drop(columns="method")
    table.attrs["source"] = what
    return table


def generation_ratios(experiment: str) -> dict[str, float]:
    """The generation ratio of each data set that an experiment's scored cells were trained on, as they measured it."""
    check_reachable()
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"there is no experiment {experiment!r} in {mlflow.get_tracking_uri()}")
    ratios: dict[str, float] = {}
    for run in client.search_runs([found.experiment_id], "tags.`plw.status` = 'scored'", max_results=50_000):
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
