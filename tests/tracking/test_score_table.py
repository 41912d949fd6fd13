"""Does the score table hold the newest scored run of each cell, and say what it leaves out?"""

import pandas as pd
import pytest

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig
from plw_mlflow.tracking.cells import cell_columns
from tests.tracking.helpers import scored

pytestmark = pytest.mark.usefixtures("store")


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
    sweep = store.create_run("0").info.run_id
    store.set_tag(run.id, "mlflow.parentRunId", sweep)
    assert tracking.generation_ratios(None, sweep=sweep) == {"toy-short": 0.18}
    with pytest.raises(ValueError, match="there is no experiment 'none'"):
        tracking.generation_ratios("none")


def test_the_prompts_share_that_a_run_has_logged_is_a_column(store):
    for plw, share in ((0.0, 0.0), (0.5, 0.4)):
        store.log_metric(scored(MainConfig(plw=plw), ("a", 0.2)).id, "prompt_share", share)
    scored(MainConfig(plw=1.0), ("a", 0.3))  # by an earlier version
    table = tracking.score_table(experiment="Default").sort_values("plw")
    assert table["prompt_share"].tolist() == pytest.approx([0.0, 0.4, float("nan")], nan_ok=True)


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
    names = ["toy-long inverted", "toy-long", *(f"toy-long + {share} toy-short.json" for share in (0.3, 0.7))]
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
        (
            lambda: tracking.score_table(experiment="defalt"),
            r"no experiment 'defalt' in .* \(did you mean 'Default'\?\)",
        ),
        (lambda: tracking.score_table(experiment="Default"), "holds no scored cell"),
        (lambda: tracking.score_table(sweep="f" * 32), "there is no run 'ffff"),
    ],
)
def test_what_is_not_there_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_run_of_a_cell_is_told_from_that_of_its_sweep(store):
    run = scored(MainConfig(), ("a", 0.2))
    with pytest.raises(ValueError, match=f"run {run.id} is that of a cell, and a sweep's is needed: it belongs to no"):
        tracking.score_table(sweep=run.id)
    sweep = store.create_run("0").info.run_id
    store.set_tag(run.id, "mlflow.parentRunId", sweep)
    with pytest.raises(ValueError, match=f"is that of a cell, and a sweep's is needed: give --run-id {sweep}"):
        tracking.score_table(sweep=run.id)
