"""Figures: how long the records of a data set are, and what its scores do along PLW with the curve fitted to them.

Tasks differ from each other far more than PLW moves any of them, so every task is centred: what is drawn is how
far a score lies from its own task's mean. The band is then that of the curve about its own mean, free of the
uncertainty of the intercept, which says how hard the tasks are and nothing of PLW.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from plw_mlflow.analyze import EXPONENT, LEVEL, SCORE, Fit
from plw_mlflow.profile import weights_text
from plw_mlflow.statistics.mixed import Array

# Okabe and Ito's colours, distinct to colour-blind readers; black is kept for means, and yellow is too pale for lines.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
MOST_NAMED = 20  # tasks; more names than these would leave the curve no room
LINES = ["-", "--", ":", "-."]
CURVE = "#1b3a5c"
CHARACTER = 0.0125  # width of a tick label's character, as a part of the axis


def plain(text: str, limit: int = 30) -> str:
    """A name from the data as matplotlib shows it literally: no formulas, not hidden, not wider than the figure."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return short.replace("$", r"\$").replace("_", " _", 1) if short.startswith("_") else short.replace("$", r"\$")


def tick_labels(plws: list[float], axis: float = 1.0) -> dict[float, str]:
    """w_p and label of the PLWs (ascending) that can be labelled without touching another; both ends always are.

    axis: the axis' width, as a part of that of `draw_curve`.
    """
    places = [(plw**EXPONENT, f"{plw:.2g}") for plw in plws]
    span = max(1.0, places[-1][0]) / axis

    def fits_beside(left: tuple[float, str], right: tuple[float, str]) -> bool:
        return right[0] - left[0] > span * CHARACTER * (1 + len(left[1]) / 2 + len(right[1]) / 2)

    shown = places[:1]
    for place in places[1:-1]:
        if fits_beside(shown[-1], place) and fits_beside(place, places[-1]):
            shown.append(place)
    return dict([*shown, places[-1]])


def centred(fit: Fit, table: pd.DataFrame) -> Array:
    """Each score's distance from its task's mean, about the mean of the curve.

    Where a task lacks a PLW its mean is that of the PLWs it has; the curve's own mean over these is given back.
    """
    curve = terms(table["plw"].to_numpy(float) ** EXPONENT) @ np.array(list(fit.coefficients.values()))
    residual = pd.Series(table["score"].to_numpy(float) - curve)
    residual -= residual.groupby(table["task"].to_numpy()).transform("mean")
    return curve - curve.mean() + residual.to_numpy()


def terms(w: Array) -> Array:
    """The curve's terms at each w_p: [n, 3]."""
    return np.column_stack([np.ones_like(w), w, w**2])


