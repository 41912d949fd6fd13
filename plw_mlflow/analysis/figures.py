"""Figures of an analysis: scores along PLW with the curves fitted to them, and how large an effect may be.

Tasks differ from each other far more than PLW moves any of them, and so may models, so scores are centred: what is
drawn is how far a score lies from the mean of its own task and model. The band is then that of the curve about its own
mean, free of the uncertainty of the intercept, which says how hard the tasks are and nothing of PLW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from plw_mlflow.analysis import wording
from plw_mlflow.analysis.answers import Answer
from plw_mlflow.analysis.axes import (
    MANY_POINTS,
    MOST_TASKS,
    clear_axes,
    curve_coefficients,
    mark_plws,
    panels_of,
    transform_of,
)
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.analysis.statistics.task_curves import TaskCurve
from plw_mlflow.drawing import (
    COLOURS,
    CURVE_BLUE,
    DASHED,
    SURE_RED,
    UNSURE_GREY,
    ZERO_GREY,
    new_figure,
    plain,
)
from plw_mlflow.transforms import CURVE_TERMS, Array, Transform, curve_terms

DOTTED = (0, (1, 1.5))


def centred(fit: Fit, table: pd.DataFrame, by: tuple[str, ...] = ()) -> Array:
    """Each score's distance from the mean of its task and model, about the mean of the curve.

    by: further columns whose values have a level of their own, as in the analysis.

    Where a task lacks a PLW its mean is that of the PLWs it has; the curve's own mean over these is given back.
    """
    contrast = curve_terms(transform_of(fit, table)(table["plw"])) - fit.centre
    curve = contrast @ curve_coefficients(fit)
    residual = pd.Series(table["score"].to_numpy(float) - curve)
    levels = [table[column].to_numpy() for column in dict.fromkeys(["task", "model", *by])]
    residual -= residual.groupby(levels).transform("mean")
    return curve + residual.to_numpy()


def band(fit: Fit | TaskCurve, contrast: Array) -> tuple[Array, Array]:
    """The height of contrasts of a curve's terms, [n, 3], and the reach of the pointwise 95 % band around it.

    The degrees of freedom are the fewest of w_p and w_p^2, so the band is not too narrow for either.
    """
    freedom = fit.degrees_of_freedom
    if isinstance(freedom, dict):
        fewest = min(math.inf if (value := freedom[term]) is None else value for term in CURVE_TERMS)
    else:
        fewest = freedom
    variance = np.einsum("ij,jk,ik->i", contrast, np.array(fit.covariance)[:3, :3], contrast)
    return contrast @ curve_coefficients(fit), stats.t.ppf(1 - LEVEL / 2, fewest) * np.sqrt(np.maximum(variance, 0))


# ------------------------------------------------------------------------------------------------- the curves


def draw_curve(fit: Fit, table: pd.DataFrame, by: tuple[str, ...] = (), *, shows_effect: bool) -> Figure:
    """One fit over the scores it came from (the rows of its data set, on its scale), its optimum above them.

    shows_effect: whether an effect of PLW may be claimed, which is what red says.
    """
    figure = new_figure(10, 4.8)
    axes = figure.add_subplot()
    _draw_mean_curve(axes, fit, table, by)
    transform = transform_of(fit, table)
    mark_plws(axes, transform)
    axes.set_ylabel("score minus its mean", fontsize=9.5)
    _mark_optimum(axes, fit, transform, shows_effect)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False, labelspacing=0.9)
    return figure


def draw_answer(answer: Answer, these: Fit | None, table: pd.DataFrame, by: tuple[str, ...] = ()) -> Figure:
    """The curve with a band for each question that was answered, small enough to be read on a phone.

    these: the fit that answers for these tasks, None where there is none. The marks above the axes are of that answer.
    """
    fit = answer.lead if these is None else these
    transform = transform_of(fit, table)
    figure = new_figure(4.6, 3.5)
    axes = figure.add_subplot()
    clear_axes(axes)
    axes.axhline(0, color=ZERO_GREY, linewidth=0.8, zorder=1)
    w = np.linspace(*transform.ends, 201)
    bands = ((answer.other_tasks, answer.lead, 0.14, "others like them"), (answer.these_tasks, fit, 0.3, "these tasks"))
    for finding, of_band, alpha, name in bands:
        if finding.kind != "untold":
            height, reach = band(of_band, curve_terms(w) - of_band.centre)
            label = f"95 % band for {name}"
            axes.fill_between(
                w, height - reach, height + reach, color=CURVE_BLUE, alpha=alpha, linewidth=0, label=label
            )
    axes.plot(w, band(fit, curve_terms(w) - fit.centre)[0], color=CURVE_BLUE, linewidth=2.2, label="fitted curve")
    at = pd.Series(centred(fit, table, by)).groupby(transform(table["plw"])).mean()
    axes.plot(at.index, at, "o", color="black", markersize=4.5, label="mean score")
    found = answer.these_tasks
    if found.peak_plw is not None:
        colour, best = SURE_RED if found.kind == "yes" else UNSURE_GREY, float(transform(found.peak_plw))
        above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": colour}
        axes.axvline(best, color=colour, linewidth=1.2, linestyle=DASHED, zorder=3)
        for ends in found.interval or []:
            axes.plot(transform(ends), [1.03, 1.03], linewidth=3, solid_capstyle="butt", **above)
        axes.plot(best, 1.03, "D", markersize=6, **above)
        axes.plot([], [], "D-", color=colour, markersize=5, linewidth=3, label="peak, 95 % interval")
    mark_plws(axes, transform, width=0.46, label="prompt loss weight (PLW)")
    axes.set_ylabel("score minus its mean", fontsize=9)
    if all(finding.kind == "untold" for finding in answer.findings):
        axes.set_title("these runs cannot tell", loc="left", fontsize=9, color=UNSURE_GREY)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    return figure


def _mark_optimum(axes: Axes, fit: Fit, transform: Transform, shows_effect: bool) -> None:
    """The optimum as a dashed line, and above the axes its intervals by both methods; nothing without an optimum."""
    if fit.optimum_plw is None or fit.delta_interval is None:
        return
    colour, name = (SURE_RED, "optimum") if shows_effect else (UNSURE_GREY, "peak, perhaps chance:")
    if fit.has_too_few_runs:
        name = "peak, with too few runs to tell:"
    label = f"{name} PLW {fit.optimum_plw:.3g}"
    best = float(transform(fit.optimum_plw))
    axes.axvline(best, color=colour, linewidth=1.4, linestyle=DASHED, zorder=3)
    above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": colour}
    axes.plot(best, 1.03, "D", markersize=7, **above)
    if fit.has_too_few_runs:
        axes.plot([], [], "D", color=colour, markersize=6, label=label)
        return
    for ends in fit.optimum_set or []:
        w = transform(ends)
        axes.plot(w, [1.03, 1.03], linewidth=3, solid_capstyle="butt", **above)
        for end, limit, arrow in zip(w, transform.ends, "<>", strict=True):
            if fit.optimum_set_is_unbounded and math.isclose(end, limit, abs_tol=1e-9):
                axes.plot(end, 1.03, arrow, markersize=7, **above)
    label += f"\n95 %: {wording.interval(fit).replace(' or ', chr(10) + 'or ')}"
    axes.plot([], [], "D-", color=colour, markersize=6, linewidth=3, label=label)
    low, high = fit.delta_interval
    axes.plot(transform(fit.delta_interval), [1.075, 1.075], "|-", linewidth=1.2, markersize=6, **above)
    label = f"by the delta method:\n{low:.3g} to {high:.3g}"
    axes.plot([], [], "|-", color=colour, markersize=6, linewidth=1.2, label=label)


def draw_overview(answers: Sequence[Answer], table: pd.DataFrame, by: tuple[str, ...] = ()) -> Figure:
    """The curves of several data sets side by side, on one axis of scores; `table` is on their scale."""
    columns = min(3, len(answers))
    figure = new_figure(10.5, 3.1 * math.ceil(len(answers) / columns))
    for axes, answer in zip(panels_of(figure, len(answers), columns), answers, strict=True):
        fit = answer.lead
        of_dataset = table[table["dataset"] == fit.dataset]
        transform = transform_of(fit, of_dataset)
        _draw_mean_curve(axes, fit, of_dataset, by, with_tasks=False)
        mark_plws(axes, transform, width=1.3 / columns, label="PLW")
        if fit.optimum_plw is not None:
            colour = SURE_RED if answer.shows_effect else UNSURE_GREY
            for ends in [] if fit.has_too_few_runs else fit.optimum_set or []:
                axes.axvspan(*transform(ends), color=colour, alpha=0.08, linewidth=0)
            axes.axvline(float(transform(fit.optimum_plw)), color=colour, linewidth=1.3, linestyle=DASHED)
        axes.set_title(plain(fit.dataset), loc="left", fontsize=11, fontweight="bold")
    figure.supylabel("score minus its mean", fontsize=9.5)
    return figure


def _draw_mean_curve(
    axes: Axes, fit: Fit, table: pd.DataFrame, by: tuple[str, ...], *, with_tasks: bool = True
) -> None:
    """A fit's curve with its band over the means of the scores at each PLW."""
    transform = transform_of(fit, table)
    means = pd.DataFrame(
        {"distance": centred(fit, table, by), "w": transform(table["plw"]), "task": table["task"].array}
    )
    clear_axes(axes)
    axes.axhline(0, color=ZERO_GREY, linewidth=0.8, zorder=1)
    if with_tasks:
        for number, (_, of_task) in enumerate(means.groupby("task")):
            at = of_task.groupby("w")["distance"].mean()
            tasks = table["task"].nunique()
            label = "" if number else f"each of {tasks} tasks" if tasks > 1 else "the task"
            axes.plot(at.index, at, "-", color="#aab0ba", linewidth=0.9, alpha=0.8, zorder=2, label=label)
    w = np.linspace(*transform.ends, 201)
    height, reach = band(fit, curve_terms(w) - fit.centre)
    label = "fitted curve"
    if not fit.has_too_few_runs:
        axes.fill_between(w, height - reach, height + reach, color=CURVE_BLUE, alpha=0.18, linewidth=0, zorder=4)
        label += ", 95 % band"
    axes.plot(w, height, color=CURVE_BLUE, linewidth=2.4, zorder=5, label=label)
    at = means.groupby("w")["distance"].mean()
    axes.plot(at.index, at, "o", color="black", markersize=5.5, zorder=6, label="mean of all scores")


