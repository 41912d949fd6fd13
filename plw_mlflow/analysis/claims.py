"""The study's claims, one by one, on scores: reproduced, contradicted, or cannot tell.

The claims and what each is judged by are in paper/claims.json; the rules are here, a function a kind. They were fixed
before any scores but the study's own were judged. Each rule asks for a 95 % interval: a claim is reproduced where the
whole interval agrees with it, contradicted where none of it does, and else these scores cannot tell. For `none` and
`gain` the interval is of the largest of all differences between two PLWs. All of them are below its upper end, which is
the largest of their one-sided 95 % bounds; that one is above its lower end is shown by bounds that hold for all of them
at once (Scheffé). Each claim is judged for both questions, these tasks and others like them, and by itself: nothing is
corrected for the number of claims.

Claims that name a number of points need a scale that has points. Printed numbers are of the study's own scores, and are
compared with no others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from plw_mlflow.analysis import findings
from plw_mlflow.analysis.score_table import SCORE, check, read_scores, rescale, widest_difference
from plw_mlflow.analysis.statistics import equivalence, fitting, fixed_tasks, lack_of_fit, over_tasks
from plw_mlflow.analysis.statistics.design import Grid, grid
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.analysis.wording import highest_end, interval
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array, make_transform

FILE = Path(__file__).parents[2] / "paper" / "claims.json"
REPRODUCED, CONTRADICTED, CANNOT_TELL = "reproduced", "contradicted", "cannot tell"
STUDY = FILE.parent / "tables" / "v1_scores.csv"  # the scores that the study has printed
SHORT_RATIO = 1.0  # data with a smaller generation ratio are short: their completions are shorter than their prompts
NO_POINTS = "the scale of these scores has no points"
QUESTIONS = {"these tasks": findings.ON_THESE, "others like them": findings.ON_OTHERS[0]}
Judged = tuple[str, str]  # the verdict, and what it rests on


@dataclass(frozen=True)
class Judgement:
    """What one data set's scores say of one claim, by one question."""

    claim: str
    says: str
    source: str  # version of the study
    dataset: str
    question: str
    verdict: str
    found: str  # the interval or number that it rests on
    data_are: str = ""  # short or long, and by what that is known


@dataclass(frozen=True)
class _Curve:
    """The mean curve of some tasks on one data set, by one of the models."""

    grid: Grid
    model: str

    @cached_property
    def fit(self) -> Fit:
        return fitting.fit(self.model, self.grid)

    @cached_property
    def whole(self) -> Grid:
        """What the model uses of the scores."""
        return (self.grid.of_these if self.model == findings.ON_THESE else self.grid.complete)[0]

    @cached_property
    def curves(self) -> fixed_tasks.RunMeans | over_tasks.MeanCurve:
        whole = self.whole
        if self.model == findings.ON_THESE:
            return fixed_tasks.fit(whole.scores, whole.x, whole.contrasts)
        return over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=True)

    @cached_property
    def steps(self) -> fixed_tasks.RunMeans | over_tasks.MeanCurve:
        """The mean of each PLW in place of a curve, with residuals about these. Raises UserError without any."""
        whole = self.whole
        each = np.eye(whole.steps.shape[1])
        contrasts = each[1 : len(whole.plws)] - each[0]
        if self.model == findings.ON_THESE:
            return fixed_tasks.fit(whole.scores, whole.steps, contrasts)
        return over_tasks.fit(whole.scores, whole.steps, contrasts, runs_differ=True)

    def reach(self, contrast: Array) -> tuple[float, float]:
        """The interval of a contrast of slope and bend."""
        value, error, freedom = self._parts(self.curves, contrast @ self.whole.contrasts)
        half = stats.t.ppf(1 - LEVEL / 2, freedom) * error
        return value - half, value + half

    def reach_of_means(self, start: float, end: float) -> tuple[float, float]:
        """The interval of the difference between the means of two PLWs. Raises UserError where runs are too few."""
        plws, each = self.whole.plws, np.eye(self.steps.contrasts.shape[1])
        value, error, freedom = self._parts(self.steps, each[plws.index(end)] - each[plws.index(start)])
        half = stats.t.ppf(1 - LEVEL / 2, freedom) * error
        return value - half, value + half

    @staticmethod
    def _parts(fitted: fixed_tasks.RunMeans | over_tasks.MeanCurve, contrast: Array) -> tuple[float, float, float]:
        value, error, freedom = (float(part) for part in fitted.t_test(contrast)[:3])
        return value, error, freedom

    def rise(self, start: float, end: float) -> Array:
        """From one PLW to another, as a contrast of slope and bend."""
        w = self.grid.transform([start, end])
        return np.array([w[1] - w[0], w[1] ** 2 - w[0] ** 2])

    def largest_difference(self) -> tuple[float, float]:
        """The interval of the largest difference between two PLWs tried, as the module's docstring has it."""
        low = high = 0.0
        for pair in combinations(self.grid.plws, 2):
            value, error, freedom = self._parts(self.curves, self.rise(*pair) @ self.whole.contrasts)
            at_once = math.sqrt(2 * stats.f.ppf(1 - LEVEL, 2, freedom)) * error  # as curves have two coefficients
            low = max(low, abs(value) - at_once)
            high = max(high, abs(value) + stats.t.ppf(1 - LEVEL, freedom) * error)
        return low, high


