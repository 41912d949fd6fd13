"""Connection: is the store there, and what to do while it is not."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

import mlflow
from mlflow.exceptions import MlflowException

from plw_mlflow.errors import first_line

WAIT_SECONDS = 600.0  # for a store that went away, where the work cannot go on without it
ASK_SECONDS = 2.0  # between two questions whether it is there again

Result = TypeVar("Result")


def check_reachable() -> None:
    """Ask the tracking store one thing, without the retries that MLflow would make.

    Raises ConnectionError where it does not answer. By the main thread only, since it changes the environment for a
    moment.
    """
    _quiet()
    patient = {
        name: os.environ.get(name) for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    }
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:
        uri = mlflow.get_tracking_uri()
        raise ConnectionError(f"the tracking store {uri} cannot be used: {first_line(error)}") from None
    finally:
        for name, value in patient.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def patiently(doing: str, call: Callable[[], Result]) -> Result:
    """What `call` gives; where the store is away meanwhile, it is called again as soon as that is back.

    doing: says to a person what is being done.

    `call` may have done its work, or a part of it, before the connection broke; to do it twice has to come to the same.
    Raises ConnectionError where the store stays away for WAIT_SECONDS, and what `call` raises where that is not because
    the store is away: one that answers is given a second call, as it may have been back at once.
    """
    is_second = False
    while True:
        try:
            return call()
        except (MlflowException, OSError) as error:  # what requests raises is an OSError
            was_away = _await_store(doing, error)
            if is_second and not was_away:
                raise
            is_second = not was_away


def _await_store(doing: str, error: Exception) -> bool:
    """Return when the store answers: whether it had to be waited for."""
    deadline = time.monotonic() + WAIT_SECONDS
    is_told = False
    while True:
        try:
            check_reachable()
            return is_told
        except ConnectionError:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"{doing}: the tracking store {mlflow.get_tracking_uri()} was away for {WAIT_SECONDS:.0f} s "
                    f"({first_line(error)}); give the same command again when it is back"
                ) from error
            if not is_told:
                print(f"{doing}: the tracking store is away; waiting for it, at most {WAIT_SECONDS:.0f} s", flush=True)
            is_told = True
            time.sleep(ASK_SECONDS)


def get_run(run_id: str) -> mlflow.entities.Run:
    """A run. Raises ValueError where there is none with that id."""
    try:
        return mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"there is no run {run_id!r} in {mlflow.get_tracking_uri()}") from None


def _quiet() -> None:
    """Keep MLflow's notes on migrations and absent model cards from between a person and the numbers."""
    for logger, level in (
        ("alembic", logging.WARNING),
        ("mlflow", logging.WARNING),
        ("mlflow.transformers", logging.ERROR),
    ):
        logging.getLogger(logger).setLevel(level)
