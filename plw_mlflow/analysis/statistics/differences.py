"""Does PLW act differently between data sets, models, or other groups of runs?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from plw_mlflow.analysis.statistics import inference, over_tasks, random_intercept
from plw_mlflow.analysis.statistics.design import Grid, is_of_curve
from plw_mlflow.analysis.statistics.fitting import JointTest, fewest_runs, hotelling
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import CURVE_TERMS


@dataclass(frozen=True)
class Difference:
    """A test of whether the curve differs between the values of a column."""

    by: str
    levels: list[str]
    tests: list[JointTest]
    notes: list[str]
    has_too_few_runs: bool  # nothing may be concluded then, as for a fit


def compare_curves(grid: Grid, by: str) -> Difference:
    """Does PLW act differently between the levels of `by`? `grid` is one made with that `by`.

    The tests are of all interactions of level and curve: over tasks (each task's curves are compared within the task),
    and the likelihood ratio of `lmm`, which assumes that PLW moves all tasks alike. Raises UserError where there is one
    level only, or a level has too few PLWs for a curve.
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
    full = random_intercept.fit(y, grid.x[run], task, reml=False)
    null = random_intercept.fit(y, grid.x[run][:, [not tested for tested in is_tested]], task, reml=False)
    chisq, df, p = inference.likelihood_ratio(full, null)
    tests.append(JointTest("likelihood ratio, lmm", chisq, df, None, p))
    needed = fewest_runs(len(grid.terms), len(grid.tasks))
    return Difference(by, levels, tests, notes, len(grid.scores) < needed)


def _equal(runs: pd.DataFrame, by: str) -> list[str]:
    """The other columns that divide the runs into the same groups as `by`."""
    others = [column for column in runs if column not in (by, "plw", "seed")]
    pairs = {column: len(runs[[by, column]].drop_duplicates()) for column in others}
    return [str(column) for column in others if runs[by].nunique() == runs[column].nunique() == pairs[column]]
