"""The statistics of PLW: against R's answers, against the tables' own arithmetic, and by their laws."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from plw_mlflow.analysis import analyze, exports, score_table, wording
from plw_mlflow.analysis.score_table import task_types, widest_difference
from plw_mlflow.analysis.statistics import (
    bootstrap,
    design,
    differences,
    equivalence,
    fitting,
    multiple_testing,
    over_tasks,
    parametric,
    task_curves,
)
from plw_mlflow.analysis.statistics.optimum import Parabola, maximisers
from plw_mlflow.transforms import EXPONENT, make_transform

FIXTURES = Path(__file__).parents[2] / "fixtures" / "r"
ANSWERS = pd.read_csv(FIXTURES / "answers.csv")
STUDY = Path(__file__).parents[3] / "paper" / "tables" / "v1_scores.csv"
REFERENCE = pd.read_csv(STUDY.with_name("reference_fits_R.csv"))
PLWS = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]
LOW, HIGH = 0.0, 1.0


def grid_of(table, dataset, **options):
    part = table[table["dataset"] == dataset] if dataset != "all" else table
    return design.grid(part, dataset, make_transform("w_p", part["plw"]), **options)


@cache
def r_grid(number, dataset="short"):
    return grid_of(score_table.read_scores(FIXTURES / f"table{number:02d}.csv"), dataset)


@cache
def study_grid(dataset="AlpacaDataShort", **options):
    return grid_of(score_table.read_scores(STUDY), dataset, **options)


def r_answers(number, dataset, model):
    return ANSWERS.query("table == @number and dataset == @dataset and model == @model").set_index("quantity")["value"]


COMPLETE = [
    (number, dataset)
    for number, dataset in [(number, "short") for number in range(1, 11)] + [(7, "long")]
    if "hotelling.p" in r_answers(number, dataset, "task-t")
]


# ------------------------------------------------------------------------------------------- against R


@pytest.mark.parametrize(("number", "dataset"), COMPLETE)
def test_task_t_equals_r(number, dataset):
    told = r_answers(number, dataset, "task-t")
    fit = fitting.fit("task-t", r_grid(number, dataset))
    for ours, theirs in (("w_p", "wp"), ("w_p^2", "wp2")):
        assert fit.coefficients[ours] == pytest.approx(told[f"mean.{theirs}"], rel=1e-9)
        assert fit.standard_errors[ours] == pytest.approx(told[f"se.{theirs}"], rel=1e-9)
        assert fit.p_values[ours] == pytest.approx(told[f"p.{theirs}"], rel=1e-7)
    (joint,) = fit.joint_tests
    assert joint.statistic == pytest.approx(told["hotelling.f"], rel=1e-8)
    assert (joint.df1, joint.df2) == pytest.approx((told["hotelling.df1"], told["hotelling.df2"]))
    assert joint.p == pytest.approx(told["hotelling.p"], rel=1e-7)


@pytest.mark.parametrize(("number", "dataset"), [(1, "short"), (7, "long"), (8, "short"), (9, "short")])
def test_ols_with_fixed_tasks_equals_r(number, dataset):
    told = r_answers(number, dataset, "ols-task")
    fit = fitting.fit("ols-task", r_grid(number, dataset))
    for ours, theirs in (("w_p", "wp"), ("w_p^2", "wp2")):
        assert fit.coefficients[ours] == pytest.approx(told[f"estimate.{theirs}"], rel=1e-8)
        assert fit.standard_errors[ours] == pytest.approx(told[f"se.{theirs}"], rel=1e-8)
        assert fit.p_values[ours] == pytest.approx(told[f"p.{theirs}"], rel=1e-6)


def test_the_study_by_every_model():
    """Hotelling over eight tasks, paper.md; lmm and beta, R's rows."""
    p = {model: fitting.fit(model, study_grid()).joint_p for model in fitting.FITS}
    assert p["task-t"] == pytest.approx(0.164, abs=5e-4)
    assert p["lmm"] == pytest.approx(4.18719165e-06, rel=1e-5)
    assert p["beta"] == pytest.approx(8.33284029e-09, rel=1e-4)
    assert 0.05 < p["crossed"] < 0.3
    assert 0.05 < p["lmm-slopes"] < 0.3
    assert p["ols-task"] < 1e-5


