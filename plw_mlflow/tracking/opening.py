"""Opening: where runs begin and end.

`mlflow run` opens a run before it starts an entry point, and logs the parameters as it was given them. The entry point
then joins that run, and logs only what is missing.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from plw_mlflow import __version__
from plw_mlflow.environment import container, processes, provenance
from plw_mlflow.errors import Refused, without_passwords
from plw_mlflow.tracking import connection, experiments, own_devices
from plw_mlflow.tracking.connection import await_reachable, check_reachable, explained, get_run, hurried, patiently
from plw_mlflow.tracking.resumption import giving_signs_of_life
from plw_mlflow.tracking.run import Run

LAST_SECONDS = 5.0  # of a run that has failed or is interrupted, for its curves to arrive
NAME_CHARACTERS = 250  # of a run's name; databases keep no more
ERROR_CHARACTERS = 500  # of the tag that says why a run failed


@contextmanager
def open_run(
    config: Any, name: str, run_id: str | None = None, *, goes_on: bool = False, experiment: str = experiments.CELLS
) -> Iterator[Run]:
    """Open a run, join the one that `mlflow run` has begun, or reopen `run_id`. The run ends with the block.

    goes_on: whether the work that the reopened run is of goes on; otherwise something is added to it.
    experiment: the name of a new run's experiment, unless the environment names one (`experiments.experiment_id`).
    The run of a sweep's cell keeps the name that the sweep gave it.

    A run that fails is marked FAILED, with the reason as its tag plw.error. An interrupted one is marked KILLED. The
    tag plw.status says the same. A run that something is added to keeps the status that it had when that fails.

    Raises Unreachable where the tracking server does not answer, and UserError where it refuses. The cell of a sweep
    waits for a server that is away, as it would be marked as failed otherwise.
    """
    is_of_sweep = processes.SWEEP in os.environ
    if is_of_sweep:
        await_reachable("opening a run")
    else:
        check_reachable()
    try:
        existing = run_id or os.environ.get("MLFLOW_RUN_ID")
        status = get_run(existing).info.status if existing else None  # raises if the run is unknown or was deleted
        status_before = None if run_id is None or goes_on else status
        wrapper = None if run_id is None else leave_wrapper(run_id)
        short = _cut(without_passwords(name), NAME_CHARACTERS)
        own_devices.restrict()
        # MLflow itself says what is wrong with an id. An experiment of a new name it would make, too, but it fails
        # where another process makes it at the same moment.
        belongs_to = None if existing or experiments.given_id() else experiments.experiment_id(experiment)
        keeps_name = is_of_sweep or (run_id is not None and not goes_on)
        active = mlflow.start_run(run_id, belongs_to, run_name=None if keeps_name else short)
        if run_id is None:
            experiments.describe(active.info.experiment_id, experiment)
    except MlflowException as error:
        raise explained("opening a run", error) from error
    run = Run(active.info.run_id)
    try:
        _check_container(run.id, wrapper, config)
        if run_id is None or (goes_on and run.read_tag("version") is None):
            run.log_config(config)
            run.tag(version=__version__, **_code_versions())  # last, as it says that all this is there
        with giving_signs_of_life(run.id):
            yield run
        run.curves.flush()
        patiently("ending the run", lambda: run.untag("error"))
    except BaseException as error:
        reason = explained(f"run {run.id}", error) if isinstance(error, MlflowException) else error
        with _ignoring_sigterm():
            _end_badly(run, reason, status_before)
        if reason is error:
            raise
        raise reason from error
    run.curves.close(0)
    try:
        mlflow.end_run("FINISHED")  # ends it in this process, and then in the store; it tries that once
    except (MlflowException, OSError):
        patiently("ending the run", lambda: mlflow.MlflowClient().set_terminated(run.id, "FINISHED"))


def child_environment(run_id: str) -> dict[str, str]:
    """The environment of a process that is to log into `run_id`.

    The store's address may hold a password, so it is here rather than on a command line, which everybody can read.
    """
    own = {
        "MLFLOW_RUN_ID": run_id,
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        processes.PARENT_REPORTS: "true",
    }
    return os.environ | own


def fail(run_id: str, reason: str) -> None:
    """Mark a run FAILED whose process has failed, and say why, unless the process has done so itself.

    So is one that is marked KILLED: of several processes, one may have failed and the first been ended for that. A run
    that somebody has deleted stays as it is.
    """
    with suppress(Refused):
        patiently("marking a failed run", lambda: _mark(run_id, "FAILED", ("FAILED",), reason=reason))


def kill(run_id: str, *, in_haste: bool = False) -> None:
    """Mark a run KILLED whose process was interrupted or killed, unless the process has done so itself.

    in_haste: whether a store that is away is not waited for.
    """
    unless = ("FAILED", "KILLED", "FINISHED")
    if not in_haste:
        with suppress(Refused):
            patiently("marking a killed run", lambda: _mark(run_id, "KILLED", unless))
        return
    with suppress(Exception), hurried():
        check_reachable()
        _mark(run_id, "KILLED", unless)


def _mark(run_id: str, status: str, unless: tuple[str, ...], reason: str = "") -> None:
    client = mlflow.MlflowClient()
    if client.get_run(run_id).info.status not in unless:
        if reason:
            client.set_tag(run_id, "plw.error", _cut(reason, ERROR_CHARACTERS))
        client.set_tag(run_id, "plw.status", status.lower())
        client.set_terminated(run_id, status)


def _end_badly(run: Run, error: BaseException, status_before: str | None) -> None:
    """End a run that has failed or was interrupted, and say so on it if the store is there.

    status_before: the status that a reopened run had, and keeps. None for other runs.
    """
    status = status_before or ("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    run.curves.close(LAST_SECONDS)
    seconds = 1.0  # for a store that is away, which must neither hide why the run failed nor be waited for
    with suppress(Exception):
        check_reachable()
        seconds = connection.ANSWER_SECONDS
        if status_before is None:
            tags = {"status": status.lower()}
            if status != "KILLED":
                tags["error"] = _cut(f"{type(error).__name__}: {error}", ERROR_CHARACTERS)
            with hurried(seconds):
                run.tag(**tags)
    with suppress(Exception), hurried(seconds):
        mlflow.end_run(status)


@contextmanager
def _ignoring_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM does nothing, so that a run that is being ended is not left half ended.

    A sweep, and MLflow too, send it to a process that may have had an interrupt from the terminal before.
    """
    if threading.current_thread() is not threading.main_thread():  # other threads may not handle signals
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


