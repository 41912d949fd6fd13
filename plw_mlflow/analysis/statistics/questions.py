"""What is asked of a data set's scores beside the fits: is there no effect, do groups differ, is the optimum stable.

All start from the over-tasks estimate (`over_tasks.py`), which the report leads with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from plw_mlflow.analysis.statistics import mixed, over_tasks
from plw_mlflow.analysis.statistics.design import Grid, is_of_curve
from plw_mlflow.analysis.statistics.fitting import JointTest, fewest_runs, hotelling
from plw_mlflow.analysis.statistics.optimum import LEVEL, Parabola, maximisers
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import CURVE_TERMS

POWER = 0.8
Resampled = Literal["tasks", "seeds", "both"]


# --------------------------------------------------------------------------------------------- no effect


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests (TOST) of every pair of PLWs tried: is the largest difference between them below a margin?

    As every pair must pass, the tests need no correction (intersection-union, Berger 1982,
    doi:10.1080/00401706.1982.10487790).
    """

    margin: float | None  # on the scale of the scores; None where the person gave none
    p: float | None  # of the worst pair; below 0.05, all differences are within the margin
    smallest_margin: float | None  # that these scores would have passed at 0.05; None if wider than the scale
    largest_difference: float  # estimated, between two PLWs tried
    pair: list[float]  # these two, the lower score first
    # The difference of the least certain pair that a t test at 0.05 finds in 4 of 5 such studies; None likewise.
    detectable: float | None


def equivalence(grid: Grid, margin: float | None = None, widest: float | None = None) -> Equivalence:
    """Is PLW's effect, over the PLWs tried, as good as none? Raises UserError as the fit over tasks does.

    widest: the largest difference that scores can have, None where their scale has no ends.
    """
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"margin must be a number above 0, got {margin}")
    whole, _ = grid.complete
    curves = over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=True)
    plws = sorted(set(whole.runs["plw"]))
    w = whole.transform(plws)
    worst_p, smallest, detectable = 0.0, 0.0, 0.0
    largest, pair = -1.0, [plws[0], plws[0]]
    for i in range(len(w)):
        for j in range(i):
            contrast = (w[i] - w[j]) * whole.contrasts[0] + (w[i] ** 2 - w[j] ** 2) * whole.contrasts[1]
            difference, error, freedom, _ = map(float, curves.t_test(contrast))
            if margin is not None:
                worst_p = max(worst_p, float(stats.t.sf((margin - abs(difference)) / error, freedom)))
            smallest = max(smallest, abs(difference) + stats.t.ppf(1 - LEVEL, freedom) * error)
            reach = stats.t.ppf(1 - LEVEL / 2, freedom) + stats.t.ppf(POWER, freedom)
            detectable = max(detectable, reach * error)
            if abs(difference) > largest:
                largest = abs(difference)
                pair = [plws[j], plws[i]] if difference > 0 else [plws[i], plws[j]]
    p = None if margin is None else worst_p

    def possible(difference: float) -> float | None:
        return None if widest is not None and difference >= widest else float(difference)

    return Equivalence(margin, p, possible(smallest), float(largest), pair, possible(detectable))


# --------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """A test of whether the curve differs between the values of a column."""

    by: str
    levels: list[str]
    tests: list[JointTest]
    notes: list[str]
    has_too_few_runs: bool  # as of a fit: nothing may be concluded


