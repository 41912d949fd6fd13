"""Did PLW move these very tasks? Each task has a curve of its own; what is tested is the mean of the curves.

The tasks are fixed, so that they differ in their curves says nothing of how certain the mean is: only residuals do. A
run's luck moves its scores on all tasks alike and is in the residual of its mean over tasks, beside a T-th of the
tasks' noise. So the regression of runs' means on the curve counts both, whatever their sizes and however unequal the
tasks' noise, with as many degrees of freedom as runs leave. Where residuals are normal and alike along PLW, its t and F
are exact with any number of tasks and runs. It gives up what a model without luck would gain from counting every score
as an observation of its own, which is little with 15 degrees of freedom or more.

Exact also takes runs as independent. Runs of one seed share examples, their order and noise, and what they so share
makes the test reject too rarely (docs/statistics.md).

Letters: R runs, T tasks, P columns of the design, K contrasts. In shapes, "..." stands for nothing where there is one
table, and for [N] where there are N tables of one design.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array


@dataclass(frozen=True)
class RunMeans:
    """The regression of runs' means over tasks on the curve, in one table or in each of N."""

    coefficients: Array  # [..., P], the means of the tasks' own
    variance: Array  # [...], of the residual of a run's mean
    bread: Array  # [P, P], covariance of the coefficients under residuals of variance 1
    free: int  # degrees of freedom of the residuals
    contrasts: Array  # [K, P], of the coefficients; what the joint test is of

    @property
    def covariance(self) -> Array:
        """Of the coefficients: [..., P, P]."""
        return np.asarray(self.variance[..., None, None] * self.bread)

    def t_test(self, contrast: Array) -> tuple[Array, Array, float, Array]:
        """Estimate, standard error, degrees of freedom and two-sided p of a contrast, [P]."""
        estimate = self.coefficients @ contrast
        error = np.sqrt(self.variance * (contrast @ self.bread @ contrast))
        return estimate, error, float(self.free), 2 * special.stdtr(self.free, -np.abs(estimate) / error)

    def joint_test(self) -> tuple[Array, int, int, Array]:
        """F, its two degrees of freedom, and p: are all contrasts 0?"""
        k = len(self.contrasts)
        estimate = self.coefficients @ self.contrasts.T
        inverse = np.linalg.inv(self.contrasts @ self.bread @ self.contrasts.T)
        statistic = np.einsum("...i,ij,...j->...", estimate, inverse, estimate) / (k * self.variance)
        return statistic, k, self.free, special.fdtrc(k, self.free, statistic)


def fit(scores: Array, x: Array, contrasts: Array) -> RunMeans:
    """Fit the runs' means over tasks by least squares, which gives the mean of the tasks' own least-squares curves.

    scores: [..., R, T], none missing; x: [R, P] of full rank; contrasts: [K, P] of the coefficients, what is tested
    together. Raises UserError for fewer runs than a curve and its residuals need, and where there are no residuals.
    """
    runs, p = x.shape
    if runs <= p:
        raise UserError(f"{runs} runs are too few for {p} coefficients and a residual")
    means = scores.mean(-1)
    q, r = np.linalg.qr(x)
    coefficients = np.linalg.solve(r, (means @ q)[..., None])[..., 0]
    variance = ((means - coefficients @ x.T) ** 2).sum(-1) / (runs - p)
    if np.any(variance <= 1e-24 * np.abs(scores).max((-1, -2)) ** 2):
        raise UserError("runs' means follow a curve exactly; without residuals nothing can be tested, check the scores")
    return RunMeans(coefficients, variance, np.linalg.inv(r.T @ r), runs - p, contrasts)
