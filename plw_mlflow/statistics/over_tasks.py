"""Curves over tasks: each task's scores give a curve, and the curves are the sample.

Nothing is assumed of how tasks differ: not in level, not in how PLW moves them, not in noise. So a test over tasks
holds for tasks at large, of which these are some. What tasks have in common by chance is a run's luck, since one
checkpoint is scored on them all: it moves all curves alike, so the curves' spread does not show it. `crossed` adds it
where the residuals do; `task-t` is the textbook's test without it.

Letters: R runs, T tasks, P columns of the design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

# Run noise is counted where its F test rejects at this level: always counting it makes the test too strict by half,
# as an estimate near 0 is then cut off below; never counting it is wrong where there is any.
COUNTED = 0.2


@dataclass(frozen=True)
class Part:
    """A part of a covariance: an estimate and its degrees of freedom."""

    covariance: Array  # [P, P]; subtracted where it is negative
    degrees_of_freedom: float


@dataclass(frozen=True)
class Curves:
    """The mean of the tasks' curves, and how sure it is."""

    coefficients: Array  # [P]
    by_task: Array  # [T, P]
    parts: tuple[Part, ...]  # of the coefficients' covariance, which is their sum
    var_run: float  # of runs' common luck, as estimated; below 0 where the residuals show none
    counts_runs: bool  # whether it is a part of the covariance
    var_residual: float

    @property
    def covariance(self) -> Array:
        """Of the coefficients: [P, P]."""
        return np.sum([part.covariance for part in self.parts], axis=0)

    def degrees_of_freedom(self, contrast: Array) -> float:
        """Of the variance of a contrast of the coefficients, [P] (Satterthwaite 1946, doi:10.2307/3002019)."""
        variances = [contrast @ part.covariance @ contrast for part in self.parts]
        spread = sum(v**2 / part.degrees_of_freedom for v, part in zip(variances, self.parts, strict=True))
        return float(sum(variances) ** 2 / spread)

    def t_test(self, contrast: Array) -> tuple[float, float, float, float]:
        """Estimate, standard error, degrees of freedom and two-sided p of a contrast, [P]."""
        estimate, variance = contrast @ self.coefficients, contrast @ self.covariance @ contrast
        freedom = self.degrees_of_freedom(contrast)
        return (
            float(estimate),
            math.sqrt(variance),
            freedom,
            float(2 * stats.t.sf(abs(estimate) / math.sqrt(variance), freedom)),
        )

    def joint_test(self, contrasts: Array) -> tuple[float, float, float, float]:
        """F, its two degrees of freedom, and p: are all contrasts, [K, P], 0?

        Hotelling's T^2. With run noise the covariance is a sum, to which a Wishart distribution is fitted
        (Krishnamoorthy and Yu 2004, doi:10.1016/j.spl.2003.10.012), so that nothing depends on the units of w_p.
        Raises ValueError where too little is known of the covariance.
        """
        estimate, k = contrasts @ self.coefficients, len(contrasts)
        inverse = np.linalg.inv(contrasts @ self.covariance @ contrasts.T)
        spread = 0.0
        for part in self.parts:
            share = contrasts @ part.covariance @ contrasts.T @ inverse
            spread += (np.trace(share @ share) + np.trace(share) ** 2) / part.degrees_of_freedom
        freedom = (k + k**2) / spread
        denominator = freedom - k + 1
        if denominator <= 0:
            raise ValueError(f"tasks and runs are too few to test {k} coefficients together")
        statistic = estimate @ inverse @ estimate * denominator / (freedom * k)
        return float(statistic), float(k), float(denominator), float(stats.f.sf(statistic, k, denominator))


def fit(scores: Array, x: Array, *, runs_differ: bool) -> Curves:
    """Fit each task's scores by least squares, and average.

    scores: [R, T], none missing; x: [R, P] of full rank. runs_differ: whether a run's common luck is looked for.

    The residuals' means over tasks vary by a run's luck and a T-th of the noise; what is left varies by the noise
    alone. Their difference is the luck's variance (a random effect crossed with tasks).

    Raises ValueError for fewer than 2 tasks, or fewer runs than a curve and its residuals need.
    """
    (runs, tasks), p = scores.shape, x.shape[1]
    if tasks < 2:
        raise ValueError("a test over tasks needs 2 tasks or more")
    if runs <= p:
        raise ValueError(f"{runs} runs are too few for {p} coefficients and a residual")
    q, r = np.linalg.qr(x)
    by_task = np.linalg.solve(r, q.T @ scores).T  # [T, P]
    bread = np.linalg.inv(r.T @ r)
    residuals = scores - x @ by_task.T
    luck = residuals.mean(1)
    free = runs - p
    of_runs = float(luck @ luck) / free
    of_noise = float(((residuals - luck[:, None]) ** 2).sum()) / (free * (tasks - 1))
    var_run = of_runs - of_noise / tasks
    parts = [Part(np.cov(by_task.T) / tasks, tasks - 1)]
    is_seen = of_noise > 0 and stats.f.sf(of_runs * tasks / of_noise, free, free * (tasks - 1)) < COUNTED
    if counted := bool(runs_differ and is_seen):
        parts += [Part(of_runs * bread, free), Part(-of_noise / tasks * bread, free * (tasks - 1))]
    return Curves(by_task.mean(0), by_task, tuple(parts), var_run, counted, of_noise)
