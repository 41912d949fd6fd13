"""A linear mixed model of scores with an intercept by group: y ~ X + (1 | group).

statsmodels' mixed model misses lme4's intercept by 1e-3, so the model is fitted here. The likelihood has a closed form
in the variance ratio, so the fit is one search in one number.

Letters: `n` scores, `P` columns of the design. "Deviance" is -2 log-likelihood, restricted if the fit is by REML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from plw_mlflow.analysis.statistics.inference import Uncertainty
from plw_mlflow.transforms import Array


@dataclass(frozen=True)
class RandomIntercept:
    """A fitted linear mixed model y ~ X + (1 | group)."""

    coefficients: Array  # [P]
    covariance: Array  # [P, P], of the coefficients
    var_group: float  # 0 when the fit is singular
    var_residual: float
    loglik: float  # restricted if fitted by REML
    reml: bool
    n: int
    parameters: int  # coefficients and variances, as lme4 counts
    uncertainty: Uncertainty

    @property
    def is_singular(self) -> bool:
        """Whether groups differ no more than residual noise makes them."""
        return self.var_group == 0


def group_means(columns: Array, group: NDArray[np.intp]) -> Array:
    """The mean of each column within each group: [groups, columns]."""
    sums = np.column_stack([np.bincount(group, column) for column in columns.T])
    return sums / np.bincount(group)[:, None]


def fit(y: Array, x: Array, group: NDArray[np.intp], reml: bool = True) -> RandomIntercept:
    """Fit y ~ X + (1 | group) by REML or ML, groups of any sizes; the first column of X must be the intercept.

    y: [n]; x: [n, P] of full rank; group: [n] numbers from 0 without a gap.

    With variance ratio r = var_group / var_residual, the covariance of a group of size m is var_residual (I + r 11'),
    whose inverse leaves deviations from the group's mean alone and divides the mean by 1 + r m. So least squares
    needs the deviations once (reduced to a triangle) and one weighted row per group for each r tried.
    """
    offset = y.mean()  # the intercept takes it back; smaller numbers lose fewer digits
    both = np.column_stack([x, y - offset])
    n, p = x.shape
    size, means = np.bincount(group), group_means(both, group)
    within = np.linalg.qr(both - means[group]).R
    divisor = n - p if reml else n

    def triangle(ratio: float) -> tuple[Array, float]:
        """R of the whitened [X y], and -2 log-likelihood with coefficients and residual variance profiled out."""
        weight = np.sqrt(size / (1 + ratio * size))
        r = np.linalg.qr(np.vstack([within, weight[:, None] * means])).R
        deviance = divisor * (1 + math.log(2 * math.pi * r[p, p] ** 2 / divisor)) + np.log1p(ratio * size).sum()
        if reml:
            deviance += 2 * np.log(np.abs(np.diag(r)[:p])).sum()
        return r, float(deviance)

    # A coarse look first: the likelihood of unbalanced groups can have two peaks.
    grid = np.linspace(-18, 30, 49)
    start = grid[np.argmin([triangle(math.exp(log_ratio))[1] for log_ratio in grid])]
    best = optimize.minimize_scalar(
        lambda log_ratio: triangle(math.exp(log_ratio))[1],
        bounds=(start - 1, start + 1),
        method="bounded",
        options={"xatol": 1e-9},
    )
    ratio = 0.0 if triangle(0.0)[1] <= best.fun + 1e-8 else math.exp(best.x)
    r, deviance = triangle(ratio)
    inverse = np.linalg.inv(r[:p, :p])
    coefficients = inverse @ r[:p, p]
    var_residual = float(r[p, p] ** 2) / divisor

    # Second derivatives of the deviance in (log r, log var_residual). A group's mean row enters least squares with
    # weight h = size / (1 + r size), and dh/dr = -h^2. At r = 0 it counts as known, so the freedom is n - P.
    h = size / (1 + ratio * size)
    lever = means[:, :p] @ inverse  # whitened by the coefficients' covariance
    misfit = means[:, p] - means[:, :p] @ coefficients
    first, second = (lever.T * h**2) @ lever, 2 * (lever.T * h**3) @ lever
    pull = lever.T @ (h**2 * misfit)
    bend = float(2 * h**3 @ misfit**2 - 2 * pull @ pull) / var_residual - h @ h
    if reml:
        bend += np.trace(second) - np.sum(first**2)
    slope = float(h**2 @ misfit**2) / var_residual
    hessian = np.array([[ratio**2 * bend, ratio * slope], [ratio * slope, divisor]])
    covariance = var_residual * inverse @ inverse.T
    uncertainty = Uncertainty(
        2 * np.linalg.pinv(hessian, hermitian=True),
        np.stack([ratio * var_residual * inverse @ first @ inverse.T, covariance]),
    )
    coefficients[0] += offset
    return RandomIntercept(
        coefficients, covariance, ratio * var_residual, var_residual, -deviance / 2, reml, n, p + 2, uncertainty
    )
