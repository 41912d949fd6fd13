"""Advice: which PLW for a data set of that generation ratio, how sure that is, and what it rests on.

The generation ratio belongs to the data set, so the data set is the unit: the curves of one (of several models, or
types of task) are pooled first, and a line over the logarithm of the ratio is laid through the data sets (random
effects, `pooling.py`). What it says of one more data set and model is a prediction interval. A person's own runs on the
very data set are then weighed against it, each by its precision, which lets them decide wherever they locate the best
PLW at all.

All of it on w_p = PLW^0.30103 within PLW 0..1.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from plw_mlflow.advice.evidence import OWN, STUDY, VAUGHN, WIT, Point, to_plw
from plw_mlflow.advice.pooling import Pooled, pool
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.data.profile import Profile
from plw_mlflow.environment import outputs
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation.task_sets import TASK_TYPES
from plw_mlflow.transforms import EXPONENT, Array

SCHEMA = "plw_mlflow.advice/1"
WIDE, WHOLE = 0.5, 0.95  # widths of an interval of w_p that are called wide, and the whole range
NORMAL = float(stats.norm.ppf(1 - LEVEL / 2))
FILES = ("advice.json", "advice.png")
IN_PRINT = (
    "In print the two large studies disagree in sign: the study saw an effect of PLW on the data set with short "
    "completions and none on those with long ones; WIT found its best prompt weight to rise with the generation ratio "
    "(rank correlation 0.5, over three data sets)."
)
LONG_GENERATION = (
    "No table has tasks of long generation alone. The study's fourth version says, without scores, that AlpacaEval and "
    "PandaLM rise up to PLW 1 on short completions."
)


@dataclass(frozen=True)
class DataSet:
    """The located points of one data set in one study, as one."""

    study: str
    dataset: str
    ratio: float
    points: int
    w: float
    variance: float


@dataclass(frozen=True)
class Slope:
    """How one study's best w_p moves for a tenfold generation ratio, by its own data sets alone."""

    study: str
    datasets: int
    slope: float
    low: float  # 95 %
    high: float


@dataclass(frozen=True)
class Line:
    """The line through all data sets: what it says of their mean, and of one more data set and model."""

    datasets: list[DataSet]
    pooled: Pooled  # intercept, and slope for a tenfold ratio
    tau2_models: float  # variance between models, and types of task, on one data set

    def mean(self, ratio: float) -> tuple[float, float]:
        """w_p at a ratio, and half its 95 % interval."""
        return self.pooled.mean(_row(ratio))

    @property
    def slope(self) -> tuple[float, float]:
        """How far w_p moves for a tenfold ratio, and half its 95 % interval."""
        return self.pooled.mean(np.array([0.0, 1.0]))

    def next_one(self, ratio: float) -> tuple[float, float]:
        """w_p of one more data set and model, and half the 95 % prediction interval."""
        return self.pooled.next_point(_row(ratio), beside=self.tau2_models)


@dataclass(frozen=True)
class Advice:
    """A suggestion and what it rests on; w_p may lie outside 0..1 where the line goes there, PLWs do not.

    The interval is for this data set and one model on it. The mean over data sets and models is surer.
    """

    ratio: float
    dataset: str | None  # the data set asked about, where it has a name
    task_types: tuple[str, ...]
    w: float | None  # None where there is no evidence
    low: float
    high: float
    line: Line | None
    own: Point | None  # of the person's own runs on this very data set
    own_share: float  # of the precision behind the suggestion
    slopes: list[Slope]
    points: list[Point]

    @property
    def plw(self) -> float | None:
        """The suggested PLW."""
        return None if self.w is None else to_plw(self.w)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return to_plw(self.low), to_plw(self.high)

    @property
    def width(self) -> float:
        """Of the interval, on w_p within 0..1."""
        return float(np.ptp(np.clip([self.low, self.high], 0, 1)))

    @property
    def mean_interval(self) -> tuple[float, float]:
        """95 % interval of the PLW that is best on average over other data sets of this ratio, and models."""
        w, reach = (0.5, 0.5) if self.line is None else self.line.mean(self.ratio)
        return to_plw(w - reach), to_plw(w + reach)

    @property
    def is_located(self) -> bool:
        """Whether the evidence rules out any part of 0..1 to speak of, if only on average."""
        low, high = self.mean_interval
        return self.w is not None and min(self.width, high**EXPONENT - low**EXPONENT) < WHOLE


