"""Does today's code load what was stored before the package was divided into rooms? fixtures/old_layout has it."""

import json
import os
import sqlite3
import subprocess
import sys
import tarfile

import mlflow
import pandas as pd
import pytest
import torch

from plw_mlflow import cell, tracking
from plw_mlflow.config import TrainConfig
from plw_mlflow.models import pretrained
from tests.stores import ROOT

TRAINED = "83d2952f4206453faeee4182d3c62d60"  # the run of a finished cell
INTERRUPTED = "46216448327942fd9a9241793da28097"  # the run of a cell that was interrupted after step 5 of 10

# What the code of that time gave: for the whole training that the interrupted one had begun, and for the regression.
CELL = "e265fb61f139b03c"
LOSSES = [5.664620, 5.698945, 5.680371, 5.664308, 5.598875, 5.615560, 5.651579, 5.581712, 5.610295, 5.601139]
PREDICTED = [[0.361974, 0.356176, 0.367772, 0.243437], [0.357283, 0.350572, 0.363994, 0.243437]]

PREDICT = """
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/plw-regression/1")
rows = pandas.DataFrame({"dataset": ["AlpacaDataShort"] * 2, "plw": [0.242, 1.0]})
print(model.predict(rows).to_json(orient="values"))
"""


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The old store's folder, which is also the current one."""
    with tarfile.open(ROOT / "tests/fixtures/old_layout/store.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.executescript((tmp_path / "store.sql").read_text().replace("FOLDER", str(tmp_path)))
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("before", ["", "import plw_mlflow.tracking"])
def test_a_regression_predicts_as_it_did(store, before):
    """In a process that knows nothing of this package, and in one that has imported today's."""
    environment = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "PYTHONPATH": str(ROOT) if before else ""}
    done = subprocess.run(
        [sys.executable, "-c", before + PREDICT], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    predicted = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
    pd.testing.assert_frame_equal(predicted, pd.DataFrame(PREDICTED), check_exact=False, atol=1e-6)


def test_a_logged_model_loads_from_its_run_and_by_its_registered_name(store):
    run = tracking.Run(TRAINED)
    model, _ = tracking.load_model(run)
    (name,) = (one.name for one in mlflow.MlflowClient().search_registered_models() if one.name != "plw-regression")
    registered, _ = tracking.load_registered(f"models:/{name}/1")
    base = pretrained.load("model")
    for key, weight in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], registered.state_dict()[key])
        assert not torch.equal(model.state_dict()[key], weight)  # it has been trained
    assert run.cell() == {"model": "model", "dataset": "toy-short", "plw": 0.242, "seed": 1234}
    assert list(tracking.read_scores(run)["task"]) == ["toy_choice", "toy_short", "toy_long"]
    assert run.config(store)["template"] == "none"


def test_an_interrupted_training_goes_on_from_its_stored_checkpoint(store, capsys):
    options = {"model": "model", "template": "none", "max_records": 80, "precision": "float32"}
    config = TrainConfig(**options, epochs=2.0, plw=0.5, save_every=2)
    with tracking.open_run(config, "test") as run:
        cell.lead(config, run)
    assert "went on from the checkpoint of step 5 of 10" in capsys.readouterr().out
    assert mlflow.get_run(run.id).data.tags["plw.cell"] == CELL
    assert mlflow.get_run(run.id).data.tags["plw.resumed_from"] == INTERRUPTED
    losses = run.curves.values("train/loss")
    assert list(losses) == list(range(1, 11))
    assert list(losses.values()) == pytest.approx(LOSSES, rel=1e-6)
