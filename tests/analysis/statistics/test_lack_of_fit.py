"""Is a curve that misses the scores found out, and is one that fits left alone?"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from plw_mlflow.analysis import analyze, exports, planning, report, wording
from plw_mlflow.analysis.statistics import design
from plw_mlflow.analysis.statistics.lack_of_fit import lack_of_fit, misfits
from plw_mlflow.transforms import make_transform

PLWS = (0, 0.0005, 0.01, 0.1, 0.5, 1)


def table(rng, shape, seeds=3, tasks=5, noise=0.01):
    """Scores of which each task has the mean `shape(w, plw)`."""
    rows = []
    for plw in PLWS:
        w = float(make_transform("w_p", PLWS)(plw))
        for seed in range(seeds):
            luck = rng.normal(scale=noise)
            for task in range(tasks):
                score = 0.4 + 0.02 * task + shape(w, plw) + luck + rng.normal(scale=noise)
                rows.append(("m", "d", plw, seed, f"t{task}", "acc", score))
    return pd.DataFrame(rows, columns=["model", "dataset", "plw", "seed", "task", "metric", "score"])


def grid(scores):
    return design.grid(scores, "d", make_transform("w_p", scores["plw"]))


def parabola(w, plw):
    return 0.2 * w - 0.2 * w**2


def test_the_test_is_the_textbooks():
    scores = table(np.random.default_rng(1), parabola)
    found = lack_of_fit(grid(scores))
    means = scores.groupby(["plw", "seed"])["score"].mean().reset_index()
    w = make_transform("w_p", PLWS)(means["plw"])
    line = np.polyval(np.polyfit(w, means["score"], 2), w)
    pure = means["score"] - means.groupby("plw")["score"].transform("mean")
    statistic = (((means["score"] - line) ** 2).sum() - (pure**2).sum()) / 3 / ((pure**2).sum() / 12)
    assert (found.freedom, found.free) == (3, 12)
    assert found.statistic == pytest.approx(statistic)
    assert found.p == pytest.approx(stats.f.sf(statistic, 3, 12))
    assert found.best_plw == means.groupby("plw")["score"].mean().idxmax()


def test_a_parabola_is_found_to_misfit_as_often_as_the_level_says():
    rng = np.random.default_rng(2)
    p = [lack_of_fit(grid(table(rng, parabola, seeds=2))).p for _ in range(600)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_one_seed_or_three_plws_cannot_show_a_misfit():
    scores = table(np.random.default_rng(3), parabola)
    assert lack_of_fit(grid(scores[scores["seed"] == 0])) is None
    assert lack_of_fit(grid(scores[scores["plw"].isin(PLWS[:3])])) is None


@pytest.mark.parametrize("at", [0.1, 0.0005])
def test_where_no_parabola_fits_nothing_is_said_of_its_shape(at, tmp_path):
    scores = table(np.random.default_rng(4), lambda w, plw: 0.3 * (plw == at))
    analysis = analyze.analyze(scores, margin=0.25, draws=0)
    (answer,) = analysis.answers
    assert answer.advice == f"No parabola describes these scores; of the PLWs tried, {at:g} scores best."
    these, others = answer.findings
    assert these.kind == "yes"
    assert these.verdict.startswith("Yes, but not along a parabola (lack of fit: p = ")
    assert f"{at:g} has the highest mean score" in these.verdict
    assert (others.kind, others.verdict) == ("untold", "These scores cannot tell: no parabola describes their means.")
    assert not answer.matters_little
    assert answer.equivalence is None
    assert answer.lead.notes[-1].startswith("No parabola describes the means of these runs (lack of fit: F(3, 12) = ")
    assert "By the curve" not in wording.table_text(analysis)
    told = exports.to_json(analysis, scores)
    assert {fit["verdict"] for fit in told["fits"]} == {answer.verdict}
    assert told["answers"][0]["misfit"]["p"] == these.p
    report.write(analysis, scores, tmp_path, "")
    assert "of curves that do not fit" in (tmp_path / "report.html").read_text()


def test_where_one_fits_the_answer_is_as_ever():
    (answer,) = analyze.analyze(table(np.random.default_rng(5), parabola), draws=0).answers
    assert "parabola" not in answer.advice
    assert answer.equivalence is not None


def test_models_whose_curves_differ_are_no_misfit():
    """Each follows a parabola of its own, and their mean one, too: what differs is that they differ."""
    rng = np.random.default_rng(6)
    up, down = (table(rng, shape) for shape in (parabola, lambda w, plw: -parabola(w, plw)))
    both = pd.concat([up, down.assign(model="other", score=down["score"] + 0.2)], ignore_index=True)
    assert lack_of_fit(grid(both)).p > 0.05


def test_the_best_plw_is_that_of_means_with_each_models_level_taken_out():
    rng = np.random.default_rng(7)
    one = table(rng, lambda w, plw: 0.1 * (plw == 0.01))
    other = table(rng, lambda w, plw: 0.2).assign(model="other")
    some = other[other["plw"].isin([0.0005, 0.5, 1])]  # of the better model, which was not tried at the best PLW
    assert lack_of_fit(grid(pd.concat([one, some], ignore_index=True))).best_plw == 0.01


def test_no_runs_are_planned_by_a_curve_that_does_not_fit():
    rng = np.random.default_rng(11)
    grids = [grid(table(rng, shape)) for shape in (parabola, lambda w, plw: 0.3 * (plw == 0.1))]
    named = [replace(one, dataset=name) for one, name in zip(grids, ("fits", "misfits"), strict=True)]
    planning_of_both = planning.ask(named, width=None, next_plws=2)
    assert [proposal.dataset for proposal in planning_of_both.proposals] == ["fits"]
    (refusal,) = planning_of_both.refusals
    assert refusal.startswith(
        "not done: misfits: runs are planned by a parabola, and no parabola describes these scores"
    )
    assert planning.ask(named, width=None, next_plws=None).text() == ""  # as none was asked for


def test_a_misfit_is_found_by_a_p_that_is_corrected_for_the_other_data_sets():
    """Each misfits by its own p alone, which is between a half of 0.01 and 0.01."""
    rng, grids = np.random.default_rng(12), []
    while len(grids) < 2:
        one = grid(table(rng, lambda w, plw: 0.012 * (plw == 0.1)))
        if 0.005 < lack_of_fit(one).p < 0.01:
            grids.append(replace(one, dataset=str(len(grids))))
    assert [*misfits(grids[:1])] == ["0"]
    assert misfits(grids) == {}


def test_a_misfit_too_small_to_matter_is_said_to_be_so():
    scores = table(np.random.default_rng(8), lambda w, plw: 0.002 * (plw == 0.1), noise=0.0001)
    (answer,) = analyze.analyze(scores, draws=0).answers
    assert answer.misfit is not None
    assert answer.matters_little
    assert 0.002 < answer.misfit.widest < 0.0025
    assert answer.advice == f"Any value will do, within {100 * answer.misfit.widest:.2g} points."


def test_the_text_has_the_p_of_its_f_and_the_answer_both_ps():
    rng = np.random.default_rng(9)
    parts = [table(rng, lambda w, plw: 0.3 * (plw == 0.1)).assign(dataset=name) for name in ("a", "b")]
    first = analyze.analyze(pd.concat(parts, ignore_index=True), draws=0).answers[0]
    assert first.these_tasks.p == first.misfit.p
    assert first.these_tasks.holm_p in (first.misfit.p, 2 * first.misfit.p)
    assert f"{first.misfit.statistic:.3g}, p = {first.misfit.p:.2g}" in first.verdict


def test_what_was_left_out_is_named_without_a_curve_too():
    scores = table(np.random.default_rng(10), lambda w, plw: 0.3 * (plw == 0.1))
    lacking = scores[(scores["task"] != "t4") | (scores["plw"] != 0.5)]
    (answer,) = analyze.analyze(lacking, draws=0).answers
    assert answer.misfit is not None
    assert answer.these_tasks.verdict.endswith("Left out: task t4 (some runs lack it).")