def advise(
    ratio: float, points: Sequence[Point], *, dataset: Sequence[str] = (), task_types: Sequence[str] = ()
) -> Advice:
    """Advice for a generation ratio, from points of evidence.

    dataset: names of the data set asked about, if any; own runs on it are set against what the others say.
    """
    if not 0 < ratio < math.inf:
        raise UserError(f"the generation ratio must be a number above 0, got {ratio}")
    mine = [point for point in points if point.study == OWN and point.dataset in dataset]
    own = mine[0] if mine else None
    line = fit_line([point for point in points if point is not own])
    w, low, high, share = None, 0.0, 1.0, 0.0
    if line is not None:
        w, reach = line.next_one(ratio)
        low, high = w - reach, w + reach
    if own is not None and own.is_located:
        # A t interval stands for the normal of the same width, so that few data sets do not pass for many.
        precisions = np.array([0.0 if w is None else (NORMAL / (high - w)) ** 2, 1 / own.variance])
        share = float(precisions[1] / precisions.sum())
        w = (1 - share) * (w or 0.0) + share * own.w
        reach = NORMAL / math.sqrt(precisions.sum())
        low, high = w - reach, w + reach
    name = dataset[0] if dataset else None
    return Advice(ratio, name, tuple(task_types), w, low, high, line, own, share, _slopes(points), list(points))


def measured_ratio(profile: Profile) -> float:
    """The generation ratio of a length profile. Raises UserError where prompts or completions have no tokens."""
    if not profile.generation_ratio:
        raise UserError(f"{profile.name} has no generation ratio: its prompts or completions are empty; give --ratio")
    return profile.generation_ratio


def check_types(task_types: Sequence[str]) -> tuple[str, ...]:
    """The types of task. Raises UserError where one is none of TASK_TYPES."""
    if unknown := [name for name in task_types if name not in TASK_TYPES]:
        raise UserError(f"task-types must be among {', '.join(TASK_TYPES)}, got {', '.join(unknown)}")
    return tuple(task_types)


def fit_line(points: Sequence[Point]) -> Line | None:
    """The line through the data sets of the located points; None where there are fewer than 3 or all of one ratio."""
    datasets, tau2 = by_dataset(points)
    if len(datasets) < 3 or np.ptp([math.log10(one.ratio) for one in datasets]) == 0:
        return None
    x = np.array([_row(one.ratio) for one in datasets])
    pooled = pool(np.array([one.w for one in datasets]), np.array([one.variance for one in datasets]), x)
    return Line(datasets, pooled, tau2)


def by_dataset(points: Sequence[Point]) -> tuple[list[DataSet], float]:
    """The located points pooled over each data set's curves, and the variance between curves of one data set.

    That variance is taken as the same everywhere, so that a data set with one curve is not the surest of all.
    """
    located = [point for point in points if point.is_located]
    keys = list(dict.fromkeys((point.study, point.dataset) for point in located))
    which = np.array([keys.index((point.study, point.dataset)) for point in located], int)
    w, variances = np.array([point.w for point in located]), np.array([point.variance for point in located])
    tau2 = pool(w, variances, np.eye(len(keys))[which]).tau2 if len(located) > len(keys) else 0.0
    found = []
    for number, (study, dataset) in enumerate(keys):
        weights = np.where(which == number, 1 / (variances + tau2), 0.0)
        ratio = located[int(np.argmax(which == number))].ratio
        mean = float(weights @ w / weights.sum())
        found.append(DataSet(study, dataset, ratio, int((which == number).sum()), mean, 1 / float(weights.sum())))
    return found, tau2


