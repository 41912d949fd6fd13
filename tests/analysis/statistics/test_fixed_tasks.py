"""Is the answer about these very tasks that of least squares on runs' means, and is it right as often as it says?"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import analysis as simulation
from plw_mlflow.analysis import analyze, score_table
from plw_mlflow.analysis.statistics import fitting, fixed_tasks, over_tasks
from tests.stores import ROOT

STUDY = ROOT / "paper" / "tables" / "v1_scores.csv"


def grids():
    return {grid.dataset: grid for grid in analyze.grids(score_table.read_scores(STUDY))}


def test_it_is_the_regression_of_runs_means():
    """By the textbook: R squared of the whole model against that of the models' levels alone."""
    grid = grids()["AlpacaDataShort"]
    fit = fitting.fit("fixed-tasks", grid)
    means = grid.scores.mean(1)

    def squares(columns):
        return float(np.linalg.lstsq(columns, means)[1][0])

    free = len(means) - grid.x.shape[1]
    full, null = squares(grid.x), squares(grid.x[:, [0, 3]])
    f = (null - full) / 2 / (full / free)
    assert fit.joint_tests[0].statistic == pytest.approx(f, rel=1e-9)
    assert fit.joint_p == pytest.approx(stats.f.sf(f, 2, free), rel=1e-9)
    assert fit.joint_p == pytest.approx(3.9e-7, rel=0.01)
    slope = stats.linregress  # one model alone: a straight line against statsmodels' textbook relative
    line = fixed_tasks.fit(grid.scores[:10], grid.x[:10, :2], np.eye(2)[1:])
    told = slope(grid.x[:10, 1], means[:10])
    assert line.t_test(np.array([0.0, 1.0]))[3] == pytest.approx(told.pvalue, rel=1e-9)


def test_its_curve_is_the_mean_of_the_tasks_own():
    for grid in grids().values():
        fit, crossed = (fitting.fit(model, grid) for model in ("fixed-tasks", "crossed"))
        assert list(fit.coefficients.values()) == pytest.approx(list(crossed.coefficients.values()), rel=1e-9)
        assert fit.optimum_plw == (None if crossed.optimum_plw is None else pytest.approx(crossed.optimum_plw))
        assert set(fit.degrees_of_freedom.values()) == {16.0}


def test_how_tasks_differ_does_not_matter_to_it():
    grid = grids()["AlpacaDataShort"]
    apart = np.random.default_rng(0).normal(size=(3, 8))
    apart -= apart.mean(1, keepdims=True)
    one = fixed_tasks.fit(grid.scores, grid.x, grid.contrasts)
    other = fixed_tasks.fit(grid.scores + grid.curve @ apart, grid.x, grid.contrasts)
    assert other.joint_test()[3] == pytest.approx(one.joint_test()[3], rel=1e-6)
    assert over_tasks.fit(grid.scores + grid.curve @ apart, grid.x, grid.contrasts, runs_differ=True).joint_test()[
        3
    ] == pytest.approx(1, abs=0.3)


def test_one_task_alone_is_as_ols():
    table = score_table.read_scores(STUDY)
    (grid,) = analyze.grids(table[(table["task"] == "piqa") & (table["dataset"] == "AlpacaDataShort")])
    fixed, ols = (fitting.fit(model, grid) for model in ("fixed-tasks", "ols-task"))
    assert fixed.joint_p == pytest.approx(ols.joint_p, rel=1e-9)
    assert fixed.optimum_set[0] == pytest.approx(ols.optimum_set[0], rel=1e-6)
    assert fixed.fewest_runs == ols.fewest_runs


def test_too_few_runs_and_no_residuals_are_reasons():
    x = np.column_stack([np.ones(3), [0, 0.5, 1], [0, 0.25, 1]])
    with pytest.raises(ValueError, match="3 runs are too few for 3 coefficients and a residual"):
        fixed_tasks.fit(np.ones((3, 4)), x, np.eye(3)[1:])
    x = np.column_stack([np.ones(5), w := np.linspace(0, 1, 5), w**2])
    with pytest.raises(ValueError, match="follow a curve exactly"):
        fixed_tasks.fit((x @ [0.5, 0.1, -0.1])[:, None], x, np.eye(3)[1:])


@pytest.mark.parametrize("sd_run", [0.0, 0.005])
@pytest.mark.parametrize("seeds", [1, 2])
def test_its_level_and_coverage_are_what_it_claims(sd_run, seeds):
    """On 2,000 tables whose tasks' curves differ and average to none: within four standard errors."""
    setting = simulation.Setting(8, "free", sd_run, seeds=seeds, centred=True)
    rows = simulation.outcomes("fixed-tasks", setting, 0, 2000)
    assert (rows["F of runs' means",] < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert rows["Fieller", "1", "holds"].mean() == pytest.approx(0.95, abs=0.02)


def test_many_tables_at_once_are_as_each_alone():
    grid = grids()["AlpacaData"]
    two = np.stack([grid.scores, grids()["AlpacaDataShort"].scores])
    both = fixed_tasks.fit(two, grid.x, grid.contrasts)
    for number, scores in enumerate(two):
        alone = fixed_tasks.fit(scores, grid.x, grid.contrasts)
        assert both.joint_test()[3][number] == pytest.approx(float(alone.joint_test()[3]), rel=1e-9)
        assert both.covariance[number] == pytest.approx(alone.covariance, rel=1e-9)


def test_runs_without_every_task_are_left_out_and_said():
    table = score_table.read_scores(STUDY)
    table = table[table["dataset"] == "AlpacaDataShort"].drop(
        index=table.index[table["dataset"] == "AlpacaDataShort"][3]
    )
    analysis = analyze.analyze(pd.DataFrame(table), draws=0)
    fit = analysis.fit_of("AlpacaDataShort", "fixed-tasks")
    assert (fit.runs, fit.n) == (19, 152)
    assert "Left out: 1 of 20 runs (not scored on every task)." in fit.notes
