"""Sweeps beside real services: PostgreSQL, a Ray cluster that loses a node, and SLURM, whose jobs are killed.

`.ci/services` installs the services and runs these; where one is missing then, its test fails.
"""

import os

import pytest

from benchmarks import services, sweeps
from tests.benchmarks.test_sweeps import complete

pytestmark = pytest.mark.skipif(
    not os.environ.get("PLW_TEST_SERVICES"), reason="PLW_TEST_SERVICES does not say that the services are installed"
)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return sweeps.undisturbed(tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.mark.parametrize("number", [2, 8])
def test_sweeps_at_once_on_an_empty_postgresql_run_each_cell_once(number, tmp_path, scores):
    with services.running(services.Postgres) as database:
        place = sweeps.Place(tmp_path, database.database("mlflow"))
        complete(sweeps.crowd("PostgreSQL", place, number, scores))


def test_eight_sweeps_at_once_on_a_store_that_does_not_exist_run_each_cell_once(tmp_path, scores):
    complete(sweeps.crowd("SQLite", sweeps.Place(tmp_path), 8, scores))


def test_a_cell_whose_ray_node_is_killed_goes_on_elsewhere(tmp_path, scores):
    with services.running(services.RayCluster) as cluster:
        complete(sweeps.lose_node(tmp_path, cluster, scores))


def test_cells_whose_slurm_jobs_are_killed_or_preempted_are_submitted_again(tmp_path, scores):
    with services.running(services.Slurm) as cluster:
        complete(sweeps.lose_jobs(tmp_path, cluster, scores))