def _slopes(points: Sequence[Point]) -> list[Slope]:
    """Each study's own slope, of those with located points at two ratios or more; errors as known, nothing beyond."""
    datasets, _ = by_dataset(points)
    slopes = []
    for study in dict.fromkeys(one.study for one in datasets):
        here = [one for one in datasets if one.study == study]
        x = np.array([math.log10(one.ratio) for one in here])
        if len(here) < 2 or np.ptp(x) == 0:
            continue
        weights = np.array([1 / one.variance for one in here])
        x -= weights @ x / weights.sum()
        information = float(weights @ x**2)
        slope, reach = float(weights * x @ [one.w for one in here]) / information, NORMAL / math.sqrt(information)
        slopes.append(Slope(study, len(here), slope, slope - reach, slope + reach))
    return slopes


def _row(ratio: float) -> Array:
    return np.array([1.0, math.log10(ratio)])


# --------------------------------------------------------------------------------------------------- telling


def sentences(advice: Advice) -> list[str]:
    """The advice in words: first what to do, then how sure that is and why."""
    low, high = advice.interval
    if advice.w is None:
        told = ["There is no evidence of a best PLW: any PLW from 0 to 1 will do; 0 is fine."]
    elif not advice.is_located:
        told = [
            "The evidence does not tell which PLW is best for such a data set: any PLW from 0 to 1 may be.",
            f"The middle of what is known is {advice.plw:.2g}, which is worth little.",
        ]
    else:
        told = [f"Suggested PLW {advice.plw:.2g}, 95 % interval {low:.2g} to {high:.2g}."]
        if advice.width >= WHOLE:
            told.append("The interval is the whole range: this is a guess to start from, and only runs would tell.")
        else:
            wide = "That is a wide interval, which rules out little; " if advice.width > WIDE else ""
            told.append(f"{wide}PLW 0 lies {'within' if low == 0 else 'outside'} it.")
    told += [*_own_words(advice), *_nearest_words(advice)]
    if advice.line is not None:
        told += _line_words(advice, advice.line)
    told += _slope_words(advice.slopes)
    studies = {point.study for point in advice.points}
    if {STUDY, WIT} <= studies:
        told.append(IN_PRINT)
    if advice.task_types:
        of_types = f"on {' and '.join(advice.task_types)} tasks"
        told.append(
            f"The evidence is {of_types} where a table tells tasks apart"
            + ("; WIT's averages of five benchmarks do not." if WIT in studies else ".")
        )
        if "long-generation" in advice.task_types:
            told.append(LONG_GENERATION)
    curves = Counter((point.study, point.dataset) for point in advice.points)
    flat = Counter((point.study, point.dataset) for point in advice.points if not point.is_located)
    if flat:
        listed = ", ".join(f"{dataset} ({n} of {curves[study, dataset]})" for (study, dataset), n in flat.items())
        told.append(f"No evidence are curves that could be flat, or highest anywhere: of {listed}.")
    guessed = sorted({point.dataset for point in advice.points if point.ratio_is == "guessed"})
    if guessed:
        told.append(f"Nobody has printed the generation ratio of {', '.join(guessed)}, which is guessed.")
    return told


def _own_words(advice: Advice) -> list[str]:
    own = advice.own
    if own is None:
        return []
    if not own.is_located:
        if own.has_too_few_runs:
            return [f"Your own runs on {own.dataset} are too few to tell; what is suggested rests on other data."]
        assert own.p is not None
        seen = "an effect of PLW, but not which is best" if own.p < LEVEL else "no clear effect of PLW"
        return [f"Your own runs on {own.dataset} show {seen} (p = {own.p:.2g}); what is suggested rests on other data."]
    return [f"Your own runs on {own.dataset} put it at {_best(own)} and have {advice.own_share:.0%} of the weight."]


def _nearest_words(advice: Advice) -> list[str]:
    """Of the data sets of others, the one whose ratio is nearest to that asked."""
    others = [point for point in advice.points if point.study != OWN]
    if not others:
        return []
    nearest = min(others, key=lambda point: abs(math.log(point.ratio / advice.ratio)))
    here = [point for point in others if (point.study, point.dataset) == (nearest.study, nearest.dataset)]
    found = [f"{_best(one)} by {one.what}{_p(one)}" for one in here if one.is_located]
    if flat := len(here) - len(found):
        found.append(f"anywhere by {flat} curve{'s' * (flat > 1)}" + (_p(here[0]) if len(here) == 1 else ""))
    return [f"The nearest in ratio is {_named(nearest)} ({nearest.ratio:.2g}); best PLW: {'; '.join(found)}."]


