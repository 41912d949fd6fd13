"""Sweeps beside real services: PostgreSQL, a Ray cluster that loses a node, and SLURM, whose jobs are killed.

`.ci/services` installs the services and runs these; where one is missing then, its test fails.
"""

import os
import pickle

import pytest
from filelock import FileLock

from benchmarks import services, sweeps
from tests.benchmarks.test_sweeps import complete

pytestmark = pytest.mark.skipif(
    not os.environ.get("PLW_TEST_SERVICES"), reason="PLW_TEST_SERVICES does not say that the services are installed"
)
PLWS = ("0", "0.5", "1")
BY_LUCK = ("jobs that had to make way", "cells begun")


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """The scores of an undisturbed sweep, which the first of pytest's processes to need them finds out for all."""
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    kept = common / "undisturbed.pickle"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(sweeps.undisturbed(common / "undisturbed", PLWS)[0]))
    return pickle.loads(kept.read_bytes())


@pytest.mark.parametrize("number", [2, 8])
def test_sweeps_at_once_on_an_empty_postgresql_run_each_cell_once(number, tmp_path, scores):
    with services.running(services.Postgres) as database:
        place = sweeps.Place(tmp_path, database.database("mlflow"))
        complete(sweeps.crowd("PostgreSQL", place, number, scores, PLWS))


def test_eight_sweeps_at_once_on_a_store_that_does_not_exist_run_each_cell_once(tmp_path, scores):
    complete(sweeps.crowd("SQLite", sweeps.Place(tmp_path), 8, scores, PLWS))


def test_a_cell_whose_ray_node_is_killed_goes_on_elsewhere(tmp_path, scores):
    with services.running(services.RayCluster) as cluster:
        complete(sweeps.lose_node(tmp_path, cluster, scores, PLWS))


def test_cells_whose_slurm_jobs_are_killed_or_preempted_are_submitted_again(tmp_path, scores):
    with services.running(services.Slurm) as cluster:
        outcomes = sweeps.lose_jobs(tmp_path, cluster, scores, PLWS)
    complete(outcomes, *BY_LUCK)  # a cell may end before it has to make way
    begun = {outcome.what: outcome.count for outcome in outcomes}["cells begun"]
    assert len(PLWS) < begun <= len(PLWS) + 2