def draw_tasks(answer: Answer, table: pd.DataFrame, by: tuple[str, ...] = ()) -> Figure:
    """A panel per task, on one axis of scores: its scores, its own curve and peak, and the curve of all tasks."""
    fit, transform = answer.lead, transform_of(answer.lead, table)
    task_curves = {curve.task: curve for curve in answer.by_task}
    table = table.assign(w=transform(table["plw"]), distance=centred(fit, table, by))
    tasks, models = sorted(table["task"].unique())[:MOST_TASKS], sorted(table["model"].unique())
    colours = {model: COLOURS[i % len(COLOURS)] if len(models) > 1 else "#7d8590" for i, model in enumerate(models)}
    columns = min(4, len(tasks))
    figure = new_figure(10.5, 0.9 + 2.2 * math.ceil(len(tasks) / columns))
    panels = panels_of(figure, len(tasks), columns)
    w = np.linspace(*transform.ends, 101)
    mean, _ = band(fit, curve_terms(w) - fit.centre)
    low, high = table.loc[table["task"].isin(tasks), "distance"].agg(["min", "max"])
    top = high + 0.15 * (high - low)  # room for the peak's interval
    panels[0].set_ylim(low - 0.05 * (high - low), top + 0.05 * (high - low))
    for number, (axes, task) in enumerate(zip(panels, tasks, strict=True)):
        of_task = table[table["task"] == task]
        clear_axes(axes)
        axes.axhline(0, color=ZERO_GREY, linewidth=0.7, zorder=1)
        for model, part in of_task.groupby("model"):
            style: dict[str, Any] = {"color": colours[model], "ms": 3.2, "alpha": 0.8, "mew": 0}
            axes.plot(part["w"], part["distance"], "o", rasterized=len(table) > MANY_POINTS, **style)
        axes.plot(w, mean, color="black", linewidth=1, linestyle=DOTTED, zorder=4)
        caption = "too few scores for a curve"
        if (curve := task_curves.get(task)) is not None:
            _draw_task_curve(axes, curve, transform, curve_terms(of_task["w"].to_numpy()).mean(0), top)
            caption = f"{'peaks' if curve.optimum_plw is not None else 'highest'} at {curve.best_plw:.2g}"
            caption += f", p = {curve.joint_p:.1g}"
        axes.set_title(plain(task, 26), loc="left", fontsize=9, fontweight="bold", pad=15)
        axes.text(0, 1.04, caption, transform=axes.transAxes, fontsize=8, color="#55555a")
        mark_plws(axes, transform, width=1.5 / columns, label="" if number < len(tasks) - columns else "PLW")
        axes.tick_params(labelsize=7.5)
    for model in models if len(models) > 1 else []:
        panels[0].plot([], [], "o", color=colours[model], markersize=5, label=plain(model))
    _label_task_lines(panels[0])
    figure.legend(loc="outside lower left", ncols=4, fontsize=8.5, frameon=False)
    figure.supylabel("score minus its mean", fontsize=9)
    return figure