def _named(point: Point) -> str:
    return f"{point.dataset} of {point.study}"


def _p(point: Point) -> str:
    if point.p is None:
        return ""
    if point.has_too_few_runs:
        return " (too few runs to tell)"
    alone = ", of these tasks alone" if point.fit in ("lmm", "ols-task") else ""
    return f" (p = {point.p:.2g} for no effect by {point.fit}{alone})"


def _best(point: Point) -> str:
    low, high = point.interval
    return f"{point.plw:.2g} ({low:.2g} to {high:.2g})"


def _line_words(advice: Advice, line: Line) -> list[str]:
    (w, reach), (low, high) = line.next_one(advice.ratio), advice.mean_interval
    ratios = [one.ratio for one in line.datasets]
    told = [
        f"By {len(ratios)} other data sets, the best PLW at ratio {advice.ratio:.3g} is {to_plw(w):.2g} on average "
        f"({low:.2g} to {high:.2g}); for one more data set and model it may be {to_plw(w - reach):.2g} to "
        f"{to_plw(w + reach):.2g}, as the best w_p differs by {math.sqrt(line.tau2_models):.2f} (SD) between models "
        f"and types of task on one data set and by {math.sqrt(line.pooled.tau2):.2f} between data sets of one ratio."
    ]
    if not min(ratios) <= advice.ratio <= max(ratios):
        told.append(f"That is beyond the ratios there is evidence for, {min(ratios):.2g} to {max(ratios):.2g}.")
    slope, reach = line.slope
    told.append(
        f"All together, w_p of the best PLW moves by {_span(slope, slope - reach, slope + reach)} for a tenfold ratio"
        + ("." if abs(slope) > reach else ", which could be either way or none.")
    )
    return told


def _slope_words(slopes: Sequence[Slope]) -> list[str]:
    if not slopes:
        return []
    listed = "; ".join(
        f"{one.study} {_span(one.slope, one.low, one.high)} from {one.datasets} data sets" for one in slopes
    )
    rising, falling = [s for s in slopes if s.slope > 0], [s for s in slopes if s.slope < 0]
    told = f"Study by study, for a tenfold ratio: {listed}."
    if not any(one.low > 0 or one.high < 0 for one in slopes):
        told += " Not one is sure of its sign."
    if rising and falling:
        is_sure = any(s.low > 0 for s in rising) and any(s.high < 0 for s in falling)
        names = [" and ".join(s.study for s in side) for side in (rising, falling)]
        told = (
            f"By their points the studies disagree in sign{'' if is_sure else ', though not surely'}: the best PLW "
            f"rises with the generation ratio by {names[0]} and falls by {names[1]}. {told}"
        )
    return [told]