def difference(grid: Grid, by: str) -> Difference:
    """Does PLW act differently between the levels of `by`? `grid` is one made with that `by`.

    The tests are of all interactions of level and curve: over tasks (each task's curves are compared within the task),
    and the likelihood ratio of `lmm`, which takes all tasks as moved alike. Raises UserError where there is one level,
    or too little for a curve in each.
    """
    levels = sorted(grid.runs[by].astype(str).unique())
    if len(levels) < 2:
        raise UserError(f"by {by}: there is only {levels[0]}, nothing to compare")
    is_tested = [is_of_curve(term) and term not in CURVE_TERMS for term in grid.terms]
    if sum(is_tested) < 2 * (len(levels) - 1):
        raise UserError(f"by {by}: not every level has PLWs enough for a curve of its own")
    notes = [f"Each of them has its own {other}, so this is as much about {other}." for other in _equal(grid.runs, by)]
    tests: list[JointTest] = []
    contrasts = np.eye(len(grid.terms))[is_tested]
    try:
        whole, left_out = grid.complete
        if left_out:
            notes.append(f"Over tasks, left out: {', '.join(left_out)}.")
        if len(whole.tasks) <= len(contrasts) + 1 or whole.terms != grid.terms or len(whole.scores) <= len(grid.terms):
            raise UserError(f"too little is scored to test {len(contrasts)} coefficients")
        tests.append(hotelling(over_tasks.fit(whole.scores, whole.x, contrasts, runs_differ=True)))
    except ValueError as error:
        notes.append(f"Not tested over tasks: {error}.")
    y, run, task = grid.long
    full = mixed.fit_random_intercept(y, grid.x[run], task, reml=False)
    null = mixed.fit_random_intercept(y, grid.x[run][:, [not tested for tested in is_tested]], task, reml=False)
    chisq, df, p = mixed.likelihood_ratio(full, null)
    tests.append(JointTest("likelihood ratio, lmm", chisq, df, None, p))
    needed = fewest_runs(len(grid.terms), len(grid.tasks))
    return Difference(by, levels, tests, notes, len(grid.scores) < needed)


def _equal(runs: pd.DataFrame, by: str) -> list[str]:
    """Which other columns part the runs as `by` does."""
    others = [column for column in runs if column not in (by, "plw", "seed")]
    pairs = {column: len(runs[[by, column]].drop_duplicates()) for column in others}
    return [str(column) for column in others if runs[by].nunique() == runs[column].nunique() == pairs[column]]


# ----------------------------------------------------------------------------------------------- bootstrap


@dataclass(frozen=True)
class Bootstrap:
    """The best PLW of resampled scores."""

    over: Resampled
    draws: int
    interval: list[float]  # 95 % of the best PLWs within the range, an end where the curve is highest there
    interior: float  # share of draws with a maximum inside the range


def bootstrap(grid: Grid, over: Resampled = "tasks", draws: int = 2000, seed: int = 1234) -> Bootstrap:
    """Resample tasks, seeds (within each model and PLW), or both, and see where the mean curve is highest.

    With two seeds a cell, those over seeds are too narrow, by about 1.4: resampling 2 of 2 halves a variance.

    Raises UserError for seeds where a cell has less than two, for fewer than 4 tasks over tasks, and where too few
    runs are scored on every task for a curve.
    """
    whole, _ = grid.complete
    if len(set(whole.runs["plw"])) < 3:
        raise UserError("the runs scored on every task have fewer than 3 PLWs")
    scores, x = whole.scores, whole.x
    runs, tasks = scores.shape
    draw = np.random.default_rng(seed)
    counts = np.ones((draws, tasks))
    if over in ("tasks", "both"):
        if tasks < 4:
            raise UserError(f"resampling tasks needs 4 or more, there {'is' if tasks == 1 else 'are'} {tasks}")
        counts = draw.multinomial(tasks, np.full(tasks, 1 / tasks), size=draws).astype(float)
    hat = np.linalg.pinv(x)[1:3]  # [2, R]
    if over == "tasks":
        coefficients = counts @ (hat @ scores).T / tasks
    else:
        cell = whole.runs.groupby([column for column in whole.runs if column != "seed"]).ngroup().to_numpy()
        if np.bincount(cell).min() < 2:
            raise UserError("resampling seeds needs every model and PLW to be run with two seeds or more")
        order = np.argsort(cell, kind="stable")
        size = np.bincount(cell)[cell[order]]
        start = np.concatenate([[0], np.cumsum(np.bincount(cell))[:-1]])[cell[order]]
        means = counts @ scores.T / tasks  # [draws, R]
        picked = order[start + (draw.random((draws, runs)) * size).astype(int)]  # a run of the same cell
        coefficients = np.take_along_axis(means, picked, 1)[:, np.argsort(order)] @ hat.T
    low, high = whole.transform.ends
    best = maximisers(coefficients[:, 0], coefficients[:, 1], low, high)
    interval = whole.transform.back(np.quantile(best, [LEVEL / 2, 1 - LEVEL / 2]))
    return Bootstrap(over, draws, interval.tolist(), float(((low < best) & (best < high)).mean()))


