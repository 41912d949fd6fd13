"""Does MLflow hold what a run said, once, in the caller's own words?  (tests/test_pipeline.py sees the rest.)"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from plw_mlflow import prepare, tracking
from plw_mlflow.config import DataOptions, MainConfig, PrepareConfig, TrainConfig
from plw_mlflow.evaluate import Evaluation, Score, table
from plw_mlflow.tracking import stored
from plw_mlflow.tracking.run import cell_columns
from tests.conftest import byte_tokenizer, tiny_llama
from tests.stores import Place


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    return place.client


def history(store, run_id, name):
    return [(point.step, point.value) for point in store.get_metric_history(run_id, name)]


def test_parameters_already_logged_keep_their_spelling(store, monkeypatch):
    begun = store.create_run("0")  # as `mlflow run` begins one
    store.log_param(begun.info.run_id, "plw", "1e-2")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun.info.run_id)
    with tracking.open_run(TrainConfig(plw=0.01, invert=True), "cell") as run:
        assert run.id == begun.info.run_id
        assert "MLFLOW_RUN_ID" not in os.environ  # no process started from here inherits it
    params = store.get_run(run.id).data.params
    assert (params["plw"], params["invert"], params["max_records"]) == ("1e-2", "true", "")


def test_every_data_set_is_an_input_and_the_profile_a_table_and_a_figure(store, tmp_path):
    rows = [{"instruction": f"Add {number}.", "output": str(number)} for number in range(30)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(mix=str(tmp_path / "sums.jsonl"))
    prepared = prepare.run("toy-short", byte_tokenizer(), options)
    with tracking.open_run(PrepareConfig(), "prepare") as run:
        run.log_data(prepared.sources, prepared.profile)
    found = store.get_run(run.id)
    inputs = {one.dataset.name: one.dataset.digest for one in found.inputs.dataset_inputs}
    assert inputs == {
        name: source.sha256[:36]
        for name, source in zip(("toy-short + 0.5 sums", "sums"), prepared.sources, strict=True)
    }
    assert found.data.tags["plw.data_sha256"] == ",".join(source.sha256 for source in prepared.sources)
    profile = store.download_artifacts(run.id, "profile.json", str(tmp_path))
    assert json.loads(Path(profile).read_text()) == prepared.profile
    assert Path(store.download_artifacts(run.id, "profile.png", str(tmp_path))).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "content"),
    [("mine.jinja", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"), ("alpaca", "not this file")],
)
def test_a_template_that_is_a_file_is_kept_with_the_run(store, tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    prepared = prepare.run("toy-short", byte_tokenizer(), DataOptions(template=name, max_records=5))
    with tracking.open_run(PrepareConfig(), "prepare") as run:
        run.log_data(prepared.sources, prepared.profile)
    kept = [item.path for item in store.list_artifacts(run.id, "template")]
    assert kept == ([f"template/{name}"] if name.endswith(".jinja") else [])
    for path in kept:
        assert Path(store.download_artifacts(run.id, path, str(tmp_path))).read_text() == content


def test_a_failure_is_told_on_the_run(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    found = store.get_run(run.id)
    assert found.info.status == "FAILED"
    assert found.data.tags["plw.error"] == "ValueError: bad luck"


def test_a_failing_run_keeps_the_metrics_held_back(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        lose(run)
    assert history(store, run.id, "train/loss") == [(1, 0.5)]


def lose(run):
    run.log_step({"train/loss": 0.5}, 1)
    raise ValueError("bad luck")


def test_what_is_added_well_to_a_failed_run_mends_it(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    with tracking.open_run(TrainConfig(), "", run_id=run.id):
        pass
    found = store.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert "plw.error" not in found.data.tags


def test_a_reopened_run_keeps_its_status_when_what_is_added_fails(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        pass
    with pytest.raises(ValueError, match="no such task"), tracking.open_run(TrainConfig(), "", run_id=run.id):
        raise ValueError("no such task")
    assert store.get_run(run.id).info.status == "FINISHED"


def test_metrics_held_back_arrive_once(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        for step in range(2500):  # more than one request takes
            run.log_step({"train/loss": float(step)}, step)
    assert history(store, run.id, "train/loss") == [(step, float(step)) for step in range(2500)]


def test_a_cut_short_run_hands_its_curve_over(store, tmp_path):
    first = tracking.Run(store.create_run("0").info.run_id)  # its process died: nobody ended it
    first.begin_cell("c", tmp_path, 0)
    for step in range(1, 6):
        first.log_step({"train/loss": step / 10}, step)
    first.flush()
    with tracking.open_run(TrainConfig(), "cell") as second:
        second.begin_cell("c", tmp_path, 3)  # the last checkpoint was of step 3
        second.log_step({"train/loss": 0.4}, 4)
    assert history(store, second.id, "train/loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert "plw.cell" not in store.get_run(first.id).data.tags
    assert store.get_run(first.id).info.status == "KILLED"
    assert store.get_run(second.id).data.tags["plw.cell"] == "c"


def test_a_run_cut_short_before_its_first_checkpoint_hands_nothing_over(store, tmp_path):
    for _ in range(2):
        with tracking.open_run(TrainConfig(), "cell") as run:
            run.begin_cell("c", tmp_path, 0)
            run.log_step({"eval/prompt_loss": 1.0}, 0)
    assert history(store, run.id, "eval/prompt_loss") == [(0, 1.0)]


def test_a_cut_short_run_that_somebody_deleted_is_left_alone(store, tmp_path):
    with tracking.open_run(TrainConfig(), "cell") as first:
        first.begin_cell("c", tmp_path, 0)
        first.log_step({"train/loss": 1.0}, 1)
    store.delete_run(first.id)
    with tracking.open_run(TrainConfig(), "cell") as second:
        second.begin_cell("c", tmp_path, 1)
    assert (tmp_path / "run_id").read_text() == second.id
    assert history(store, second.id, "train/loss") == []


def saved(folder, step):
    """A checkpoint's folder, as training leaves it."""
    place = folder / f"step-{step:06d}"
    place.mkdir(parents=True)
    (place / "weights.safetensors").write_text(f"weights of step {step}")
    return place


