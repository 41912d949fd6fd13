"""Curves over tasks: each task's scores give a curve, and the curves are the sample.

Nothing is assumed about how tasks differ: not in level, not in how PLW moves them, not in noise. So a test over tasks
holds for the population of tasks that these are a sample of. What the tasks share by chance is a run's luck: one
checkpoint is scored on all of them, so its luck moves all curves alike, and the variance between the curves does not
show it. `crossed` adds the variance of this luck where the residuals show it, which assumes that all tasks have the
same noise; `task-t` is the textbook test without it.

Letters: R runs, T tasks, P columns of the design, K contrasts. In shapes, "..." stands for nothing where there is one
table, and for [N] where there are N tables of one design.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special

from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array

# The variance of luck is estimated without bias, so the estimate is below 0 in half of the tables that have no luck. To
# add it wherever it is above 0, and deduct nothing, would make the test too strict by half; never to add it would be
# wrong where there is luck. So it is added where its F test rejects at level COUNTED. An estimate below 0 is deducted,
# at most this part (DEDUCTED) of the variance between curves, which must not come near 0. Both numbers were chosen by
# simulation (benchmarks/analysis.py).
COUNTED = 0.3
DEDUCTED = 0.15


@dataclass(frozen=True)
class MeanCurve:
    """The mean of the tasks' curves in one table, or in each of N tables, and how certain it is."""

    coefficients: Array  # [..., P], mean over tasks
    between: Array  # [..., P, P], covariance of tasks' curves
    bread: Array  # [P, P], covariance of a task's curve under residuals of variance 1
    of_runs: Array  # [...], mean square of the residuals' means over tasks: luck, and a T-th of the noise
    of_noise: Array  # [...], mean square of what is left of the residuals
    tasks: int
    free: int  # degrees of freedom of a task's residuals
    contrasts: Array  # [K, P], of the coefficients; what the joint test is of
    runs_differ: bool  # whether the variance of luck is estimated

    @property
    def var_run(self) -> Array:
        """The estimated variance of runs' luck: [...]; below 0 where the residuals show none."""
        return self.of_runs - self.of_noise / self.tasks

    @cached_property
    def counts_runs(self) -> NDArray[np.bool_]:
        """Whether the variance of luck is added to the covariance: [...]. If not, one below 0 is deducted in part."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.of_runs * self.tasks / self.of_noise
        p = special.fdtrc(self.free, self.free * (self.tasks - 1), ratio)
        return np.asarray(self.runs_differ & (self.of_noise > 0) & (p < COUNTED))

    @cached_property
    def parts(self) -> Array:
        """Independent estimates whose sum is the coefficients' covariance, [3, ..., P, P].

        The first is of the tasks' curves. Where luck is counted, the second is of the means of residuals, and the
        third, which is negative, takes the noise out of these.
        """
        of_tasks = self.between / self.tasks
        counted = np.where(self.counts_runs, 1.0, 0.0)
        luck, noise = (
            (counted * part)[..., None, None] * self.bread for part in (self.of_runs, -self.of_noise / self.tasks)
        )
        return np.stack([of_tasks - self._deduction(of_tasks), luck, noise])

    def _deduction(self, of_tasks: Array) -> Array:
        """What is deducted where the variance of luck comes out below 0: [..., P, P]."""
        tested, bread = (self.contrasts @ part @ self.contrasts.T for part in (of_tasks, self.bread))
        smallest = _whitened(tested, bread)[..., 0]
        below = np.where(self.deducts, -self.var_run, 0.0)
        variance = np.clip(below, 0, DEDUCTED * np.maximum(smallest, 0))[..., None, None]
        tested = np.where(variance > 0, tested, np.eye(len(bread)))
        follow = np.linalg.solve(tested, self.contrasts @ of_tasks)  # [..., K, P]
        return np.asarray(variance * (follow.swapaxes(-1, -2) @ bread @ follow))

    @property
    def deducts(self) -> NDArray[np.bool_]:
        """Whether an estimate of luck below 0 is deducted: [...]."""
        return np.asarray(self.runs_differ & ~self.counts_runs & (self.var_run < 0))

    @property
    def covariance(self) -> Array:
        """Of the coefficients: [..., P, P]."""
        return np.asarray(self.parts.sum(0))

    @property
    def freedoms(self) -> Array:
        """Degrees of freedom of the parts, [3]."""
        return np.array([self.tasks - 1, self.free, self.free * (self.tasks - 1)], float)

    def degrees_of_freedom(self, contrast: Array) -> Array:
        """Of the variance of a contrast, [P] or [..., P] (Satterthwaite 1946, doi:10.2307/3002019): [...]."""
        variances = np.einsum("...i,p...ij,...j->p...", contrast, self.parts, contrast)
        return np.asarray(variances.sum(0) ** 2 / np.tensordot(1 / self.freedoms, variances**2, 1))

    def t_test(self, contrast: Array) -> tuple[Array, Array, Array, Array]:
        """Estimate, standard error, degrees of freedom and two-sided p of a contrast, [P] or [..., P]: [...] each."""
        estimate = np.einsum("...i,...i->...", contrast, self.coefficients)
        error = np.sqrt(np.einsum("...i,...ij,...j->...", contrast, self.covariance, contrast))
        freedom = self.degrees_of_freedom(contrast)
        return estimate, error, freedom, 2 * special.stdtr(freedom, -np.abs(estimate) / error)

    def joint_test(self) -> tuple[Array, int, Array, Array]:
        """F, its two degrees of freedom, and p: are all contrasts 0? [...] each.

        Hotelling's T^2, or with run noise, by the moments of Kenward and Roger (1997, doi:10.2307/2533558), what lies
        between that and the F of a covariance known but for a factor. Nothing depends on the units of w_p.
        Raises UserError where too little is known of the covariance.
        """
        k = len(self.contrasts)
        too_few = UserError(f"tasks and runs are too few to test {k} coefficients together")
        if self.tasks <= k:
            raise too_few
        estimate, parts = self.coefficients @ self.contrasts.T, self.contrasts @ self.parts @ self.contrasts.T
        total = parts.sum(0)
        values = _whitened(total, self.contrasts @ self.bread @ self.contrasts.T)
        if np.any(values[..., 0] <= 1e-12 * values[..., -1]):
            raise UserError(f"tasks' curves are too much alike to test {k} coefficients together")
        # How sure the covariance is depends on what it is made of. By chance the curves' spread is small in some
        # direction, which there would seem all luck: half of what that takes on average is given back. And one that
        # came out too small would seem less sure than it is; without differences between curves it is the luck's.
        parts[0] /= 1 - (k + 1) / (2 * (self.tasks - 1)) if k > 1 else 1
        judged = parts.sum(0)
        least = np.where(self.counts_runs[..., None, None], parts[1], judged)
        shares = parts @ np.linalg.inv(_at_least(judged, least))
        of_square, squared = _trace(shares @ shares), _trace(shares) ** 2
        # E (tr D)^2 and E tr D^2 of the covariance's relative error D. All of the first part is estimated (a Wishart
        # matrix), of the others a factor.
        first = 2 * np.tensordot(1 / self.freedoms, np.stack([of_square[0], squared[1], squared[2]]), 1)
        second = 2 * np.tensordot(
            1 / self.freedoms, np.stack([(of_square[0] + squared[0]) / 2, of_square[1], of_square[2]]), 1
        )
        factor, denominator = reference(k, first, second)
        if np.any(denominator <= 0):
            raise too_few
        wald = np.einsum("...i,...i->...", estimate, np.linalg.solve(total, estimate[..., None])[..., 0])
        statistic = factor * wald / k
        return statistic, k, denominator, special.fdtrc(k, denominator, statistic)


def _whitened(covariance: Array, unit: Array) -> Array:
    """Eigenvalues of a covariance, [..., K, K], beside another one, [K, K], ascending: [..., K]."""
    whiten = np.linalg.inv(np.linalg.cholesky(unit))
    return np.asarray(np.linalg.eigvalsh(whiten @ covariance @ whiten.T))


def _trace(matrices: Array) -> Array:
    return np.asarray(np.trace(matrices, axis1=-2, axis2=-1))


def _at_least(covariance: Array, least: Array) -> Array:
    """A covariance, [..., K, K], and in the directions in which another one is larger, that one."""
    root = np.linalg.cholesky(least)
    half = np.linalg.solve(root, covariance)
    values, vectors = np.linalg.eigh(np.linalg.solve(root, half.swapaxes(-1, -2)))
    axes = root @ vectors
    return np.asarray((axes * np.maximum(values, 1)[..., None, :]) @ axes.swapaxes(-1, -2))


def reference(k: int, first: Array, second: Array) -> tuple[Array, Array]:
    """What a Wald F of k contrasts is to be multiplied with, and its denominator's degrees of freedom: [...] each.

    first, second: [...], E (tr D)^2 and E tr D^2 of the covariance's relative error D: A1 and A2 of Kenward and Roger.
    Where such an F has no mean, with few tasks or few runs, and where the moments fit none, the factor and the degrees
    of freedom are those of Hotelling's T^2, which are on the safe side.
    """
    freedom = (k + k**2) / second
    alone = (freedom - k + 1) / freedom, freedom - k + 1
    b = (first + 6 * second) / (2 * k)
    g = ((k + 1) * first - (k + 4) * second) / ((k + 2) * second)
    c1, c2, c3 = (part / (3 * k + 2 * (1 - g)) for part in (g, k - g, k + 2 - g))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = 1 / (1 - second / k)
        variance = 2 / k * (1 + c1 * b) / ((1 - c2 * b) ** 2 * (1 - c3 * b))
        denominator = 4 + (k + 2) / (k * variance / (2 * mean**2) - 1)
        factor = denominator / (mean * (denominator - 2))
        fits = (second <= 0.99 * k) & (denominator > 2) & (alone[0] <= factor * (1 + 1e-9)) & (factor <= 1 + 1e-9)
    return np.where(fits, factor, alone[0]), np.where(fits, denominator, alone[1])


def fit(scores: Array, x: Array, contrasts: Array, *, runs_differ: bool) -> MeanCurve:
    """Fit each task's scores by least squares, and average.

    scores: [..., R, T], none missing; x: [R, P] of full rank; contrasts: [K, P] of the coefficients, what is tested
    together. runs_differ: whether the variance of runs' luck is estimated.

    The residuals' means over tasks vary by a run's luck and a T-th of the noise; what is left varies by the noise
    alone. Their difference is the luck's variance (a random effect crossed with tasks).

    Raises UserError for fewer than 2 tasks, fewer runs than a curve and its residuals need, or tasks that do not
    differ in what is tested.
    """
    *_, runs, tasks = scores.shape
    p = x.shape[1]
    if tasks < 2:
        raise UserError("a test over tasks needs 2 tasks or more")
    if runs <= p:
        raise UserError(f"{runs} runs are too few for {p} coefficients and a residual")
    q, r = np.linalg.qr(x)
    by_task = np.linalg.solve(r, q.T @ scores)  # [..., P, T]
    residuals = scores - x @ by_task
    luck = residuals.mean(-1)
    free = runs - p
    coefficients = by_task.mean(-1)
    apart = by_task - coefficients[..., None]
    between, bread = apart @ apart.swapaxes(-1, -2) / (tasks - 1), np.linalg.inv(r.T @ r)
    largest = _whitened(contrasts @ between @ contrasts.T, contrasts @ bread @ contrasts.T)[..., -1]
    if np.any(largest <= 1e-24 * np.abs(scores).max((-1, -2)) ** 2):
        raise UserError("all tasks have the same curve; nothing can be tested over them")
    return MeanCurve(
        coefficients,
        between,
        bread,
        (luck**2).sum(-1) / free,
        ((residuals - luck[..., None]) ** 2).sum((-1, -2)) / (free * (tasks - 1)),
        tasks,
        free,
        contrasts,
        runs_differ,
    )
