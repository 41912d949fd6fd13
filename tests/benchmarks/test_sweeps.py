"""Sweeps that are killed, lose their server, or are started at once: each cell is run once, with the same scores."""

import sqlite3
from contextlib import closing

import pytest

from benchmarks import sweeps
from tests.servers import Server
from tests.stores import make_store

pytestmark = pytest.mark.slow
PLWS = ("0", "1")


def complete(outcomes, *but):
    """Whether everything that was to be found was found, except where that is a matter of luck."""
    assert outcomes
    wrong = [outcome for outcome in outcomes if outcome.count != outcome.whole and outcome.what not in but]
    assert wrong == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    make_store(folder)
    return sweeps.undisturbed(folder, PLWS)


def test_a_sweep_that_is_killed_with_all_its_processes_goes_on_and_runs_each_cell_once(tmp_path, undisturbed):
    make_store(tmp_path)
    complete(sweeps.kill(tmp_path, *undisturbed, kills=1, seed=2, plws=PLWS), "sent while cells ran")


def test_a_sweep_waits_for_a_lost_server(tmp_path, undisturbed):
    store = make_store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0'")
        database.commit()
    with closing(Server(store, tmp_path)) as server:
        outcomes = sweeps.lose_server(server, tmp_path / "lost", *undisturbed, losses=1, seed=1, plws=PLWS)
    complete(outcomes, "while the sweep ran")


def test_two_sweeps_at_once_on_a_store_that_does_not_exist_run_each_cell_once(tmp_path, undisturbed):
    complete(sweeps.crowd("SQLite", sweeps.Place(tmp_path), 2, undisturbed[0], PLWS))


@pytest.mark.parametrize("way", sweeps.WAYS[:2], ids=lambda way: way.name)
def test_a_sweep_that_is_killed_alone_or_interrupted_leaves_no_cell_at_work(tmp_path, way):
    make_store(tmp_path)
    complete(sweeps.interrupt(tmp_path, way))


def test_a_cell_that_dies_is_told_of_and_run_again_alone_where_that_is_asked_for(tmp_path):
    make_store(tmp_path)
    complete(sweeps.fail(tmp_path, PLWS))