@pytest.fixture
def cut_short(store, tmp_path):
    """A run of the cell "abc" whose checkpoint of step 40 is in the store, and whose machine is gone."""
    with tracking.open_run(TrainConfig(), "cell") as run:
        run.begin_cell("abc", tmp_path, 0)
        run.log_step({"train/loss": 0.5}, 40)
        run.store_checkpoint(saved(tmp_path / "old", 20))
        run.store_checkpoint(saved(tmp_path / "old", 40))
    return run.id


def artifacts(store, run_id, path=None):
    return [item.path for item in store.list_artifacts(run_id, path)]


def test_the_stores_newest_checkpoint_is_brought_to_another_machine(store, cut_short, tmp_path):
    assert artifacts(store, cut_short, "checkpoints") == ["checkpoints/step-000040"]  # the one before it is gone
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        run.fetch_checkpoint("abc", folder, newer_than=0)
        assert (folder / "step-000040" / "weights.safetensors").read_text() == "weights of step 40"
        run.begin_cell("abc", folder, 40)
        assert artifacts(store, cut_short, "checkpoints")  # kept until there is another
        run.store_checkpoint(saved(tmp_path / "new", 60))
        assert "checkpoints" not in artifacts(store, cut_short)
        assert artifacts(store, run.id, "checkpoints") == ["checkpoints/step-000060"]
        run.drop_checkpoints()
    assert "checkpoints" not in artifacts(store, run.id)
    tags = store.get_run(cut_short).data.tags | store.get_run(run.id).data.tags
    assert "plw.checkpoint" not in tags
    assert tags["plw.superseded_by"] == run.id
    assert history(store, run.id, "train/loss") == [(40, 0.5)]


@pytest.mark.parametrize(("cell", "newer_than"), [("abcd", 0), ("ab", 0), ("abc", 40)])
def test_another_cells_or_an_older_checkpoint_is_left_where_it_is(cut_short, tmp_path, cell, newer_than):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        run.fetch_checkpoint(cell, folder, newer_than=newer_than)
    assert not list(folder.iterdir())


