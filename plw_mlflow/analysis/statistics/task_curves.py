"""The curve of each task by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.optimum import Parabola, maximisers
from plw_mlflow.transforms import CURVE_TERMS


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


def fit_task_curves(grid: Grid, types: dict[str, str] | None = None) -> list[TaskCurve]:
    """The curves of the tasks that have runs enough; p-values and intervals are each task's own, not corrected."""
    curves = []
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
        curves.append(
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
    return curves
