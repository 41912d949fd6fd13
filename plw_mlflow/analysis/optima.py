"""Where each method, and each part of the scores, finds the best PLW: as a list, and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plw_mlflow.analysis.answers import Answer
from plw_mlflow.analysis.axes import clear_axes, mark_plws, percent
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.wording import highest_end
from plw_mlflow.drawing import (
    CURVE_BLUE,
    SURE_RED,
    UNSURE_GREY,
    new_figure,
    plain,
)
from plw_mlflow.transforms import Transform


@dataclass(frozen=True)
class OptimumEstimate:
    """Where one method finds the best PLW: a row of the figure of optima, and of the report's table."""

    group: str  # what kind of method, or of scores
    name: str
    method: str  # of the interval
    plw: float | None  # None without an interior optimum
    highest: float | None  # where the curve is highest within the range: that PLW, or an end; None where not known
    intervals: list[list[float]]  # of PLW, 95 %
    is_unbounded: bool  # whether they go on beyond the range
    interior: float | None  # probability of a maximum inside the range, or share of a bootstrap's draws
    is_lead: bool = False


def estimates(answer: Answer, fits: list[Fit]) -> list[OptimumEstimate]:
    """The best PLW by every model (`fits`, of the answer's data set), bootstrap, type of task and task."""
    rows = []
    for fit in fits:
        rows += _estimates_of_fit("Model", fit.model, fit, is_lead=fit.model == answer.lead.model)
    for bootstrap in answer.bootstraps:
        name = "tasks and seeds" if bootstrap.over == "both" else bootstrap.over
        ends, share = [bootstrap.interval], bootstrap.interior
        rows.append(OptimumEstimate("Bootstrap over", name, "percentiles", None, None, ends, False, share))
    for kind, fit in answer.by_type:
        rows += _estimates_of_fit("Type of task", f"{kind} ({fit.model})", fit)
    for curve in answer.by_task:
        ends = [] if curve.delta_interval is None else [curve.delta_interval]
        optimum, best, probability = curve.optimum_plw, curve.best_plw, curve.interior_probability
        rows.append(OptimumEstimate("Task", curve.task, "delta", optimum, best, ends, False, probability))
    return rows


def _estimates_of_fit(group: str, name: str, fit: Fit, is_lead: bool = False) -> list[OptimumEstimate]:
    """The best PLW by a fit, with the interval by each method that gives one."""
    shared: dict[str, Any] = {
        "plw": fit.optimum_plw,
        "highest": highest_end(fit) if fit.optimum_plw is None else fit.optimum_plw,
        "interior": fit.interior_probability,
        "is_lead": is_lead,
    }
    ends = [] if fit.delta_interval is None else [fit.delta_interval]
    delta = OptimumEstimate(group, name, "delta", intervals=ends, is_unbounded=False, **shared)
    if fit.optimum_set is None:
        return [delta]
    is_unbounded = fit.optimum_set_is_unbounded
    return [
        OptimumEstimate(group, name, "Fieller", intervals=fit.optimum_set, is_unbounded=is_unbounded, **shared),
        delta,
    ]


def interval_text(estimate: OptimumEstimate) -> str:
    """The interval of an estimate in words."""
    if not estimate.intervals:
        return "unbounded, none of it inside" if estimate.is_unbounded else "none inside"
    inside = " and ".join(f"{low:.3g} to {high:.3g}" for low, high in estimate.intervals)
    return f"{inside}, and on beyond: unbounded" if estimate.is_unbounded else inside


def estimate_rows(estimates: list[OptimumEstimate]) -> list[dict[str, Any]]:
    """Estimates as the table shows them: the intervals of one fit in one row."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for estimate in estimates:
        row = rows.setdefault((estimate.group, estimate.name), {"first": estimate, "delta": None, "fieller": None})
        row["fieller" if estimate.method == "Fieller" else "delta"] = estimate
    return list(rows.values())


def draw_optima(estimates: Sequence[OptimumEstimate], transform: Transform) -> Figure:
    """Where each method, and each part of the scores, finds the best PLW; intervals of one name share a row."""
    rows: dict[tuple[str, str], list[OptimumEstimate]] = {}
    for estimate in estimates:
        rows.setdefault((estimate.group, estimate.name), []).append(estimate)
    groups = list(dict.fromkeys(group for group, _ in rows))
    figure = new_figure(10, 0.9 + 0.25 * (len(rows) + 1.4 * len(groups)))
    axes = figure.add_subplot()
    clear_axes(axes)
    axes.grid(axis="y", visible=False)
    across = axes.get_yaxis_transform()  # x as a part of the axes, y a row
    labels: dict[float, str] = {}
    y, last_group = 0.0, ""
    for (group, name), of_row in rows.items():
        if group != last_group:
            y, last_group = y - 1.4, group
            axes.text(-0.01, y, group, transform=across, fontsize=9, fontweight="bold", ha="right", va="center")
        y -= 1
        labels[y] = plain(name, 34)
        _draw_row(axes, of_row, transform, y)
    axes.text(1.03, -1.4, "peak", transform=across, fontsize=8.5, va="center", color=UNSURE_GREY)
    axes.text(1.2, -1.4, "inside", transform=across, fontsize=8.5, va="center", ha="right", color=UNSURE_GREY)
    axes.set_ylim(y - 0.8, -0.6)
    mark_plws(axes, transform, width=0.9)
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    return figure


def _draw_row(axes: Axes, estimates: list[OptimumEstimate], transform: Transform, y: float) -> None:
    """The intervals of one name, the first thick, its best PLW as a marker, and both in numbers at the right."""
    first, across = estimates[0], axes.get_yaxis_transform()
    top = y + 0.11 * (len(estimates) - 1)
    colour = SURE_RED if first.is_lead else CURVE_BLUE
    for number, estimate in enumerate(estimates):
        height = top - 0.25 * number
        style: dict[str, Any] = {"color": colour, "clip_on": False, "alpha": 0.6 if number else 1}
        for ends in estimate.intervals:
            w = transform(ends)
            axes.plot(w, [height] * 2, linewidth=1.2 if number else 2.4, solid_capstyle="butt", **style)
            for end, limit, arrow in zip(w, transform.ends, "<>", strict=True):
                if estimate.is_unbounded and math.isclose(end, limit, abs_tol=1e-9):
                    axes.plot(end, height, arrow, markersize=5, **style)
    is_inside = first.plw is not None
    if first.highest is not None:
        marker, face = ("D", colour) if is_inside else ("o", "white")
        axes.plot(transform(first.highest), top, marker, ms=6, color=colour, mfc=face, zorder=5, clip_on=False)
    best = "" if first.highest is None else f"{first.plw:.3g}" if is_inside else "no peak"
    axes.text(1.03, y, best, transform=across, fontsize=8.5, va="center")
    probability = "" if first.interior is None else percent(first.interior)
    axes.text(1.2, y, probability, transform=across, fontsize=8.5, va="center", ha="right")
