"""The replication's records and tables, by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from benchmarks import replication
from plw_mlflow.config import DataOptions
from plw_mlflow.transforms import make_transform

CELL = {"model": "m", "dataset": "d", "plw": 0.1, "seed": 1}


def question(metric, value, log_likelihood, task="held_out_new"):
    return {**CELL, "task": task, "metric": metric, "value": value, "log_likelihoods": [log_likelihood]}


def test_a_sets_loss_is_of_all_its_tokens_and_other_measures_are_means():
    rows = [
        question("completion_loss", 2.0, -20.0),  # ten tokens
        question("completion_loss", 5.0, -10.0),  # two
        question("exact_match", 1.0, -20.0),
        question("exact_match", 0.0, -10.0),
        question("acc", 1.0, -3.0, task="piqa"),
    ]
    found = replication.held_out_table(pd.DataFrame(rows)).set_index("task")["score"]
    assert dict(found) == {"held_out_new completion_loss": -30 / 12, "held_out_new exact_match": 0.5}


def test_a_parabola_is_found_again():
    plws = np.array([0, 0.01, 0.05, 0.2463, 0.5, 1.0] * 2)
    w = make_transform("w_p", plws)(plws)
    noise = np.random.default_rng(3).normal(scale=1e-4, size=12)
    rows = [
        {**CELL, "plw": plw, "seed": number // 6, "task": "t", "metric": "m", "score": 0.3 + 0.2 * x - 0.15 * x**2 + e}
        for number, (plw, x, e) in enumerate(zip(plws, w, noise, strict=True))
    ]
    row = replication.curves(pd.DataFrame(rows)).splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["d", "t"]
    slope, bend, p = map(float, row[2:5])
    assert (slope, bend) == pytest.approx((0.2, -0.15), abs=1e-3)
    assert p < 1e-6
    assert float(row[5]) > 0.001
    assert row[6].startswith("0.26 (0.2")  # (2/3)^(1 / 0.30103)


def found_of(plw, seed, score):
    cell = CELL | {"plw": plw, "seed": seed}
    scores = pd.DataFrame([{**cell, "task": "piqa", "metric": "acc", "score": score}])
    questions = pd.DataFrame([{**question("exact_match", score, -2.0), **cell}])
    return scores, questions, pd.DataFrame([{"run": f"{plw} {seed}", "packing": "true", "limit": None, **cell}])


def test_what_two_sweeps_have_found_is_published_together(tmp_path, monkeypatch):
    sweeps = {"first": found_of(0.0, 1, 0.1), "second": found_of(0.0, 2, 1 / 3), "again": found_of(0.0, 1, 0.3)}
    monkeypatch.setattr(replication, "_found", sweeps.__getitem__)
    for sweep in sweeps:
        replication.publish.callback(tmp_path, sweep)
    for name, column in (("scores.csv", "score"), ("held_out.csv", "score")):
        table = pd.read_csv(tmp_path / name).set_index("seed")
        assert dict(table[column]) == {2: 1 / 3, 1: 0.3}
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    assert lines == [
        "run,packing,limit,model,dataset,plw,seed",
        "0.0 1,true,,m,d,0.0,1",
        "0.0 2,true,,m,d,0.0,2",
    ]


def test_records_are_drawn_that_fit_in_both_forms(tmp_path):
    records = [{"instruction": f"Name the number {n}.", "input": "", "output": "It is " * (n % 40)} for n in range(120)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = DataOptions(cache_dir=tmp_path / "cache", max_tokens=100, empty_completion="bad")
    pairs = replication.draw(str(file), "toy", options, 12)
    assert len({pair.cleaned.id for pair in pairs}) == 12
    assert pairs == replication.draw(str(file), "toy", options, 12)
    assert all(pair.cleaned.output for pair in pairs)
    longest = max(len(pair.cleaned.output) for pair in pairs)
    assert longest < max(len(record["output"]) for record in records)
    inverted = [pair for pair in pairs if pair.short != pair.cleaned]
    assert inverted
    assert all(
        (pair.short.input, pair.short.output) == (pair.cleaned.output, pair.cleaned.instruction) for pair in inverted
    )


def test_means_are_over_seeds_by_task():
    scores = [
        {**CELL, "seed": seed, "task": task, "score": seed + len(task)} for seed in (1, 2) for task in ("bb", "a")
    ]
    assert replication.means(replication.mean_table(pd.DataFrame(scores))).splitlines() == [
        "| trained on | PLW | bb | a |",
        "| --- | --- | --- | --- |",
        "| d | 0.1 | 3.5000 | 2.5000 |",
    ]


def cells(rise, gain):
    """Scores and questions of 24 cells: on short data `rise` from PLW 0 to a peak, and new records better by `gain`."""
    rng = np.random.default_rng(1)
    tasks = [f"task{number}" for number in range(6)]
    scores, questions = [], []
    answers = rng.random(60)
    for dataset in ("alpaca_cleaned", "alpaca_short"):
        for plw in (0, 0.01, 0.05, 0.2463, 0.5, 1):
            w = float(make_transform("w_p", [0.0, 1.0])(plw))
            for seed in (1, 2):
                cell = {"model": "m", "dataset": f"{dataset}.jsonl", "plw": plw, "seed": seed}
                for task in tasks:
                    peak = rise * (1 - (w / 0.7 - 1) ** 2) * (dataset == "alpaca_short")
                    score = 0.4 + peak + rng.normal(scale=0.004)
                    scores.append({**cell, "task": task, "metric": "acc", "score": score})
                better = gain * (plw > 0)
                for metric, sign in (("completion_loss", -1), ("exact_match", 1), ("bleu", 1)):
                    for number, answer in enumerate(answers + rng.normal(scale=0.01, size=60)):
                        new = {"task": f"held_out_{dataset}_new", "metric": metric, "document": str(number)}
                        questions.append({**cell, **new, "doc_id": number, "value": answer + sign * better})
    table = pd.DataFrame(questions)
    table.attrs["metrics"] = dict.fromkeys(tasks, "acc")
    return pd.DataFrame(scores), table


@pytest.mark.parametrize(
    ("rise", "gain", "expected"),
    [
        (0.05, 0.1, ["holds", "holds", "holds", "holds", "does not hold"]),
        (-0.05, -0.1, ["does not hold", "holds", "does not hold", "does not hold", "holds"]),
    ],
)
def test_hypotheses_are_judged_by_what_was_planted(rise, gain, expected):
    judged = replication.judge(*cells(rise, gain))
    assert [one.number for one in judged] == [1, 2, 3, 4, 5]
    assert [one.verdict for one in judged] == expected


def test_where_nothing_was_planted_the_hypotheses_of_an_effect_do_not_hold():
    judged = replication.judge(*cells(0.0, 0.0))
    assert [one.verdict for one in judged][1] == "holds"
    assert "holds" not in {judged[0].verdict, judged[3].verdict}
    assert judged[4].verdict != "does not hold"
