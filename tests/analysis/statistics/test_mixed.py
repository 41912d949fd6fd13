"""Do the mixed models equal R's and dense matrices', obey their laws, and refuse what they cannot estimate?"""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from plw_mlflow.analysis import score_table
from plw_mlflow.analysis.statistics import inference, random_intercept, random_slopes
from plw_mlflow.transforms import EXPONENT

FIXTURES = Path(__file__).parents[2] / "fixtures" / "r"
ANSWERS = pd.read_csv(FIXTURES / "answers.csv")
TERMS = ["intercept", "wp", "wp2", "model"]
TABLES = [(number, "short") for number in range(1, 11)] + [(7, "long")]
PLWS = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]


@cache
def r_table(number, dataset):
    """Scores [R, T], fixed design [R, 4], random design [R, 3] and task names of one of R's tables."""
    table = pd.read_csv(FIXTURES / f"table{number:02d}.csv").query("dataset == @dataset")
    wide = table.pivot(index=["model", "plw", "seed"], columns="task", values="score")
    w = wide.index.get_level_values("plw").to_numpy(float) ** EXPONENT
    z = np.column_stack([np.ones_like(w), w, w**2])
    is_second = wide.index.get_level_values("model") == "base-2"
    return wide.to_numpy(), np.column_stack([z, is_second]), z, list(wide.columns)


def r_answers(number, dataset, model):
    return ANSWERS.query("table == @number and dataset == @dataset and model == @model").set_index("quantity")["value"]


@cache
def fit_table(number, dataset, model, reml, columns=(0, 1, 2, 3)):
    scores, x, z, _ = r_table(number, dataset)
    x = x[:, columns]
    if model == "lmm":
        run, task = np.nonzero(~np.isnan(scores))
        return random_intercept.fit(scores[run, task], x[run], task, reml)
    return random_slopes.fit(scores, x, z, by_task=model == "lmm-slopes-by-task", reml=reml)