def test_the_beta_row_of_the_reference():
    row = REFERENCE[REFERENCE["software"].str.startswith("glmmTMB")].iloc[0]
    fit = fitting.fit("beta", study_grid(row["dataset"]))
    assert list(fit.coefficients.values()) == pytest.approx(row[["b0", "b1", "b2"]].tolist(), rel=1e-5)
    assert list(fit.standard_errors.values()) == pytest.approx(row[["se0", "se1", "se2"]].tolist(), rel=1e-4)
    assert fit.loglik == pytest.approx(row["loglik"], abs=1e-4)
    assert (fit.vertex_wp, fit.vertex_wp_se) == pytest.approx((row["vertex_wp"], row["vertex_wp_se_delta"]), rel=1e-4)


def test_difference_between_data_sets_equals_r():
    told = r_answers(7, "all", "lmm-by-dataset")
    grid = grid_of(score_table.read_scores(FIXTURES / "table07.csv"), "all", by="dataset")
    found = differences.compare_curves(grid, "dataset")
    over, ratio = found.tests
    assert ratio.statistic == pytest.approx(told["ml.lrt.chisq"], rel=1e-5)
    assert (ratio.df1, ratio.p) == pytest.approx((told["ml.lrt.df"], told["ml.lrt.p"]), rel=1e-4)
    assert over.df1 == 2
    assert found.levels == ["long", "short"]


# ------------------------------------------------------------------------------------------------ optimum


def parabola(slope=0.05, bend=-0.04, scale=1e-3, freedom=7.0):
    covariance = scale**2 * np.array([[1.0, -0.9], [-0.9, 1.0]])
    return Parabola(slope, bend, covariance, lambda _: freedom, LOW, HIGH)


def test_delta_and_fieller_agree_where_all_is_sure():
    sure = parabola(scale=1e-4)
    (pair,), is_unbounded = sure.fieller_set()
    assert not is_unbounded
    assert pair == pytest.approx(sure.delta_interval(), abs=1e-4)
    assert sure.vertex == pytest.approx(0.625)
    assert sure.interior_probability() > 1 - 1e-9


def test_fieller_is_the_closed_form():
    """With one number of degrees of freedom the set is that of a quadratic inequality in w."""
    found = parabola(scale=4e-3)
    t = stats.t.ppf(0.975, 7) ** 2
    v = found.covariance
    roots = np.roots(
        [4 * (found.bend**2 - t * v[1, 1]), 4 * (found.slope * found.bend - t * v[0, 1]), found.slope**2 - t * v[0, 0]]
    )
    (pair,), is_unbounded = found.fieller_set()
    assert not is_unbounded
    assert pair == pytest.approx(sorted(roots.real))
    assert all((found.excess(w) <= 0) == (min(roots) <= w <= max(roots)) for w in np.linspace(-1, 2, 61))


def test_a_bend_that_may_be_none_leaves_the_set_without_end():
    pairs, is_unbounded = parabola(scale=0.05).fieller_set()
    assert is_unbounded
    assert pairs == [(LOW, HIGH)]


@pytest.mark.parametrize("freedom", [math.inf, 7.0])
@pytest.mark.parametrize("scale", [0.003, 0.02, 0.2])
def test_the_chance_of_an_interior_maximum_is_that_of_draws(scale, freedom):
    found = parabola(scale=scale, freedom=freedom)
    draw = np.random.default_rng(0)
    n = 400_000
    noise = draw.multivariate_normal([0, 0], found.covariance, n)
    if math.isfinite(freedom):
        noise *= np.sqrt(freedom / draw.chisquare(freedom, n))[:, None]
    slope, bend = (np.array([found.slope, found.bend]) + noise).T
    share = ((slope > 0) & (slope + 2 * bend < 0)).mean()
    assert found.interior_probability() == pytest.approx(share, abs=4 * 0.5 / math.sqrt(n))


def test_the_best_place_on_the_range():
    slope, bend = np.array([0.05, 0.05, -0.05, 0.05, -0.05, 0.0]), np.array([-0.04, -0.01, -0.04, 0.04, 0.04, 0.01])
    places = np.linspace(LOW, HIGH, 100_001)
    heights = slope[:, None] * places + bend[:, None] * places**2
    assert maximisers(slope, bend, LOW, HIGH) == pytest.approx(places[heights.argmax(1)], abs=1e-5)


# ----------------------------------------------------------------------------------------------- questions