# ------------------------------------------------------------------------------------------------- the rules


def _effect(curve: _Curve, margin: float | None) -> Judged:
    """PLW moves the scores. Contradicted where all differences are shown to be within the margin, without an effect."""
    p = curve.fit.joint_p
    is_none = margin is not None and (_equal(curve, margin).p or 0) < LEVEL
    return REPRODUCED if p < LEVEL else CONTRADICTED if is_none else CANNOT_TELL, f"p = {p:.2g}"


def _none(curve: _Curve, margin: float | None) -> Judged:
    """All differences between PLWs are within the margin. Contradicted where one is shown to be larger."""
    low, high = curve.largest_difference()
    found = f"largest difference {low:.4f} to {high:.4f}; p of a curve = {curve.fit.joint_p:.2g}"
    if margin is None:
        return CANNOT_TELL, f"{found}; {NO_POINTS}"
    return REPRODUCED if high < margin else CONTRADICTED if low > margin else CANNOT_TELL, found


def _concave(curve: _Curve) -> Judged:
    """The curve bends downwards."""
    low, high = curve.reach(np.array([0.0, 1.0]))
    return REPRODUCED if high < 0 else CONTRADICTED if low > 0 else CANNOT_TELL, f"w_p² {low:+.3f} to {high:+.3f}"


def _peak(curve: _Curve, low: float, high: float) -> Judged:
    """The best PLW lies between two.

    Contradicted where none of its interval does, where the curve bends upwards, and where the scores are shown to be
    higher at an end of the range than at all PLWs tried between the two.
    """
    bend, _ = _concave(curve)
    fit = curve.fit
    if bend == CONTRADICTED:
        return CONTRADICTED, "the curve bends upwards"
    if fit.optimum_set is None or fit.optimum_plw is None:
        return _peaks_at_an_end(curve, low, high)
    ends = fit.optimum_set
    is_inside = all(low <= start and end <= high for start, end in ends) and not fit.optimum_set_is_unbounded
    is_outside = all(end < low or high < start for start, end in ends)
    found = f"PLW {fit.optimum_plw:.3g}, {interval(fit)}"
    return REPRODUCED if is_inside else CONTRADICTED if is_outside else CANNOT_TELL, found


def _peaks_at_an_end(curve: _Curve, low: float, high: float) -> Judged:
    """Of a curve without a peak inside the range, which is highest at one end of it.

    Contradicted where PLW has an effect, and the end is shown to be above every PLW tried from low to high.
    """
    end = highest_end(curve.fit)
    inside = [plw for plw in curve.fit.plws if low <= plw <= high]
    if curve.fit.joint_p >= LEVEL or not inside or low <= end <= high:
        return CANNOT_TELL, "no peak inside the range"
    reaches = [curve.reach(curve.rise(plw, end)) for plw in inside]
    least = min(range(len(inside)), key=lambda number: reaches[number][0])
    found = f"PLW {end:g} less PLW {inside[least]:g}: {reaches[least][0]:+.4f} to {reaches[least][1]:+.4f}"
    if reaches[least][0] > 0:
        return CONTRADICTED, f"highest at an end, {found}"
    return CANNOT_TELL, f"no peak inside the range, {found}"


