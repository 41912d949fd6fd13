"""The study's claims, one by one, on scores: reproduced, contradicted, or cannot tell.

The claims and what each is judged by are in paper/claims.json; the rules are here, a function a kind. They were fixed
before any scores but the study's own were judged. Each rule asks for a 95 % interval: a claim is reproduced where the
whole interval agrees with it, contradicted where none of it does, and else these scores cannot tell. For `none` and
`gain` the ends are two one-sided 95 % bounds of every difference: a two-sided 90 % interval. Each claim is judged for
both questions, these tasks and others like them, and by itself: nothing is corrected for the number of claims.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from plw_mlflow.analysis import findings
from plw_mlflow.analysis.score_table import check, rescale
from plw_mlflow.analysis.statistics import equivalence, fitting, fixed_tasks, over_tasks
from plw_mlflow.analysis.statistics.design import Grid, grid
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.analysis.wording import highest_end, interval
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array, make_transform

FILE = Path(__file__).parents[2] / "paper" / "claims.json"
REPRODUCED, CONTRADICTED, CANNOT_TELL = "reproduced", "contradicted", "cannot tell"
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

    def reach(self, contrast: Array, level: float = LEVEL) -> tuple[float, float]:
        """The interval of a contrast of slope and bend."""
        value, error, freedom = (float(part) for part in self.curves.t_test(contrast @ self.whole.contrasts)[:3])
        half = stats.t.ppf(1 - level / 2, freedom) * error
        return value - half, value + half

    def rise(self, start: float, end: float) -> Array:
        """From one PLW to another, as a contrast of slope and bend."""
        w = self.grid.transform([start, end])
        return np.array([w[1] - w[0], w[1] ** 2 - w[0] ** 2])

    def differences(self) -> list[tuple[float, float]]:
        """The intervals of the sizes of all differences between two PLWs tried, at one-sided 95 %."""
        reaches = [
            self.reach(self.rise(*pair), 2 * LEVEL) for pair in combinations(sorted(set(self.grid.runs["plw"])), 2)
        ]
        return [(max(0.0, low, -high), max(-low, high)) for low, high in reaches]


# ------------------------------------------------------------------------------------------------- the rules


def _effect(curve: _Curve, margin: float) -> Judged:
    """PLW moves the scores. Contradicted where all differences are shown to be within the margin, without an effect."""
    p, equal = curve.fit.joint_p, _equal(curve, margin)
    verdict = REPRODUCED if p < LEVEL else CONTRADICTED if (equal.p or 0) < LEVEL else CANNOT_TELL
    return verdict, f"p = {p:.2g}"


def _none(curve: _Curve, margin: float) -> Judged:
    """All differences between PLWs are within the margin. Contradicted where one is shown to be larger."""
    low, high = (max(ends) for ends in zip(*curve.differences(), strict=True))
    found = f"largest difference {low:.4f} to {high:.4f}; p of a curve = {curve.fit.joint_p:.2g}"
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

    Every difference to it must have its sign; it is contradicted where one is shown to have the other.
    """
    others = [other for other in sorted(set(curve.grid.runs["plw"])) if other != plw and other < below]
    if plw not in set(curve.grid.runs["plw"]) or not others:
        return CANNOT_TELL, f"PLW {plw:g} was not tried beside others"
    reaches = [curve.reach(sign * curve.rise(other, plw)) for other in others]
    least = min(range(len(others)), key=lambda number: reaches[number][0])
    verdict = REPRODUCED if reaches[least][0] > 0 else CANNOT_TELL
    if any(high < 0 for _, high in reaches):
        verdict, least = CONTRADICTED, min(range(len(others)), key=lambda number: reaches[number][1])
    low, high = sorted(sign * end for end in reaches[least])
    return verdict, f"PLW {plw:g} less PLW {others[least]:g}: {low:+.4f} to {high:+.4f}"


def _gain(curve: _Curve, low: float, high: float) -> Judged:
    """The largest difference between two PLWs lies between two numbers."""
    least, most = (max(ends) for ends in zip(*curve.differences(), strict=True))
    verdict = (
        REPRODUCED if low <= least and most <= high else CONTRADICTED if most < low or high < least else CANNOT_TELL
    )
    return verdict, f"largest difference {least:.4f} to {most:.4f}"


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


def _equal(curve: _Curve, margin: float) -> equivalence.Equivalence:
    return equivalence.assess_equivalence(curve.grid, margin, tasks_are_fixed=curve.model == findings.ON_THESE)


