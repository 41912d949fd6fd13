"""Pages: addresses of MLflow's pages, and the saved views of its list of runs, as MLflow 3.17 reads them.

MLflow's pages open on GenAI unless their address says `workflowType=machine_learning`; the experiment's own tag
mlflow.experimentKind does not change that. A saved view says which runs the list shows, in which order, with which
columns and charts. It is a tag of the experiment, is offered under *Views*, and is opened by `viewStateShareKey`.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import mlflow

from plw_mlflow.tracking import connection

TRAINING = "workflowType=machine_learning"
VIEW = "mlflow.sharedViewState."  # how the tag of a saved view begins; its key follows
ALL_CELLS = "cells"  # the view of all cells of an experiment
LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` is


def run_page(experiment_id: str, run_id: str) -> str:
    """A run's page, as a link within MLflow's pages."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{TRAINING}"


def file_page(experiment_id: str, run_id: str, file: str) -> str:
    """The page that shows a file of a run."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(file)}?{TRAINING}"


def list_page(experiment_id: str, view: str) -> str:
    """An experiment's list of runs as a saved view shows it."""
    return f"#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={view}"


def charts(page: str) -> str:
    """The page that shows the charts of a list's runs in place of its columns."""
    return f"{page}&compareRunsMode=CHART"


def image(run_id: str, file: str, title: str) -> str:
    """An image among a run's files, in the Markdown of a description."""
    return f"![{title}](get-artifact?path={quote(file)}&run_uuid={run_id})"


def address(page: str) -> str:
    """The address of a page: on the tracking server, or where `mlflow ui` shows the store that is no server."""
    store = connection.address()
    base = re.sub("//[^/@]*@", "//", store.rstrip("/")) if store.startswith("http") else LOCAL
    return f"{base}/{page}"  # without the user's name, which the browser asks for


def opened(page: str) -> str:
    """How a person opens a page: its address, after the command that starts MLflow's pages where no server does."""
    store = connection.address()
    if store.startswith("http"):
        return address(page)
    command = f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    if store != mlflow.get_tracking_uri():  # it holds a password
        command = 'MLFLOW_BACKEND_STORE_URI="$MLFLOW_TRACKING_URI" mlflow ui'
    return f"{command}    then open {address(page)}"


def all_cells_view() -> dict[str, Any]:
    """The view of all cells of an experiment, the highest score first."""
    columns = [*_METRICS, "params.`plw`", "params.`dataset`", "params.`model`", "params.`seed`"]
    # In the order of their beginning, which is the usual one, MLflow would hide the cells of each sweep below it.
    return view("tags.`plw.cell` LIKE '%'", columns, ("metrics.`score`", False))


def sweep_view(sweep: str, tasks: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """The view of a sweep's cells by rising PLW.

    tasks: metrics that the score is the mean of. options: those that differ between the cells.
    """
    metrics = [f"metrics.`{task}`" for task in tasks]
    parameters = [f"params.`{name}`" for name in dict.fromkeys(["plw", *options])]
    return view(f"tags.`plw.cell_of.{sweep}` = 'true'", [*_METRICS, *metrics, *parameters], ("metrics.`w_p`", True))


_METRICS = ("metrics.`score`", "metrics.`prompt_share`", "metrics.`w_p`")


def view(search: str, columns: Sequence[str], order: tuple[str, bool]) -> dict[str, Any]:
    """What MLflow's list of runs is to show: the runs that a search finds, in an order (by what, whether rising).

    Its charts begin with the score against w_p and against the prompts' share of the loss.
    """
    charts = [
        {
            "uuid": f"score-{axis}",
            "type": "SCATTER",
            "xaxis": {"key": axis, "type": "METRIC"},
            "yaxis": {"key": "score", "type": "METRIC"},
            "runsCountToCompare": 100,
            "metricSectionId": "score",
            "deleted": False,
            "isGenerated": False,
        }
        for axis in ("w_p", "prompt_share")
    ]
    return {
        "searchFilter": search,
        "orderByKey": order[0],
        "orderByAsc": order[1],
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [*columns],
        "columnOrder": ["attributes.`Created`", "attributes.`Duration`", *columns],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [{"uuid": "score", "name": "Score against PLW", "display": True, "isReordered": True}],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
    }


def view_tag(key: str, name: str, content: dict[str, Any]) -> tuple[str, str]:
    """The tag of an experiment that holds a saved view, and its value. key: names the view in addresses."""
    envelope = {"name": name, "createdAt": int(time.time() * 1000), "state": json.dumps(content)}
    return VIEW + key, json.dumps(envelope)
