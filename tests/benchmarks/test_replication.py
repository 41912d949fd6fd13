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
    (curve,) = replication.curve_table(pd.DataFrame(rows)).to_dict("records")
    assert curve["w_p"] == pytest.approx(0.2, abs=1e-3)
    assert curve["w_p^2"] == pytest.approx(-0.15, abs=1e-3)
    assert curve["free"] == 9
    assert curve["joint_p"] < 1e-6
    assert curve["peak"] == pytest.approx((0.2 / 0.3) ** (1 / 0.30103), rel=0.02)


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