def _draw_task_curve(axes: Axes, curve: TaskCurve, transform: Transform, centre: Array, top: float) -> None:
    """A task's own curve about its mean over `centre`, with its band; its peak and the peak's interval at `top`."""
    w = np.linspace(*transform.ends, 101)
    height, reach = band(curve, curve_terms(w) - centre)
    axes.fill_between(w, height - reach, height + reach, color=CURVE_BLUE, alpha=0.15, linewidth=0)
    axes.plot(w, height, color=CURVE_BLUE, linewidth=1.7)
    if curve.optimum_plw is not None and curve.delta_interval is not None:
        colour, best = SURE_RED if curve.joint_p < LEVEL else UNSURE_GREY, float(transform(curve.optimum_plw))
        axes.plot(transform(curve.delta_interval), [top, top], color=colour, linewidth=1.4)
        axes.plot(best, top, "D", color=colour, markersize=4.5)
        axes.axvline(best, color=colour, linewidth=0.9, linestyle=DASHED, zorder=2)


def _label_task_lines(axes: Axes) -> None:
    """Entries of the legend for the lines that every panel has."""
    peak = "the task's peak, 95 % by the delta method (red where p < 0.05)"
    axes.plot([], [], color=CURVE_BLUE, linewidth=1.7, label="the task's own curve, 95 % band")
    axes.plot([], [], color="black", linewidth=1, linestyle=DOTTED, label="curve of all tasks")
    axes.plot([], [], "D-", color=UNSURE_GREY, markersize=4.5, label=peak)


