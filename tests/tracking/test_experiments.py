"""Do runs belong to experiments of their own, which say what they are, and is what the environment names obeyed?"""

import json

import mlflow
import pytest
import sqlalchemy
from mlflow.store.tracking.dbmodels.models import SqlExperiment

from plw_mlflow import tracking
from plw_mlflow.config import EvaluateConfig, TrainConfig
from plw_mlflow.errors import UserError
from plw_mlflow.tracking import experiments, pages


@pytest.fixture
def free(store, monkeypatch):
    """A store, where the environment names no experiment."""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    return store


def opened(store, config=None, **how):
    with tracking.open_run(config or TrainConfig(), "name", **how) as run:
        pass
    return store.get_experiment(store.get_run(run.id).info.experiment_id)


def test_cells_and_what_looks_at_things_have_experiments_that_say_what_they_are(free):
    assert experiments.known_experiment_id() is None
    cells = opened(free)
    looking = opened(free, EvaluateConfig(model="toy"), experiment=tracking.LOOKING)
    assert (cells.name, looking.name) == ("plw", "plw-looking")
    assert experiments.known_experiment_id() == cells.experiment_id == opened(free).experiment_id
    view = json.loads(json.loads(cells.tags["mlflow.sharedViewState.cells"])["state"])
    assert {"metrics.`score`", "metrics.`prompt_share`", "params.`plw`"} <= set(view["selectedColumns"])
    assert pages.list_page(cells.experiment_id, "cells") in cells.tags["mlflow.note.content"]
    assert "evaluate" in looking.tags["mlflow.note.content"]
    assert "mlflow.sharedViewState.cells" not in looking.tags


def test_who_only_looks_in_an_experiment_of_another_name_does_not_describe_it(free):
    made = free.create_experiment("my-study")
    experiments.describe(made, experiments.LOOKING)
    assert "mlflow.note.content" not in free.get_experiment(made).tags
    experiments.describe(made, experiments.CELLS)
    assert "mlflow.note.content" in free.get_experiment(made).tags


def test_what_somebody_has_written_of_an_experiment_stays(free):
    made = free.create_experiment("plw", tags={"mlflow.note.content": "mine"})
    assert opened(free).experiment_id == made
    assert free.get_experiment(made).tags["mlflow.note.content"] == "mine"


@pytest.mark.parametrize("name", ["MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"])
def test_the_environment_names_the_experiment(free, monkeypatch, name):
    mine = free.create_experiment("mine")
    monkeypatch.setenv(name, "mine" if name == "MLFLOW_EXPERIMENT_NAME" else mine)
    assert opened(free).experiment_id == experiments.experiment_id() == experiments.known_experiment_id() == mine
    assert free.get_experiment_by_name("plw") is None


def test_a_name_and_an_id_of_two_experiments_are_refused(free, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", free.create_experiment("mine"))
    assert opened(free).name == "mine"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", free.create_experiment("another"))
    with pytest.raises(
        UserError, match="MLFLOW_EXPERIMENT_NAME is 'mine', whose id is 1, but MLFLOW_EXPERIMENT_ID is 2"
    ):
        opened(free)


def test_commands_that_begin_a_new_experiment_at_the_same_moment_are_all_in_it(free, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")

    @sqlalchemy.event.listens_for(SqlExperiment, "before_insert", once=True)
    def make_it_first(*_):
        free.create_experiment("mine")

    assert opened(free).name == "mine"


def test_a_run_that_mlflow_run_has_begun_stays_in_its_experiment(free, monkeypatch):
    mine = free.create_experiment("mine")
    monkeypatch.setenv("MLFLOW_RUN_ID", free.create_run(mine).info.run_id)  # as mlflow run --experiment-name does
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mine)
    assert opened(free).experiment_id == mine


def test_a_store_of_an_earlier_version_is_told_of(free, capsys, monkeypatch):
    free.create_run("0", tags={"plw.cell": "abc"})
    opened(free)
    assert "MLFLOW_EXPERIMENT_NAME=Default" in capsys.readouterr().out
    opened(free)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    default = opened(free)
    assert default.experiment_id == "0"
    assert "mlflow.note.content" not in default.tags  # it is for all kinds of runs
    assert "mlflow.sharedViewState.cells" in default.tags


def test_the_name_that_a_sweep_gave_its_cell_stays(store, monkeypatch):
    begun = store.create_run("0", run_name="plw 0.1 seed 2 toy-short").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    monkeypatch.setenv("PLW_SWEEP", "1")
    with tracking.open_run(TrainConfig(), "another name") as run:
        assert run.id == begun
    assert mlflow.get_run(begun).info.run_name == "plw 0.1 seed 2 toy-short"
