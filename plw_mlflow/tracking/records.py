"""Records: what a store holds of a cell, read without changing anything; and a run of a store that is thrown away.

Whoever copies a store with its database to another machine, or to another folder, leaves the old places of all files in
it. They are then looked for beside the database.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import RunTag

from plw_mlflow.errors import UserError
from plw_mlflow.tracking import connection, logged_models
from plw_mlflow.tracking.cells import check_is_of_cell, parameters
from plw_mlflow.tracking.connection import check_reachable, get_run, patiently
from plw_mlflow.tracking.opening import leave_wrapper
from plw_mlflow.tracking.run import Run

# Of the training's curves those that do not tell how fast the machine was.
CURVES = (
    *(f"train/{name}" for name in ("loss", "prompt_loss", "completion_loss", "learning_rate", "grad_norm")),
    *("eval/prompt_loss", "eval/completion_loss"),
)
# The columns of MLflow's tables that hold places of files.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
OF_THE_STORE = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")  # no other store knows these


@dataclass(frozen=True)
class Record:
    """What a store holds of a cell."""

    run: Run
    name: str
    options: dict[str, Any]  # by which it was trained; a template that is a file is a copy of this block
    parameters: dict[str, str]
    tags: dict[str, str]  # without `plw.`
    environment: dict[str, str]
    code: dict[str, str]  # the SHA-256 of each file; empty where the run is older than this file
    sources: list[dict[str, Any]]  # of the data: name, location and sha256 of each
    curves: dict[str, dict[int, float]]  # values by step
    metrics: dict[str, float]  # the last value of each
    evaluations: list[dict[str, Any]]  # the results of each in turn, as `evaluate` gives them
    model: Path | None  # the folder of the logged model; None where there is none
    why_no_model: str


@contextmanager
def recorded(run_id: str) -> Iterator[Record]:
    """The record of a cell, for the block. Within it, the tracking store is where the run's files are found.

    Raises UserError where there is no such run, or it is not the run of a cell that was trained.
    """
    check_reachable()
    get_run(run_id)
    leave_wrapper(run_id)
    with _with_places_of_now(run_id), reading(run_id) as record:
        check_is_of_cell(run := get_run(run_id))
        if (status := run.info.status) != "FINISHED":
            raise UserError(f"run {run_id} is {status}, so it does not hold a whole cell; give that of a finished one")
        yield record


@contextmanager
def reading(run_id: str) -> Iterator[Record]:
    """The record of a run in the present store, for the block."""
    found, run = get_run(run_id), Run(run_id)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model: Path | None = None
        why_no_model = ""
        try:
            model = stack.enter_context(logged_models.folder_of(run))
        except UserError as error:
            why_no_model = str(error)
        names = {item.path for item in run.client.list_artifacts(run_id)}
        read = partial(_json, run, folder, names)
        yield Record(
            run=run,
            name=str(found.info.run_name),
            options=run.config(folder),
            parameters=parameters(found),
            tags={
                name.removeprefix("plw."): value for name, value in found.data.tags.items() if name.startswith("plw.")
            }
            | {"data_sha256": run.read_tag("data_sha256") or ""},
            environment=read("environment.json"),
            code=read("code.json"),
            sources=read("profile.json").get("sources", []),
            curves={name: run.curves.values(name) for name in CURVES if name in found.data.metrics},
            metrics=dict(found.data.metrics),
            evaluations=_evaluations(run, folder, names),
            model=model,
            why_no_model=why_no_model,
        )


@contextmanager
def scratch_run(config: Any) -> Iterator[Run]:
    """A run with a config in a store of its own, which is removed when the block ends."""
    with tempfile.TemporaryDirectory() as folder, _store(f"sqlite:///{folder}/mlflow.db"):
        check_reachable()
        experiment = mlflow.MlflowClient().create_experiment("scratch", artifact_location=f"{folder}/artifacts")
        with mlflow.start_run(experiment_id=experiment, log_system_metrics=False) as active:
            run = Run(active.info.run_id)
            run.log_config(config)
            yield run
            run.curves.close(0)


def note_verification(run_id: str, text: str) -> None:
    """Say on a run, in its tag plw.verified, how it was verified last."""
    tags = [RunTag("plw.verified", text)]
    patiently("noting the verification", lambda: mlflow.MlflowClient().log_batch(run_id, tags=tags))


@contextmanager
def _store(uri: str) -> Iterator[None]:
    """Within the block, the tracking store is another one."""
    before = mlflow.get_tracking_uri()
    environment = {name: os.environ.pop(name) for name in OF_THE_STORE if name in os.environ}
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.update(environment)


@contextmanager
def _with_places_of_now(run_id: str) -> Iterator[None]:
    """Within the block, the files of a run are found although its store was moved.

    The tracking store is then a copy of the database, in which the places are those of now.
    """
    database = connection.sqlite_file(mlflow.get_tracking_uri())
    folder = Path(str(get_run(run_id).info.artifact_uri).removeprefix("file://"))
    moved = database and _moved(folder, database.resolve().parent)
    if database is None or not moved:
        yield
        return
    before, now = moved
    print(f"the store was moved: what it says to be in {before} is read in {now}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "mlflow.db")
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as theirs, sqlite3.connect(copy) as ours:
            theirs.backup(ours)
            for table, column in PLACES:
                ours.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (f"{before}/", f"{now}/"))
        with _store(f"sqlite:///{copy}"):
            check_reachable()
            yield


def _moved(folder: Path, beside: Path) -> tuple[Path, Path] | None:
    """The folder in which a run's files were recorded to be, and the one in which they are; None if that is the same.

    folder: of the run's files, as recorded. beside: where the database is.
    """
    for count in range(1, len(folder.parts) - 1 if folder.is_absolute() else 1):  # to the run's own folder
        before, rest = Path(*folder.parts[:count]), Path(*folder.parts[count:])
        if (beside / rest).is_dir():
            return None if folder.is_dir() and folder.samefile(beside / rest) else (before, beside)
    return None


def _json(run: Run, folder: Path, names: set[str], name: str) -> Any:
    """The content of a JSON file of a run; empty where it has none."""
    if name not in names:
        return {}
    return json.loads(Path(run.client.download_artifacts(run.id, name, str(folder))).read_text())


def _evaluations(run: Run, folder: Path, names: set[str]) -> list[dict[str, Any]]:
    listed = run.client.list_artifacts(run.id, "harness") if "harness" in names else []
    paths = sorted(item.path for item in listed)  # which begin with the time
    return [_json(run, folder, {path}, path) for path in paths]