def _span(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def text(advice: Advice) -> str:
    """The advice as the terminal shows it: the words, then the evidence."""
    name = f" ({advice.dataset})" if advice.dataset else ""
    lines = [f"Data set of generation ratio {advice.ratio:.3g}{name}", "", *sentences(advice), ""]
    columns = [("ratio", 8), ("best PLW (95 %)", 24), ("p", 8), ("data set of study: model, scores", 0)]
    lines.append("  ".join(f"{title:{width}}" for title, width in columns).rstrip())
    for point in sorted(advice.points, key=lambda point: point.ratio):
        best = _best(point) if point.is_located else "anywhere"
        p = "" if point.p is None else "few runs" if point.has_too_few_runs else f"{point.p:.2g}"
        mark = "~" if point.ratio_is == "guessed" else ""
        shown = [f"{mark}{point.ratio:.3g}", best, p, f"{_named(point)}: {point.what}"]
        lines.append("  ".join(f"{part:{width}}" for part, (_, width) in zip(shown, columns, strict=True)).rstrip())
    lines.append("p is of no effect of PLW at all, where runs are not too few to tell; ~ is a guess.")
    return "\n".join(lines)


def to_json(advice: Advice) -> dict[str, Any]:
    """What `advice.json` holds; an infinite variance is null."""
    line = advice.line
    return {
        "schema": SCHEMA,
        "exponent": EXPONENT,
        "generation_ratio": advice.ratio,
        "dataset": advice.dataset,
        "task_types": list(advice.task_types),
        "suggested_plw": advice.plw,
        "interval": list(advice.interval),
        "mean_interval": list(advice.mean_interval),
        "is_located": advice.is_located,
        "sentences": sentences(advice),
        "own_share": advice.own_share,
        "line": None
        if line is None
        else {
            "intercept": float(line.pooled.coefficients[0]),
            "slope_per_tenfold": float(line.pooled.coefficients[1]),
            "covariance": line.pooled.covariance.tolist(),
            "degrees_of_freedom": line.pooled.degrees_of_freedom,
            "tau2_datasets": line.pooled.tau2,
            "tau2_models": line.tau2_models,
            "datasets": [asdict(one) for one in line.datasets],
        },
        "slopes": [asdict(one) for one in advice.slopes],
        "evidence": [
            asdict(point)
            | {"variance": point.variance if point.is_located else None}
            | {"best_plw": point.plw, "interval": list(point.interval)}
            for point in advice.points
        ],
    }


def write(advice: Advice, directory: Path) -> list[Path]:
    """Write `advice.json` and `advice.png` into a directory, and return their paths."""
    contents = [(json.dumps(to_json(advice), indent=2, allow_nan=False) + "\n").encode(), draw(advice)]
    return outputs.write(directory, dict(zip(FILES, contents, strict=True)))


STYLES: Mapping[str, tuple[str, str]] = {
    STUDY: ("#D55E00", "o"),
    WIT: ("#0072B2", "s"),
    VAUGHN: ("#009E73", "^"),
    OWN: ("#B22222", "D"),
}
TICKS = (0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


def draw(advice: Advice) -> bytes:
    """A PNG of the evidence: the best PLW against the generation ratio, the line through it, and the advice."""
    from matplotlib.figure import Figure  # a second that a fit need not wait for

    figure = Figure(figsize=(9.5, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    ratios = [advice.ratio, *(point.ratio for point in advice.points)]
    span = np.geomspace(min(ratios) / 1.6, max(ratios) * 1.6, 101)
    if advice.line is not None:
        for reaches, alpha, label in (
            ([advice.line.next_one(ratio) for ratio in span], 0.10, "one more data set and model, 95 %"),
            ([advice.line.mean(ratio) for ratio in span], 0.18, "mean over data sets, 95 %"),
        ):
            w, reach = np.array(reaches).T
            ends = np.clip([w - reach, w + reach], 0, 1)
            axes.fill_between(span, *ends, color="#1b3a5c", alpha=alpha, linewidth=0, label=label)
        axes.plot(span, np.clip(w, 0, 1), color="#1b3a5c", linewidth=2, label="line through the data sets")
    # Points of one ratio stand beside each other, in the order of the list.
    seen: dict[float, int] = {}
    shown: set[tuple[str, bool]] = set()
    for point in advice.points:
        seen[point.ratio] = seen.get(point.ratio, -1) + 1
        aside = 1.045 ** (seen[point.ratio] - (sum(other.ratio == point.ratio for other in advice.points) - 1) / 2)
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
            label=None if (point.study, point.is_located) in shown else label,
            clip_on=False,
        )
        shown.add((point.study, point.is_located))
    axes.axvline(advice.ratio, color="black", linewidth=1, linestyle=(0, (4, 2)))
    w, (low, high) = (
        float(np.clip(advice.w if advice.w is not None else 0.5, 0, 1)),
        np.clip([advice.low, advice.high], 0, 1),
    )
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
    axes.set_xscale("log")
    axes.set_xlim(span[0], span[-1])
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([plw**EXPONENT for plw in TICKS], [f"{plw:g}" for plw in TICKS])
    axes.set_xticks([x for x in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if span[0] <= x <= span[-1]])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("generation ratio: completion tokens over prompt tokens")
    axes.set_ylabel(f"best PLW, spaced as w_p = PLW^{EXPONENT}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8.5, frameon=False)
    heading = f"Best PLW at generation ratio {advice.ratio:.3g}"
    figure.suptitle(heading, x=0.02, ha="left", fontsize=13, fontweight="bold")
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