# ------------------------------------------------------------------------------------------------ each task


@dataclass(frozen=True)
class TaskCurve:
    """One task's own curve, by least squares on its runs."""

    task: str
    task_type: str | None
    coefficients: dict[str, float]
    covariance: list[list[float]]  # of the coefficients
    degrees_of_freedom: int
    joint_p: float  # F of the curve
    optimum_plw: float | None  # None without an interior maximum
    delta_interval: list[float] | None  # 95 %, delta method, cut to the range
    best_plw: float  # where the curve is highest: the optimum, or an end of the PLWs tried
    interior_probability: float


def each_task(grid: Grid, types: dict[str, str] | None = None) -> list[TaskCurve]:
    """The curves of the tasks that have runs enough; p-values and intervals are each task's own, not corrected."""
    found = []
    for column, task in enumerate(grid.tasks):
        scored = ~np.isnan(grid.scores[:, column])
        x = grid.x[scored]
        x = x[:, [0, 1, 2, *(c for c in range(3, x.shape[1]) if np.ptp(x[:, c]) > 0)]]
        n, p = x.shape
        if len(set(grid.runs["plw"][scored])) < 3 or n <= p or np.linalg.matrix_rank(x) < p:
            continue
        y = grid.scores[scored, column]
        q, r = np.linalg.qr(x)
        b = np.linalg.solve(r, q.T @ y)
        residual = y - x @ b
        variance = float(residual @ residual) / (n - p)
        if variance <= 1e-24 * max(1.0, float(np.abs(y).max()) ** 2):
            continue
        inverse = np.linalg.inv(r)
        whole = variance * inverse @ inverse.T
        covariance = whole[1:3, 1:3]
        f = float(b[1:3] @ np.linalg.solve(covariance, b[1:3])) / 2
        low, high = grid.transform.ends
        parabola = Parabola(float(b[1]), float(b[2]), covariance, lambda _, df=n - p: float(df), low, high)  # type: ignore[misc]
        optimum = interval = None
        if parabola.has_interior_maximum and (reach := parabola.delta_interval()) is not None:
            optimum = float(grid.transform.back(parabola.vertex or 0.0))
            interval = grid.transform.back(np.clip(reach, low, high)).tolist()
        tried = grid.transform([grid.runs["plw"][scored].min(), grid.runs["plw"][scored].max()])
        best = float(grid.transform.back(maximisers(b[1:2], b[2:3], *tried)[0])) if optimum is None else optimum
        found.append(
            TaskCurve(
                task,
                (types or {}).get(task),
                dict(zip(("intercept", *CURVE_TERMS), b[:3].tolist(), strict=True)),
                whole[:3, :3].tolist(),
                n - p,
                float(stats.f.sf(f, 2, n - p)),
                optimum,
                interval,
                best,
                parabola.interior_probability(),
            )
        )
    return found


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's (1979) adjustment of p-values for looking at all of them."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def task_types(table: pd.DataFrame) -> dict[str, str]:
    """The type of each task, where the table has a column task_type. Raises UserError for a task of two types."""
    if "task_type" not in table:
        return {}
    given = table[table["task_type"].notna() & (table["task_type"].astype(str).str.strip() != "")]
    kinds = given["task_type"].astype(str).groupby(given["task"]).unique()
    for task, several in kinds.items():
        if len(several) > 1:
            source = table.attrs.get("source", "score table")
            raise UserError(f"{source}: task {task} has the types {' and '.join(sorted(several))}; keep one")
    return {str(task): kind[0] for task, kind in kinds.items()}
