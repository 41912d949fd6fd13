"""Does a cell go on from the store's newest usable checkpoint, on one machine at a time?"""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from plw_mlflow import tracking
from plw_mlflow.config import TrainConfig
from plw_mlflow.tracking import StoredCheckpoints, resumption
from tests.tracking.helpers import history, saved

pytestmark = pytest.mark.usefixtures("store")


def weight_in(place):
    return load_file(place / "weights.safetensors")["weight"].item()


@pytest.fixture
def cut_short(store, tmp_path):
    """A run of the cell "abc" whose checkpoint of step 40 is in the store, and whose machine is gone."""
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "abc", tmp_path, 0)
        run.curves.log_step({"train/loss": 0.5}, 40)
        StoredCheckpoints(run, "abc").store(saved(tmp_path / "old", 20))
        StoredCheckpoints(run, "abc").store(saved(tmp_path / "old", 40))
    return run.id


def artifacts(store, run_id, path=None):
    return [item.path for item in store.list_artifacts(run_id, path)]


def test_the_stores_newest_checkpoint_is_brought_to_another_machine(store, cut_short, tmp_path):
    assert artifacts(store, cut_short, "checkpoints") == ["checkpoints/step-000040"]  # the one before it is gone
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        stored = StoredCheckpoints(run, "abc")
        stored.fetch(folder, newer_than=0)
        assert weight_in(folder / "step-000040") == 40
        tracking.begin_cell(run, "abc", folder, 40)
        assert artifacts(store, cut_short, "checkpoints")  # kept until there is another
        stored.store(saved(tmp_path / "new", 60))
        assert "checkpoints" not in artifacts(store, cut_short)
        assert artifacts(store, run.id, "checkpoints") == ["checkpoints/step-000060"]
        stored.remove()
    assert "checkpoints" not in artifacts(store, run.id)
    tags = store.get_run(cut_short).data.tags | store.get_run(run.id).data.tags
    assert "plw.checkpoint" not in tags
    assert tags["plw.superseded_by"] == run.id
    assert history(store, run.id, "train/loss") == [(40, 0.5)]


@pytest.mark.usefixtures("untagged_by_others")
def test_two_machines_that_go_on_with_one_cell_both_do(store, cut_short, tmp_path):
    """Its earlier run stands for the cell no longer, whichever of them says so first."""
    (tmp_path / "other machine").mkdir()
    (tmp_path / "other machine" / "run_id").write_text(cut_short)
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "abc", tmp_path / "other machine", 40)
    assert store.get_run(run.id).data.tags["plw.cell"] == "abc"
    assert "plw.cell" not in store.get_run(cut_short).data.tags


@pytest.mark.parametrize(("cell", "newer_than"), [("abcd", 0), ("ab", 0), ("abc", 40)])
def test_another_cells_or_an_older_checkpoint_is_left_where_it_is(cut_short, tmp_path, cell, newer_than):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        StoredCheckpoints(run, cell).fetch(folder, newer_than=newer_than)
    assert not list(folder.iterdir())


@pytest.fixture
def alive(store, cut_short, monkeypatch):
    """The run, as if it had not ended, and little patience with it."""
    store.update_run(cut_short, "RUNNING")
    monkeypatch.setattr(resumption, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(resumption, "SIGN_SECONDS", 0.1)
    return cut_short


def test_a_cell_that_another_machine_is_at_work_on_is_not_taken(store, alive, tmp_path):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with (
        resumption.giving_signs_of_life(alive),  # it trains or scores, slowly: no metric arrives
        pytest.raises(ValueError, match=f"another process is training this very cell, as run {alive}"),
        tracking.open_run(TrainConfig(), "cell") as run,
    ):
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=99)
    assert artifacts(store, alive, "checkpoints")


def test_a_run_that_stays_silent_is_taken_for_dead(alive, tmp_path):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert (folder / "step-000040").is_dir()


def test_a_run_that_ends_while_one_waits_is_dead(store, alive, tmp_path, monkeypatch):
    def end(seconds):
        store.set_tag(alive, "plw.alive", "its last sign")
        store.update_run(alive, "KILLED")

    monkeypatch.setattr(resumption.time, "sleep", end)
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert (folder / "step-000040").is_dir()


