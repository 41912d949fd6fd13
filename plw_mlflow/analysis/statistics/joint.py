"""Does one curve describe several data sets, and on which axis?

The same PLW means another thing on other data, so data sets that differ in w_p may be alike in the prompts' share of
the loss weight. What is compared is the run's mean over tasks, which has the luck of the run in it once:

    mean score of a run = level + slope w + bend w^2 + residual,   residuals normal, one variance for each data set

Levels are of each data set and model (and value of the columns compared by). Slope and bend are of all data sets (one
curve), or of each (a curve each). Every fit is by maximum likelihood, to the same means of the same runs, and axes are
functions of a run's PLW and data, so that likelihoods and AICs on different axes can be compared.

What a data set's level is, no other can tell. So the prediction for a data set that is left out of the fit is how far
each of its runs lies from the mean of its level's runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from plw_mlflow.analysis.score_table import RUN, odds_of_rows
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import AXES, SHARE_AXES, Array, Transform, make_transform

MIN_FREE = 4  # runs of each data set beyond its levels and a curve
ROUNDS = 500  # of reweighting; some twenty are usual


@dataclass(frozen=True)
class JointFit:
    """One description of all data sets' runs."""

    axis: str | None  # None without a curve
    curves: int  # 0, 1 for all data sets, or as many as there are
    parameters: int  # levels, slopes, bends and variances
    loglik: float
    aic: float
    # By data set that was left out: the root mean square of what the others' curve leaves of its runs' distances from
    # their level; None for a curve each, which says nothing of further data.
    left_out: dict[str, float] | None
    beyond: dict[str, int] | None  # the left-out runs that lie outside the range of the others on this axis


@dataclass(frozen=True)
class Joint:
    """All descriptions, without a curve first."""

    datasets: list[str]
    runs: int
    tasks: list[str]
    fits: list[JointFit]
    refusals: dict[str, str]  # why an axis, or a data set, is not among them

    def of(self, axis: str | None, *, each: bool = False) -> JointFit:
        """The description by that axis; each: by a curve for each data set."""
        return next(fit for fit in self.fits if fit.axis == axis and (fit.curves > 1) == each)

    @property
    def best(self) -> JointFit:
        """Of the descriptions by one curve, that of the lowest AIC."""
        return min((fit for fit in self.fits if fit.curves == 1), key=lambda fit: fit.aic)


def compare_axes(table: pd.DataFrame, by: tuple[str, ...] = ()) -> Joint:
    """Describe the data sets of a checked table, whose scores are on one scale, on every axis.

    Only tasks count that every run is scored on. by: columns whose values have levels of their own. Data sets of too
    few runs are left out, as are axes on which there is no fit. Raises UserError where fewer than two data sets are
    left, or no such task, and where there is no fit on w_p.
    """
    keys = list(dict.fromkeys([*RUN, *by]))
    groups = list(dict.fromkeys(["dataset", "model", *by]))
    refusals = _of_too_few_runs(table, keys, groups)
    table = table[~table["dataset"].isin(list(refusals))]
    if (left := table["dataset"].nunique()) < 2:
        too_few = "; ".join(f"{name} {why}" for name, why in refusals.items())
        raise UserError(f"{left} data set{'s' * (left != 1)} left to join" + f" ({too_few})" * bool(too_few))
    scores = table.pivot_table(index=keys, columns="task", values="score")
    runs = scores.index.to_frame(index=False)
    scores = scores.dropna(axis=1)
    if scores.empty:
        raise UserError("no task is scored on every run")
    names, dataset = np.unique(runs["dataset"], return_inverse=True)
    levels = _dummies(runs.groupby(groups).ngroup().to_numpy())
    means = _Means(scores.to_numpy(float).mean(1), levels, dataset, [str(name) for name in names])
    odds = odds_of_rows(table)
    of_run = None if odds is None else table.assign(odds=odds).groupby(keys)["odds"].first().to_numpy()
    fits = [means.describe(None, np.empty((len(runs), 0)))]
    for axis in AXES:
        try:
            w = _places(axis, runs["plw"].to_numpy(float), of_run)
            curve = np.column_stack([w, w**2])
            fits += [means.describe(axis, curve), means.describe(axis, curve, each=True)]
        except UserError as error:
            if axis == "w_p":  # beside which all others are seen
                raise
            refusals[axis] = str(error)
    return Joint(means.names, len(runs), list(scores.columns), fits, refusals)