def test_equivalence_is_of_the_worst_pair(monkeypatch):
    monkeypatch.setattr(over_tasks, "COUNTED", 0.0)  # luck is left out, so that tests of a pair are Student's
    monkeypatch.setattr(over_tasks, "DEDUCTED", 0.0)
    grid = study_grid("AlpacaData")
    found = equivalence.assess_equivalence(grid, 0.01)
    slope, bend = np.linalg.lstsq(grid.x, grid.scores)[0][1:3]
    ps = []
    for i, one in enumerate(PLWS):
        for other in PLWS[:i]:
            step = grid.transform(one) - grid.transform(other), grid.transform(one) ** 2 - grid.transform(other) ** 2
            by_task = slope * step[0] + bend * step[1]
            ps.append(
                max(
                    stats.ttest_1samp(by_task, m, alternative=a).pvalue for m, a in ((0.01, "less"), (-0.01, "greater"))
                )
            )
    assert found.p == pytest.approx(max(ps))
    assert equivalence.assess_equivalence(grid, found.smallest_margin).p == pytest.approx(0.05)
    assert equivalence.assess_equivalence(grid).p is None
    assert found.largest_difference < found.smallest_margin
    with pytest.raises(ValueError, match="margin must be a number above 0"):
        equivalence.assess_equivalence(grid, -1)


def test_equivalence_counts_luck():
    grid = study_grid("AlpacaDataShort")
    luck = np.random.default_rng(0).normal(0, 0.01, (len(grid.scores), 1))
    lucky = replace(grid, scores=grid.scores + luck)
    curves = over_tasks.fit(lucky.scores, lucky.x, lucky.contrasts, runs_differ=True)
    assert curves.counts_runs
    w = lucky.transform(PLWS)
    pairs = [(w[i] - w[j], w[i] ** 2 - w[j] ** 2) for i in range(10) for j in range(i)]
    estimate, error, freedom, _ = curves.t_test(np.array(pairs) @ lucky.contrasts)
    expected = stats.t.sf((0.05 - np.abs(estimate)) / error, freedom).max()
    assert equivalence.assess_equivalence(lucky, 0.05).p == pytest.approx(expected)


def test_what_does_not_vary_between_tasks_is_no_evidence():
    """Data sets of equal scores, and tasks of equal curves."""
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'").reset_index(drop=True)
    both = pd.concat([table, table.assign(dataset="again")], ignore_index=True)
    (found,) = analyze.analyze(both, draws=0).differences
    assert [test.test for test in found.tests] == ["likelihood ratio, lmm"]
    assert found.tests[0].p == pytest.approx(1)
    assert found.notes == ["Not tested over tasks: all tasks have the same curve; nothing can be tested over them."]
    alike = table.assign(score=table["plw"].map(dict(zip(PLWS, np.linspace(0.3, 0.5, 10), strict=True))))
    alike["score"] += 0.01 * np.sin(7 * alike.groupby(["model", "plw"]).ngroup()) + alike.groupby("task").ngroup() / 50
    analysis = analyze.analyze(alike, margin=0.01, draws=0)
    assert {one.what for one in analysis.refusals if "all tasks have the same curve" in one.reason} >= {
        "crossed",
        "task-t",
    }
    assert analysis.answers[0].equivalence is None


def test_bootstraps_resample_what_they_say():
    table = pd.concat([score_table.read_scores(STUDY).assign(seed=seed) for seed in (1, 2)])
    draw = np.random.default_rng(0)
    table["score"] += draw.normal(0, 0.003, len(table))
    table = table.reset_index(drop=True)
    table.attrs = {}
    grid = grid_of(score_table.check(table), "AlpacaDataShort")
    found = {over: bootstrap.bootstrap_optimum(grid, over, 500) for over in analyze.BOOTSTRAPS}
    assert found["tasks"] == bootstrap.bootstrap_optimum(grid, "tasks", 500)
    width = {over: np.diff(np.array(one.interval) ** EXPONENT)[0] for over, one in found.items()}
    assert 0 < width["seeds"] < width["tasks"] <= width["both"] * 1.2
    optimum = fitting.fit("task-t", grid).optimum_plw
    assert all(one.interval[0] < optimum < one.interval[1] for one in found.values())
    with pytest.raises(ValueError, match="two seeds or more"):
        bootstrap.bootstrap_optimum(study_grid(), "seeds", 10)


def test_a_tasks_own_curve_is_least_squares():
    (first, *_), grid = task_curves.fit_task_curves(study_grid(), {"arc_challenge": "choice"}), study_grid()
    expected, rss, *_ = np.linalg.lstsq(grid.x, grid.scores[:, 0])
    assert (first.task, first.task_type) == ("arc_challenge", "choice")
    assert list(first.coefficients.values()) == pytest.approx(expected[:3])
    small = np.linalg.lstsq(grid.x[:, [0, 3]], grid.scores[:, 0])[1]
    f = (small[0] - rss[0]) / 2 / (rss[0] / 16)
    assert first.joint_p == pytest.approx(stats.f.sf(f, 2, 16))


