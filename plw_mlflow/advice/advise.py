"""Advice: which PLW suits a data set of a given generation ratio, how certain that is, and what it rests on.

The generation ratio belongs to the data set, so the data set is the unit. The curves of one data set (of several
models, or types of task) are pooled first; then a line over the logarithm of the ratio is fitted through the data sets
(random effects, `pooling.py`). For one more data set and model the line gives a prediction interval. A person's own
runs on the very data set are then weighed against it, each by its precision. So they decide wherever they locate the
best PLW.

Everything is computed on w_p = PLW^0.30103, within PLW 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from plw_mlflow.advice import single_runs
from plw_mlflow.advice.evidence import OWN, EvidencePoint, to_plw
from plw_mlflow.advice.pooling import Pooled, pool
from plw_mlflow.advice.single_runs import SingleRuns
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.data.profile import Profile
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation.task_sets import TASK_TYPES
from plw_mlflow.transforms import EXPONENT, Array

WHOLE = 0.95  # width of an interval of w_p from which on it is called the whole range
NORMAL = float(stats.norm.ppf(1 - LEVEL / 2))


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

    def by_share(self, ratio: float) -> tuple[float, float]:
        """The same as `next_one`, if one share of the prompts in the loss weight were best on all data sets.

        The best (PLW / ratio)^0.30103 is then the same on all of them, and that is pooled.
        """
        unit = ratio**EXPONENT
        units = np.array([dataset.ratio**EXPONENT for dataset in self.datasets])
        w, variances = (np.array([getattr(dataset, name) for dataset in self.datasets]) for name in ("w", "variance"))
        pooled = pool(w / units, variances / units**2, np.ones((len(units), 1)))
        best, reach = pooled.next_point(np.ones(1), beside=self.tau2_models / unit**2)
        return best * unit, reach * unit


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
    own: EvidencePoint | None  # of the person's own runs on this very data set
    own_share: float  # of the precision behind the suggestion
    slopes: list[Slope]
    points: list[EvidencePoint]
    single_runs: list[SingleRuns]  # in print, which have no weight

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
    ratio: float, points: Sequence[EvidencePoint], *, dataset: Sequence[str] = (), task_types: Sequence[str] = ()
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
    singles = single_runs.published(task_types)
    return Advice(
        ratio, name, tuple(task_types), w, low, high, line, own, share, _slopes(points), list(points), singles
    )


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


def fit_line(points: Sequence[EvidencePoint]) -> Line | None:
    """The line through the data sets of the located points; None where there are fewer than 3 or all of one ratio."""
    datasets, tau2 = by_dataset(points)
    if len(datasets) < 3 or np.ptp([math.log10(dataset.ratio) for dataset in datasets]) == 0:
        return None
    x = np.array([_row(dataset.ratio) for dataset in datasets])
    pooled = pool(
        np.array([dataset.w for dataset in datasets]), np.array([dataset.variance for dataset in datasets]), x
    )
    return Line(datasets, pooled, tau2)


def by_dataset(points: Sequence[EvidencePoint]) -> tuple[list[DataSet], float]:
    """The located points pooled over each data set's curves, and the variance between curves of one data set.

    That variance is taken as the same everywhere, so that a data set with one curve is not the surest of all.
    """
    located = [point for point in points if point.is_located]
    keys = list(dict.fromkeys((point.study, point.dataset) for point in located))
    which = np.array([keys.index((point.study, point.dataset)) for point in located], int)
    w, variances = np.array([point.w for point in located]), np.array([point.variance for point in located])
    tau2 = pool(w, variances, np.eye(len(keys))[which]).tau2 if len(located) > len(keys) else 0.0
    datasets = []
    for number, (study, dataset) in enumerate(keys):
        weights = np.where(which == number, 1 / (variances + tau2), 0.0)
        ratio = located[int(np.argmax(which == number))].ratio
        mean = float(weights @ w / weights.sum())
        datasets.append(DataSet(study, dataset, ratio, int((which == number).sum()), mean, 1 / float(weights.sum())))
    return datasets, tau2


def _slopes(points: Sequence[EvidencePoint]) -> list[Slope]:
    """Each study's own slope, of those with located points at two ratios or more; errors as known, nothing beyond."""
    datasets, _ = by_dataset(points)
    slopes = []
    for study in dict.fromkeys(dataset.study for dataset in datasets):
        of_study = [dataset for dataset in datasets if dataset.study == study]
        x = np.array([math.log10(dataset.ratio) for dataset in of_study])
        if len(of_study) < 2 or np.ptp(x) == 0:
            continue
        weights = np.array([1 / dataset.variance for dataset in of_study])
        x -= weights @ x / weights.sum()
        information = float(weights @ x**2)
        slope, reach = (
            float(weights * x @ [dataset.w for dataset in of_study]) / information,
            NORMAL / math.sqrt(information),
        )
        slopes.append(Slope(study, len(of_study), slope, slope - reach, slope + reach))
    return slopes


def _row(ratio: float) -> Array:
    return np.array([1.0, math.log10(ratio)])