@pytest.fixture
def alive(store, cut_short, monkeypatch):
    """The run, as if it had not ended, and little patience with it."""
    store.update_run(cut_short, "RUNNING")
    monkeypatch.setattr(stored, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(stored, "BEAT_SECONDS", 0.1)
    return cut_short


def test_a_cell_that_another_machine_is_at_work_on_is_not_taken(store, alive, tmp_path):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with (
        stored.giving_signs_of_life(alive),  # it trains or scores, slowly: no metric arrives
        pytest.raises(ValueError, match=f"another process is training this very cell, as run {alive}"),
        tracking.open_run(TrainConfig(), "cell") as run,
    ):
        run.fetch_checkpoint("abc", folder, newer_than=99)
    assert artifacts(store, alive, "checkpoints")


def test_a_run_that_stays_silent_is_taken_for_dead(alive, tmp_path):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        run.fetch_checkpoint("abc", folder, newer_than=0)
    assert (folder / "step-000040").is_dir()


def test_a_run_that_ends_while_one_waits_is_dead(store, alive, tmp_path, monkeypatch):
    def end(seconds):
        store.set_tag(alive, "plw.alive", "its last sign")
        store.update_run(alive, "KILLED")

    monkeypatch.setattr(stored.time, "sleep", end)
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        run.fetch_checkpoint("abc", folder, newer_than=0)
    assert (folder / "step-000040").is_dir()


def test_a_checkpoint_that_somebody_removed_is_done_without(store, cut_short, tmp_path):
    shutil.rmtree(Path(store.get_run(cut_short).info.artifact_uri) / "checkpoints")
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        with pytest.warns(UserWarning, match="step-000040 of run .* is not to be had"):
            run.fetch_checkpoint("abc", folder, newer_than=0)
        assert not list(folder.iterdir())
        run.begin_cell("abc", folder, 0)
        run.store_checkpoint(saved(tmp_path / "new", 20))
    assert "plw.checkpoint" not in store.get_run(cut_short).data.tags


def test_what_cannot_be_removed_stops_nothing(store, cut_short, tmp_path):
    with tracking.open_run(TrainConfig(), "cell") as run:
        run.fetch_checkpoint("abc", tmp_path, newer_than=40)
        run.begin_cell("abc", tmp_path, 40)
        store.delete_run(cut_short)  # MLflow then lets nobody change it
        with pytest.warns(UserWarning, match="cannot be removed"):
            run.store_checkpoint(saved(tmp_path / "new", 60))
    assert store.get_run(run.id).info.status == "FINISHED"


def test_a_pod_started_again_goes_on_in_the_run_it_began(store, cut_short, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", cut_short)  # as Kubernetes gives it to the pod's successor
    monkeypatch.setattr(stored, "SILENT_SECONDS", 1e6)  # there is nobody to wait for
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        assert run.id == cut_short
        run.fetch_checkpoint("abc", folder, newer_than=0)
        run.begin_cell("abc", folder, 40)
        for step in (40, 41):
            run.log_step({"train/loss": 0.4}, step)
    assert (folder / "step-000040").is_dir()
    assert history(store, cut_short, "train/loss") == [(40, 0.5), (41, 0.4)]  # no step is there twice


def test_a_wrapper_says_whose_run_it_works_on_and_holds_nothing_else(store, monkeypatch):
    with tracking.open_run(MainConfig(), "cell") as cell:
        pass
    wrapper = store.create_run("0").info.run_id  # as `mlflow run -e evaluate -P run_id=...` begins one
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    with tracking.open_run(MainConfig(), "", run_id=cell.id) as reopened:
        assert reopened.id == cell.id
    found = store.get_run(wrapper)
    assert {name: tag for name, tag in found.data.tags.items() if name.startswith("plw.")} == {"plw.for_run": cell.id}
    assert (found.data.params, found.data.metrics) == ({}, {})


def scored(config, *scores):
    """A finished cell with a score per task."""
    with tracking.open_run(config, "cell") as run:
        run.tag(cell=f"{config.plw}/{config.method}")
        add_scores(run, *scores)
    return run


def add_scores(run, *scores, whole=None, caveats=None):
    samples = [{"task": task, "prediction": "yes"} for task, _ in scores]
    found = [
        Score(task, "acc", score, 0.1, 5, 0, "1.0", True, caveat=(caveats or {}).get(task, ""))
        for task, score in scores
    ]
    evaluation = Evaluation(found, {}, samples)
    run.log_scores(evaluation, table(evaluation, run.cell()), whole)


def test_score_is_the_mean_over_the_tasks_first_scored(store):
    run = scored(MainConfig(), ("a", 0.2), ("b", 0.4))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("b", 0.6), ("c", 1.0))
    found = store.get_run(run.id).data
    assert found.metrics["score"] == pytest.approx((0.2 + 0.6) / 2)
    assert found.tags["plw.score_tasks"] == "a/acc@0,b/acc@0"
    assert dict(zip(again.scores()["task"], again.scores()["score"], strict=True)) == {"a": 0.2, "b": 0.6, "c": 1.0}


def test_a_larger_set_scored_whole_takes_the_place_of_the_first(store):
    run = scored(MainConfig(), ("a", 0.2))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.2), ("b", 0.6))
    assert store.get_run(run.id).data.metrics["score"] == pytest.approx(0.4)


