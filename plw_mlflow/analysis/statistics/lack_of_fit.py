"""Does a parabola describe the scores at all?

Runs of one PLW differ by luck and noise alone, once the levels of models are taken out. If the means of the PLWs lie
further from the fitted curve than that explains, the curve has another shape, and what is said of its peak, its ends
and its range does not hold. It is the textbook's F test of lack of fit, by the runs' means over these tasks (as
`fixed_tasks`): a mean for each PLW against the curve, each with the same levels beside it. Noise that runs of one seed
share makes it find a misfit too rarely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import special, stats

from plw_mlflow.analysis.statistics import fixed_tasks
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.multiple_testing import adjust_by_holm
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.errors import UserError

MISFIT = 0.01  # p below which a curve is taken not to fit


@dataclass(frozen=True)
class LackOfFit:
    """The F test of lack of fit, and what the means of PLWs say without a curve."""

    statistic: float
    freedom: int  # degrees of freedom of the distances of PLWs from the curve
    free: int  # and of runs from the mean of their PLW
    p: float
    holm_p: float  # corrected for the other data sets that are tested with it
    best_plw: float  # of the highest mean
    widest: float  # what all differences between two PLWs' means are shown to be below, each at LEVEL

    def why(self) -> str:
        """Why nothing is said of a curve's shape, where it misfits."""
        return f"no parabola describes these scores (lack of fit: p = {self.p:.2g})"


def misfits(grids: Sequence[Grid]) -> dict[str, LackOfFit]:
    """The tests of those data sets whose scores no parabola describes: with p, by Holm's correction, below MISFIT."""
    tests = {grid.dataset: test for grid in grids if (test := lack_of_fit(grid)) is not None}
    corrected = adjust_by_holm({name: test.p for name, test in tests.items()})
    return {name: replace(test, holm_p=corrected[name]) for name, test in tests.items() if corrected[name] < MISFIT}


def lack_of_fit(grid: Grid) -> LackOfFit | None:
    """Test whether the curve misses the means of PLWs; None where the runs are too few, or of one seed, to tell."""
    try:
        whole, _ = grid.of_these
        columns = whole.steps.shape[1]
        if np.linalg.matrix_rank(whole.steps) < columns:  # some PLWs were tried with one model alone
            return None
        curve = fixed_tasks.fit(whole.scores, whole.x, whole.contrasts)
        means = fixed_tasks.fit(whole.scores, whole.steps, np.eye(columns)[: len(whole.plws)])
    except UserError:
        return None
    freedom = curve.free - means.free
    if freedom < 1:
        return None
    pure = float(means.variance) * means.free
    statistic = (float(curve.variance) * curve.free - pure) / freedom / float(means.variance)
    p = float(special.fdtrc(freedom, means.free, max(0.0, statistic)))
    reach = float(stats.t.ppf(1 - LEVEL, means.free))
    differences = (means.t_test(one - other)[:2] for one, other in combinations(means.contrasts, 2))
    widest = max(abs(float(difference)) + reach * float(error) for difference, error in differences)
    best = whole.plws[int(means.coefficients[: len(whole.plws)].argmax())]
    return LackOfFit(statistic, freedom, means.free, p, p, best, widest)
