"""Is every step in a run's curves once, also where another run goes on for it?"""

import pytest
from mlflow.entities import ViewType

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig, TrainConfig
from plw_mlflow.errors import Refused
from plw_mlflow.tracking import StoredCheckpoints
from tests.tracking.helpers import history, saved

pytestmark = pytest.mark.usefixtures("store")


def test_metrics_held_back_arrive_once(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        for step in range(2500):  # more than one request takes
            run.curves.log_step({"train/loss": float(step)}, step)
    assert history(store, run.id, "train/loss") == [(step, float(step)) for step in range(2500)]


def test_a_cut_short_run_hands_its_curve_over(store, tmp_path):
    first = tracking.Run(store.create_run("0").info.run_id)  # its process died: nobody ended it
    tracking.begin_cell(first, "c", tmp_path, 0)
    for step in range(1, 6):
        first.curves.log_step({"train/loss": step / 10}, step)
    first.curves.flush()
    with tracking.open_run(TrainConfig(), "cell") as second:
        tracking.begin_cell(second, "c", tmp_path, 3)  # the last checkpoint was of step 3
        second.curves.log_step({"train/loss": 0.4}, 4)
    assert history(store, second.id, "train/loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert "plw.cell" not in store.get_run(first.id).data.tags
    assert store.get_run(first.id).info.status == "KILLED"
    assert store.get_run(second.id).data.tags["plw.cell"] == "c"


def test_a_run_cut_short_before_its_first_checkpoint_hands_nothing_over(store, tmp_path):
    for _ in range(2):
        with tracking.open_run(TrainConfig(), "cell") as run:
            tracking.begin_cell(run, "c", tmp_path, 0)
            run.curves.log_step({"eval/prompt_loss": 1.0}, 0)
    assert history(store, run.id, "eval/prompt_loss") == [(0, 1.0)]


def test_a_cut_short_run_that_somebody_deleted_hands_its_curve_over_and_is_left_alone(store, tmp_path):
    with tracking.open_run(TrainConfig(), "cell") as first:
        tracking.begin_cell(first, "c", tmp_path, 0)
        first.curves.log_step({"train/loss": 1.0}, 1)
    store.delete_run(first.id)
    with tracking.open_run(TrainConfig(), "cell") as second:
        tracking.begin_cell(second, "c", tmp_path, 1)
    assert (tmp_path / "run_id").read_text() == second.id
    assert history(store, second.id, "train/loss") == [(1, 1.0)]
    assert "plw.superseded_by" not in store.get_run(first.id).data.tags


@pytest.mark.filterwarnings("ignore:sending the metrics")
def test_a_run_that_is_deleted_while_it_trains_is_said_at_once(store, tmp_path, impatient, capsys):
    with pytest.raises(Refused) as error:
        train_deleted(store, tmp_path)
    (deleted,) = store.search_runs(["0"], run_view_type=ViewType.DELETED_ONLY)
    run_id = deleted.info.run_id
    for part in (f"metrics of run {run_id}", f"mlflow runs restore --run-id {run_id}", f"checkpoints in {tmp_path}"):
        assert part in str(error.value)
    assert "waiting" not in capsys.readouterr().out
    with tracking.open_run(TrainConfig(), "cell") as second:  # the same command again
        tracking.begin_cell(second, "c", tmp_path, 2)
    assert history(store, second.id, "train/loss") == [(1, 1.0), (2, 0.5)]


def train_deleted(store, folder):
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "c", folder, 0)
        run.curves.log_step({"train/loss": 1.0}, 1)
        run.curves.flush()
        store.delete_run(run.id)
        run.curves.log_step({"train/loss": 0.5}, 2)  # goes on
        run.curves.save_unsent()
        with pytest.warns(UserWarning, match="step-000002 is not in the store"):
            StoredCheckpoints(run, "abc").store(saved(folder, 2))
        run.curves.flush()


def test_a_curve_has_one_value_a_step(store):
    with tracking.open_run(MainConfig(), "cell") as run:
        for step, loss in ((2, 5.0), (1, 3.0), (2, 4.0)):
            run.curves.log_step({"train/loss": loss}, step)
            run.curves.flush()
    assert run.curves.values("train/loss") == {1: 3.0, 2: 4.0}