def test_there_is_no_score_before_all_of_its_tasks_are_there(store, capsys):
    with tracking.open_run(MainConfig(), "cell") as run:
        run.tag(cell="x", status="trained")
        add_scores(run, ("b", 0.4), whole=["a/acc@0", "b/acc@0"])
    found = store.get_run(run.id).data
    assert "score" not in found.metrics
    assert (found.metrics["b/acc"], found.tags["plw.status"]) == (0.4, "trained")
    assert "no score yet, which is the mean of 2 tasks: a/acc@0 to come" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no scored cell"):
        tracking.score_table(experiment="Default")
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.2))
    found = store.get_run(run.id).data
    assert found.metrics["score"] == pytest.approx(0.3)
    assert found.tags["plw.status"] == "scored"


def test_a_task_scored_with_other_shots_does_not_count_as_the_sets(store):
    with tracking.open_run(MainConfig(), "cell") as run:
        run.tag(cell="x")
        add_scores(run, ("a", 0.2), whole=["a/acc@5"])
    assert "score" not in store.get_run(run.id).data.metrics


def test_a_score_that_is_not_comparable_says_so_and_why(store):
    with tracking.open_run(MainConfig(), "cell") as run:
        run.tag(cell="x")
        add_scores(run, ("a", 0.2), ("b", 0.4), caveats={"a": "0-shot, not 25"})
    found = store.get_run(run.id).data
    assert (found.tags["plw.score_comparable"], found.tags["plw.score_caveat"]) == ("false", "a: 0-shot, not 25")
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.3))
    found = store.get_run(run.id).data
    assert found.tags["plw.score_comparable"] == "true"
    assert "plw.score_caveat" not in found.tags


def test_samples_are_one_table_that_grows(store, tmp_path):
    run = scored(MainConfig(), ("a", 0.2))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("b", 0.2))
    table = mlflow.load_table("samples.json", run_ids=[run.id])
    assert list(table["task"]) == ["a", "b"]
    assert list(table["prediction"]) == ["yes", "yes"]
    listed = {item.path for item in store.list_artifacts(run.id, "harness")}
    assert {f"harness/{one}.json" for one in table["evaluation"]} == listed


def test_a_curve_has_one_value_a_step(store):
    with tracking.open_run(MainConfig(), "cell") as run:
        for step, loss in ((2, 5.0), (1, 3.0), (2, 4.0)):
            run.log_step({"train/loss": loss}, step)
            run.flush()
    assert run.curve("train/loss") == {1: 3.0, 2: 4.0}