def test_a_checkpoint_that_somebody_removed_is_done_without(store, cut_short, tmp_path):
    shutil.rmtree(Path(store.get_run(cut_short).info.artifact_uri) / "checkpoints")
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        stored = StoredCheckpoints(run, "abc")
        with pytest.warns(UserWarning, match="step-000040 of run .* cannot be used"):
            stored.fetch(folder, newer_than=0)
        assert not list(folder.iterdir())
        tracking.begin_cell(run, "abc", folder, 0)
        stored.store(saved(tmp_path / "new", 20))
    assert "plw.checkpoint" not in store.get_run(cut_short).data.tags


def damage(place):
    content = (place / "optimizer.safetensors").read_bytes()
    (place / "optimizer.safetensors").write_bytes(content[:-4])


def replace_by_anothers(place):
    shutil.rmtree(place)
    saved(place.parent, 60, cell="abcd")


def replace_by_an_earlier(place):
    shutil.rmtree(place)
    saved(place.parent, 40).rename(place)


@pytest.mark.parametrize("spoil", [shutil.rmtree, damage, replace_by_anothers, replace_by_an_earlier])
def test_a_stored_checkpoint_that_cannot_be_used_is_left_and_the_one_before_it_taken(spoil, store, cut_short, tmp_path):
    newer = tmp_path / "newer"
    newer.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "abc", newer, 0)
        store.log_artifacts(run.id, str(saved(newer, 60)), "checkpoints/step-000060")
        store.set_tag(run.id, "plw.checkpoint", "abc/step-000060")
    spoil(Path(store.get_run(run.id).info.artifact_uri) / "checkpoints" / "step-000060")
    folder = tmp_path / "other machine"
    folder.mkdir()
    told = pytest.warns(UserWarning, match="step-000060 of run .* cannot be used .*; going on without it")
    with tracking.open_run(TrainConfig(), "cell") as run, told:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert sorted(path.name for path in folder.iterdir()) == ["run_id", "step-000040"]
    assert weight_in(folder / "step-000040") == 40


@pytest.mark.parametrize(
    "name", ["../../stolen", "/stolen", "step-000050/../../x", "step-abc", "step--5", "step-50", ""]
)
def test_a_tag_that_names_no_checkpoint_is_passed_over(name, store, cut_short, tmp_path):
    with tracking.open_run(TrainConfig(), "stranger") as stranger:
        store.set_tag(stranger.id, "plw.checkpoint", f"abc/{name}")
    folder = tmp_path / "other machine"
    folder.mkdir()
    told = pytest.warns(UserWarning, match=f"run {stranger.id} names .* which is none")
    with tracking.open_run(TrainConfig(), "cell") as run, told:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert sorted(path.name for path in folder.iterdir()) == ["run_id", "step-000040"]


def test_what_cannot_be_removed_stops_nothing(store, cut_short, tmp_path):
    with tracking.open_run(TrainConfig(), "cell") as run:
        stored = StoredCheckpoints(run, "abc")
        stored.fetch(tmp_path, newer_than=40)
        tracking.begin_cell(run, "abc", tmp_path, 40)
        store.delete_run(cut_short)  # MLflow then lets nobody change it
        with pytest.warns(UserWarning, match="cannot be removed"):
            stored.store(saved(tmp_path / "new", 60))
    assert store.get_run(run.id).info.status == "FINISHED"


def test_a_pod_started_again_goes_on_in_the_run_it_began(store, cut_short, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", cut_short)  # as Kubernetes gives it to the pod's successor
    monkeypatch.setattr(resumption, "SILENT_SECONDS", 1e6)  # there is nobody to wait for
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        assert run.id == cut_short
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
        tracking.begin_cell(run, "abc", folder, 40)
        for step in (40, 41):
            run.curves.log_step({"train/loss": 0.4}, step)
    assert (folder / "step-000040").is_dir()
    assert history(store, cut_short, "train/loss") == [(40, 0.5), (41, 0.4)]  # no step is there twice
