"""Does a sweep mark the runs of cells that could not do so themselves?"""

import mlflow
import pytest

from plw_mlflow import sweep
from plw_mlflow.config import MainConfig
from tests.stores import Place


@pytest.fixture
def store(tmp_path):
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    return place.client


@pytest.mark.parametrize(
    ("ended", "expected"),
    [(0, ("RUNNING", None)), (130, ("RUNNING", None)), (-9, ("FAILED", "failed")), (None, ("KILLED", "killed"))],
)
def test_a_sweep_marks_the_cell_that_could_not_do_so_itself(store, monkeypatch, ended, expected):
    """ended: the cell's exit status; None where the sweep was interrupted before the cell had begun its work."""
    run = store.create_run("0").info.run_id
    given = []

    def wait(command, environment):
        given.append((command, environment))
        if ended is None:
            raise KeyboardInterrupt
        return ended

    monkeypatch.setattr(sweep, "_run_to_end", wait)
    try:
        assert sweep._run_cell(MainConfig(), run) == ended
    except KeyboardInterrupt:
        assert ended is None
    found = store.get_run(run)
    assert (found.info.status, found.data.tags.get("plw.status")) == expected
    ((command, environment),) = given
    assert environment["MLFLOW_TRACKING_URI"] == mlflow.get_tracking_uri()
    assert not [part for part in command if "sqlite" in part]  # everybody can read a command line