def simulate(seed=0, runs=20, tasks=5, missing=0.0, spread=(0.2, 0.03, 0.02), sd_run=0.01, sd=0.01):
    """Scores [R, T] with NaN where missing, fixed design [R, 4] and random design [R, 3]; residual SDs differ."""
    random = np.random.default_rng(seed)
    w = np.resize(PLWS, runs) ** EXPONENT
    z = np.column_stack([np.ones(runs), w, w**2])
    x = np.column_stack([z, np.arange(runs) // len(PLWS) % 2])
    curves = np.array([0.5, 0.1, -0.08]) + random.normal(size=(tasks, 3)) * spread
    sds = sd * np.linspace(0.5, 1.5, tasks)
    noise = random.normal(0, sd_run, runs)[:, None] + random.normal(size=(runs, tasks)) * sds
    scores = z @ curves.T + noise
    scores[random.random(scores.shape) < missing] = np.nan
    return scores, x, z


def dense(scores, x, z, weights, cov_task, var_run, var_residual):
    """y, X, V and the cells' runs and tasks of the model, one row a score."""
    run, task = np.nonzero(~np.isnan(scores))
    v = (z[run] @ cov_task @ z[run].T) * (task[:, None] == task)
    v += var_run * (run[:, None] == run) + np.diag(
        np.broadcast_to(var_residual, scores.shape[1])[task] / weights[run, task]
    )
    return scores[run, task], x[run], v, run, task


def dense_loglik(y, x, v, reml):
    """The (restricted) log-likelihood by its definition, with coefficients and their covariance."""
    covariance = np.linalg.inv(x.T @ np.linalg.solve(v, x))
    coefficients = covariance @ x.T @ np.linalg.solve(v, y)
    residual = y - x @ coefficients
    deviance = len(y) * math.log(2 * math.pi) + np.linalg.slogdet(v)[1] + residual @ np.linalg.solve(v, residual)
    if reml:
        deviance -= x.shape[1] * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1]
    return -deviance / 2, coefficients, covariance


# ------------------------------------------------------------------------------------------- against R


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("model", ["lmm", "lmm-slopes"])
@pytest.mark.parametrize(("number", "dataset"), TABLES)
def test_fits_equal_lme4(number, dataset, model, reml):
    answers, prefix = r_answers(number, dataset, model), "reml." if reml else "ml."
    fit = fit_table(number, dataset, model, reml)
    assert fit.loglik == pytest.approx(answers[prefix + "loglik"], abs=1e-6)
    assert fit.is_singular == bool(answers[prefix + "singular"])
    if fit.is_singular:
        return
    for k, term in enumerate(TERMS):
        assert fit.coefficients[k] == pytest.approx(answers[f"{prefix}estimate.{term}"], rel=1e-6)
        assert math.sqrt(fit.covariance[k, k]) == pytest.approx(answers[f"{prefix}se.{term}"], rel=1e-5)
    variances = {"var.residual": np.mean(fit.var_residual)}
    if model == "lmm":
        variances["var.task.intercept"] = fit.var_group
    else:
        variances["var.run"] = fit.var_run
        variances |= {f"var.task.{term}": fit.cov_task[k, k] for k, term in enumerate(TERMS[:3])}
        variances["cov.task.wp.wp2"] = fit.cov_task[1, 2]
    for name, value in variances.items():
        assert value == pytest.approx(answers[prefix + name], rel=1e-4)


@pytest.mark.parametrize("model", ["lmm", "lmm-slopes"])
@pytest.mark.parametrize(("number", "dataset"), TABLES)
def test_degrees_of_freedom_equal_lmertest(number, dataset, model):
    answers, fit = r_answers(number, dataset, model), fit_table(number, dataset, model, True)
    for term, contrast in zip(TERMS, np.eye(4), strict=True):
        freedom = inference.satterthwaite(fit, contrast)
        assert freedom == pytest.approx(answers[f"reml.df.{term}"], rel=1e-4)
        t = contrast @ fit.coefficients / math.sqrt(contrast @ fit.covariance @ contrast)
        assert 2 * stats.t.sf(abs(t), freedom) == pytest.approx(answers[f"reml.p.{term}"], rel=1e-3)


@pytest.mark.parametrize("model", ["lmm", "lmm-slopes"])
@pytest.mark.parametrize(("number", "dataset"), TABLES)
def test_likelihood_ratio_and_criteria_equal_lme4(number, dataset, model):
    answers, fit = r_answers(number, dataset, model), fit_table(number, dataset, model, False)
    null = fit_table(number, dataset, model, False, (0, 3))
    assert null.loglik == pytest.approx(answers["ml.null.loglik"], abs=1e-6)
    chisq, freedom, p = inference.likelihood_ratio(fit, null)
    assert (chisq, freedom) == (pytest.approx(answers["ml.lrt.chisq"], abs=1e-5), 2)
    assert p == pytest.approx(answers["ml.lrt.p"], rel=1e-5)
    assert inference.aic_bic(fit) == pytest.approx((answers["ml.aic"], answers["ml.bic"]), abs=1e-5)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(("number", "dataset"), TABLES)
def test_residual_variances_by_task_equal_glmmtmb(number, dataset, reml):
    answers, prefix = r_answers(number, dataset, "lmm-slopes-by-task"), "reml." if reml else "ml."
    fit = fit_table(number, dataset, "lmm-slopes-by-task", reml)
    assert fit.converged
    # glmmTMB searches logarithms of standard deviations, so at a singular fit it ends somewhere on the way there: its
    # Hessian is not positive definite, or no two of its runs end at one likelihood. Ours must not be lower then.
    if not answers[prefix + "pd_hessian"] or answers[prefix + "loglik_agree"] < 2:
        assert fit.is_singular
        assert fit.loglik > answers[prefix + "loglik"] - 1e-5
        return
    assert not fit.is_singular
    assert fit.loglik == pytest.approx(answers[prefix + "loglik"], abs=1e-6)
    assert fit.var_run == pytest.approx(answers[prefix + "var.run"], rel=1e-4)
    scores, x, z, tasks = r_table(number, dataset)
    expected = np.array([answers[f"{prefix}var.residual.{task}"] for task in tasks])
    np.testing.assert_allclose(fit.var_residual, expected, rtol=1e-4)
    cov_task = np.zeros((3, 3))
    for k, row in enumerate(TERMS[:3]):
        cov_task[k, k] = answers[f"{prefix}var.task.{row}"]
        for m, column in enumerate(TERMS[:k]):
            cov_task[k, m] = cov_task[m, k] = answers[f"{prefix}cov.task.{column}.{row}"]
    np.testing.assert_allclose(fit.cov_task, cov_task, rtol=1e-3, atol=1e-7)
    # glmmTMB's standard errors of ML hold the variances' uncertainty too; these are of least squares at its variances.
    parts = dense(scores, x, z, np.ones_like(scores), cov_task, answers[prefix + "var.run"], expected)
    covariance = dense_loglik(*parts[:3], reml)[2]
    for k, term in enumerate(TERMS):
        assert fit.coefficients[k] == pytest.approx(answers[f"{prefix}estimate.{term}"], rel=1e-5)
        assert fit.covariance[k, k] == pytest.approx(covariance[k, k], rel=1e-4)


def test_p_values_of_the_study_equal_lme4():
    tables = Path(__file__).parents[3] / "paper" / "tables"
    reference = pd.read_csv(tables / "reference_fits_R.csv").query("software.str.startswith('lme4')")
    study = score_table.read_scores(tables / "v1_scores.csv")
    for row in reference.itertuples():
        part = study[study["dataset"] == row.dataset]
        w = part["plw"].to_numpy() ** EXPONENT
        x = np.column_stack([np.ones_like(w), w, w**2])
        fit = random_intercept.fit(part["score"].to_numpy(), x, pd.factorize(part["task"])[0])
        t = fit.coefficients / np.sqrt(np.diag(fit.covariance))
        p = [2 * stats.t.sf(abs(t[k]), inference.satterthwaite(fit, np.eye(3)[k])) for k in (1, 2)]
        assert p == pytest.approx([row.p1, row.p2], rel=1e-4)  # lme4 stops that early


# ------------------------------------------------------------------------------ against dense matrices

PARTS = [(by_task, run_effect) for by_task in (True, False) for run_effect in (True, False)]


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(("by_task", "run_effect"), PARTS)
def test_deviance_and_gradient_equal_dense_matrices(by_task, run_effect, reml):
    scores, x, z = simulate(runs=12, missing=0.2)
    weights = np.random.default_rng(1).uniform(0.5, 2, scores.shape)
    table = random_slopes._tabulate(scores, x, z, weights, by_task, run_effect)

    def expected(parameters):
        factor, sd_run, var_residual = table.unpack(parameters)
        cells = np.where(table.is_scored, table.scores, np.nan)
        parts = dense(cells, table.x, table.z, table.weights, factor @ factor.T, sd_run**2, var_residual)[:3]
        # log |X'V^-1 X| is added later, in the caller's columns
        return -2 * dense_loglik(*parts, reml)[0] + reml * x.shape[1] * math.log(2 * math.pi)

    at = table.start + np.random.default_rng(2).normal(0, 0.2, len(table.start))
    deviance, gradient = random_slopes._deviance_and_gradient(table, at, reml)
    assert deviance == pytest.approx(expected(at), abs=1e-8)
    np.testing.assert_allclose(gradient, optimize.approx_fprime(at, expected, 1e-7), rtol=1e-4, atol=1e-3)
    slopes = [(expected(at + step) - expected(at - step)) / 2e-5 for step in 1e-5 * np.eye(len(at))]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(("by_task", "run_effect"), PARTS)
def test_the_fit_is_the_highest_point_of_the_dense_likelihood(by_task, run_effect, reml):
    scores, x, z = simulate(seed=3, missing=0.1)
    weights = np.random.default_rng(1).uniform(0.5, 2, scores.shape)
    fit = random_slopes.fit(scores, x, z, weights=weights, by_task=by_task, run_effect=run_effect, reml=reml)
    is_scored = ~np.isnan(scores)
    weights = np.where(is_scored, weights, np.nan)
    weights /= np.nanmean(weights, axis=0) if by_task else np.nanmean(weights)

    def at(cov_task, var_run, var_residual):
        return dense_loglik(*dense(scores, x, z, weights, cov_task, var_run, var_residual)[:3], reml)

    loglik, coefficients, covariance = at(fit.cov_task, fit.var_run, fit.var_residual)
    assert fit.converged
    assert fit.loglik == pytest.approx(loglik, abs=1e-7)
    np.testing.assert_allclose(fit.coefficients, coefficients, rtol=1e-7)
    np.testing.assert_allclose(fit.covariance, covariance, rtol=1e-6, atol=1e-10)
    random = np.random.default_rng(4)
    for _ in range(50):
        turn = np.eye(3) + random.normal(0, 0.01, (3, 3))
        changes = random.normal(1, 0.01), np.broadcast_to(random.normal(1, 0.01, 5 if by_task else 1), 5)
        assert at(turn @ fit.cov_task @ turn.T, fit.var_run * changes[0], fit.var_residual * changes[1])[0] < loglik


def test_degrees_of_freedom_do_not_depend_on_how_variances_are_searched():
    """Satterthwaite's number by its definition, in variances, by dense matrices and differences alone."""
    scores, x, z = simulate(seed=4, runs=30, spread=(0.2, 0.05, 0.05))
    fit = random_slopes.fit(scores, x, z)
    assert not fit.at_zero
    lower = np.tril_indices(3)
    at = np.concatenate([fit.cov_task[lower], [fit.var_run], fit.var_residual])
    scale = np.concatenate([np.sqrt(np.outer(*[np.diag(fit.cov_task)] * 2))[lower], at[6:]])

    def solve(parameters):
        cov_task = np.zeros((3, 3))
        cov_task[lower] = parameters[:6]
        cov_task = cov_task + np.tril(cov_task, -1).T
        parts = dense(scores, x, z, np.ones_like(scores), cov_task, parameters[6], parameters[7:])
        loglik, _, covariance = dense_loglik(*parts[:3], reml=True)
        return -2 * loglik, covariance

    steps = 2e-3 * np.diag(scale)
    hessian = np.array(
        [
            [sum(a * b * solve(at + a * one + b * two)[0] for a in (1, -1) for b in (1, -1)) / 4 for two in steps]
            for one in steps
        ]
    )
    slopes = np.array([(solve(at + step)[1] - solve(at - step)[1]) / 2 for step in steps])
    for contrast in np.vstack([np.eye(4), [0, 1, 1, 0]]):
        slope = slopes @ contrast @ contrast
        expected = 2 * (contrast @ fit.covariance @ contrast) ** 2 / (2 * slope @ np.linalg.solve(hessian, slope))
        assert inference.satterthwaite(fit, contrast) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("reml", [True, False])
def test_a_random_intercept_equals_dense_matrices(reml):
    scores, x, z = simulate(seed=6, missing=0.2)
    run, task = np.nonzero(~np.isnan(scores))
    fit = random_intercept.fit(scores[run, task], x[run], task, reml)

    def at(var_group, var_residual):
        return dense_loglik(
            *dense(scores, x, z, np.ones_like(scores), np.diag([var_group, 0, 0]), 0, var_residual)[:3], reml
        )

    loglik, coefficients, covariance = at(fit.var_group, fit.var_residual)
    assert fit.loglik == pytest.approx(loglik, abs=1e-8)
    np.testing.assert_allclose(fit.coefficients, coefficients)
    np.testing.assert_allclose(fit.covariance, covariance)
    for change in (0.999, 1.001):
        assert at(fit.var_group * change, fit.var_residual)[0] < loglik
        assert at(fit.var_group, fit.var_residual * change)[0] < loglik


# ------------------------------------------------------------------------------------------------ laws


def test_scores_in_percent_give_the_same_fit_in_percent():
    scores, x, z = simulate(missing=0.1)
    fit, percent = random_slopes.fit(scores, x, z), random_slopes.fit(100 * scores + 7, x, z)
    np.testing.assert_allclose(percent.coefficients, 100 * fit.coefficients + [7, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(percent.covariance, 1e4 * fit.covariance, rtol=1e-4, atol=1e-9)
    for contrast in np.eye(4):
        assert inference.satterthwaite(percent, contrast) == pytest.approx(
            inference.satterthwaite(fit, contrast), rel=1e-4
        )


@pytest.mark.parametrize("reml", [True, False])
def test_curves_that_are_levels_alone_are_random_intercepts(reml):
    scores, x, z = simulate(missing=0.2)
    run, task = np.nonzero(~np.isnan(scores))
    expected = random_intercept.fit(scores[run, task], x[run], task, reml)
    fit = random_slopes.fit(scores, x, z[:, :1], by_task=False, run_effect=False, reml=reml)
    assert fit.loglik == pytest.approx(expected.loglik, abs=1e-8)
    assert fit.parameters == expected.parameters
    np.testing.assert_allclose(fit.coefficients, expected.coefficients, rtol=1e-6)
    np.testing.assert_allclose(fit.covariance, expected.covariance, rtol=1e-4, atol=1e-9)
    for contrast in np.eye(4):
        assert inference.satterthwaite(fit, contrast) == pytest.approx(
            inference.satterthwaite(expected, contrast), rel=1e-4
        )
    assert inference.f_test(fit, np.eye(4)[1:3]) == pytest.approx(inference.f_test(expected, np.eye(4)[1:3]), rel=1e-4)


def test_a_shifted_curve_is_the_same_curve():
    scores, x, z = simulate(missing=0.1)
    turn = np.array([[1, -0.5, 0.25], [0, 1, -1], [0, 0, 1]])  # w - 0.5 in place of w
    fit = random_slopes.fit(scores, x, z, reml=False)
    shifted = random_slopes.fit(scores, np.column_stack([z @ turn, x[:, 3]]), z @ turn, reml=False)
    assert shifted.loglik == pytest.approx(fit.loglik, abs=1e-7)
    np.testing.assert_allclose(turn @ shifted.coefficients[:3], fit.coefficients[:3], rtol=1e-6)
    np.testing.assert_allclose(turn @ shifted.cov_task @ turn.T, fit.cov_task, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("by_task", [True, False])
def test_only_ratios_of_weights_matter(by_task):
    scores, x, z = simulate()
    weights = np.random.default_rng(1).uniform(0.5, 2, scores.shape)
    factors = np.arange(1, 6) if by_task else 3
    fits = [random_slopes.fit(scores, x, z, weights=w, by_task=by_task) for w in (weights, weights * factors)]
    assert fits[0].loglik == pytest.approx(fits[1].loglik, abs=1e-8)
    np.testing.assert_allclose(fits[0].coefficients, fits[1].coefficients, rtol=1e-7)


def test_the_order_of_runs_and_tasks_does_not_matter():
    scores, x, z = simulate(missing=0.1)
    runs, tasks = np.random.default_rng(1).permutation(len(x)), np.array([4, 2, 0, 1, 3])
    fit, other = (
        random_slopes.fit(scores, x, z),
        random_slopes.fit(scores[runs][:, tasks], x[runs], z[runs]),
    )
    assert other.loglik == pytest.approx(fit.loglik, abs=1e-8)
    np.testing.assert_allclose(other.coefficients, fit.coefficients, rtol=1e-6)
    np.testing.assert_allclose(other.var_residual, fit.var_residual[tasks], rtol=1e-3)


def test_a_run_without_scores_changes_nothing():
    scores, x, z = simulate()
    more = [np.vstack([part, part[-1:]]) for part in (scores, x, z)]
    more[0][-1] = np.nan
    assert random_slopes.fit(*more).loglik == pytest.approx(random_slopes.fit(scores, x, z).loglik, abs=1e-9)


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_a_refit_finds_what_a_fresh_fit_finds(size):
    scores, x, z = simulate(runs=40, tasks=8)
    first = random_slopes.fit(scores, x, z)
    again = scores + np.random.default_rng(1).normal(0, size, scores.shape)
    fresh, refit = (random_slopes.fit(again, x, z, start=start) for start in (None, first))
    assert refit.converged
    assert refit.loglik == pytest.approx(fresh.loglik, abs=1e-7)
    assert refit.evaluations <= (15 if size < 1e-3 else 40)


# --------------------------------------------------------------------------------------- at the boundary


@pytest.mark.parametrize("by_task", [True, False])
def test_a_variance_of_zero_is_said_and_counts_as_known(by_task):
    scores, x, z = simulate(seed=8, runs=40, tasks=8, spread=(0.2, 0, 0), sd_run=0)
    fit = random_slopes.fit(scores, x, z, by_task=by_task)
    assert fit.at_zero == ("curves", "runs")
    assert fit.is_singular
    assert fit.converged
    without = random_slopes.fit(scores, x, z, by_task=by_task, run_effect=False)
    assert without.at_zero == ("curves",)
    assert fit.parameters == without.parameters + 1
    assert fit.loglik == pytest.approx(without.loglik, abs=1e-7)
    for contrast in np.eye(4):
        assert inference.satterthwaite(fit, contrast) == pytest.approx(
            inference.satterthwaite(without, contrast), rel=1e-3
        )


def test_a_task_that_follows_the_run_effects_alone_is_said():
    scores, x, z = simulate(seed=2, runs=30, tasks=6, sd_run=0.02)
    noise = np.random.default_rng(7).normal(0, 0.02, 30)
    scores[:, 1:] += noise[:, None]
    scores[:, 0] = z @ [0.5, 0.1, -0.1] + np.nanmean(scores[:, 1:] - z @ np.linalg.lstsq(z, scores[:, 1:])[0], axis=1)
    fit = random_slopes.fit(scores, x, z)
    assert "residuals" in fit.at_zero
    assert fit.converged
    assert fit.var_residual.argmin() == 0
    assert all(inference.satterthwaite(fit, contrast) > 1 for contrast in np.eye(4))


def test_without_differences_between_tasks_the_intercept_fit_is_least_squares():
    scores, x, _ = simulate(seed=2, spread=(0, 0, 0), sd_run=0, runs=40)
    scores -= scores.mean(axis=0) - scores.mean()  # tasks then differ less than chance
    run, task = np.nonzero(~np.isnan(scores))
    fit = random_intercept.fit(scores[run, task], x[run], task)
    assert fit.is_singular
    assert [inference.satterthwaite(fit, contrast) for contrast in np.eye(4)] == pytest.approx([200 - 4] * 4)


def test_a_search_cut_short_is_not_called_converged(monkeypatch):
    scores, x, z = simulate(missing=0.1)
    original = optimize.minimize
    monkeypatch.setattr(
        random_slopes.optimize, "minimize", lambda *a, **k: original(*a, **k | {"options": {"maxiter": 2}})
    )
    assert not random_slopes.fit(scores, x, z).converged


# -------------------------------------------------------------------------------------------- inference


def test_joint_f_of_balanced_intercepts_is_that_of_fixed_tasks():
    scores, x, _ = simulate()
    run, task = np.nonzero(~np.isnan(scores))
    y, x = scores[run, task], x[run]
    fit = random_intercept.fit(y, x, task)
    dummies = np.column_stack([task[:, None] == np.arange(5), x[:, 3]])
    full = np.column_stack([dummies, x[:, 1:3]])
    rss = [np.linalg.lstsq(design, y)[1][0] for design in (dummies, full)]
    freedom = len(y) - full.shape[1]
    expected = (rss[0] - rss[1]) / 2 / (rss[1] / freedom)
    f, above, below, p = inference.f_test(fit, np.eye(4)[1:3])
    assert (f, above, below) == (pytest.approx(expected, rel=1e-6), 2, pytest.approx(freedom, rel=1e-6))
    assert p == pytest.approx(stats.f.sf(expected, 2, freedom), rel=1e-5)


def made_up(freedoms):
    """A fit whose coefficients 1, 2, .. have variance 1 and these degrees of freedom: 2 v^2 / (g'A g)."""
    size = len(freedoms)
    gradient = np.zeros((size, size, size))
    gradient[range(size), range(size), range(size)] = 1
    uncertainty = inference.Uncertainty(np.diag(2 / np.array(freedoms)), gradient)
    covariance = np.diag(np.linspace(1, 1 + 1e-9, size))  # not quite equal, so that their order is known
    return random_intercept.RandomIntercept(1.0 + np.arange(size), covariance, 1.0, 1.0, 0.0, True, 9, 4, uncertainty)


def test_joint_f_by_hand():
    # F = (1 + 4) / 2; means of t^2: 4/2 and 10/8, E = 3.25; 2 E / (E - 2)
    assert inference.f_test(made_up([4, 10]), np.eye(2))[:3] == pytest.approx((2.5, 2, 5.2), rel=1e-6)
    assert inference.f_test(made_up([4, 1.5]), np.eye(2))[2] == 2
    assert inference.f_test(made_up([7, 7]), np.eye(2))[2] == pytest.approx(7)
    f, _, below, p = inference.f_test(made_up([4, 10]), np.eye(2)[1:])
    assert (f, below) == pytest.approx((4, 10), rel=1e-6)
    assert p == pytest.approx(2 * stats.t.sf(2, 10), rel=1e-6)


def test_comparisons_that_mean_nothing_are_refused():
    scores, x, z = simulate()
    fit = random_slopes.fit(scores, x, z)
    with pytest.raises(ValueError, match="fit both by ML"):
        inference.likelihood_ratio(fit, fit)
    with pytest.raises(ValueError, match="fit by ML"):
        inference.aic_bic(fit)
    with pytest.raises(ValueError, match="not independent"):
        inference.f_test(fit, np.array([[0, 1, 0, 0], [0, 2, 0, 0]]))


# -------------------------------------------------------------------------------------------- bad input


def spoil(scores, x, z, **change):
    return {"scores": scores, "x": x, "z": z} | change


def with_value(array, place, value):
    array = array.copy()
    array[place] = value
    return array


REFUSED = {
    "one task": (lambda s, x, z: spoil(s[:, :1], x, z), "one task"),
    "rows": (lambda s, x, z: spoil(s, x[1:], z), "row per run"),
    "infinite": (lambda s, x, z: spoil(with_value(s, (0, 0), np.inf), x, z), "infinite"),
    "few": (lambda s, x, z: spoil(with_value(s, (slice(3, None), 0), np.nan), x, z), "a task has 3 scores"),
    "two PLWs": (lambda s, x, z: spoil(with_value(s, (z[:, 1] > 0.15, 0), np.nan), x, z), "too few PLWs"),
    "twice": (lambda s, x, z: spoil(s, np.column_stack([x, x[:, 1]]), z), "fixed design"),
    "no PLW": (lambda s, x, z: spoil(s, x, np.column_stack([z, np.zeros(len(z))])), "random design"),
    "weights": (lambda s, x, z: spoil(s, x, z, weights=np.zeros(s.shape)), "weight"),
    "exact": (lambda s, x, z: spoil(with_value(s, (slice(None), 0), z @ [0.5, 0.1, -0.1]), z, z), "exactly"),
    "constant": (lambda s, x, z: spoil(np.full(s.shape, 0.5), x, z), "exactly"),
    "one each": (
        lambda s, x, z: spoil(np.where(np.arange(len(s))[:, None] % 5 == np.arange(5), s, np.nan), x, z),
        "runs",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_estimated_is_refused(fault):
    change, message = REFUSED[fault]
    with pytest.raises(ValueError, match=message):
        random_slopes.fit(**change(*simulate(runs=40)))


def test_runs_of_one_score_each_fit_without_a_run_effect():
    scores, x, z = simulate(runs=100)
    scores = np.where(np.arange(100)[:, None] // 20 == np.arange(5), scores, np.nan)
    assert not random_slopes.has_run_information(scores, x)
    assert random_slopes.fit(scores, x, z, run_effect=False).converged


def test_runs_that_the_design_uses_up_hold_no_information_on_runs():
    scores, x, _ = simulate(runs=20)
    assert random_slopes.has_run_information(scores, x)
    assert not random_slopes.has_run_information(scores[:4], np.eye(4))


def test_a_start_of_another_shape_is_refused():
    scores, x, z = simulate()
    first = random_slopes.fit(scores[:, :4], x, z)
    with pytest.raises(ValueError, match="start without it"):
        random_slopes.fit(scores, x, z, start=first)
