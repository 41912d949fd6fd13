"""Do the named sets hold what the study ran?"""

import csv

import pytest

from plw_mlflow.evaluation import task_sets
from plw_mlflow.evaluation.task_sets import Benchmark
from tests.stores import ROOT

# How the study's table names what the harness of today names otherwise.
RENAMED = {("truthfulqa_mc2", "mc2"): ("truthfulqa_mc2", "acc")}


def scored(name):
    return [one for one in task_sets.select(name) if one.is_scored]


def test_version_1_scores_what_the_study_plotted():
    with (ROOT / "paper/tables/v1_scores.csv").open() as file:
        plotted = {(row["task"], row["metric"], row["task_type"]) for row in csv.DictReader(file)}
    expected = {(*RENAMED.get((task, metric), (task, metric)), kind) for task, metric, kind in plotted}
    found = {(one.task.removeprefix("huerta2024_"), one.metric, one.task_type) for one in scored("huerta2024-v1")}
    assert found == expected
    assert {one.task: one.num_fewshot for one in scored("huerta2024-v1") if one.num_fewshot} == {
        "arc_challenge": 25,
        "winogrande": 5,
    }


def test_which_of_truthfulqa_counts_is_the_sets_name():
    counts = {
        name: {one.task for one in task_sets.select(name) if one.is_scored and one.task.startswith("truthful")}
        for name in ("huerta2024-v1", "huerta2024-v1-mc1")
    }
    assert counts == {"huerta2024-v1": {"truthfulqa_mc2"}, "huerta2024-v1-mc1": {"truthfulqa_mc1"}}
    measured = {one.task for one in task_sets.select("huerta2024-v1")}
    assert measured == {one.task for one in task_sets.select("huerta2024-v1-mc1")}


def test_version_4_has_eleven_tasks_and_two_that_are_not_run():
    assert len(scored("huerta2024-v4")) == 11
    assert set(task_sets.not_run("toy,huerta2024-v4")) == {"alpaca_eval", "pandalm"}
    assert task_sets.not_run("huerta2024-v1") == {}


def test_sets_and_tasks_mix_and_none_is_named_twice():
    found = [one.task for one in task_sets.select("toy, hellaswag,huerta2024-v1,toy")]
    assert found[:4] == ["toy_choice", "toy_short", "toy_long", "hellaswag"]
    assert len(found) == len(set(found)) == 4 + 9
    assert task_sets.select("hellaswag") == [Benchmark("hellaswag")]


@pytest.mark.parametrize("listed", ["piqa,huerta2024-v1", "huerta2024-v1,piqa"])
def test_a_task_named_beside_its_set_is_run_as_the_set_has_it(listed):
    assert sorted(map(str, task_sets.select(listed))) == sorted(map(str, task_sets.select("huerta2024-v1")))


def test_sets_that_differ_in_a_task_are_refused():
    with pytest.raises(ValueError, match="differ in how they run or score truthfulqa_mc1"):
        task_sets.select("huerta2024-v1,huerta2024-v1-mc1")


def test_a_part_of_a_set_is_run_as_the_set_has_it():
    assert task_sets.select("huerta2024-v1:arc_challenge") == [
        Benchmark("arc_challenge", "acc_norm", 25, "multiple-choice")
    ]
    with pytest.raises(ValueError, match="set toy has no task 'piqa'; it has toy_choice, toy_short, toy_long"):
        task_sets.select("toy:piqa")


def test_part_of_a_set_belongs_to_the_whole_of_it():
    toy = ["toy_choice/acc@0", "toy_short/acc@0", "toy_long/bleu@0"]
    assert task_sets.whole(["toy_short/acc@0"]) == toy
    assert len(task_sets.whole(["piqa/acc@0", "arc_challenge/acc_norm@25"])) == 8
    assert len(task_sets.whole(["piqa/acc@0", "huerta2024_wmt16-ro-en/bleu@0"])) == 11
    assert task_sets.whole(["winogrande/acc@0"]) == ["winogrande/acc@0"]  # the sets give it five examples
    assert task_sets.whole(["toy_short/acc@0", "piqa/acc@0"]) == ["toy_short/acc@0", "piqa/acc@0"]


def test_a_toy_score_of_other_data_is_said_to_say_nothing():
    assert task_sets.remark("toy", "toy-short") is None
    assert task_sets.remark("piqa", "mine.jsonl") is None
    for tasks in ("toy", "piqa,toy_choice", "toy:toy_long"):
        assert "says nothing of mine.jsonl" in task_sets.remark(tasks, "mine.jsonl")
