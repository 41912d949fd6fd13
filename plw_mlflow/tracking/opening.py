"""Opening: where runs begin and end.

MLflow's own `mlflow run` has opened a cell's run already and logged the parameters as it was given them; here that run
is joined, and only what is missing is logged.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from plw_mlflow import __version__
from plw_mlflow.environment import container, processes, provenance
from plw_mlflow.errors import without_passwords
from plw_mlflow.tracking import connection
from plw_mlflow.tracking.connection import check_reachable, explained, get_run, hurried, patiently
from plw_mlflow.tracking.resumption import giving_signs_of_life
from plw_mlflow.tracking.run import Run

LAST_SECONDS = 5.0  # of a run that has failed or is interrupted, for its curves to arrive
NAME_CHARACTERS = 250  # of a run's name; databases keep no more
ERROR_CHARACTERS = 500  # of the tag that says why a run failed


@contextmanager
def open_run(config: Any, name: str, run_id: str | None = None) -> Iterator[Run]:
    """Open a run (the one `mlflow run` has begun, if any), or reopen `run_id`; it ends with the block.

    A new run that fails is marked FAILED with the reason as its tag plw.error, an interrupted one KILLED; its tag
    plw.status says the same. When adding to a reopened one fails, that keeps the status it had. Raises Unreachable
    where the tracking server does not answer, and UserError where it refuses.
    """
    check_reachable()
    try:
        joined = run_id or os.environ.get("MLFLOW_RUN_ID")
        status = get_run(joined).info.status if joined else None  # says it of one that is unknown or was deleted
        before = None if run_id is None else status
        wrapper = None if run_id is None else _leave_wrapper(run_id)
        short = _cut(without_passwords(name), NAME_CHARACTERS)
        active = mlflow.start_run(run_id=run_id, run_name=None if run_id else short)
    except MlflowException as error:
        raise explained("opening a run", error) from error
    run = Run(active.info.run_id)
    try:
        _check_container(run.id, wrapper, config)
        if run_id is None:
            run.tag(version=__version__, **_origin())
            run.log_config(config)
        with giving_signs_of_life(run.id):
            yield run
        run.curves.flush()
        patiently("ending the run", lambda: run.untag("error"))
    except BaseException as error:
        told = explained(f"run {run.id}", error) if isinstance(error, MlflowException) else error
        with _deaf_to_sigterm():
            _end_badly(run, told, before)
        if told is error:
            raise
        raise told from error
    run.curves.close(0)
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
    """The environment of a process that is to log into `run_id`, and no other run.

    The store's address is here rather than on a command line, which everybody on the machine can read.
    """
    ours = {"MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), processes.PARENT_REPORTS: "true"}
    return os.environ | ours


def fail(run_id: str) -> None:
    """Mark a run FAILED whose process ended badly, perhaps before it could say so itself."""
    patiently("marking a failed run", lambda: _mark(run_id, "FAILED", unless=("FAILED", "KILLED")))


def kill(run_id: str) -> None:
    """Mark a run KILLED whose process was interrupted before it could say so itself, if the store can be told."""
    with suppress(Exception), hurried():
        check_reachable()
        _mark(run_id, "KILLED", unless=("FAILED", "KILLED", "FINISHED"))


def _mark(run_id: str, status: str, unless: tuple[str, ...]) -> None:
    client = mlflow.MlflowClient()
    if client.get_run(run_id).info.status not in unless:
        client.set_tag(run_id, "plw.status", status.lower())
        client.set_terminated(run_id, status)


def _end_badly(run: Run, error: BaseException, before: str | None) -> None:
    """Say on a run how it ended, if the store can be told.

    before: the status that a reopened run had, and keeps.
    """
    status = before or ("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    run.curves.close(LAST_SECONDS)
    seconds = 1.0  # for a store that is gone; it must neither hide why the run failed nor be waited for
    with suppress(Exception):
        check_reachable()
        seconds = connection.ANSWER_SECONDS
        if before is None:
            why = {} if status == "KILLED" else {"error": f"{type(error).__name__}: {error}"}
            with hurried(seconds):
                run.tag(status=status.lower(), **{name: _cut(text, ERROR_CHARACTERS) for name, text in why.items()})
    with suppress(Exception), hurried(seconds):
        mlflow.end_run(status)


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM does nothing: a run that is just being ended is not to be left half ended.

    A sweep, and MLflow too, send it to a process that may have heard an interrupt from the terminal before.
    """
    if threading.current_thread() is not threading.main_thread():  # nobody else may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cut(text: str, characters: int) -> str:
    """A text for a person, cut off visibly where it is too long."""
    return text if len(text) <= characters else text[: characters - 2] + " …"


def _leave_wrapper(run_id: str) -> str | None:
    """Where `mlflow run` has opened a run for work on another one, say so on it, and leave it alone; gives its id."""
    wrapper = os.environ.pop("MLFLOW_RUN_ID", None)
    if wrapper and wrapper != run_id:
        mlflow.MlflowClient().set_tag(wrapper, "plw.for_run", run_id)
    return wrapper


def _origin() -> dict[str, str]:
    """The code, its commit and the image it runs in, as far as they are known."""
    found = {
        "image": container.image(),
        "git_commit": provenance.commit(),
        "code_sha256": provenance.code_digest(provenance.ROOT),
    }
    return {name: value for name, value in found.items() if value}


def _check_container(run_id: str, wrapper: str | None, config: Any) -> None:
    """In a container, find out before the work whether it is the right code, and whether its results would last.

    wrapper: the run for which MLflow has recorded a commit, where that is another one.
    """
    client = mlflow.MlflowClient()
    place = client.get_experiment(client.get_run(run_id).info.experiment_id).artifact_location
    container.check_mounted(mlflow.get_tracking_uri(), place)
    worker = wrapper or run_id
    try:
        provenance.check_image(client.get_run(worker).data.tags.get("mlflow.source.git.commit"))
    except ValueError as error:
        if not config.allow_stale_image:
            raise
        warnings.warn(str(error), stacklevel=2)
        client.set_tag(worker, "plw.stale_image", "true")
