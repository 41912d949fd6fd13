"""What the figures of an analysis share."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.task_curves import TaskCurve
from plw_mlflow.drawing import (
    clear_frame,
    tick_labels,
)
from plw_mlflow.transforms import EXPONENT, TERMS, Array, Transform, make_transform

MOST_TASKS = 48  # that are drawn each by itself: more would be too small to read, or too long a page
MANY_POINTS = 3000  # from which on an SVG holds them as one picture: each by itself would take megabytes
SPACING = {
    "w_p": f"spaced as w_p = PLW^{EXPONENT}",
    "plw": "spaced as it is",
    "logit": "spaced by its logit",
    "rank": "those tried equally spaced",
    "share": "spaced by the prompts' share of the loss weight",
    "w_share": f"spaced by the prompts' share of the loss weight, to the {EXPONENT}",
    "w_odds": f"spaced by the prompts' loss weight over the completions', to the {EXPONENT}",
}


def percent(share: float) -> str:
    """A probability as a text that never makes it certain by rounding."""
    return "> 99 %" if 0.995 <= share < 1 else "< 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def transform_of(fit: Fit, table: pd.DataFrame) -> Transform:
    """The transform of a fit; `table` has its data set's rows, as ranks are of all PLWs tried."""
    return make_transform(fit.axis, table["plw"], fit.prompt_odds)


def panels_of(figure: Figure, count: int, columns: int) -> list[Axes]:
    """A grid of axes that share their axis of scores."""
    panels: list[Axes] = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False, sharey=True).flat)
    for axes in panels[count:]:
        axes.remove()
    return panels[:count]


def clear_axes(axes: Axes) -> None:
    """Axes without a frame, with small tick labels."""
    clear_frame(axes)
    axes.tick_params(labelsize=8.5)


def mark_plws(axes: Axes, transform: Transform, width: float = 1.0, label: str | None = None) -> None:
    """Mark the PLWs tried. width: of the axes, as a part of that of `draw_curve`."""
    ticks = tick_labels(transform, width)
    low, high = transform.ends
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks(transform(transform.plws), minor=True)
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"prompt loss weight (PLW), {SPACING[transform.name]}" if label is None else label, fontsize=9)


def curve_coefficients(fit: Fit | TaskCurve) -> Array:
    """Of the curve's terms: [3]. Others, such as a model's level, are left out."""
    return np.array([fit.coefficients[term] for term in TERMS])
