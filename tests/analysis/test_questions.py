"""Are the same questions compared, and others refused?"""

import numpy as np
import pandas as pd
import pytest

from plw_mlflow.analysis import questions
from plw_mlflow.errors import UserError


def asked(runs, count=40, task="arc", metric="acc", dataset="short", seed=1):
    """Questions of runs, given as (PLW, seed): right with a chance that rises with PLW."""
    rng = np.random.default_rng(seed)
    rows = [
        {"dataset": dataset, "model": "toy", "plw": plw, "seed": of, "task": task, "metric": metric, "doc_id": number}
        | {"document": f"{task}-{number}", "value": float(rng.random() < 0.3 + 0.5 * plw)}
        for plw, of in runs
        for number in range(count)
    ]
    return pd.DataFrame(rows)


def together(*parts, notes=()):
    table = pd.concat(parts, ignore_index=True)
    metrics = dict(zip(table["task"], table["metric"], strict=True))
    table.attrs = {"metrics": metrics, "notes": list(notes)}
    return table


TWO = [(0.0, 1), (0.5, 1), (1.0, 1)]


def test_every_other_plw_is_compared_on_each_task_and_on_all():
    found = questions.compare(together(asked(TWO), asked(TWO, task="piqa", count=60, seed=2)), 0.0)
    assert [(row.plw, row.task) for row in found.rows] == [
        (plw, task) for plw in (0.5, 1.0) for task in ("mean of 2 tasks", "arc", "piqa")
    ]
    assert [row.found.questions for row in found.rows[:3]] == [100, 40, 60]
    single = sorted((row for row in found.rows if row.tasks == 1), key=lambda row: row.found.paired.p)
    assert single[0].holm_p == pytest.approx(4 * single[0].found.paired.p)  # of two tasks and two PLWs
    only = questions.compare(together(asked(TWO), asked(TWO, task="piqa", count=60, seed=2)), 1.0, 0.5)
    assert {row.plw for row in only.rows} == {0.5}
    table = together(asked(TWO))
    values = table.groupby("plw")["value"].mean()
    (row,) = questions.compare(table, 1.0, 0.5).rows
    assert row.found.difference == pytest.approx(values[0.5] - values[1.0])


def test_one_seed_says_nothing_of_luck_and_two_do():
    text = questions.text(questions.compare(together(asked(TWO)), 0.0))
    assert "Luck of training is not in them" in text
    assert "with luck" not in text
    twice = together(asked([*TWO, (0.0, 2), (0.5, 2), (1.0, 2)]), notes=["one is missing"])
    found = questions.compare(twice, 0.0)
    assert found.rows[0].found.with_luck.high > found.rows[0].found.with_luck.low
    assert "Luck of training is in the last interval" in questions.text(found)
    assert questions.text(found).endswith("note: one is missing")
    frame = questions.frame(found)
    assert list(frame["seeds"]) == [2, 2]
    assert (frame["with_luck_error"] >= frame["error"]).all()


def test_seeds_that_only_one_plw_has_are_left_out():
    (row,) = questions.compare(together(asked([(0.0, 1), (0.0, 2), (1.0, 2), (1.0, 3)])), 0.0).rows
    assert (row.seeds, row.are_paired) == ((1, 1), True)
    (row,) = questions.compare(together(asked([(0.0, 1), (1.0, 2), (1.0, 3)])), 0.0).rows
    assert (row.seeds, row.are_paired) == ((2, 1), False)
    assert "no seed in common" in questions.text(questions.compare(together(asked([(0.0, 1), (1.0, 2)])), 0.0))


def test_other_documents_are_refused_by_name():
    table = together(asked(TWO))
    table.loc[(table["plw"] == 0.5) & table["doc_id"].isin([3, 7]), "document"] = "other"
    with pytest.raises(UserError, match=r"short, toy: .* questions of arc: document 3, 7 of PLW .* same text"):
        questions.compare(table, 0.0)


