"""When does a run have its score, and of which tasks?"""

import mlflow
import pandas as pd
import pytest

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig, TrainConfig
from plw_mlflow.errors import Refused
from tests.tracking.helpers import add_scores, scored

pytestmark = pytest.mark.usefixtures("store")


def test_what_the_store_refuses_after_the_training_is_said_at_once(store, impatient):
    with pytest.raises(Refused, match=r"logging the measures: the tracking store .* refuses it: .* 'active' state"):
        measure_deleted(store)


def measure_deleted(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        store.delete_run(run.id)
        tracking.log_measures(run, {"length": 1.0})


def test_score_is_the_mean_over_the_tasks_first_scored(store):
    run = scored(MainConfig(), ("a", 0.2), ("b", 0.4))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("b", 0.6), ("c", 1.0))
    found = store.get_run(run.id).data
    assert found.metrics["score"] == pytest.approx((0.2 + 0.6) / 2)
    assert found.tags["plw.score_tasks"] == "a/acc@0,b/acc@0"
    assert dict(zip(tracking.read_scores(again)["task"], tracking.read_scores(again)["score"], strict=True)) == {
        "a": 0.2,
        "b": 0.6,
        "c": 1.0,
    }


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


def test_a_score_of_two_kinds_of_arithmetic_is_not_comparable(store):
    run = scored(MainConfig(), ("a", 0.2), ("b", 0.4))
    assert store.get_run(run.id).data.tags["plw.eval_precision"] == "float32"
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.3), precision="bfloat16")
    tags = store.get_run(run.id).data.tags
    assert (tags["plw.score_comparable"], tags["plw.eval_precision"]) == ("false", "bfloat16, float32")
    assert tags["plw.score_caveat"] == "arithmetic differs: bfloat16, float32"
    assert dict(tracking.read_scores(run).set_index("task")["precision"]) == {"a": "bfloat16", "b": "float32"}


def test_the_questions_of_each_evaluation_are_an_artifact(store):
    run = scored(MainConfig(), ("a", 0.2))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.6), ("b", 0.4))
    names = sorted(item.path for item in store.list_artifacts(run.id, "questions"))
    first, second = (pd.read_parquet(store.download_artifacts(run.id, name)) for name in names)
    assert list(first["value"]) == [1, 0, 0, 0, 0]
    assert second.groupby("task")["value"].mean().to_dict() == {"a": 0.6, "b": 0.4}
    assert (second["plw"] == MainConfig().plw).all()
    harness = sorted(item.path for item in store.list_artifacts(run.id, "harness"))
    ids = [first["evaluation"][0], second["evaluation"][0]]
    assert [names, harness] == [
        [f"questions/{one}.parquet" for one in ids],
        [f"harness/{one}.json" for one in ids],
    ]


def test_samples_are_one_table_that_grows(store, tmp_path):
    run = scored(MainConfig(), ("a", 0.2))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("b", 0.2))
    table = mlflow.load_table("samples.json", run_ids=[run.id])
    assert list(table["task"]) == ["a", "b"]
    assert list(table["prediction"]) == ["yes", "yes"]
    listed = {item.path for item in store.list_artifacts(run.id, "harness")}
    assert {f"harness/{one}.json" for one in table["evaluation"]} == listed