def test_holm_by_hand():
    assert multiple_testing.adjust_by_holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert multiple_testing.adjust_by_holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


# -------------------------------------------------------------------------------------------------- design


def test_incomplete_runs_are_left_out_and_counted():
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'")
    gone = table.drop(index=table.index[[0, 25, 26]])
    fit = fitting.fit("crossed", grid_of(gone, "AlpacaDataShort"))
    left = table.merge(
        table.loc[table.index[[0, 25, 26]], ["model", "plw"]].drop_duplicates(), how="left", indicator=True
    )
    whole = fitting.fit("crossed", grid_of(left.query("_merge == 'left_only'"), "AlpacaDataShort"))
    count = 20 - whole.runs
    assert f"Left out: {count} of 20 runs (not scored on every task)." in fit.notes
    assert fit.coefficients == whole.coefficients
    assert fitting.fit("lmm-slopes", grid_of(gone, "AlpacaDataShort")).n == 157


def test_few_tasks_are_a_reason_not_an_error():
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'")
    two = table[table["task"].isin(["piqa", "arc_challenge"])]
    analysis = analyze.analyze(two, draws=0)
    assert analysis.answers[0].lead.model == "lmm"
    assert "lmm leads, as crossed cannot be fitted" in analysis.answers[0].lead.notes[0]
    reasons = {one.what: one.reason for one in analysis.refusals}
    assert "4 tasks or more, there are 2" in reasons["crossed"]
    one = analyze.analyze(table[table["task"] == "piqa"], draws=0)
    assert one.answers[0].lead.model == "ols-task"
    assert [fit.model for fit in one.fits] == ["ols-task", "fixed-tasks"]


def test_scores_of_0_and_1_refuse_the_beta_model_alone():
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'").copy()
    table.loc[table.index[3], "score"] = 1.0
    analysis = analyze.analyze(table, draws=0)
    assert [fit.model for fit in analysis.fits] == [name for name in fitting.FITS if name != "beta"]
    (reason,) = (one.reason for one in analysis.refusals if one.what == "beta")
    row = table.iloc[3]
    assert reason == (
        f"score 1 of task {row['task']} at PLW {row['plw']:g}, seed {row['seed']} is not strictly between 0 and 1, and "
        "the beta family has no other; the other models take it"
    )


def test_percentages_are_told_what_makes_them_fractions():
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'")
    analysis = analyze.analyze(table.assign(score=100 * table["score"]), draws=0)
    (reason,) = (one.reason for one in analysis.refusals if one.what == "beta")
    assert "--scale fraction divides scores of 0..100 by 100" in reason


def test_weights_are_those_of_the_table():
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'").copy()
    table["n"] = np.where(table["plw"] == 0.1, 10, 1000)
    weighted, plain = grid_of(table, "AlpacaDataShort"), grid_of(table.drop(columns="n"), "AlpacaDataShort")
    assert np.unique(weighted.weights).tolist() == [10, 1000]
    assert plain.weights is None
    assert fitting.fit("lmm-slopes", weighted).coefficients != fitting.fit("lmm-slopes", plain).coefficients
    table["n"] = 500
    same = fitting.fit("lmm-slopes", grid_of(table, "AlpacaDataShort"))
    assert same.coefficients == pytest.approx(fitting.fit("lmm-slopes", plain).coefficients, rel=1e-5)


def test_an_unknown_column_to_compare_is_an_error():
    table = score_table.read_scores(STUDY)
    with pytest.raises(ValueError, match=r"no column learning_rate to compare by; it has model, dataset"):
        analyze.analyze(table, by=("learning_rate",), draws=0)
    with pytest.raises(ValueError, match="runs do not differ by task_type"):
        analyze.analyze(table, by=("task_type",), draws=0)