def test_fewer_documents_are_refused_by_name():
    table = together(asked([(0.0, 1)]), asked([(1.0, 1)], count=30))
    with pytest.raises(UserError, match=r"PLW 1 seed 1 was not asked document 30, 31, 32, 33, 34 and 5 more"):
        questions.compare(table, 0.0)


def test_a_plw_without_runs_and_a_lonely_one_are_refused():
    with pytest.raises(UserError, match=r"no questions of PLW 0\.3; there are those of PLW 0, 0\.5, 1"):
        questions.compare(together(asked(TWO)), 0.3)
    with pytest.raises(UserError, match="no two PLWs to compare"):
        questions.compare(together(asked([(0.0, 1)])), 0.0)


def test_a_data_set_without_the_plw_leaves_the_others():
    found = questions.compare(together(asked(TWO), asked([(0.5, 1), (1.0, 1)], dataset="stray")), 0.0)
    assert {row.group["dataset"] for row in found.rows} == {"short"}
    assert found.notes == ["stray, toy: no questions of PLW 0; there are those of PLW 0.5, 1"]


def test_a_metric_of_the_corpus_alone_is_left_out_with_its_reason():
    corpus = asked(TWO, task="wmt", metric="ter").assign(value=np.nan)
    found = questions.compare(together(asked(TWO), corpus), 0.0)
    assert {row.task for row in found.rows} == {"arc"}
    assert found.notes == ["wmt is left out: ter has no value for a single question"]


def test_data_sets_are_compared_apart_and_only_by_the_metric_of_the_score():
    other = asked(TWO, metric="acc_norm", seed=5)
    table = pd.concat([asked(TWO), other, asked(TWO, dataset="long", seed=3)], ignore_index=True)
    table.attrs["metrics"] = {"arc": "acc"}
    found = questions.compare(table, 0.0)
    assert [name for name, _ in questions.groups(found)] == ["long, toy", "short, toy"]
    assert {row.metric for row in found.rows} == {"acc"}


def test_questions_lie_beside_the_scores(tmp_path):
    scores = tmp_path / "scores.csv"
    table = asked(TWO)[[*questions.CELL, "task", "metric"]].drop_duplicates().assign(score=0.5)
    table.to_csv(scores, index=False)
    with pytest.raises(UserError, match=r"questions\.parquet, which is not there"):
        questions.read_beside(scores)
    asked(TWO).to_parquet(tmp_path / questions.FILE)
    assert questions.compare(questions.read_beside(scores), 0.0).rows[0].task == "arc"
    asked(TWO).drop(columns="value").to_parquet(tmp_path / questions.FILE)
    with pytest.raises(UserError, match="holds no questions as main, evaluate and sweep write them"):
        questions.read_beside(scores)


def test_only_the_runs_of_the_score_table_are_compared(tmp_path):
    scores = tmp_path / "scores.csv"
    asked(TWO).to_parquet(tmp_path / questions.FILE)
    table = asked(TWO)[[*questions.CELL, "task", "metric"]].drop_duplicates().assign(score=0.5)
    table[table["plw"] != 0.5].to_csv(scores, index=False)
    found = questions.compare(questions.read_beside(scores), 0.0)
    assert (found.plws, {row.plw for row in found.rows}) == (2, {1.0})
    table.assign(model="another").to_csv(scores, index=False)
    with pytest.raises(UserError, match="holds no questions of the runs in"):
        questions.read_beside(scores)


def test_each_measure_of_held_out_records_is_compared_by_itself_and_in_no_mean():
    scored = together(asked(TWO), asked(TWO, task="piqa", seed=2))
    new = [asked(TWO, task="held_out_new", metric=metric, seed=3) for metric in ("completion_loss", "exact_match")]
    table = pd.concat([scored, *new], ignore_index=True)
    table.attrs = scored.attrs
    found = questions.compare(table, 0.0, 1.0)
    names = ["mean of 2 tasks", "arc", "held_out_new completion_loss", "held_out_new exact_match", "piqa"]
    assert [row.task for row in found.rows] == names
    assert found.rows[0].found.questions == 80
    assert "less of it is better" in questions.text(found)
