"""Is each cell of a sweep run once, whoever works on it and whatever has ended before?"""

from dataclasses import replace

import mlflow
import pytest

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig, SweepConfig
from plw_mlflow.environment import processes
from plw_mlflow.errors import UserError
from plw_mlflow.sweep import ending
from plw_mlflow.sweep import run as run_sweep
from plw_mlflow.sweep.account import Account
from plw_mlflow.sweep.grid import Cell
from plw_mlflow.tracking.claims import Claims
from plw_mlflow.tracking.sweeps import _keep_running
from tests.stores import Place

CELLS = [Cell(MainConfig(plw=plw), f"plw {plw}", f"cell{plw:g}", f"cell{plw:g}") for plw in (0.0, 1.0)]


@pytest.fixture
def store(tmp_path):
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    return place.client


@pytest.fixture
def open_account(store, monkeypatch):
    """Opens an account of CELLS for a process of its own; `grid` tells sweeps apart."""
    opened = []

    def open_one(grid="grid", **options):
        sweep = tracking.open_sweep(SweepConfig(), grid, {})
        opened.append(sweep)
        account = Account(CELLS, sweep.__enter__(), **{"retries_failed": False} | options)
        mlflow.end_run()  # this test opens several runs in one process
        return account

    yield open_one
    monkeypatch.setattr(mlflow, "end_run", lambda *_: None)
    for sweep in reversed(opened):
        sweep.__exit__(None, None, None)


def finish(store, run_id):
    store.set_tag(run_id, "plw.status", "scored")
    store.set_terminated(run_id, "FINISHED")


def test_a_cell_is_begun_by_one_process_alone(open_account):
    one, other = open_account(), open_account()
    assert one.sweep.run.id == other.sweep.run.id
    first, second = one.begin_next(), other.begin_next()
    assert [begun.cell.name for begun in (first, second)] == ["plw 0.0", "plw 1.0"]
    assert one.begin_next() is None
    other.look()
    assert other.elsewhere == {"cell0"}
    assert [cell.name for cell in other.left] == ["plw 0.0"]


def test_of_cells_with_one_training_one_runs_at_a_time(open_account, tmp_path):
    account = open_account()
    account.cells = [replace(cell, training="shared") for cell in CELLS]
    first = account.begin_next()
    assert account.begin_next() is None
    account.end(first, 1, tmp_path / "none")
    assert account.begin_next().cell.name == "plw 1.0"


def test_a_cell_that_fails_while_its_first_process_is_ended_for_that_has_failed(store, open_account, tmp_path):
    account = open_account()
    begun = account.begin_next()
    store.set_terminated(begun.run_id, "KILLED")  # as torchrun ends it where another process has failed
    account.end(begun, 1, tmp_path / "none")
    assert [cell.name for cell in account.failed] == ["plw 0.0"]


def test_a_finished_cell_is_not_run_again_and_one_that_was_cut_short_goes_on_in_its_run(store, open_account, tmp_path):
    one = open_account()
    first, second = one.begin_next(), one.begin_next()
    finish(store, first.run_id)
    one.end(first, 0, tmp_path / "none")
    store.set_terminated(second.run_id, "KILLED")
    one.end(second, 130, tmp_path / "none")
    assert [cell.name for cell in one.finished] == ["plw 0.0"]
    other = open_account()
    begun = other.begin_next()
    assert (begun.cell.name, begun.run_id) == ("plw 1.0", second.run_id)


def test_a_failed_cell_is_run_again_only_where_that_is_asked_for(store, open_account, tmp_path):
    one = open_account()
    begun = one.begin_next()
    log = tmp_path / "log.txt"
    log.write_text("loading\nout of memory\n")
    one.end(begun, -9, log)
    assert [cell.name for cell in one.failed] == ["plw 0.0"]
    assert "killed by signal 9; its last line: out of memory" in one.failure(begun.cell)
    assert [item.path for item in store.list_artifacts(begun.run_id)] == ["log.txt"]
    assert store.get_run(begun.run_id).info.status == "FAILED"
    assert one.begin_next().cell.name == "plw 1.0"
    again = open_account(retries_failed=True)
    retried = again.begin_next()
    assert retried.cell.name == "plw 0.0"
    assert retried.run_id != begun.run_id
    again.end(retried, 1, log)
    assert again.begin_next() is None  # it has failed a second time
    assert [cell.name for cell in again.failed] == ["plw 0.0"]


def test_cells_that_another_sweep_has_finished_count(store, open_account, tmp_path):
    one = open_account()
    for _ in CELLS:
        begun = one.begin_next()
        finish(store, begun.run_id)
        one.end(begun, 0, tmp_path / "none")
    other = open_account("another grid")
    assert other.sweep.run.id != one.sweep.run.id
    assert other.begin_next() is None
    assert other.finished == CELLS
    other.adopt()
    tags = store.get_run(begun.run_id).data.tags
    assert tags[f"plw.cell_of.{other.sweep.run.id}"] == "true"
    assert tags[f"plw.cell_of.{one.sweep.run.id}"] == "true"
    assert store.search_registered_models() == []  # no claim is left behind