def draw_curve(fit: Fit, table: pd.DataFrame) -> bytes:
    """A PNG of one fit over the scores it came from (the rows of its data set, on its scale)."""
    table = table.sort_values(SCORE)
    w, distance = table["plw"].to_numpy(float) ** EXPONENT, centred(fit, table)
    figure = Figure(figsize=(9.5, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color="#9a9a9a", linewidth=0.8, zorder=1)

    tasks = sorted(table["task"].unique())
    for number, task in enumerate(tasks):
        mine = (table["task"] == task).to_numpy()
        line = LINES[number // len(COLOURS) % len(LINES)]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        aside = 0.025 * (number / max(1, len(tasks) - 1) - 0.5)  # so that points of one PLW do not hide each other
        axes.plot(w[mine] + aside, distance[mine], marker, color=colour, markersize=4.5, alpha=0.55, markeredgewidth=0)
        means = pd.Series(distance[mine]).groupby(w[mine]).mean()
        axes.plot(means.index, means, line, color=colour, linewidth=1, alpha=0.5)
        if len(tasks) <= MOST_NAMED:
            axes.plot([], [], marker, color=colour, linestyle=line, linewidth=1, markersize=5, label=plain(task))
    if len(tasks) > MOST_NAMED:
        axes.plot([], [], "o", color="#9a9a9a", markersize=5, label=f"{len(tasks)} tasks, coloured")

    range_w = np.linspace(0, max(1.0, w.max()), 201)
    contrast = terms(range_w) - terms(w).mean(axis=0)
    height = contrast @ np.array(list(fit.coefficients.values()))
    reach = stats.t.ppf(1 - LEVEL / 2, fit.degrees_of_freedom) * np.sqrt(
        np.einsum("ij,jk,ik->i", contrast, np.array(fit.covariance), contrast)
    )
    axes.fill_between(range_w, height - reach, height + reach, color=CURVE, alpha=0.18, linewidth=0, zorder=4)
    axes.plot(range_w, height, color=CURVE, linewidth=2.4, zorder=5, label="fitted curve, 95 % band")
    means = pd.Series(distance).groupby(w).mean()
    axes.plot(means.index, means, "o", color="black", markersize=6, zorder=6, label="mean over tasks")
    if fit.optimum_plw is not None and fit.optimum_interval is not None and fit.vertex_wp is not None:
        low, high = (plw**EXPONENT for plw in fit.optimum_interval)
        low_plw, high_plw = fit.optimum_interval
        colour, name = ("#B22222", "optimum") if fit.joint_p < LEVEL else ("#707070", "peak, perhaps chance:")
        label = f"{name} PLW {fit.optimum_plw:.3g}\n95 % interval {low_plw:.3g} to {high_plw:.3g}"
        top = axes.get_ylim()[1]
        axes.axvline(fit.vertex_wp, color=colour, linewidth=1.4, linestyle=(0, (4, 2)), zorder=3)
        axes.errorbar(
            fit.vertex_wp,
            top,
            xerr=[[fit.vertex_wp - low], [high - fit.vertex_wp]],
            fmt="D",
            color=colour,
            capsize=5,
            markersize=6,
            linewidth=1.6,
            clip_on=False,
            zorder=7,
            label=label,
        )
        axes.set_ylim(top=top)

    ticks = tick_labels(fit.plws)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([plw**EXPONENT for plw in fit.plws], minor=True)
    axes.tick_params(labelsize=9)
    axes.set_xlabel(f"prompt loss weight (PLW), spaced as w_p = PLW^{EXPONENT}")
    axes.set_ylabel("score minus its task's mean")
    figure.suptitle(plain(fit.dataset, 80), x=0.02, ha="left", fontsize=13, fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8.5, frameon=False)
    return _png(figure)


def draw_profile(found: Mapping[str, Any]) -> bytes:
    """A PNG of a length profile: how long the records are, and what part of the loss weight lies on their prompts."""
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, 3))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(0, 1)

    lengths = {f"{name}, bare": found["lengths"][name] for name in ("instruction", "input", "completion")}
    lengths["whole example, with template"] = found["lengths_with_template"]["example"]
    colours = [COLOURS[1], COLOURS[0], COLOURS[2], "black"]
    for (name, length), line, colour in zip(lengths.items(), ("--", ":", "-", "-"), colours, strict=True):
        shares = [float(quantile) for quantile in length["quantiles"]]
        label = f"{name}: mean {length['mean']:.1f}"
        left.step(
            list(length["quantiles"].values()), shares, line, where="post", color=colour, linewidth=2, label=label
        )
    cut = f"max-tokens {found['max_tokens']}: {found['longer_than_max_tokens']:.1%} are longer"
    left.axvline(found["max_tokens"], color="#B22222", linewidth=1.4, linestyle=(0, (4, 2)), label=cut)
    left.set_xscale("symlog", linthresh=1, linscale=0.5, base=4)
    left.set_xlim(left=0)
    left.xaxis.set_major_formatter("{x:.0f}")
    left.set_xlabel("tokens")
    left.set_ylabel("share of the records that are no longer")
    left.set_title("Lengths", loc="left", fontsize=11)
    figure.legend(loc="outside lower left", ncols=3, fontsize=8.5, frameon=False)

    shares_by_plw = {float(plw): share for plw, share in found["effective_prompt_share"].items()}
    w = np.array(list(shares_by_plw)) ** EXPONENT
    right.plot(w, list(shares_by_plw.values()), "-o", color=CURVE, linewidth=2, markersize=5)
    ticks = tick_labels(list(shares_by_plw), axis=0.6)
    right.set_xticks(list(ticks), list(ticks.values()))
    right.set_xlabel(f"prompt loss weight (PLW), spaced as w_p = PLW^{EXPONENT}")
    right.set_ylabel("prompts' share of the loss weight")
    right.set_title(f"What a PLW leaves to the prompts{weights_text(found)}", loc="left", fontsize=11)
    ratio = found["generation_ratio"]
    heading = plain(found["name"], 60) + ("" if ratio is None else f"   generation ratio {ratio:.3g}")
    figure.suptitle(heading, x=0.02, ha="left", fontsize=13, fontweight="bold")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
