"""Opening: where runs begin and end.

MLflow's own `mlflow run` has opened a cell's run already and logged the parameters as it was given them; here that run
is joined, and only what is missing is logged.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from plw_mlflow import __version__, origin
from plw_mlflow.tracking.connection import check_reachable, get_run, patiently
from plw_mlflow.tracking.run import NoRun, Run
from plw_mlflow.tracking.stored import giving_signs_of_life

LAST_SECONDS = 5.0  # of a run that has failed or is interrupted, for its curves to arrive


@contextmanager
def open_run(config: Any, name: str, run_id: str | None = None) -> Iterator[Run]:
    """Open a run (the one `mlflow run` has begun, if any), or reopen `run_id`; it ends with the block.

    A new run that fails is marked FAILED with the reason as its tag plw.error, an interrupted one KILLED; when adding
    to a reopened one fails, that keeps the status it had. Raises ConnectionError where the tracking server does not
    answer.

    In processes other than the first of those that torchrun has started, it opens nothing and yields a `NoRun`.
    """
    if not origin.is_first_process():
        yield NoRun()
        return
    check_reachable()
    before = None if run_id is None else get_run(run_id).info.status
    wrapper = None if run_id is None else _leave_wrapper(run_id)
    active = mlflow.start_run(run_id=run_id, run_name=None if run_id else name)
    run = Run(active.info.run_id)
    try:
        _check_container(run.id, wrapper, config)
        if run_id is None:
            run.tag(version=__version__, **_origin())
            run.log_config(config)
        with giving_signs_of_life(run.id):
            yield run
        run.flush()
        patiently("ending the run", lambda: run.untag("error"))
    except BaseException as error:
        status = before or ("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        run.close(LAST_SECONDS)
        with suppress(Exception):  # a store that is gone must not hide why the run failed
            if before is None:
                run.tag(status="failed", error=f"{type(error).__name__}: {error}"[:500])
        with suppress(Exception):
            mlflow.end_run(status)
        raise
    run.close(0)
    try:
        mlflow.end_run("FINISHED")  # forgets the run, and then tells the store, once
    except (MlflowException, OSError):
        patiently("ending the run", lambda: mlflow.MlflowClient().set_terminated(run.id, "FINISHED"))


@contextmanager
def open_sweep(config: Any) -> Iterator[tuple[Run, Callable[[str], str]]]:
    """Open a sweep's parent run; yields it with a function that opens a child for a cell and returns the child's id."""
    with open_run(config, "sweep") as parent:
        client = mlflow.MlflowClient()
        experiment = client.get_run(parent.id).info.experiment_id

        def open_child(name: str) -> str:
            tags = {"mlflow.parentRunId": parent.id}
            child = patiently("opening a run", lambda: client.create_run(experiment, tags=tags, run_name=name))
            return str(child.info.run_id)

        yield parent, open_child


def child_environment(run_id: str) -> dict[str, str]:
    """The environment of a process that is to log into `run_id`, and no other run."""
    return os.environ | {"MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}


def fail(run_id: str) -> None:
    """Mark a run FAILED whose process ended badly, perhaps before it could say so itself."""
    patiently("marking a failed run", lambda: mlflow.MlflowClient().set_terminated(run_id, "FAILED"))


def _leave_wrapper(run_id: str) -> str | None:
    """Where `mlflow run` has opened a run for work on another one, say so on it, and leave it alone; gives its id."""
    wrapper = os.environ.pop("MLFLOW_RUN_ID", None)
    if wrapper and wrapper != run_id:
        mlflow.MlflowClient().set_tag(wrapper, "plw.for_run", run_id)
    return wrapper


def _origin() -> dict[str, str]:
    """The code, its commit and the image it runs in, as far as they are known."""
    found = {"image": origin.image(), "git_commit": origin.commit(), "code_sha256": origin.code_digest(origin.ROOT)}
    return {name: value for name, value in found.items() if value}


def _check_container(run_id: str, wrapper: str | None, config: Any) -> None:
    """In a container, find out before the work whether it is the right code, and whether its results would last.

    wrapper: the run for which MLflow has recorded a commit, where that is another one.
    """
    client = mlflow.MlflowClient()
    place = client.get_experiment(client.get_run(run_id).info.experiment_id).artifact_location
    origin.check_mounted(mlflow.get_tracking_uri(), place)
    worker = wrapper or run_id
    try:
        origin.check_image(client.get_run(worker).data.tags.get("mlflow.source.git.commit"))
    except ValueError as error:
        if not config.allow_stale_image:
            raise
        warnings.warn(str(error), stacklevel=2)
        client.set_tag(worker, "plw.stale_image", "true")
