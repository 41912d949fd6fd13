"""Does every run end with the status and the reason that it deserves?"""

import os
import signal

import mlflow
import pytest

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig, TrainConfig
from plw_mlflow.errors import Refused
from tests.tracking.helpers import history, open_and_end

pytestmark = pytest.mark.usefixtures("store")


def test_a_failure_is_told_on_the_run(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    found = store.get_run(run.id)
    assert found.info.status == "FAILED"
    assert found.data.tags["plw.error"] == "ValueError: bad luck"


def test_a_failing_run_keeps_the_metrics_held_back(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        lose(run)
    assert history(store, run.id, "train/loss") == [(1, 0.5)]


def lose(run):
    run.curves.log_step({"train/loss": 0.5}, 1)
    raise ValueError("bad luck")


def test_what_is_added_well_to_a_failed_run_mends_it(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    with tracking.open_run(TrainConfig(), "", run_id=run.id):
        pass
    found = store.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert "plw.error" not in found.data.tags


def test_a_reopened_run_keeps_its_status_when_what_is_added_fails(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        pass
    with pytest.raises(ValueError, match="no such task"), tracking.open_run(TrainConfig(), "", run_id=run.id):
        raise ValueError("no such task")
    assert store.get_run(run.id).info.status == "FINISHED"


def test_a_name_that_mlflow_refuses_is_one_line(store):
    with pytest.raises(Refused, match=r"run \w+: the tracking store .* refuses it: Invalid value .what"):
        log_badly()
    (found,) = store.search_runs(["0"])
    assert found.info.status == "FAILED"
    assert found.data.tags["plw.error"].startswith("Refused: run ")


def log_badly():
    with tracking.open_run(TrainConfig(), "cell"):
        mlflow.log_metric("what?!", 1.0)


@pytest.mark.parametrize("given", ["f" * 32, "no id at all/.."])
@pytest.mark.parametrize("by", ["option", "environment"])
def test_an_unknown_run_is_said(monkeypatch, given, by):
    if by == "environment":
        monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with pytest.raises(ValueError, match=f"there is no run '{given}'"):
        open_and_end(given if by == "option" else None)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_deleted_run_is_said(store, monkeypatch, by):
    run = store.create_run("0").info.run_id
    store.delete_run(run)
    if by == "environment":
        monkeypatch.setenv("MLFLOW_RUN_ID", run)
    with pytest.raises(
        ValueError, match=f"run {run} in .* was deleted; restore it by mlflow runs restore --run-id {run}"
    ):
        open_and_end(run if by == "option" else None)
    with pytest.raises(ValueError, match="was deleted"):
        tracking.score_table(sweep=run)


def test_a_deleted_or_unknown_experiment_is_said(store, monkeypatch):
    gone = store.create_experiment("gone")
    store.delete_experiment(gone)
    with pytest.raises(ValueError, match=f"experiment 'gone' in .* was deleted; .* --experiment-id {gone}"):
        tracking.score_table(experiment="gone")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    with pytest.raises(Refused, match=f"opening a run: .* mlflow experiments restore --experiment-id {gone}"):
        open_and_end()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    with pytest.raises(Refused, match=r"opening a run: .* MLFLOW_EXPERIMENT_ID .* `4711` does not exist"):
        open_and_end()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    store.delete_experiment("0")
    with pytest.raises(Refused, match=r"opening a run: .* --experiment-id 0"):
        open_and_end()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_is_killed_everywhere(store, stop):
    with pytest.raises(stop), tracking.open_run(TrainConfig(), "cell") as run:
        raise stop
    found = store.get_run(run.id)
    status = "KILLED" if stop is KeyboardInterrupt else "FAILED"
    assert (found.info.status, found.data.tags["plw.status"]) == (status, status.lower())
    assert ("plw.error" in found.data.tags) == (status == "FAILED")


def test_a_second_interrupt_does_not_leave_a_run_half_ended(store, monkeypatch):
    """As a sweep sends one to a cell that has heard of the first at the terminal."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = mlflow.end_run
    monkeypatch.setattr(mlflow, "end_run", lambda status: (os.kill(os.getpid(), signal.SIGTERM), end(status)))
    try:
        with pytest.raises(KeyboardInterrupt), tracking.open_run(TrainConfig(), "cell") as run:
            raise KeyboardInterrupt
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert store.get_run(run.id).info.status == "KILLED"


def test_a_run_that_fails_as_its_store_goes_away_does_not_wait_for_it(store, monkeypatch):
    asked = []
    end = mlflow.end_run
    monkeypatch.setattr(mlflow, "end_run", lambda status: (asked.append(os.environ[RETRIES]), end(status)))
    monkeypatch.setattr(tracking.opening, "check_reachable", once(tracking.opening.check_reachable))
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    assert asked == ["1"]
    assert os.environ[RETRIES] != "1"
    assert "plw.error" not in store.get_run(run.id).data.tags


RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


def once(call):
    """The function, and then a store that is away."""
    calls = []

    def called():
        calls.append(1)
        if len(calls) > 1:
            raise ConnectionError("away")
        call()

    return called


def test_a_long_reason_is_cut_off_visibly(store):
    with pytest.raises(ValueError, match="xxx"), tracking.open_run(TrainConfig(), "n" * 300) as run:
        raise ValueError("x" * 600)
    found = store.get_run(run.id)
    assert len(found.data.tags["plw.error"]) == 500
    assert found.data.tags["plw.error"].endswith("x …")
    assert (len(found.info.run_name), found.info.run_name[-2:]) == (250, " …")


def test_a_wrapper_says_whose_run_it_works_on_and_holds_nothing_else(store, monkeypatch):
    with tracking.open_run(MainConfig(), "cell") as cell:
        pass
    tags = {"mlflow.project.entryPoint": "evaluate"}
    wrapper = store.create_run("0", tags=tags).info.run_id  # as `mlflow run -e evaluate -P run_id=...` begins one
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    with tracking.open_run(MainConfig(), "", run_id=cell.id) as reopened:
        assert reopened.id == cell.id
    found = store.get_run(wrapper)
    assert {name: tag for name, tag in found.data.tags.items() if name.startswith("plw.")} == {"plw.for_run": cell.id}
    assert (found.data.params, found.data.metrics) == ({}, {})
    assert found.info.run_name == f"evaluate on {cell.id[:8]}"
