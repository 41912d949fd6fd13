"""Does a parabola describe the scores at all?

Runs of one PLW and model differ by luck and noise alone. If the means of such runs lie further from the fitted curve
than that explains, the curve has another shape, and what is said of its peak, its ends and its range does not hold. It
is the textbook's F test of lack of fit, by the runs' means over these tasks (as `fixed_tasks`). Noise that runs of one
seed share makes it find a misfit too rarely.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from plw_mlflow.analysis.statistics.design import Grid

MISFIT = 0.01  # p below which a curve is taken not to fit


@dataclass(frozen=True)
class LackOfFit:
    """The F test of lack of fit."""

    statistic: float
    freedom: int  # degrees of freedom of the distances of PLWs from the curve
    free: int  # and of runs from the mean of their PLW and model
    p: float
    best_plw: float  # whose runs score best on average


def lack_of_fit(grid: Grid) -> LackOfFit | None:
    """Test whether the curve misses the means of runs; None without runs that differ in seed alone, or a spare PLW.

    Raises UserError as the fit of `fixed-tasks` does.
    """
    whole, _ = grid.of_these
    means = whole.scores.mean(-1)
    cells = whole.runs.drop(columns="seed").astype(str).agg("\n".join, axis=1)
    _, cell = np.unique(cells, return_inverse=True)
    runs, rank, groups = len(means), int(np.linalg.matrix_rank(whole.x)), int(cell.max()) + 1
    freedom, free = groups - rank, runs - groups
    if freedom < 1 or free < 1:
        return None
    residuals = means - whole.x @ np.linalg.lstsq(whole.x, means)[0]
    around = means - (np.bincount(cell, means) / np.bincount(cell))[cell]
    pure = float(around @ around)
    if pure <= 1e-24 * float(np.abs(means).max()) ** 2:
        return None
    statistic = (float(residuals @ residuals) - pure) / freedom / (pure / free)
    plws = np.unique(whole.runs["plw"])
    best = max(plws, key=lambda plw: float(means[whole.runs["plw"] == plw].mean()))
    return LackOfFit(statistic, freedom, free, float(special.fdtrc(freedom, free, statistic)), float(best))
