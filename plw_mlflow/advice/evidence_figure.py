"""The figure of an advice: the best PLW against the generation ratio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from plw_mlflow.advice.advise import Advice, Line
from plw_mlflow.advice.evidence import OWN, STUDY, VAUGHN, WIT, EvidencePoint
from plw_mlflow.drawing import CURVE_BLUE, DASHED, SURE_RED, clear_frame, new_figure, png
from plw_mlflow.transforms import EXPONENT, Array

STYLES: Mapping[str, tuple[str, str]] = {
    STUDY: ("#D55E00", "o"),
    WIT: ("#0072B2", "s"),
    VAUGHN: ("#009E73", "^"),
    OWN: (SURE_RED, "D"),
}
TICKS = (0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


def draw(advice: Advice) -> bytes:
    """A PNG of the evidence: the best PLW against the generation ratio, the line through it, and the advice."""
    figure = new_figure(9.5, 5.4)
    axes = figure.add_subplot()
    clear_frame(axes)
    axes.grid(axis="x", visible=False)
    ratios = [advice.ratio, *(point.ratio for point in advice.points)]
    lowest, highest = min(ratios) / 1.6, max(ratios) * 1.6
    if advice.line is not None:
        _draw_line(axes, advice.line, np.geomspace(lowest, highest, 101))
    _draw_points(axes, advice.points)
    _draw_advice(axes, advice)
    axes.set_xscale("log")
    axes.set_xlim(lowest, highest)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([plw**EXPONENT for plw in TICKS], [f"{plw:g}" for plw in TICKS])
    axes.set_xticks([ratio for ratio in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if lowest <= ratio <= highest])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("generation ratio: completion tokens over prompt tokens")
    axes.set_ylabel(f"best PLW, spaced as w_p = PLW^{EXPONENT}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8.5, frameon=False)
    heading = f"Best PLW at generation ratio {advice.ratio:.3g}"
    figure.suptitle(heading, x=0.02, ha="left", fontsize=13, fontweight="bold")
    return png(figure)


def _draw_line(axes: Axes, line: Line, ratios: Array) -> None:
    """The line through the data sets, in its two intervals."""
    for estimates, alpha, label in (
        ([line.next_one(ratio) for ratio in ratios], 0.10, "one more data set and model, 95 %"),
        ([line.mean(ratio) for ratio in ratios], 0.18, "mean over data sets, 95 %"),
    ):
        w, reach = np.array(estimates).T
        ends = np.clip([w - reach, w + reach], 0, 1)
        axes.fill_between(ratios, *ends, color=CURVE_BLUE, alpha=alpha, linewidth=0, label=label)
    axes.plot(ratios, np.clip(w, 0, 1), color=CURVE_BLUE, linewidth=2, label="line through the data sets")


def _draw_points(axes: Axes, points: Sequence[EvidencePoint]) -> None:
    """Each point with its interval; points of one ratio stand beside each other, in the order of the list."""
    at_ratio = Counter(point.ratio for point in points)
    drawn_at_ratio: Counter[float] = Counter()
    labelled: set[tuple[str, bool]] = set()
    for point in points:
        aside = 1.045 ** (drawn_at_ratio[point.ratio] - (at_ratio[point.ratio] - 1) / 2)
        drawn_at_ratio[point.ratio] += 1
        colour, marker = STYLES.get(point.study, ("#555555", "v"))
        label = point.study if point.is_located else f"{point.study}: anywhere"
        axes.errorbar(
            point.ratio * aside,
            point.w,
            yerr=[[max(0.0, point.w - point.low)], [max(0.0, point.high - point.w)]],
            fmt=marker,
            color=colour if point.is_located else "#b5b5b5",
            markerfacecolor=colour if point.is_located else "white",
            markersize=6,
            linewidth=1.2,
            label=None if (point.study, point.is_located) in labelled else label,
            clip_on=False,
        )
        labelled.add((point.study, point.is_located))


def _draw_advice(axes: Axes, advice: Advice) -> None:
    """The suggestion with its interval; without a suggestion, the whole range."""
    axes.axvline(advice.ratio, color="black", linewidth=1, linestyle=DASHED)
    w = float(np.clip(advice.w if advice.w is not None else 0.5, 0, 1))
    low, high = np.clip([advice.low, advice.high], 0, 1)
    axes.errorbar(
        advice.ratio,
        w,
        yerr=[[w - low], [high - w]],
        fmt="*" if advice.w is not None else "none",
        ecolor="black",
        color="black",
        markersize=14,
        capsize=6,
        linewidth=2,
        label="advice, 95 %",
        zorder=6,
        clip_on=False,
    )
