"""Is a store of use after `mlflow gc` has removed for good what was deleted in it?"""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig
from plw_mlflow.errors import UserError
from plw_mlflow.tracking.claims import Claims
from tests.conftest import byte_tokenizer, tiny_llama
from tests.tracking.helpers import add_scores

pytestmark = pytest.mark.usefixtures("store")


def cell(plw, score):
    """The run of a cell with a model and a score."""
    config = MainConfig(model="tiny", plw=plw)
    with tracking.open_run(config, "cell") as run:
        run.tag(cell=f"{plw}", base_model="f" * 64, save_precision="float32")
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), config)
        add_scores(run, ("a", score))
    return run


def test_a_store_is_of_use_after_gc(store, tmp_path):
    removed, kept = cell(0.1, 0.5), cell(0.5, 0.25)
    claims = Claims()
    with claims.giving_signs_of_life():
        assert claims.take("a-cell")
    folder = Path(store.get_run(removed.id).info.artifact_uri)
    model = Path(store.get_logged_model(removed.model_id).artifact_location)
    store.delete_run(removed.id)
    store.delete_logged_model(removed.model_id)
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", mlflow.get_tracking_uri()]
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert removed.id in done.stdout
    assert (folder.exists(), model.exists()) == (False, False)

    with pytest.raises(UserError, match="there is no run"):
        tracking.load_model(tracking.Run(removed.id))
    with pytest.raises(UserError, match=r"model models:/plw-tiny-ffffffff-toy-short/1 cannot be loaded: "):
        tracking.load_registered("models:/plw-tiny-ffffffff-toy-short/1")
    assert tracking.trained_in("models:/plw-tiny-ffffffff-toy-short/1") is None
    assert list(tracking.score_table(experiment="Default")["plw"]) == [0.5]
    assert tracking.load_model(kept)
    again = cell(0.1, 0.75)
    assert store.get_run(again.id).data.tags["plw.model_version"].endswith("/3")
    assert sorted(tracking.score_table(experiment="Default")["score"]) == [0.25, 0.75]
    with claims.giving_signs_of_life():
        assert claims.take("a-cell")
