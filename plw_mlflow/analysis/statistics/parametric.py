"""The likelihood ratio's p-value by parametric bootstrap, for the two linear mixed models.

With few tasks the ratio is not distributed as chi^2, so it is compared with the ratios of scores drawn from the fitted
model without the curve. The p-value is then right where the model is; `lmm` stays wrong where PLW moves tasks
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from plw_mlflow.analysis.statistics import inference, random_intercept, random_slopes
from plw_mlflow.analysis.statistics.design import Grid, is_of_curve
from plw_mlflow.analysis.statistics.fitting import JointTest
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array


def joint_test(grid: Grid, model: str, draws: int, seed: int = 1234) -> JointTest:
    """Test the curve of `lmm` or `lmm-slopes`. The smallest p there can be is 1 / (draws + 1).

    Raises UserError for another model, and where the model cannot be fitted.
    """
    if model not in RATIOS:
        raise UserError(f"model is {model!r}, but must be one of {', '.join(RATIOS)}")
    ratios = RATIOS[model](grid, np.random.default_rng(seed))
    seen = next(ratios)
    as_large = sum(next(ratios) >= seen for _ in range(draws))
    return JointTest(f"likelihood ratio, parametric bootstrap of {draws}", seen, 2, None, (1 + as_large) / (1 + draws))


def _intercepts(grid: Grid, random: np.random.Generator) -> Iterator[float]:
    """The likelihood ratio of `lmm` on the scores, then on draws from its null fit, without end."""
    y, run, task = grid.long
    x = grid.curve[run]

    def fits(y: Array) -> tuple[random_intercept.RandomIntercept, random_intercept.RandomIntercept]:
        return (
            random_intercept.fit(y, x, task, reml=False),
            random_intercept.fit(y, x[:, :1], task, reml=False),
        )

    full, null = fits(y)
    yield inference.likelihood_ratio(full, null)[0]
    while True:
        levels = random.normal(0, np.sqrt(null.var_group), len(grid.tasks))
        noise = random.normal(0, np.sqrt(null.var_residual), len(y))
        yield inference.likelihood_ratio(*fits(null.coefficients[0] + levels[task] + noise))[0]


def _slopes(grid: Grid, random: np.random.Generator) -> Iterator[float]:
    """The same of `lmm-slopes`; refits begin at the fits of the scores."""
    kept = [i for i, term in enumerate(grid.terms) if not is_of_curve(term)]
    has_runs = random_slopes.has_run_information(grid.scores, grid.x)

    def fit(scores: Array, x: Array, start: random_slopes.RandomSlopes | None = None) -> random_slopes.RandomSlopes:
        return random_slopes.fit(
            scores, x, grid.curve, weights=grid.weights, run_effect=has_runs, reml=False, start=start
        )

    full = fit(grid.scores, grid.x)
    null = fit(grid.scores, grid.x[:, kept], full)
    yield inference.likelihood_ratio(full, null)[0]
    weights = np.ones_like(grid.scores) if grid.weights is None else grid.weights
    is_scored = ~np.isnan(grid.scores)
    mean = np.array([column[scored].mean() for column, scored in zip(weights.T, is_scored.T, strict=True)])
    sd = np.sqrt(null.var_residual * mean / weights)
    while True:
        curves = random.multivariate_normal(np.zeros(3), null.cov_task, len(grid.tasks), method="eigh")
        luck = random.normal(0, np.sqrt(null.var_run), len(grid.scores))
        fixed = grid.x[:, kept] @ null.coefficients
        scores = fixed[:, None] + grid.curve @ curves.T + luck[:, None] + random.normal(size=sd.shape) * sd
        scores = np.where(is_scored, scores, np.nan)
        yield inference.likelihood_ratio(fit(scores, grid.x, full), fit(scores, grid.x[:, kept], null))[0]


RATIOS: dict[str, Callable[[Grid, np.random.Generator], Iterator[float]]] = {
    "lmm": _intercepts,
    "lmm-slopes": _slopes,
}