def _extreme(curve: _Curve, plw: float, sign: int, below: float = math.inf) -> Judged:
    """One PLW has the lowest expected score (sign -1) or the highest (1) of those tried, or of those below a PLW.

    Every difference to it must have its sign, of the curve and of the PLWs' own means; the claim is contradicted where
    one is shown to have the other sign, by both. A curve alone says nothing of a PLW that does not lie on it.
    """
    others = [other for other in curve.grid.plws if other != plw and other < below]
    if plw not in curve.grid.plws or not others:
        return CANNOT_TELL, f"PLW {plw:g} was not tried beside others"
    of_curve, found = _is_beyond(plw, others, sign, lambda other: curve.reach(curve.rise(other, plw)))
    if of_curve == CANNOT_TELL:
        return of_curve, found
    try:
        of_means, by_means = _is_beyond(plw, others, sign, lambda other: curve.reach_of_means(other, plw))
    except UserError as error:
        return CANNOT_TELL, f"{found} by the curve; of means: {error}"
    return of_curve if of_means == of_curve else CANNOT_TELL, f"{found} by the curve; {by_means} by means"


def _is_beyond(plw: float, others: list[float], sign: int, reach: Callable[[float], tuple[float, float]]) -> Judged:
    """Whether one PLW's score is beyond those of others, by the intervals of its differences to them."""
    reaches = [reach(other) for other in others]
    signed = [(low, high) if sign > 0 else (-high, -low) for low, high in reaches]
    least = min(range(len(others)), key=lambda number: signed[number][0])
    verdict = REPRODUCED if signed[least][0] > 0 else CANNOT_TELL
    if any(high < 0 for _, high in signed):
        verdict, least = CONTRADICTED, min(range(len(others)), key=lambda number: signed[number][1])
    low, high = reaches[least]
    return verdict, f"PLW {plw:g} less PLW {others[least]:g}: {low:+.4f} to {high:+.4f}"


def _gain(curve: _Curve, low: float | None, high: float | None) -> Judged:
    """The largest difference between two PLWs lies between two numbers."""
    least, most = curve.largest_difference()
    found = f"largest difference {least:.4f} to {most:.4f}"
    if low is None or high is None:
        return CANNOT_TELL, f"{found}; {NO_POINTS}"
    is_beyond = most < low or high < least
    return REPRODUCED if low <= least and most <= high else CONTRADICTED if is_beyond else CANNOT_TELL, found


def _printed(curve: _Curve, model: str, of: str, value: float, tolerance: float) -> Judged:
    """A printed number is what that model gives. It is a number of these tasks, whatever the question."""
    fit = fitting.fit(model, curve.grid)
    found = {"p": fit.joint_p, "optimum_plw": fit.optimum_plw, **fit.coefficients}[of]
    if found is None:
        return CONTRADICTED, "none"
    return REPRODUCED if abs(found - value) <= tolerance else CONTRADICTED, f"{found:.3g} by {model}, printed {value:g}"


RULES: dict[str, Callable[..., Judged]] = {
    "effect": _effect,
    "none": _none,
    "concave": _concave,
    "peak": _peak,
    "extreme": _extreme,
    "gain": _gain,
    "printed": _printed,
}
OF_SHAPE = ("none", "concave", "peak", "gain")  # rules that take a parabola to describe the scores
IN_POINTS = {"effect": ("margin",), "none": ("margin",), "gain": ("low", "high")}  # of rules; 1 is 100 points


def _equal(curve: _Curve, margin: float) -> equivalence.Equivalence:
    return equivalence.assess_equivalence(curve.grid, margin, tasks_are_fixed=curve.model == findings.ON_THESE)