# --------------------------------------------------------------------------------------------- the effect's size


def draw_no_effect(answers: Sequence[Answer]) -> Figure:
    """How large an effect of PLW may be, by data set: what was found, what is not ruled out, what could be found.

    A bar that leaves the figure goes to the end of the scores' scale.
    """
    shown = [(answer.dataset, equal) for answer in answers if (equal := answer.equivalence) is not None]
    sizes = [
        size
        for _, equal in shown
        for size in (equal.smallest_margin, equal.detectable, equal.largest_difference, equal.margin)
        if size is not None
    ]
    right = 1.06 * max(sizes)
    figure = new_figure(10, 1.2 + 0.45 * len(shown))
    axes = figure.add_subplot()
    clear_axes(axes)
    axes.grid(axis="y", visible=False)
    names = ("not ruled out at 0.05", "largest difference found", "would be found in 4 of 5 such studies")
    for number, (_, equal) in enumerate(shown):
        not_ruled_out, largest, detectable = names if number == 0 else ("", "", "")
        bar = 2 * right if equal.smallest_margin is None else equal.smallest_margin
        axes.barh(-number, bar, height=0.5, color=CURVE_BLUE, alpha=0.16, label=not_ruled_out)
        axes.plot(equal.largest_difference, -number, "D", color=CURVE_BLUE, markersize=7, label=largest)
        would_be = [] if equal.detectable is None else [equal.detectable] * 2
        axes.plot(
            would_be, [-number - 0.3, -number + 0.3][: len(would_be)], color=COLOURS[0], linewidth=3, label=detectable
        )
    margin = next((equal.margin for _, equal in shown if equal.margin is not None), None)
    if margin is not None:
        axes.axvline(margin, color=SURE_RED, linewidth=1.4, linestyle=DASHED, label="margin given")
    axes.set_yticks([-number for number in range(len(shown))], [plain(dataset) for dataset, _ in shown])
    axes.set_ylim(0.5 - len(shown), 0.5)
    axes.set_xlim(0, right)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_xlabel("difference of scores between two PLWs", fontsize=9)
    figure.legend(loc="outside lower left", ncols=4, fontsize=8.5, frameon=False)
    return figure
