"""A small training that is killed, told to end, or loses its disk or its server: the same bits, and whole curves."""

import sqlite3
from contextlib import closing

import pytest

from benchmarks import faults
from tests.servers import Server
from tests.stores import make_store


def complete(outcomes, *but):
    """Whether everything that was to be found was found, except where that is a matter of luck."""
    assert outcomes
    return all(outcome.count == outcome.whole for outcome in outcomes if outcome.what not in but)


@pytest.mark.slow
def test_killed_and_starved_trainings_end_in_the_undisturbed_bits(tmp_path):
    with faults.fresh_process() as process:
        outcomes = process.submit(faults.disturb, tmp_path, kills=2, terms=1, seed=1, recipes=faults.ALONE[1:]).result()
    assert {outcome.fault for outcome in outcomes} >= {"2 SIGKILLs", "1 SIGTERMs", "disk full to the end, then SIGKILL"}
    assert complete(outcomes, "sent while a checkpoint was written")


@pytest.mark.slow
def test_a_lost_server_and_a_killed_training_leave_every_step_in_the_curves_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # so that a request fails as soon as the server is gone
    store = make_store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0'")
        database.commit()
    with closing(Server(store, tmp_path)) as server:
        outcomes = faults.lose_server(server, tmp_path)
    assert complete(outcomes)
    assert "the tracking store takes metrics again" in (tmp_path / "output").read_text()


@pytest.mark.parametrize(
    ("rows", "once"), [([(1, 1.0), (2, 1.0)], 2), ([(1, 1.0), (1, 2.0), (2, 1.0)], 1), ([(2, 1.0)], 1)]
)
def test_steps_that_are_lost_or_doubled_are_counted(rows, once, tmp_path):
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE runs (run_uuid TEXT, start_time INTEGER)")
        database.execute("CREATE TABLE metrics (run_uuid TEXT, key TEXT, step INTEGER, value REAL)")
        database.executemany("INSERT INTO runs VALUES (?, ?)", [("old", 1), ("new", 2)])
        database.executemany("INSERT INTO metrics VALUES ('new', 'train/loss', ?, ?)", rows)
        database.execute("INSERT INTO metrics VALUES ('old', 'train/loss', 3, 0.0)")
        database.commit()
    curves, in_store = faults.count_points(tmp_path / "mlflow.db")
    assert (curves.count, curves.whole) == (once, 2)
    assert (in_store.count, in_store.whole) == (len(rows), 2)
