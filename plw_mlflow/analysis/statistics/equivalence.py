"""Is there no effect: are all differences between PLWs smaller than a margin?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from plw_mlflow.analysis.statistics import fixed_tasks, over_tasks
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.optimum import LEVEL, POWER
from plw_mlflow.errors import UserError


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests (TOST) of every pair of PLWs tried: is the largest difference between them below a margin?

    As every pair must pass, the tests need no correction (intersection-union, Berger 1982,
    doi:10.1080/00401706.1982.10487790).
    """

    margin: float | None  # on the scale of the scores; None where none was given
    p: float | None  # of the worst pair; below 0.05, all differences are within the margin
    smallest_margin: float | None  # that these scores would have passed at 0.05; None if wider than the scale
    largest_difference: float  # estimated, between two PLWs tried
    pair: list[float]  # these two, the lower score first
    # The difference of the least certain pair that a t test at 0.05 finds in 4 of 5 such studies; None likewise.
    detectable: float | None
    standard_error: float  # of the difference of the least certain pair


def assess_equivalence(
    grid: Grid, margin: float | None = None, widest: float | None = None, *, tasks_are_fixed: bool = False
) -> Equivalence:
    """Test whether all differences between the PLWs tried are below a margin. Raises UserError as the fit does.

    widest: the largest difference that scores can have, None where their scale has no ends. tasks_are_fixed: whether
    the question is of the mean of these very tasks (`fixed-tasks`) and not of tasks like these (`crossed`).
    """
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"margin must be a number above 0, got {margin}")
    whole, _ = grid.of_these if tasks_are_fixed else grid.complete
    curves: fixed_tasks.RunMeans | over_tasks.MeanCurve
    if tasks_are_fixed:
        curves = fixed_tasks.fit(whole.scores, whole.x, whole.contrasts)
    else:
        curves = over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=True)
    plws = whole.plws
    w = whole.transform(plws)
    worst_p, smallest, detectable, largest_error = 0.0, 0.0, 0.0, 0.0
    largest, pair = -1.0, [plws[0], plws[0]]
    for i in range(len(w)):
        for j in range(i):
            contrast = (w[i] - w[j]) * whole.contrasts[0] + (w[i] ** 2 - w[j] ** 2) * whole.contrasts[1]
            difference, error, freedom = (float(part) for part in curves.t_test(contrast)[:3])
            if margin is not None:
                worst_p = max(worst_p, float(stats.t.sf((margin - abs(difference)) / error, freedom)))
            smallest = max(smallest, abs(difference) + stats.t.ppf(1 - LEVEL, freedom) * error)
            reach = stats.t.ppf(1 - LEVEL / 2, freedom) + stats.t.ppf(POWER, freedom)
            detectable, largest_error = max(detectable, reach * error), max(largest_error, error)
            if abs(difference) > largest:
                largest = abs(difference)
                pair = [plws[j], plws[i]] if difference > 0 else [plws[i], plws[j]]
    p = None if margin is None else worst_p

    def possible(difference: float) -> float | None:
        return None if widest is not None and difference >= widest else float(difference)

    return Equivalence(margin, p, possible(smallest), float(largest), pair, possible(detectable), largest_error)
