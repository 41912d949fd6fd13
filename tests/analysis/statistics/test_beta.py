"""The beta model against glmmTMB, against integrals done numerically, and by its laws."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, optimize, special, stats

from plw_mlflow.analysis.statistics import beta
from plw_mlflow.transforms import EXPONENT

ROOT = Path(__file__).resolve().parents[3]
R = ROOT / "tests/fixtures/r"
ANSWERS = pd.read_csv(R / "answers.csv").query("model == 'beta'")
TERMS = ["intercept", "wp", "wp2", "model"]


def design(table):
    w = table["plw"].to_numpy() ** EXPONENT
    return np.column_stack([np.ones_like(w), w, w**2])


def simulate(groups=6, each=15, phi=80.0, sd=0.7, seed=0, weights=1.0):
    rng = np.random.default_rng(seed)
    group = np.tile(np.arange(groups), each)
    w = np.repeat(np.linspace(0, 1, each), groups)
    x = np.column_stack([np.ones_like(w), w, w**2])
    mu = special.expit(x @ [-0.4, 1.0, -0.8] + rng.normal(0, sd, groups)[group])
    return rng.beta(mu * phi * weights, (1 - mu) * phi * weights), x, group


def scores(y, x, group, weights=None):
    return beta.Scores(y, x, group, np.ones_like(y) if weights is None else weights)


def check_fit(fit, coefficients, errors, var_group, phi, loglik):
    assert fit.converged
    np.testing.assert_allclose(fit.coefficients, coefficients, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.diag(fit.covariance)), errors, rtol=1e-4)
    # glmmTMB stops where the likelihood is flat to its own tolerance, which the variances feel first.
    np.testing.assert_allclose([fit.var_group, fit.phi], [var_group, phi], rtol=1e-4)
    assert fit.loglik == pytest.approx(loglik, abs=1e-4)


def test_the_studys_short_data_give_glmmtmbs_row():
    row = pd.read_csv(ROOT / "paper/tables/reference_fits_R.csv").query("software.str.startswith('glmmTMB')").iloc[0]
    table = pd.read_csv(ROOT / "paper/tables/v1_scores.csv").query("dataset == @row.dataset")
    fit = beta.fit(table["score"], design(table), table["task"])
    check_fit(
        fit,
        row[["b0", "b1", "b2"]].astype(float),
        row[["se0", "se1", "se2"]].astype(float),
        *row[["var_task", "dispersion", "loglik"]],
    )


@pytest.mark.parametrize(("number", "dataset"), ANSWERS[["table", "dataset"]].drop_duplicates().itertuples(index=False))
def test_simulated_tables_give_glmmtmbs_answers(number, dataset):
    answer = ANSWERS.query("table == @number and dataset == @dataset").set_index("quantity")["value"]
    table = pd.read_csv(R / f"table{number:02d}.csv").query("dataset == @dataset")
    x = np.column_stack([design(table), table["model"] == "base-2"])
    estimates, errors = answer[[f"ml.estimate.{term}" for term in TERMS]], answer[[f"ml.se.{term}" for term in TERMS]]
    fit = beta.fit(table["score"], x, table["task"])
    check_fit(fit, estimates, errors, answer["ml.var.task.intercept"], answer["ml.phi"], answer["ml.loglik"])
    null = beta.fit(table["score"], x[:, [0, 3]], table["task"])
    assert null.loglik == pytest.approx(answer["ml.null.loglik"], abs=1e-4)


def log_integrand(u, y, fixed, sigma, phi):
    mu = special.expit(fixed + sigma * u)
    return stats.beta.logpdf(y, mu * phi, (1 - mu) * phi).sum() + stats.norm.logpdf(u)


def test_likelihood_is_laplaces_and_near_the_integral():
    weights = np.random.default_rng(1).uniform(0.5, 2, 90)
    y, x, group = simulate(weights=weights)
    theta = np.array([-0.3, 0.9, -0.7, np.log(0.6), np.log(70)])
    laplace = exact = 0.0
    for number in range(6):
        own = group == number
        arguments = y[own], x[own] @ theta[:3], 0.6, 70 * weights[own]
        mode = optimize.minimize_scalar(lambda u, a=arguments: -log_integrand(u, *a), options={"xtol": 1e-10})
        bend = sum(c * -log_integrand(mode.x + d, *arguments) for c, d in ((1, -1e-4), (-2, 0), (1, 1e-4))) / 1e-8
        laplace += -mode.fun + np.log(2 * np.pi / bend) / 2
        area, _ = integrate.quad(
            lambda u, a=arguments, top=mode.fun: np.exp(log_integrand(u, *a) + top),
            mode.x - 2,
            mode.x + 2,
            epsabs=1e-12,
        )
        exact += -mode.fun + np.log(area)
    value, _, _ = scores(y, x, group, weights).loglik(theta)
    assert value == pytest.approx(laplace, abs=1e-5)  # the numerical second derivative is no better
    assert value == pytest.approx(exact, abs=1e-2)  # Laplace's own error: of the order 1/15 of a group's skewness
    assert value != pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("phi", [0.8, 70.0, 5e3])
def test_gradient_is_that_of_the_likelihood(phi):
    weights = np.random.default_rng(1).uniform(0.5, 2, 90)
    likelihood = scores(*simulate(weights=weights), weights)
    theta = np.array([-0.3, 0.9, -0.7, np.log(0.6), np.log(phi)])
    step = 1e-3 / np.sqrt(phi) * np.eye(5)

    def difference(h):
        return (likelihood.loglik(theta + h)[0] - likelihood.loglik(theta - h)[0]) / (2 * np.abs(h).max())

    expected = [(4 * difference(h / 2) - difference(h)) / 3 for h in step]
    np.testing.assert_allclose(likelihood.loglik(theta)[1], expected, rtol=1e-5, atol=1e-5 * np.sqrt(phi))


def test_polygammas_are_scipys():
    z = np.concatenate([np.geomspace(1e-3, 1e7, 501), np.linspace(9.9, 10.1, 51)])
    trigamma, tetragamma = beta.polygammas(z)
    np.testing.assert_allclose(trigamma, special.polygamma(1, z), rtol=1e-13)
    np.testing.assert_allclose(tetragamma, special.polygamma(2, z), rtol=1e-13)


def test_order_of_rows_and_names_of_groups_do_not_matter():
    y, x, group = simulate()
    order = np.random.default_rng(3).permutation(len(y))
    fit, again = beta.fit(y, x, group), beta.fit(y[order], x[order], [f"task {9 - g}" for g in group[order]])
    np.testing.assert_allclose(again.coefficients, fit.coefficients, rtol=1e-8)
    np.testing.assert_allclose(again.covariance, fit.covariance, rtol=1e-6)
    assert again.loglik == pytest.approx(fit.loglik, abs=1e-9)


def test_units_of_x_do_not_matter():
    y, x, group = simulate()
    fit, again = beta.fit(y, x, group), beta.fit(y, x * [1, 1e5, 1e-4], group)
    np.testing.assert_allclose(again.coefficients * [1, 1e5, 1e-4], fit.coefficients, rtol=1e-8)
    np.testing.assert_allclose(np.diag(again.covariance) * [1, 1e10, 1e-8], np.diag(fit.covariance), rtol=1e-6)


def test_scores_mirrored_about_a_half_mirror_the_coefficients():
    y, x, group = simulate()
    fit, again = beta.fit(y, x, group), beta.fit(1 - y, x, group)
    np.testing.assert_allclose(again.coefficients, -fit.coefficients, rtol=1e-8)
    assert (again.phi, again.var_group) == pytest.approx((fit.phi, fit.var_group), rel=1e-7)


def test_weights_scale_the_precision():
    y, x, group = simulate()
    fit, double = beta.fit(y, x, group), beta.fit(y, x, group, np.full(len(y), 2.0))
    assert double.phi == pytest.approx(fit.phi / 2, rel=1e-7)
    np.testing.assert_allclose(double.coefficients, fit.coefficients, rtol=1e-7)


def test_recovers_what_made_the_scores():
    y, x, group = simulate(groups=60, each=40, phi=300.0)
    fit = beta.fit(y, x, group)
    errors = np.sqrt(np.diag(fit.covariance))
    assert (np.abs(fit.coefficients - [-0.4, 1.0, -0.8]) < 3 * errors).all()
    assert fit.phi == pytest.approx(300, rel=0.1)
    assert fit.var_group == pytest.approx(0.49, rel=0.4)


def test_groups_that_do_not_differ_have_variance_0():
    y, x, _ = simulate(groups=1, each=30)
    y, x, group = np.tile(y, 4), np.tile(x, (4, 1)), np.repeat(np.arange(4), 30)

    def plain(theta):
        mu = special.expit(x @ theta[:3])
        return -stats.beta.logpdf(y, mu * np.exp(theta[3]), (1 - mu) * np.exp(theta[3])).sum()

    expected = optimize.minimize(plain, [0, 0, 0, 4], method="BFGS", options={"gtol": 1e-4})
    fit = beta.fit(y, x, group)
    assert fit.converged
    assert fit.var_group == 0
    assert fit.loglik == pytest.approx(-expected.fun, abs=1e-6)
    np.testing.assert_allclose(fit.coefficients, expected.x[:3], atol=1e-4)
    assert np.isfinite(fit.covariance).all()


@pytest.mark.parametrize("score", [0.0, 1.0, -0.1, 1.3, np.nan, np.inf])
def test_scores_outside_the_family_are_named(score):
    y, x, group = simulate()
    y[7] = score
    with pytest.raises(
        ValueError, match=r"^row 7: score \S+ is not strictly between 0 and 1.*fit another model"
    ) as error:
        beta.fit(y, x, group)
    assert "\n" not in str(error.value)
    labelled = pd.Series(y, index=np.arange(len(y)) + 2)  # lines of a file with a header
    with pytest.raises(ValueError, match=r"^row 9: score"):
        beta.fit(labelled, x, group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, x, group: (y, x, group, np.where(np.arange(90) == 4, 0, 1)), "row 4: weight 0 must be a finite"),
        (lambda y, x, group: (y, x, np.where(np.arange(90) == 4, np.nan, group)), "row 4: no group"),
        (lambda y, x, group: (y, x, np.zeros(90)), "1 group; a variance between groups needs 2"),
        (lambda y, x, group: (y, x, np.arange(90)), "each of the 90 groups has one score"),
        (lambda y, x, group: (y[:4], x[:4], [0, 0, 1, 1]), "4 scores are too few for 3 coefficients"),
        (lambda y, x, group: (y, np.column_stack([x, x[:, 1]]), group), "columns of x depend on each other"),
        (lambda y, x, group: (y[1:], x, group), "89 scores, 90 rows of x, 90 groups, 89 weights"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        beta.fit(*change(*simulate()))


def test_a_fit_without_a_maximum_says_so():
    _, x, group = simulate()
    on_a_curve = special.expit(x @ [-0.4, 1.0, -0.8] + np.linspace(-1, 1, 6)[group])  # the precision has no bound
    fit = beta.fit(on_a_curve, x, group)
    assert not fit.converged
    assert np.isnan(fit.covariance).all()
