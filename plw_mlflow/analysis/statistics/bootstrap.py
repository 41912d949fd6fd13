"""Is the best PLW stable when tasks, seeds or both are resampled?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.optimum import LEVEL, maximisers
from plw_mlflow.errors import UserError

Resampled = Literal["tasks", "seeds", "both"]


@dataclass(frozen=True)
class Bootstrap:
    """The best PLW of resampled scores."""

    over: Resampled
    draws: int
    interval: list[float]  # 95 % of the best PLWs within the range, an end where the curve is highest there
    interior: float  # share of draws with a maximum inside the range


def bootstrap_optimum(grid: Grid, over: Resampled = "tasks", draws: int = 2000, seed: int = 1234) -> Bootstrap:
    """Resample tasks, seeds (within each model and PLW), or both, and see where the mean curve is highest.

    With two seeds a cell, intervals over seeds are too narrow by a factor of about 1.4: resampling 2 of 2 halves a
    variance.

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
