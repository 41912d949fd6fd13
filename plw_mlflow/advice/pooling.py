"""Estimates from several studies as one: a regression whose points differ by more than their own errors.

y_i = x_i b + u_i + e_i with var(u) = tau2, common and unknown, and var(e_i) known. tau2 is by REML; intervals are by
Knapp and Hartung (2003, doi:10.1002/sim.1482), whose factor is not let below 1: with few points it may happen to be
small, and would then promise more than the points' own errors allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array


@dataclass(frozen=True)
class Pooled:
    """A random-effects meta-regression."""

    coefficients: Array  # [P]
    covariance: Array  # [P, P], of the coefficients
    tau2: float  # variance between points, beyond their own errors
    degrees_of_freedom: int  # points less coefficients

    @property
    def _quantile(self) -> float:
        return float(stats.t.ppf(1 - LEVEL / 2, self.degrees_of_freedom))

    def mean(self, x: Array) -> tuple[float, float]:
        """The line at x, [P], and half its 95 % interval."""
        return float(x @ self.coefficients), self._quantile * math.sqrt(x @ self.covariance @ x)

    def next_point(self, x: Array, beside: float = 0.0) -> tuple[float, float]:
        """What another study would find at x, [P], and half the 95 % prediction interval.

        beside: variance of such a point beyond tau2 (Higgins et al. 2009, doi:10.1111/j.1467-985X.2008.00552.x).
        """
        variance = x @ self.covariance @ x + self.tau2 + beside
        return float(x @ self.coefficients), self._quantile * math.sqrt(variance)


def pool(y: Array, variances: Array, x: Array) -> Pooled:
    """Pool n estimates: y [n], the variances of their errors [n], and x [n, P] of full rank.

    Raises UserError where there are no more points than coefficients.
    """
    n, p = x.shape
    if n <= p:
        raise UserError(f"{n} points are too few to pool by {p} coefficients")

    def weighted(tau2: float) -> tuple[Array, Array, Array]:
        weights = 1 / (variances + tau2)
        inverse = np.asarray(np.linalg.inv(x.T @ (weights[:, None] * x)), np.float64)
        return weights, inverse, inverse @ (x.T @ (weights * y))

    def deviance(tau2: float) -> float:
        """Minus twice the restricted log-likelihood, but for a constant."""
        weights, inverse, b = weighted(tau2)
        return float(-np.log(weights).sum() - np.linalg.slogdet(inverse)[1] + weights @ (y - x @ b) ** 2)

    # Residuals cannot show more variance than their range squared times n; a log scale, as the errors' may be tiny.
    highest = max(1e-12, n * float(np.ptp(y)) ** 2)
    start = math.log(highest) - 30
    logs = np.linspace(start, math.log(highest), 121)
    best = int(np.argmin([deviance(math.exp(log)) for log in logs]))
    around = (float(logs[max(0, best - 1)]), float(logs[min(120, best + 1)]))
    minimum = optimize.minimize_scalar(
        lambda log: deviance(math.exp(log)), bounds=around, method="bounded", options={"xatol": 1e-10}
    )
    tau2 = math.exp(float(minimum.x))
    if deviance(0.0) <= deviance(tau2) + 1e-9:
        tau2 = 0.0
    weights, inverse, b = weighted(tau2)
    factor = max(1.0, float(weights @ (y - x @ b) ** 2) / (n - p))
    return Pooled(b, factor * inverse, tau2, n - p)