def test_curves_by_model_are_compared(monkeypatch):
    """Without luck, by Hotelling's test of the differences between two models' curves, task by task."""
    monkeypatch.setattr(over_tasks, "COUNTED", 0.0)
    monkeypatch.setattr(over_tasks, "DEDUCTED", 0.0)
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'").reset_index(drop=True)
    (found,) = analyze.analyze(table, by=("model",), draws=0).differences
    assert (found.by, found.levels, found.notes) == ("model", ["LLaMA1-7B", "LLaMA2-7B"], [])
    w = np.array(PLWS) ** EXPONENT
    x = np.column_stack([np.ones(10), w, w**2])
    one, other = (
        np.linalg.lstsq(x, table[table["model"] == level].pivot(index="plw", columns="task", values="score"))[0][1:]
        for level in found.levels
    )
    apart = (one - other).T
    squared = 8 * apart.mean(0) @ np.linalg.solve(np.cov(apart.T), apart.mean(0))
    over, ratio = found.tests
    assert (over.df1, over.df2, over.p) == pytest.approx((2, 6, stats.f.sf(squared * 6 / (7 * 2), 2, 6)))
    assert ratio.df1 == 2
    assert 0.05 < ratio.p < 1


def test_columns_that_part_runs_alike_are_named():
    table = made_up([(f"model of {d}", d, plw, 0) for d in ("a", "b") for plw in PLWS], 8)
    by_dataset, by_model = analyze.analyze(table, by=("model",), draws=0).differences
    assert by_dataset.notes == ["Each of them has its own model, so this is as much about model."]
    assert by_model.notes == ["Each of them has its own dataset, so this is as much about dataset."]
    assert by_model.tests == by_dataset.tests


def test_numbers_of_questions_given_for_some_scores_only_are_said_not_to_be_used():
    table = made_up([("m", "d", plw, 0) for plw in PLWS], 8).assign(n=100.0)
    assert not any("is not used" in note for note in fitting.fit("crossed", grid_of(table, "d")).notes)
    table.loc[[3, 4], "n"] = np.nan, 0.0
    grid = grid_of(table, "d")
    assert grid.weights is None
    assert "n is not above 0 for 2 of 80 scores, so it is not used." in fitting.fit("lmm-slopes", grid).notes


def test_a_task_without_an_optimum_is_highest_at_an_end_of_the_plws_tried():
    table = made_up([("m", "d", plw, 0) for plw in (0.05, 0.1, 0.3, 0.8)], 2)
    rise = {"t0": 1.0, "t1": -1.0}
    table["score"] = 0.5 + table["task"].map(rise) * table["plw"] ** EXPONENT / 10 + 0.001 * np.sin(table.index)
    found = task_curves.fit_task_curves(grid_of(table, "d"))
    assert [task.optimum_plw for task in found] == [None, None]
    assert [task.best_plw for task in found] == pytest.approx([0.8, 0.05])


def test_data_sets_with_incomplete_runs_are_compared():
    table = score_table.read_scores(STUDY)
    table = table.drop(index=[table.index[5], table.index[300]])
    grid = design.grid(table, "all", make_transform("w_p", table["plw"]), by="dataset")
    found = differences.compare_curves(grid, "dataset")
    assert [test.test.split()[0] for test in found.tests] == ["Hotelling's", "likelihood"]
    assert "2 of 60 runs" in found.notes[0]


def test_another_column_tells_runs_apart_and_is_compared():
    """Two learning rates, at which PLW acts oppositely, half as much at one: no rows are taken for the same."""
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'")
    other = table.assign(
        learning_rate="high", score=(table.groupby("task")["score"].transform("mean") * 3 - table["score"]) / 2
    )
    both = pd.concat([table.assign(learning_rate="low"), other], ignore_index=True)
    with pytest.raises(ValueError, match="scores the same model, dataset, plw, seed, task as row"):
        analyze.analyze(both, draws=0)
    analysis = analyze.analyze(both, by=("learning_rate",), draws=0)
    fit = next(fit for fit in analysis.fits if fit.model == "task-t")
    assert (fit.n, fit.runs) == (320, 40)
    assert "learning_rate[high]" in fit.coefficients
    plain = fitting.fit("task-t", grid_of(table, "AlpacaDataShort"))
    assert fit.coefficients["w_p"] == pytest.approx(plain.coefficients["w_p"] / 4)
    (found,) = analysis.differences
    over, ratio = found.tests
    assert over.p == pytest.approx(plain.joint_p, rel=0.3)  # half the difference is the curve itself
    assert ratio.p < 1e-8


# ------------------------------------------------------------------------------------- parametric bootstrap


def test_of_a_balanced_table_the_parametric_bootstrap_of_lmm_is_its_f_test():
    """The ratio is then a function of F, whose distribution under the null depends on nothing."""
    grid = study_grid("AlpacaData")
    found = parametric.joint_test(grid, "lmm", 400)
    ratio, f = fitting.fit("lmm", grid).joint_tests
    assert found.statistic == pytest.approx(ratio.statistic)
    assert found.p == pytest.approx(f.p, abs=4 * math.sqrt(f.p * (1 - f.p) / 400))
    assert found == parametric.joint_test(grid, "lmm", 400)
    assert found != parametric.joint_test(grid, "lmm", 400, seed=2)