def _best_runs(scores: _Scores, tasks: list[str]) -> Judged:
    """The highest score of all runs on each of some tasks is one of short data.

    The interval is of the difference between the highest of these and the highest of the others, by the noise of a
    single run on that task: the residual SD of the data sets' own curves.
    """
    if unknown := [name for name, kind in scores.kinds.items() if kind.name == ""]:
        return CANNOT_TELL, f"{', '.join(unknown)}: {scores.kinds[unknown[0]].reason}"
    lowest, highest, found, are_highest = math.inf, math.inf, [], 0
    for task in tasks:
        of_task = scores.table[scores.table["task"] == task]
        short = of_task["dataset"].map(lambda name: scores.kinds[name].name == "short")
        if short.all() or not short.any():
            return CANNOT_TELL, f"no scores of both kinds of data on {task}"
        squares = freedom = 0.0
        for dataset, part in of_task.groupby("dataset"):
            one = fixed_tasks.fit((g := scores.grid(part, str(dataset))).scores, g.x, g.contrasts)
            squares, freedom = squares + float(one.variance) * one.free, freedom + one.free
        difference = float(of_task["score"][short].max() - of_task["score"][~short].max())
        are_highest += difference > 0
        half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * math.sqrt(2 * squares / freedom)
        lowest, highest = min(lowest, difference - half), min(highest, difference + half)
        found.append(f"{task} {difference - half:+.3f} to {difference + half:+.3f}")
    verdict = REPRODUCED if lowest > 0 else CONTRADICTED if highest < 0 else CANNOT_TELL
    return verdict, f"on {are_highest} of {len(tasks)} tasks it is, by {'; '.join(found)}"


# ------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class _Kind:
    """Whether data are short or long (empty where nobody knows), and how that is known."""

    name: str
    reason: str

    @classmethod
    def of(cls, dataset: str, ratio: float | None, short: str, long: str) -> _Kind:
        """By the generation ratio where it is known; else by the name, if that says one of the two."""
        if ratio is not None:
            return cls("short" if ratio < SHORT_RATIO else "long", f"the generation ratio is {ratio:.3g}")
        said = [kind for kind, words in (("short", short), ("long", long)) if re.search(words, dataset, re.IGNORECASE)]
        if len(said) == 1:
            return cls(said[0], "so its name says; the generation ratio is not known")
        return cls("", "whether its completions are short or long is not known; --ratios NAME=RATIO says it")

    def __str__(self) -> str:
        return f"{self.name} data: {self.reason}" if self.name else self.reason


@dataclass(frozen=True)
class _Scores:
    """A table of scores as claims are judged by it."""

    table: pd.DataFrame  # checked, on one scale
    by: tuple[str, ...]  # columns that tell runs apart beside the table's own
    unit: findings.Unit
    kinds: dict[str, _Kind]  # of data sets

    def grid(self, part: pd.DataFrame, dataset: str) -> Grid:
        """A data set's scores as the models take them."""
        return grid(part, dataset, make_transform("w_p", part["plw"]), also=self.by)

    def in_its_scale(self, rule: str, by: Mapping[str, Any]) -> dict[str, Any]:
        """A rule's numbers, those in points on the scale of these scores; None in their place if that has no points."""
        point = self.unit.point if self.unit.has_points else None
        of_points = {name: None if point is None else by[name] * 100 * point for name in IN_POINTS.get(rule, ())}
        return {**by, **of_points}


def judge(
    table: pd.DataFrame,
    scale: str = "none",
    file: Path = FILE,
    *,
    by: tuple[str, ...] = (),
    ratios: Mapping[str, float] | None = None,
) -> list[Judgement]:
    """Every claim on a table of scores. Raises UserError as `analyze` does.

    by: columns that tell runs apart beside the table's own. ratios: generation ratios by data set, as far as they are
    known; data are short or long by these, and by their names where they are not known.
    """
    table = rescale(check(table, by), scale).reset_index(drop=True)
    told = json.loads(file.read_text())
    words = told["short_data"], told["long_data"]
    kinds = {name: _Kind.of(name, (ratios or {}).get(name), *words) for name in sorted(table["dataset"].unique())}
    unit = findings.Unit(widest_difference(table, scale), has_points=scale in ("none", "fraction"))
    scores = _Scores(table, by, unit, kinds)
    return [
        replace(one, data_are=str(kinds[one.dataset]) if one.dataset in kinds else "")
        for claim in told["study"]
        for one in _judge(claim, scores)
    ]