def test_what_a_run_was_told_comes_back_with_its_template(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text('{"prompt_input": "{instruction}{input}", "prompt_no_input": "{instruction}"}')
    options = TrainConfig(template="mine.json", max_records=5)
    prepared = prepare.run("toy-short", byte_tokenizer(), options)
    with tracking.open_run(options, "cell") as run:
        run.log_data(prepared.sources, prepared.profile)
    Path("mine.json").unlink()
    told = run.told(tmp_path)
    assert (told["dataset"], told["max_records"]) == ("toy-short", 5)
    assert "prompt_no_input" in Path(told["template"]).read_text()
    run.check_data(prepared.sources)
    with pytest.raises(ValueError, match="toy-short has the SHA-256 0, but run"):
        run.check_data([dataclasses.replace(prepared.sources[0], sha256="0")])


def test_the_score_table_holds_scored_cells_alone(store):
    scored(MainConfig(plw=0.0), ("a", 0.2))
    scored(MainConfig(plw=1.0), ("a", 0.3))
    with tracking.open_run(MainConfig(), "no cell"):
        pass
    expected = pd.DataFrame({"plw": [0.0, 1.0], "score": [0.2, 0.3]})
    found = tracking.score_table(experiment="Default").sort_values("plw", ignore_index=True)
    pd.testing.assert_frame_equal(found[["plw", "score"]], expected)
    assert set(found["model"]) == {"toy"}


def test_a_data_sets_generation_ratio_is_what_a_run_of_it_measured(store):
    scored(MainConfig(plw=0.0), ("a", 0.2))  # without a profile
    run = scored(MainConfig(plw=1.0), ("a", 0.3))
    scored(MainConfig(plw=1.0, dataset="toy-long"), ("a", 0.3))
    store.log_dict(run.id, {"generation_ratio": 0.18}, "profile.json")
    assert tracking.generation_ratios("Default") == {"toy-short": 0.18}
    with pytest.raises(ValueError, match="there is no experiment 'none'"):
        tracking.generation_ratios("none")


def test_runs_without_scores_are_left_out_and_listed(store):
    scored(MainConfig(plw=0.0), ("a", 0.2))
    running = scored(MainConfig(plw=0.5), ("a", 0.3)).id
    store.set_terminated(running, "RUNNING")
    for plw in (0.0, 1.0):
        with pytest.raises(ZeroDivisionError), tracking.open_run(MainConfig(plw=plw), "broken"):
            raise ZeroDivisionError
    table = tracking.score_table(experiment="Default")
    assert set(table["plw"]) == {0.0}
    failed, still = table.attrs["left_out"]  # PLW 0 failed once, but another run has its scores
    assert "(failed): toy on toy-short, PLW 1, seed 1234" in failed
    assert f"run {running} (running): toy on toy-short, PLW 0.5" in still


def test_of_a_cell_run_twice_the_newest_counts(store):
    scored(MainConfig(), ("a", 0.2))
    scored(MainConfig(), ("a", 0.3))
    assert list(tracking.score_table(experiment="Default")["score"]) == [0.3]


def test_two_spellings_of_a_plw_are_one_cell(store, monkeypatch):
    begun = store.create_run("0").info.run_id
    store.log_param(begun, "plw", "1e-2")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    scored(MainConfig(plw=0.01), ("a", 0.2))
    scored(MainConfig(plw=0.01), ("a", 0.3))
    assert list(tracking.score_table(experiment="Default")["score"]) == [0.3]


def test_cells_of_two_recipes_are_not_mixed(store):
    first = scored(MainConfig(), ("a", 0.2))
    second = scored(MainConfig(), ("a", 0.3))
    store.set_tag(second.id, "plw.cell", "another recipe")
    with pytest.raises(ValueError, match="two kinds of cell") as error:
        tracking.score_table(experiment="Default")
    assert first.id in str(error.value)
    assert second.id in str(error.value)


def test_a_parameter_to_compare_by_is_a_column_and_tells_cells_apart(store):
    scored(MainConfig(learning_rate=0.001), ("a", 0.2))
    other = scored(MainConfig(learning_rate=0.002), ("a", 0.3))
    store.set_tag(other.id, "plw.cell", "another rate")
    table = tracking.score_table(experiment="Default", also=("learning_rate",))
    assert dict(zip(table["learning_rate"].astype(float), table["score"], strict=True)) == {0.001: 0.2, 0.002: 0.3}
    with pytest.raises(ValueError, match="has no parameter nothing to compare by"):
        tracking.score_table(experiment="Default", also=("nothing",))


def test_what_was_done_to_a_data_set_makes_it_another_in_the_table(store, monkeypatch):
    """Also where the caller has spelled it his own way, or an older run lacks a parameter."""
    begun = store.create_run("0").info.run_id
    store.log_param(begun, "invert", "True")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    changes = [{"invert": True}, {}, *({"mix": "b/toy-short.json", "mix_share": share} for share in (0.3, 0.7))]
    names = ["toy-long inverted", "toy-long", *(f"toy-long + {share} b/toy-short.json" for share in (0.3, 0.7))]
    for number, change in enumerate(changes):
        run = scored(MainConfig(dataset="toy-long", **change), ("a", number / 10))
        store.set_tag(run.id, "plw.cell", f"cell {number}")
        assert store.get_run(run.id).data.params["dataset"] == "toy-long"
    table = tracking.score_table(experiment="Default")
    assert dict(zip(table["dataset"], table["score"], strict=True)) == {
        name: number / 10 for number, name in enumerate(names)
    }
    assert cell_columns({"model": "m", "dataset": "d", "plw": "1", "seed": "1"})["dataset"] == "d"


def test_methods_in_one_table_count_as_models(store):
    scored(MainConfig(), ("a", 0.2))
    scored(MainConfig(method="lora"), ("a", 0.3))
    assert set(tracking.score_table(experiment="Default")["model"]) == {"toy (full)", "toy (lora)"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tracking.score_table(experiment="none"), "there is no experiment 'none'"),
        (lambda: tracking.score_table(experiment="Default"), "holds no scored cell"),
        (lambda: tracking.score_table(sweep="f" * 32), "there is no run 'ffff"),
    ],
)
def test_what_is_not_there_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_processes_other_than_the_first_ask_nothing_of_the_store(store, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    mlflow.set_tracking_uri("http://127.0.0.1:9")  # where nobody answers
    with tracking.open_run(TrainConfig(), "cell") as run:
        run.begin_cell("c", tmp_path, 0)
        run.log_step({"train/loss": 0.5}, 1)
        run.store_checkpoint(saved(tmp_path, 1))
        run.flush()
        run.tag(anything="")
    assert (run.id, run.address()) == ("", "")
    assert [path.name for path in tmp_path.glob("run_id")] == []


def test_a_run_of_the_other_processes_leaves_nothing_of_a_run_as_it_is():
    asked = {"cell", "check_data", "curve", "load_checkpoint", "scores", "told"}  # of the first alone
    public = {name for name in vars(tracking.Run) if not name.startswith("_")}
    assert public - asked <= vars(tracking.NoRun).keys()


def test_what_a_preset_made_of_an_unset_parameter_is_told_and_read_back(store, monkeypatch):
    """`mlflow run` has logged the empty value, which stays; nobody is misled by it."""
    begun = store.create_run("0").info.run_id
    for name, value in {"seed": "", "method": "''", "learning_rate": "", "mix": "''", "epochs": "3.0"}.items():
        store.log_param(begun, name, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    config = MainConfig(preset="huerta2024-lora")
    scored(config, ("a", 0.2))
    run = store.get_run(begun)
    assert run.data.params.keys() == set(MainConfig.__dataclass_fields__)
    assert (run.data.params["seed"], run.data.params["batch_examples"]) == ("", "128")
    told = {name: value for name, value in run.data.tags.items() if name.startswith("plw.preset.")}
    assert told == {"plw.preset.seed": "42", "plw.preset.method": "lora", "plw.preset.learning_rate": "0.0002"}

    scored(MainConfig(preset="huerta2024-lora", method="full"), ("a", 0.3))
    table = tracking.score_table(experiment="Default").set_index("model")
    assert dict(table["score"]) == {"toy (lora)": 0.2, "toy (full)": 0.3}
    assert set(table["seed"]) == {42}
    assert set(table["dataset"]) == {"toy-short"}


def test_a_registered_model_comes_back_by_version_and_alias(store):
    model, tokens = tiny_llama(), torch.arange(6).unsqueeze(0)
    config = TrainConfig(model="tiny")
    with tracking.open_run(config, "cell") as run:
        run.log_checkpoint(model, byte_tokenizer(), config)
    store.set_registered_model_alias("plw-tiny-toy-short", "best", "1")
    for uri in ("models:/plw-tiny-toy-short/1", "models:/plw-tiny-toy-short@best"):
        loaded, tokenizer = tracking.load_registered(uri)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert tokenizer("Who?").input_ids == byte_tokenizer()("Who?").input_ids
    with pytest.raises(ValueError, match=r"model models:/plw-tiny-toy-short/7 cannot be loaded: .*not found"):
        tracking.load_registered("models:/plw-tiny-toy-short/7")


@pytest.fixture
def registered(store):
    """The folder in the store of a model that is registered as plw-tiny-toy-short, version 1, and its run."""
    config = TrainConfig(model="tiny")
    with tracking.open_run(config, "cell") as run:
        run.log_checkpoint(tiny_llama(), byte_tokenizer(), config)
    return Path(store.get_logged_model(run._model_id).artifact_location.removeprefix("file://")), run


def _edit_mlmodel(**changes):
    """Damage to what MLflow says of a logged model's flavour transformers."""

    def damage(folder):
        told = yaml.safe_load((folder / "MLmodel").read_text())
        told["flavors"]["transformers"] |= changes
        (folder / "MLmodel").write_text(yaml.safe_dump(told))

    return damage


def _of_another_flavour(folder):
    told = yaml.safe_load((folder / "MLmodel").read_text())
    del told["flavors"]["transformers"]
    (folder / "MLmodel").write_text(yaml.safe_dump(told))


def _with_code(folder):
    file = folder / "model/config.json"
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (folder / "model/mine.py").write_text(f"open({str(folder / 'was run')!r}, 'w')\n")


def _with_a_number_that_is_none(folder):
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


STRANGE = [
    (_of_another_flavour, "is of the flavour python_function; models of the flavour transformers are loaded"),
    (_edit_mlmodel(task="summarization"), "is for the task summarization"),
    (_edit_mlmodel(model_binary="../../elsewhere"), "lacks its own weights or its tokenizer"),
    (_edit_mlmodel(components=[]), "lacks its own weights or its tokenizer"),
    (_edit_mlmodel(components=3), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").write_text("[1"), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").write_text("3"), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").unlink(), "its MLmodel is damaged"),
    (lambda folder: shutil.rmtree(folder / "components"), "lacks the folder components/tokenizer"),
    (_with_code, "'models:/.*/model' cannot be loaded: it needs program code of its own, which is not run"),
    (_with_a_number_that_is_none, "model 'models:/.*/model' is damaged: 1 numbers of lm_head.weight"),
]


def test_a_strangers_logged_model_is_refused_in_one_line(registered, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, run = registered
    shutil.copytree(folder, tmp_path / "kept")
    for damage, expected in STRANGE:  # one after another, as it takes a second to log a model
        damage(folder)
        for load in (lambda: tracking.load_registered("models:/plw-tiny-toy-short/1"), run.load_checkpoint):
            with pytest.raises(ValueError, match=expected) as raised:
                load()
            assert "models:/" in str(raised.value)
            assert "\n" not in str(raised.value)
        assert not (folder / "was run").exists()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)


@pytest.mark.parametrize("is_here", [True, False])
def test_a_logged_model_is_read_and_not_written(is_here, registered, monkeypatch, tmp_path):
    """From a store on this machine in its place, from another by a copy that is then removed."""
    folder, run = registered
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if not is_here:
        monkeypatch.setattr("plw_mlflow.tracking.run.LocalArtifactRepository", type(None))
    model, tokenizer = run.load_checkpoint()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(scratch.iterdir()) == []
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    tokens = torch.arange(6).unsqueeze(0)
    assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert tokenizer("Who?").input_ids == byte_tokenizer()("Who?").input_ids
