"""Do the simulations of questions count what they say?"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import questions
from plw_mlflow.analysis.questions import FILE


def test_rejections_are_those_of_the_tests_by_name():
    counts = np.array([[60.0, 12, 2, 26], [60, 7, 6, 27]])
    found = questions.rejections(counts, 0.1)
    assert found["McNemar, mid-p"] == found["McNemar, exact"] == 0.5
    assert stats.binomtest(2, 14).pvalue < 0.05 < stats.binomtest(6, 13).pvalue
    assert found["unpaired"] == 0
    assert found["interval holds"] == 0.5


def test_a_balanced_model_of_answers_is_that_of_their_analysis_of_variance():
    rng = np.random.default_rng(0)
    right = (rng.random((1, 5, 40)) < rng.random((1, 1, 40))).astype(float)
    x = np.stack([np.ones(5), np.linspace(0, 1, 5), np.linspace(0, 1, 5) ** 2], 1)
    found = questions.curve_tests(right, x)
    scores = right[0].mean(1)
    residual = scores - x @ np.linalg.lstsq(x, scores)[0]
    explained = ((scores - scores.mean()) ** 2).sum() - residual @ residual
    assert found["means"][0] == pytest.approx(stats.f.sf(explained / 2 / (residual @ residual / 2), 2, 2))
    around = right[0] - right[0].mean(0) - right[0].mean(1, keepdims=True) + right[0].mean()
    variance = (around**2).sum() / 4 / 39 / 40
    assert found["crossed, no luck"][0] == pytest.approx(stats.chi2.sf(explained / variance, 2), rel=1e-6)


def test_real_answers_have_no_difference_but_the_planted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "DRAWS", 400)
    rng = np.random.default_rng(1)
    hard = rng.random(300)
    rows = [
        {"dataset": "short", "model": "m", "plw": plw, "seed": 1, "task": "arc", "metric": "acc", "doc_id": number}
        | {"document": str(number), "value": float(hard[number] + rng.normal(0, 0.2) + plw / 5 < 0.6)}
        for plw in (0.0, 1.0)
        for number in range(300)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / FILE)
    pd.DataFrame(rows).drop_duplicates("plw").to_csv(tmp_path / "scores.csv", index=False)
    none, *_, most = questions.real(tmp_path / "scores.csv")
    assert {none["seeds"], most["seeds"]} == {1}
    values = pd.DataFrame(rows).pivot_table(index="doc_id", columns="plw", values="value")
    assert none["disagreement"] == pytest.approx((values[0.0] != values[1.0]).mean())
    assert none["paired"] < 0.09
    assert most["paired"] > 2 * none["paired"] > most["unpaired"]


def test_the_means_of_two_seeds_are_compared_by_the_t_test_where_each_has_both(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "DRAWS", 400)
    rng = np.random.default_rng(2)
    rows = [
        {"dataset": "short", "model": "m", "plw": plw, "seed": seed, "task": "arc", "metric": "acc", "doc_id": number}
        | {"document": str(number), "value": float(rng.random() < 0.6)}
        for plw, seed in ((0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2), (0.5, 1))
        for number in range(300)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / FILE)
    pd.DataFrame(rows).drop_duplicates(["plw", "seed"]).to_csv(tmp_path / "scores.csv", index=False)
    *_, two = questions.real(tmp_path / "scores.csv")
    means = pd.DataFrame(rows).pivot_table(index="doc_id", columns="plw", values="value")
    assert (two["seeds"], two["pairs"], two["planted"]) == (2, 1, 0.0)  # PLW 0.5 has one seed alone
    assert two["disagreement"] == pytest.approx((means[0.0] != means[1.0]).mean())
    assert 0.02 < two["paired"] < 0.09