def _best_runs(table: pd.DataFrame, is_short: pd.Series, tasks: list[str]) -> Judged:
    """The highest score of all runs on each of some tasks is one of short data.

    The interval is of the difference between the highest of these and the highest of the others, by the noise of a
    single run on that task: the residual SD of the data sets' own curves.
    """
    lowest, highest, found, are_highest = math.inf, math.inf, [], 0
    for task in tasks:
        of_task = table[table["task"] == task]
        short = is_short[of_task.index]
        if short.all() or not short.any():
            return CANNOT_TELL, f"no scores of both kinds of data on {task}"
        squares = freedom = 0.0
        for dataset, part in of_task.groupby("dataset"):
            one = fixed_tasks.fit((g := _grid(part, str(dataset))).scores, g.x, g.contrasts)
            squares, freedom = squares + float(one.variance) * one.free, freedom + one.free
        difference = float(of_task["score"][short].max() - of_task["score"][~short].max())
        are_highest += difference > 0
        half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * math.sqrt(2 * squares / freedom)
        lowest, highest = min(lowest, difference - half), min(highest, difference + half)
        found.append(f"{task} {difference - half:+.3f} to {difference + half:+.3f}")
    verdict = REPRODUCED if lowest > 0 else CONTRADICTED if highest < 0 else CANNOT_TELL
    return verdict, f"on {are_highest} of {len(tasks)} tasks it is, by {'; '.join(found)}"


# ------------------------------------------------------------------------------------------------- judging


def judge(table: pd.DataFrame, scale: str = "none", file: Path = FILE) -> list[Judgement]:
    """Every claim on a table of scores. Raises UserError as `analyze` does."""
    table = rescale(check(table), scale).reset_index(drop=True)
    told = json.loads(file.read_text())
    is_short = table["dataset"].map(lambda name: bool(re.search(told["short_data"], name, re.IGNORECASE)))
    return [one for claim in told["study"] for one in _judge(claim, table, is_short)]


def _judge(claim: dict[str, Any], table: pd.DataFrame, is_short: pd.Series) -> Iterator[Judgement]:
    head = claim["id"], claim["claim"], claim["source"]
    if "rule" not in claim:
        yield Judgement(*head, "", "", CANNOT_TELL, claim["not_judged"])
        return
    if claim["rule"] == "best_runs":
        yield Judgement(*head, "all", "these tasks", *_best_of_runs(table, is_short, claim["tasks"]))
        return
    on = claim.get("dataset")
    of_data = table["dataset"] == on if on else is_short == (claim["data"] == "short")
    names = sorted(table["dataset"][of_data].unique())
    if not names:
        yield Judgement(
            *head, on or f"{claim['data']} data", "", CANNOT_TELL, "there are no such data among the scores"
        )
    for dataset in names:
        part = table[(table["dataset"] == dataset) & _is_asked(claim, table)]
        if part.empty:
            kinds = ", ".join(claim.get("types", claim.get("tasks", [])))
            yield Judgement(*head, dataset, "", CANNOT_TELL, f"no task of {kinds} among the scores")
            continue
        for question, model in QUESTIONS.items():
            if question != "these tasks" and claim["rule"] == "printed":
                continue
            yield Judgement(*head, dataset, question, *_ruled(claim, part, dataset, model))


def _best_of_runs(table: pd.DataFrame, is_short: pd.Series, tasks: list[str]) -> Judged:
    """What the highest scores say, or why they say nothing: one claim's trouble must not cost the others."""
    try:
        return _best_runs(table, is_short, tasks)
    except UserError as error:
        return CANNOT_TELL, str(error)


def _ruled(claim: dict[str, Any], part: pd.DataFrame, dataset: str, model: str) -> Judged:
    """What a claim's rule says, or why it says nothing."""
    try:
        curve = _Curve(_grid(part, dataset), model)
        if curve.fit.has_too_few_runs:
            return CANNOT_TELL, f"{curve.fit.runs} runs, and it takes {curve.fit.fewest_runs}"
        return RULES[claim["rule"]](curve, **claim.get("by", {}))
    except UserError as error:
        return CANNOT_TELL, str(error)


def _is_asked(claim: dict[str, Any], table: pd.DataFrame) -> pd.Series:
    """Which scores a claim is about: those of its tasks or of its types of task, or all."""
    if "tasks" in claim:
        return table["task"].isin(claim["tasks"])
    if "types" in claim:
        return table["task_type"].isin(claim["types"]) if "task_type" in table else pd.Series(False, table.index)
    return pd.Series(True, table.index)


def _grid(part: pd.DataFrame, dataset: str) -> Grid:
    return grid(part, dataset, make_transform("w_p", part["plw"]))


# ------------------------------------------------------------------------------------------------- telling


def frame(judgements: list[Judgement]) -> pd.DataFrame:
    """A row per claim, data set and question."""
    return pd.DataFrame([vars(one) for one in judgements])


def text(judgements: list[Judgement]) -> str:
    """As the terminal shows it: each claim, and below it what each data set's scores say of it."""
    lines, last = [], ""
    for one in judgements:
        if one.claim != last:
            lines += ["", f"{one.says} ({one.source})"]
            last = one.claim
        where = ", ".join(filter(None, (one.dataset, one.question)))
        lines.append(f"  {one.verdict}{f' on {where}' if where else ''}: {one.found}")
    return "\n".join(lines[1:])
