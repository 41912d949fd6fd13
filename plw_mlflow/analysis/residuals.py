"""What the tasks' own curves leave of the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from plw_mlflow.analysis.axes import MANY_POINTS, MOST_TASKS, clear_axes, transform_of
from plw_mlflow.analysis.statistics import design
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.drawing import (
    CURVE_BLUE,
    ZERO_GREY,
    new_figure,
    plain,
)


def residuals(fit: Fit, table: pd.DataFrame, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """What each task's own curve leaves of its scores: task, fitted, residual, standardised by the task's SD, sd.

    Tasks with too few runs for residuals are left out.
    """
    grid = design.grid(table, fit.dataset, transform_of(fit, table), also=by)
    parts = [pd.DataFrame(columns=["task", "fitted", "residual", "standardised", "sd"], dtype=float)]
    for column, task in enumerate(grid.tasks):
        scored = ~np.isnan(grid.scores[:, column])
        x, y = grid.x[scored], grid.scores[scored, column]
        b, _, rank, _ = np.linalg.lstsq(x, y)
        residual = y - x @ b
        if len(y) > rank and (sd := float(np.sqrt(residual @ residual / (len(y) - rank)))) > 0:
            columns = {"task": task, "fitted": x @ b, "residual": residual, "standardised": residual / sd, "sd": sd}
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def draw_residuals(left: pd.DataFrame) -> Figure:
    """What `residuals` gave: against fitted values, against a normal distribution, and their size by task."""
    sds = left.groupby("task")["sd"].first().sort_values()
    figure = new_figure(10.5, max(3.3, 1.1 + 0.17 * min(len(sds), MOST_TASKS)))
    scatter, quantiles, sizes = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    for axes, title in ((scatter, "Against fitted values"), (quantiles, "Normal quantiles"), (sizes, "Noise by task")):
        clear_axes(axes)
        axes.set_title(title, loc="left", fontsize=10)
    is_many = len(left) > MANY_POINTS
    style: dict[str, Any] = {"color": CURVE_BLUE, "markersize": 3.5, "alpha": 0.5, "mew": 0, "rasterized": is_many}
    scatter.plot(left["fitted"], left["residual"], "o", **style)
    scatter.axhline(0, color=ZERO_GREY, linewidth=0.8)
    scatter.set_xlabel("fitted score", fontsize=9)
    scatter.set_ylabel("residual", fontsize=9)
    ordered = np.sort(left["standardised"])
    expected = stats.norm.ppf((np.arange(len(ordered)) + 0.5) / len(ordered))
    quantiles.plot(expected, ordered, "o", **style)
    quantiles.axline((0, 0), slope=1, color=ZERO_GREY, linewidth=0.8)
    quantiles.set_xlabel("normal quantile", fontsize=9)
    quantiles.set_ylabel("residual over its task's SD", fontsize=9)
    if len(sds) <= MOST_TASKS:
        sizes.barh(range(len(sds)), sds, height=0.6, color=CURVE_BLUE, alpha=0.7)
        sizes.set_yticks(range(len(sds)), [plain(task, 22) for task in sds.index], fontsize=7.5)
        sizes.set_ylim(-0.8, max(len(sds), 4) - 0.2)  # a lone bar keeps its width
        sizes.grid(axis="y", visible=False)
    else:
        sizes.hist(sds, bins=20, color=CURVE_BLUE, alpha=0.7)
        sizes.set_ylabel("tasks", fontsize=9)
    sizes.set_xlim(left=0)
    sizes.set_xlabel("residual SD", fontsize=9)
    return figure