def leave_wrapper(run_id: str) -> str | None:
    """The id of the run that `mlflow run` has opened for work on `run_id`, if any. Its name and a tag say what for.

    Nothing else is logged into it.
    """
    wrapper = os.environ.pop("MLFLOW_RUN_ID", None)
    if wrapper and wrapper != run_id:
        client = mlflow.MlflowClient()
        command = client.get_run(wrapper).data.tags.get("mlflow.project.entryPoint", "work")
        client.update_run(wrapper, name=f"{command} on {run_id[:8]}")
        client.set_tag(wrapper, "plw.for_run", run_id)
    return wrapper


def _code_versions() -> dict[str, str]:
    """Tags for the code, its commit and the image it runs in, as far as they are known."""
    versions = {
        "image": container.image(),
        "git_commit": provenance.commit(),
        "code_sha256": provenance.code_digest(provenance.ROOT),
    }
    return {name: value for name, value in versions.items() if value}


def _check_container(run_id: str, wrapper: str | None, config: Any) -> None:
    """In a container, check before the work that it runs the right code, and that its results would last.

    wrapper: the run that `mlflow run` has recorded the commit of the code on, where that is not `run_id`.

    Raises UserError where the results would be lost, or the image holds other code and `config` does not allow that.
    """
    client = mlflow.MlflowClient()
    artifacts = client.get_experiment(client.get_run(run_id).info.experiment_id).artifact_location
    container.check_mounted(mlflow.get_tracking_uri(), artifacts)
    recorded = wrapper or run_id
    try:
        provenance.check_image(client.get_run(recorded).data.tags.get("mlflow.source.git.commit"))
    except ValueError as error:
        if not config.allow_stale_image:
            raise
        warnings.warn(str(error), stacklevel=2)
        client.set_tag(recorded, "plw.stale_image", "true")