def _of_too_few_runs(table: pd.DataFrame, keys: list[str], groups: list[str]) -> dict[str, str]:
    """The data sets that have too few runs for levels, a curve and a variance, and what each of them has."""
    found = {}
    for name, part in table.groupby("dataset"):
        runs, needed = len(part[keys].drop_duplicates()), len(part[groups].drop_duplicates()) + 2 + MIN_FREE
        if runs < needed:
            found[str(name)] = f"has {runs} runs, and it takes {needed}"
    return found


def _places(axis: str, plw: Array, odds: Array | None) -> Array:
    if axis in SHARE_AXES and odds is not None:
        return Transform(axis, ())(odds)  # of odds 1 at PLW 1, so that odds are what it takes for PLWs
    return make_transform(axis, plw)(plw)


@dataclass(frozen=True)
class _Means:
    """The runs' means over tasks, and what each run belongs to."""

    y: Array  # [R]
    levels: Array  # [R, L], 1 where a run has that level
    dataset: NDArray[np.intp]  # [R]
    names: list[str]

    def describe(self, axis: str | None, curve: Array, *, each: bool = False) -> JointFit:
        """Fit levels and a curve, [R, 2] (or [R, 0] for none), or a curve for each data set."""
        curves = [curve * (self.dataset == number)[:, None] for number in range(len(self.names))] if each else [curve]
        loglik, _ = _maximise(self.y, np.column_stack([self.levels, *curves]), self.dataset)
        parameters = self.levels.shape[1] + len(curves) * curve.shape[1] + len(self.names)
        count = len(curves) * (curve.shape[1] > 0)
        left_out = None if each else {name: self._error(n, curve) for n, name in enumerate(self.names)}
        beyond = None if each or not count else {name: self._beyond(n, curve) for n, name in enumerate(self.names)}
        return JointFit(axis, count, parameters, loglik, 2 * (parameters - loglik), left_out, beyond)

    def _error(self, number: int, curve: Array) -> float:
        """What the curve of the other data sets leaves of this one's distances from its levels."""
        here = self.dataset == number
        others = self.levels[~here]
        x = np.column_stack([others[:, others.any(0)], curve[~here]])
        _, coefficients = _maximise(self.y[~here], x, np.unique(self.dataset[~here], return_inverse=True)[1])
        predicted = curve[here] @ coefficients[len(coefficients) - curve.shape[1] :]
        left = self.y[here] - predicted
        left = left - self.levels[here] @ np.linalg.lstsq(self.levels[here], left)[0]
        return math.sqrt(float(np.mean(left**2)))

    def _beyond(self, number: int, curve: Array) -> int:
        here, w = self.dataset == number, curve[:, 0]
        low, high = w[~here].min(), w[~here].max()
        return int(((w[here] < low - 1e-9) | (w[here] > high + 1e-9)).sum())


def _dummies(groups: NDArray[np.integer]) -> Array:
    return np.asarray(groups[:, None] == np.arange(groups.max() + 1), float)


def _maximise(y: Array, x: Array, group: NDArray[np.intp]) -> tuple[float, Array]:
    """The highest log-likelihood of y ~ normal(x b, variance of its group), and b there.

    By reweighting until nothing changes, which climbs to the nearest peak. With curves that fit one data set or
    another, there may be several; so it starts from equal variances, and from each data set's being the smallest.
    """
    groups = int(group.max()) + 1
    starts = [np.ones(groups), *(np.where(np.arange(groups) == g, 1e-4, 1.0) for g in range(groups) if groups > 1)]
    size = np.bincount(group)
    best, found = -math.inf, np.zeros(x.shape[1])
    for variance in starts:
        loglik = -math.inf
        for _ in range(ROUNDS):
            weight = 1 / np.sqrt(variance[group])
            b = np.linalg.lstsq(x * weight[:, None], y * weight)[0]
            variance = np.bincount(group, (y - x @ b) ** 2) / size
            if variance.min() <= 1e-24 * max(1.0, float(np.abs(y).max()) ** 2):
                raise UserError("runs' means follow a curve exactly, so their likelihood has no maximum")
            before, loglik = loglik, -0.5 * float(size @ (np.log(2 * math.pi * variance) + 1))
            if loglik - before < 1e-10:
                break
        if loglik > best:
            best, found = loglik, b
    return best, found