def _judge(claim: dict[str, Any], scores: _Scores) -> Iterator[Judgement]:
    head = claim["id"], claim["claim"], claim["source"]
    if "rule" not in claim:
        yield Judgement(*head, "", "", CANNOT_TELL, claim["not_judged"])
        return
    if claim["rule"] == "best_runs":
        yield Judgement(*head, "all", "these tasks", *_best_of_runs(scores, claim["tasks"]))
        return
    on = claim.get("dataset")
    names = [name for name, kind in scores.kinds.items() if (name == on if on else kind.name == claim["data"])]
    unknown = [] if on else [name for name, kind in scores.kinds.items() if kind.name == ""]
    if not names and not unknown:
        where = on or f"{claim['data']} data"
        yield Judgement(*head, where, "", CANNOT_TELL, "there are no such data among the scores")
    for dataset in unknown:
        yield Judgement(*head, dataset, "", CANNOT_TELL, scores.kinds[dataset].reason)
    for dataset in names:
        part = scores.table[(scores.table["dataset"] == dataset) & _is_asked(claim, scores.table)]
        if part.empty:
            kinds = ", ".join(claim.get("types", claim.get("tasks", [])))
            yield Judgement(*head, dataset, "", CANNOT_TELL, f"no task of {kinds} among the scores")
            continue
        if claim["rule"] == "printed" and not _is_the_studys(part):
            yield Judgement(*head, dataset, "", CANNOT_TELL, "a number of the study's own scores, and these are others")
            continue
        for question, model in QUESTIONS.items():
            if question != "these tasks" and claim["rule"] == "printed":
                continue
            yield Judgement(*head, dataset, question, *_ruled(claim, scores, part, dataset, model))


def _is_the_studys(part: pd.DataFrame) -> bool:
    """Whether scores of a data set are just those that the study has printed of it."""
    printed = check(read_scores(STUDY))
    columns = [*SCORE, "score"]
    theirs = printed[printed["dataset"] == part["dataset"].iloc[0]][columns].sort_values(SCORE)
    return len(part) == len(theirs) and bool((part[columns].sort_values(SCORE).to_numpy() == theirs.to_numpy()).all())


def _best_of_runs(scores: _Scores, tasks: list[str]) -> Judged:
    """What the highest scores say, or why they say nothing: one claim's trouble must not cost the others."""
    try:
        return _best_runs(scores, tasks)
    except ValueError as error:
        return CANNOT_TELL, _reason(error)


def _reason(error: ValueError) -> str:
    """Why scores say nothing, by the error that they led to, which may be one of numpy's."""
    return str(error) if isinstance(error, UserError) else "these scores allow no curve"


def _ruled(claim: dict[str, Any], scores: _Scores, part: pd.DataFrame, dataset: str, model: str) -> Judged:
    """What a claim's rule says, or why it says nothing."""
    try:
        curve = _Curve(scores.grid(part, dataset), model)
        if curve.fit.has_too_few_runs:
            return CANNOT_TELL, f"{curve.fit.runs} runs, and it takes {curve.fit.fewest_runs}"
        if claim["rule"] in OF_SHAPE and (found := lack_of_fit.misfits([curve.grid])):
            return CANNOT_TELL, found[curve.grid.dataset].why()
        return RULES[claim["rule"]](curve, **scores.in_its_scale(claim["rule"], claim.get("by", {})))
    except ValueError as error:
        return CANNOT_TELL, _reason(error)


def _is_asked(claim: dict[str, Any], table: pd.DataFrame) -> pd.Series:
    """Which scores a claim is about: those of its tasks or of its types of task, or all."""
    if "tasks" in claim:
        return table["task"].isin(claim["tasks"])
    if "types" in claim:
        return table["task_type"].isin(claim["types"]) if "task_type" in table else pd.Series(False, table.index)
    return pd.Series(True, table.index)


# ------------------------------------------------------------------------------------------------- telling


def frame(judgements: list[Judgement]) -> pd.DataFrame:
    """A row per claim, data set and question."""
    return pd.DataFrame([vars(one) for one in judgements])


def text(judgements: list[Judgement]) -> str:
    """As the terminal shows it: what the data are; then each claim, and below it what each data set's scores say."""
    lines, last = (
        [f"{dataset}: {kind}" for dataset, kind in {one.dataset: one.data_are for one in judgements}.items() if kind],
        "",
    )
    for one in judgements:
        if one.claim != last:
            lines += ["", f"{one.says} ({one.source})"]
            last = one.claim
        where = ", ".join(filter(None, (one.dataset, one.question)))
        lines.append(f"  {one.verdict}{f' on {where}' if where else ''}: {one.found}")
    return "\n".join(lines).strip()