def test_a_plain_effect_is_beyond_all_draws():
    assert parametric.joint_test(study_grid(), "lmm", 49).p == 1 / 50


def test_the_parametric_bootstrap_of_slopes_draws_from_its_null():
    grid = study_grid()
    found = parametric.joint_test(grid, "lmm-slopes", 60)
    f, ratio = fitting.fit("lmm-slopes", grid).joint_tests
    assert found.statistic == pytest.approx(ratio.statistic, rel=1e-4)
    assert ratio.p < found.p < 0.5  # chi^2 takes too much for an effect
    analysis = analyze.analyze(score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'"), draws=0, refits=5)
    tests = {fit.model: [test.test for test in fit.joint_tests] for fit in analysis.fits}
    assert tests["lmm-slopes"] == [f.test, ratio.test, found.test.replace("60", "5")]
    assert found.test not in tests["crossed"]
    with pytest.raises(ValueError, match="must be one of lmm, lmm-slopes"):
        parametric.joint_test(grid, "beta", 1)


# --------------------------------------------------------------------------------------------- found in review


def made_up(runs, tasks, seed=0):
    """A table of these runs (model, dataset, plw, seed) with noise alone."""
    draw = np.random.default_rng(seed)
    table = pd.DataFrame(runs, columns=["model", "dataset", "plw", "seed"])
    table = table.merge(pd.DataFrame({"task": [f"t{i}" for i in range(tasks)]}), how="cross").assign(metric="acc")
    return table.assign(score=draw.uniform(0.4, 0.6, len(table)))


def test_a_plw_that_would_be_lost_is_not_lost():
    """One cell is missing, at PLW 0, where all scores are low: the model that takes incomplete runs leads."""
    table = made_up([("m", "d", plw, seed) for plw in PLWS for seed in (0, 1)], 8)
    table["score"] = table["score"] / 20 - 0.05 * (table["plw"] == 0)
    whole = analyze.analyze(table, margin=0.01, draws=0).answers[0]
    assert (whole.lead.model, whole.lead.joint_p < 0.05) == ("crossed", True)
    analysis = analyze.analyze(table[(table["plw"] > 0) | (table["task"] != "t0")], margin=0.01, draws=0)
    (answer,) = analysis.answers
    assert (answer.lead.model, answer.lead.joint_p < 0.05, answer.equivalence) == ("lmm-slopes", True, None)
    reason = "no run at PLW 0 is scored on every task; use lmm-slopes"
    assert answer.lead.notes[0] == f"lmm-slopes leads, as crossed cannot be fitted ({reason})."
    assert {one.what for one in analysis.refusals if one.reason == reason} >= {"crossed", "task-t", "equivalence"}


def test_the_lead_uses_most_of_the_scores():
    table = made_up([("m", "d", plw, seed) for plw in PLWS for seed in range(3)], 8)
    runs, tasks = table.groupby(["plw", "seed"]).ngroup(), table.groupby("task").ngroup()
    (answer,) = analyze.analyze(table[(table["seed"] == 0) | (tasks != runs % 8)], draws=0).answers
    assert answer.lead.model == "lmm-slopes"
    assert answer.lead.notes[0] == "lmm-slopes leads, as crossed can use 80 of 220 scores only."


def test_a_fit_that_did_not_converge_does_not_lead(monkeypatch):
    def fit(model, grid, scale="none"):
        if model == "crossed":
            raise ValueError("it is not to be")
        return replace(real(model, grid, scale), converged=model != "lmm-slopes")

    real = fitting.fit
    monkeypatch.setattr(fitting, "fit", fit)
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'")
    lead = analyze.analyze(table, draws=0).answers[0].lead
    assert lead.model == "lmm"
    assert lead.notes[0].startswith(
        "lmm leads, as crossed cannot be fitted (it is not to be) and lmm-slopes did not converge, and it takes"
    )


def of_runs(runs, tasks, dataset="d", rise=0.4, seed=0):
    """A run at each of so many PLWs, whose scores rise by far more than their noise."""
    plws = [PLWS[round(place)] for place in np.linspace(0, len(PLWS) - 1, runs)]
    table = made_up([("m", dataset, plw, 0) for plw in plws], tasks, seed)
    return table.assign(score=table["score"] / 10 + rise * table["plw"] ** EXPONENT)


@pytest.mark.parametrize(
    ("runs", "tasks", "is_told"),
    [
        *((runs, tasks, False) for runs, tasks in ((3, 3), (3, 8), (4, 3), (4, 8), (6, 8))),
        *((runs, tasks, True) for runs, tasks in ((7, 2), (7, 8), (4, 1))),  # one task counts luck as noise
    ],
)
def test_too_few_runs_make_no_headline(runs, tasks, is_told):
    table = of_runs(runs, tasks)
    analysis = analyze.analyze(table, margin=0.9, draws=0)
    (answer,) = analysis.answers
    assert answer.lead.joint_p < 0.05
    assert answer.shows_effect == is_told
    told = exports.to_json(analysis, table)
    fits = [fit for fit in told["fits"] if fit["model"] != "fixed-tasks"]  # whose residuals have a run's luck in them
    verdicts = [answer.verdict, told["answers"][0]["verdict"], *(fit["verdict"] for fit in fits)]
    words = f"Too few runs to tell whether PLW matters: there are {runs}, and it takes at least 7."
    if is_told:
        assert not any("Too few" in verdict for verdict in verdicts)
        assert answer.verdict.startswith("PLW matters here")
    else:
        assert all(verdict.startswith(words) for verdict in verdicts)
        assert not any("matters here" in verdict or "within" in verdict for verdict in verdicts)
        assert answer.other_tasks.kind == "untold"
        assert answer.other_tasks.p is None


def test_models_cost_runs_before_a_verdict():
    both = pd.concat([of_runs(4, 8), of_runs(4, 8, seed=1).assign(model="n")], ignore_index=True)
    (answer,) = analyze.analyze(both, draws=0).answers
    assert (answer.lead.runs, answer.lead.fewest_runs, answer.lead.has_too_few_runs) == (8, 8, False)


def test_too_few_runs_show_no_difference_either():
    table = pd.concat([of_runs(4, 13), of_runs(4, 13, "e", rise=-0.05, seed=1)], ignore_index=True)
    analysis = analyze.analyze(table, draws=0)
    assert analysis.differences[0].tests[0].p < 0.05
    assert analysis.differences[0].has_too_few_runs
    assert "Does the curve differ by dataset? Too few runs to tell." in wording.table_text(analysis)
    many = pd.concat([of_runs(6, 13), of_runs(6, 13, "e", rise=-0.05, seed=1)], ignore_index=True)
    assert not analyze.analyze(many, draws=0).differences[0].has_too_few_runs


def test_a_difference_wider_than_the_scale_is_no_number():
    grid = next(iter(analyze.grids(of_runs(4, 8))))
    luck = np.array([0.0, 0.5, 0.0, 0.0])[:, None]  # of one run, which four do not tell from an effect
    loud = replace(grid, scores=grid.scores + luck)
    unlimited, limited = equivalence.assess_equivalence(loud), equivalence.assess_equivalence(loud, widest=1.0)
    assert unlimited.smallest_margin > 1
    assert unlimited.detectable > 1
    assert (limited.smallest_margin, limited.detectable) == (None, None)
    assert limited.largest_difference == unlimited.largest_difference


def test_how_far_two_scores_can_lie_apart():
    table = score_table.check(of_runs(4, 8))
    percent = table.assign(score=100 * table["score"])
    assert widest_difference(table, "none") == 1
    assert widest_difference(percent, "none") == 100
    assert widest_difference(score_table.rescale(percent, "minmax"), "minmax") == 1
    assert widest_difference(score_table.rescale(percent, "zscore"), "zscore") is None
    assert widest_difference(table.assign(score=-table["score"]), "none") is None
    with pytest.raises(ValueError, match=r"margin is 1, but no two scores can differ by more than 1; give a margin"):
        analyze.analyze(table, margin=1)
    assert analyze.analyze(percent, margin=1, draws=0).margin == 1


def test_the_verdict_of_a_fit_is_that_of_the_answer_it_leads():
    """Corrected for the other data sets, as the answer is, by every model."""
    table = score_table.read_scores(STUDY)
    told = exports.to_json(analyze.analyze(table, margin=0.01, draws=0), table)
    fits = {(fit["dataset"], fit["model"]): fit for fit in told["fits"]}
    for answer in told["answers"]:
        lead = fits[answer["dataset"], answer["lead"]]
        assert (lead["verdict"], lead["holm_p"]) == (answer["verdict"], answer["holm_p"])
    short = fits["AlpacaDataShort", "lmm"]
    assert short["holm_p"] == 3 * short["joint_p"]
    halved = {**{name: fit["joint_p"] for (name, model), fit in fits.items() if model == "lmm"}}
    assert {name: fits[name, "lmm"]["holm_p"] for name in halved} == multiple_testing.adjust_by_holm(halved)


def test_types_of_tasks_are_one_each_and_blanks_are_none():
    table = score_table.read_scores(STUDY)
    types = task_types(table)
    blank = table.assign(task_type=table["task_type"].where(table["task"] != "piqa", " "))
    assert task_types(blank) == {task: kind for task, kind in types.items() if task != "piqa"}
    both = table.assign(task_type=table["task_type"].where(table.index > table.index[0], "other"))
    with pytest.raises(ValueError, match=r"has the types .*other.*; keep one"):
        task_types(both)


def test_no_run_on_every_task_is_a_reason():
    table = score_table.read_scores(STUDY).query("dataset == 'AlpacaDataShort'").reset_index(drop=True)
    runs = table.groupby(["model", "plw"], sort=False).ngroup()
    tasks = table.groupby("task").ngroup()
    analysis = analyze.analyze(table[tasks != runs % 8])
    assert analysis.answers[0].lead.model == "lmm-slopes"
    reasons = {one.what: one.reason for one in analysis.refusals}
    assert "no run is scored on every task" in reasons["crossed"]
    assert reasons["equivalence"] == "a curve takes 3 PLWs, and no run is scored on every task"
    assert "fewer than 3 PLWs" in reasons["bootstrap over tasks"]
    assert analysis.answers[0].bootstraps == []


def test_too_little_for_a_joint_test_is_said_and_leaves_no_nan():
    """4 coefficients, and one run more than the curves take: where luck counts, its freedom is below their number."""
    runs = [*((m, "d", plw, 0) for m in "abc" for plw in (0, 0.2, 1)), ("a", "d", 0.2, 1)]
    notes, ps = [], []
    for seed in range(12):
        table = made_up(runs, 8, seed)
        luck = np.random.default_rng(seed).normal(0, 0.1, len(runs))
        table["score"] += luck[table.groupby(["model", "plw", "seed"]).ngroup()]
        analysis = analyze.analyze(table, by=("model",), draws=0)
        (found,) = analysis.differences
        notes += found.notes
        ps += [test.p for test in found.tests]
        json.dumps(exports.to_json(analysis, table), allow_nan=False)
    assert any("too few to test 4 coefficients together" in note for note in notes)
    assert np.isfinite(ps).all()


def test_a_colon_in_a_name_is_no_interaction():
    runs = [(m, "d", plw, 0) for m in ("llama:7b", "llama:13b", "x") for plw in PLWS]
    (found,) = analyze.analyze(made_up(runs, 13), by=("model",), draws=0).differences
    assert [test.df1 for test in found.tests] == [4, 4]


def test_values_of_a_column_are_not_seeds():
    runs = [("m", "d", plw, 0) for plw in PLWS]
    both = pd.concat([made_up(runs, 8, seed).assign(rate=rate) for seed, rate in enumerate(("2e-5", "0.0001"))])
    analysis = analyze.analyze(both.reset_index(drop=True), by=("rate",), draws=10)
    assert "two seeds or more" in {one.what: one.reason for one in analysis.refusals}["bootstrap over seeds"]
    same = both.assign(rate=both["rate"].replace("0.0001", "0.00002")).reset_index(drop=True)
    with pytest.raises(ValueError, match="scores the same model, dataset, plw, seed, task, rate as row"):
        analyze.analyze(same, by=("rate",))
    with pytest.raises(ValueError, match="rate is '', but runs differ by it"):
        analyze.analyze(both.assign(rate=both["rate"].replace("2e-5", "")).reset_index(drop=True), by=("rate",))


def test_a_set_narrower_than_the_grid_is_found():
    narrow = parabola(slope=0.0500123, scale=1e-6)
    ((low, high),), is_unbounded = narrow.fieller_set()
    assert low < narrow.vertex < high
    assert high - low < 1e-3
    assert not is_unbounded


def test_a_verdict_counts_the_data_sets_looked_at():
    fit = fitting.fit("lmm", study_grid())
    assert wording.verdict(fit, None, fit.joint_p).startswith("PLW matters here (p = 4.2e-06)")
    hint = wording.verdict(fit, None, 0.07)
    assert hint.startswith("PLW may matter here (p = 4.2e-06 by itself, 0.07 corrected for the other data sets)")
    assert "may be chance" in hint