def test_what_killed_sweeps_have_left_of_finished_cells_is_cleared(store, open_account, monkeypatch, tmp_path):
    killed = open_account()
    for _ in CELLS:
        begun = killed.begin_next()
        finish(store, begun.run_id)
    stray = killed.sweep.open_cell("cell0", "plw 0.0")  # by a request that was sent twice
    monkeypatch.setattr(processes, "has_ended", lambda process: True)
    account = open_account()
    assert account.begin_next() is None
    assert account.sweep.abandoned() == {"cell0", "cell1"}
    account.clear()
    assert store.search_registered_models() == []
    assert store.get_run(stray).info.status == "KILLED"
    assert account.finished == CELLS


def test_a_cell_at_work_elsewhere_is_not_cleared(store, open_account):
    at_work = open_account()
    begun = at_work.begin_next()
    open_account("another grid").clear()
    assert store.get_run(begun.run_id).info.status == "RUNNING"
    assert len(store.search_registered_models()) == 1


def test_the_run_of_a_sweep_that_another_process_works_on_is_running(store, open_account):
    sweep = open_account().sweep
    store.set_terminated(sweep.run.id, "KILLED")  # by a process of the sweep that was interrupted
    _keep_running(sweep.run)
    assert store.get_run(sweep.run.id).info.status == "RUNNING"


def test_a_cell_that_ends_well_without_a_score_has_failed(store, open_account, tmp_path):
    """Or it would be begun again for ever."""
    account = open_account()
    begun = account.begin_next()
    store.set_terminated(begun.run_id, "FINISHED")
    account.end(begun, 0, tmp_path / "none")
    assert account.failed == [begun.cell]
    assert "it has ended without a score" in account.failure(begun.cell)


def test_a_cell_that_is_finished_has_not_failed_however_its_process_ends(store, open_account, tmp_path):
    account = open_account()
    begun = account.begin_next()
    finish(store, begun.run_id)
    account.end(begun, -9, tmp_path / "none")
    assert account.finished == [begun.cell]
    assert store.get_run(begun.run_id).info.status == "FINISHED"


def test_a_cell_whose_run_somebody_deletes_is_run_in_a_new_one(store, open_account, tmp_path):
    account = open_account()
    begun = account.begin_next()
    store.delete_run(begun.run_id)
    account.end(begun, 1, tmp_path / "none")
    again = account.begin_next()
    assert again.cell == begun.cell
    assert again.run_id != begun.run_id


def test_a_sweep_joins_the_run_that_mlflow_run_has_begun_and_goes_on_in_that_of_the_same_cells(
    store, open_account, monkeypatch
):
    begun = [store.create_run("0", run_name=f"begun-{number}").info.run_id for number in (1, 2)]
    for run_id in begun:
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        assert open_account().sweep.run.id == begun[0]
    first, second = map(store.get_run, begun)
    assert first.info.run_name == "toy-short, toy-long plw 0 to 1 (10)"
    assert first.data.params["plw"] == SweepConfig().plw
    assert second.data.tags["plw.for_run"] == begun[0]


def test_a_dry_run_refuses_a_run_that_the_sweep_would_not_go_on_with(store):
    other, none = (store.create_run("0", tags=tags).info.run_id for tags in ({"plw.grid": "grid"}, {}))
    faults = {
        "nosuch": "there is no run 'nosuch'",
        other: f"run {other} is of a sweep of other cells",
        none: f"run {none} is not the run of a sweep",
    }
    for run_id, fault in faults.items():
        with pytest.raises(UserError, match=fault):
            run_sweep(SweepConfig(plw="0.1", dataset="toy-short", dry_run=True, run_id=run_id))
    run_sweep(SweepConfig(plw="0.1", dataset="toy-short", dry_run=True, run_id="new"))


def test_one_process_alone_logs_the_options_of_a_new_sweep(store, open_account, monkeypatch):
    log, others = tracking.Run.log_config, []

    def log_when_nobody_else_may(run, config):
        others.append(Claims().take("0-grid"))
        log(run, config)

    monkeypatch.setattr(tracking.Run, "log_config", log_when_nobody_else_may)
    open_account()
    assert others == [False]


def test_one_sweep_alone_marks_the_best_model(store, open_account, monkeypatch, tmp_path):
    account, others = open_account(), []
    while begun := account.begin_next():
        finish(store, begun.run_id)
        account.end(begun, 0, tmp_path / "none")

    def mark_when_nobody_else_may(*_):
        others.append(Claims().take("best"))
        return ["the alias best stays where it is"]

    monkeypatch.setattr(tracking, "mark_best", mark_when_nobody_else_may)
    monkeypatch.setattr(ending, "_analyse", lambda *_: [])
    ending.end(SweepConfig(), account)
    assert others == [False]


def test_the_views_of_removed_sweeps_are_removed_with_the_next_one(store, open_account):
    def views(sweep):
        sweep.save_view("cells", [], [])
        tags = store.get_experiment(store.get_run(sweep.run.id).info.experiment_id).tags
        return {name.rpartition("-")[2] for name in tags if name.startswith("mlflow.sharedViewState.sweep-")}

    first = open_account().sweep
    assert views(first) == {first.run.id}
    store.delete_run(first.run.id)
    second = open_account().sweep
    assert views(second) == {second.run.id} != {first.run.id}
