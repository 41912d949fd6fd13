"""Two questions, two answers, in plain words: did PLW move these tasks, and would it move others like them?

The first is answered by `fixed-tasks`; the second by the fit that leads, if that takes tasks as a sample. Both are
corrected for the number of data sets looked at. What to do follows from the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scipy import stats

from plw_mlflow.analysis.answers import Finding
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.equivalence import Equivalence
from plw_mlflow.analysis.statistics.fitting import Fit, fewest_runs
from plw_mlflow.analysis.statistics.lack_of_fit import LackOfFit
from plw_mlflow.analysis.statistics.optimum import LEVEL, POWER
from plw_mlflow.analysis.wording import highest_end, interval

ON_THESE = "fixed-tasks"  # the model that answers the first question
ON_OTHERS = ("crossed", "lmm-slopes")  # the models that can answer the second
MOST_SEEDS = 99  # that advice names
FEWEST_FREE = 5  # degrees of freedom of runs' SD below which it says too little to plan by
SURE = 0.9  # that the SD is not above its upper bound, and not below its lower one
SHOWS_NOISE = "would show by how much runs differ anyway, and so how many it takes"
LEFT_OUT = "Left out: "  # how the note begins in which a fit says what it did not use


@dataclass(frozen=True)
class Unit:
    """How differences of scores are told."""

    widest: float | None  # that two scores can have; None where their scale has no ends
    has_points: bool  # whether a hundredth of it is a point

    @property
    def point(self) -> float | None:
        """The difference that is as good as none unless a margin is given: a point, or a hundredth of the scale."""
        return None if self.widest is None else self.widest / 100

    def words(self, difference: float) -> str:
        """A difference as a text."""
        if not self.has_points or self.point is None:
            return f"{difference:.2g}"
        points = f"{difference / self.point:.2g}"
        return f"{points} point{'s' * (points != '1')}"


def about_these(
    fit: Fit | None, holm_p: float | None, equal: Equivalence | None, tasks: int, unit: Unit, why_not: str
) -> Finding:
    """Did PLW move these tasks? fit: by `fixed-tasks`, None where it could not be fitted, with the reason.

    tasks: how many there are, of which the fit may use fewer.
    """
    tasks = tasks if fit is None else fit.tasks  # it may have left some out
    mean = "the curve of its score" if tasks == 1 else "the curve of their mean score"
    found = _finding(_of_these(tasks), fit, holm_p, equal, unit, mean, why_not)
    return found if fit is None else replace(found, verdict=" ".join([found.verdict, *_left_out(fit)]))


def _of_these(tasks: int) -> str:
    return f"Did PLW move {'this task' if tasks == 1 else f'these {tasks} tasks'}?"


def _of_others(tasks: int) -> str:
    return f"Would it move others like {'it' if tasks == 1 else 'them'}?"


def _left_out(fit: Fit) -> list[str]:
    return [note for note in fit.notes if note.startswith(LEFT_OUT)]


def about_others(lead: Fit, holm_p: float, equal: Equivalence | None, unit: Unit, why_not: str) -> Finding:
    """Would PLW move other tasks like these? lead: the fit that leads; why_not: why that is not by `crossed`."""
    fit = lead if lead.model in ON_OTHERS else None
    why_not = why_not.removesuffix("; use lmm-slopes")  # what cannot be fitted either, or it would lead
    if not why_not and lead.notes:
        why_not = lead.notes[0].removesuffix(".")
    return _finding(_of_others(lead.tasks), fit, holm_p, equal, unit, "the curve of the mean of such tasks", why_not)


def _finding(
    question: str, fit: Fit | None, holm_p: float | None, equal: Equivalence | None, unit: Unit, mean: str, why_not: str
) -> Finding:
    if fit is None or holm_p is None:
        return Finding(question, f"These scores cannot tell: {why_not}.")
    if fit.has_too_few_runs:
        few = f"there are {fit.runs}, and it takes at least {fit.fewest_runs}"
        return Finding(question, f"Too few runs to tell: {few}.", model=fit.model)
    kind = "yes" if holm_p < LEVEL else "perhaps" if fit.joint_p < LEVEL else "not shown"
    p = f"p = {fit.joint_p:.2g}" + f" by itself, {holm_p:.2g} for so many data sets" * (kind == "perhaps")
    words = f"{kind.capitalize()} ({p}): {mean} "
    if fit.optimum_plw is None:
        words += f"has no peak inside the range, and is highest at PLW {highest_end(fit):.3g}"
        words += ", which may be chance." if kind != "yes" else "."
    else:
        words += f"peaks at PLW {fit.optimum_plw:.3g} (95 % interval {interval(fit)})"
        words += ", which may be chance." if kind != "yes" else "; where is not settled." * fit.optimum_set_is_unbounded
        words = words.removesuffix(".") + "."
    if equal is not None and equal.smallest_margin is not None:
        words += (
            f" By the curve, no two PLWs tried differ by more than {unit.words(equal.smallest_margin)} (95 % sure)."
        )
    if equal is not None and equal.p is not None and equal.margin is not None:
        shown = "is" if equal.p < LEVEL else "is not"
        words += f" That none differ by {unit.words(equal.margin)} {shown} shown (p = {equal.p:.2g})."
    return Finding(
        question,
        words,
        kind,
        fit.model,
        fit.joint_p,
        holm_p,
        fit.optimum_plw,
        None if fit.optimum_plw is None else fit.optimum_set,
        fit.optimum_plw is not None and fit.optimum_set_is_unbounded,
        equal,
    )


def without_curve(misfit: LackOfFit) -> str:
    """That no parabola describes the scores, as a sentence."""
    return (
        f"No parabola describes the means of these runs (lack of fit: F({misfit.freedom}, {misfit.free}) = "
        f"{misfit.statistic:.3g}, p = {misfit.p:.2g}), so a curve's peak, ends and range mean nothing here."
    )


def moved_without_curve(fit: Fit, misfit: LackOfFit, unit: Unit) -> Finding:
    """The first answer where no parabola describes the scores: PLW moved the tasks, since their means differ by it.

    fit: by `fixed-tasks`.
    """
    words = (
        f"Yes, but not along a parabola (lack of fit: p = {misfit.p:.2g}): of the PLWs tried, {misfit.best_plw:g} has "
        f"the highest mean score. By these means, no two PLWs differ by more than {unit.words(misfit.widest)} "
        "(95 % sure)."
    )
    return Finding(_of_these(fit.tasks), " ".join([words, *_left_out(fit)]), "yes", fit.model, misfit.p, misfit.holm_p)


def untold_without_curve(lead: Fit) -> Finding:
    """The second answer there, which rests on the tasks' curves."""
    return Finding(_of_others(lead.tasks), "These scores cannot tell: no parabola describes their means.")


def advise_without_curve(misfit: LackOfFit, unit: Unit, margin: float | None) -> str:
    """What to do there, in one sentence; margin: as of `as_good_as_none`."""
    if (within := as_good_as_none(misfit.widest, unit, margin)) is not None:
        return _any_value(within, unit)
    return f"No parabola describes these scores; of the PLWs tried, {misfit.best_plw:g} scores best."


def _any_value(within: float, unit: Unit) -> str:
    return f"Any value will do, within {unit.words(within)}."


def as_good_as_none(shown: float | None, unit: Unit, margin: float | None) -> float | None:
    """What all differences between the PLWs tried are shown to be below, if that is as good as none.

    margin: a difference that is as good as none; where it was not given, a point.
    """
    margin = unit.point if margin is None else margin
    return shown if shown is not None and margin is not None and shown <= margin else None


def smallest_that_matters_little(these: Finding, unit: Unit, margin: float | None) -> float | None:
    """`as_good_as_none` of what an answer by the curve shows."""
    shown = None if these.equivalence is None else these.equivalence.smallest_margin
    return as_good_as_none(shown, unit, margin)


def advise(
    these: Finding,
    fit: Fit | None,
    grid: Grid,
    unit: Unit,
    margin: float | None,
    why_not: str = "",
    others: Finding | None = None,
) -> str:
    """What to do, in one sentence, by what was found for these tasks; fit: that finding's.

    margin: as of `as_good_as_none`. why_not: why there is no fit. others: the second answer.
    """
    if (within := smallest_that_matters_little(these, unit, margin)) is not None:
        return _any_value(within, unit)
    margin, equal = unit.point if margin is None else margin, these.equivalence
    if these.kind == "yes" and fit is not None:
        if fit.optimum_plw is None:
            return f"Use PLW {highest_end(fit):.2g} on data like these, where the curve is highest."
        if len(ends := fit.optimum_set or []) == 1 and not fit.optimum_set_is_unbounded:
            return f"Use {ends[0][0]:.2g} to {ends[0][1]:.2g} on data like these."
        return f"Use PLW {fit.optimum_plw:.2g} for now: it scores best, but where the peak lies is not settled."
    cannot_tell = "These runs cannot tell"
    if others is not None and others.kind == "yes":
        cannot_tell += " of these tasks alone, but they do of others like them (see the second answer)"
    if fit is None and (lost := grid.lost_plws):
        everywhere = len(lost) == len(set(grid.runs["plw"]))
        where = "on every run" if everywhere else f"at PLW {', '.join(f'{plw:g}' for plw in lost)}"
        return f"{cannot_tell}; score every task {where}."
    if fit is None:
        if (more := seeds_for_noise(grid)) == 0:
            return f"{cannot_tell}: {why_not}."
        return f"{cannot_tell}: {_seeds(more)} {SHOWS_NOISE}."
    if equal is None or margin is None:
        return f"{cannot_tell}; --margin names a difference that matters, and then says how many seeds it takes."
    if (free := fit.runs - len(fit.coefficients)) < FEWEST_FREE:
        return f"{cannot_tell}: {_seeds(math.ceil((FEWEST_FREE - free) / _cells(grid)))} {SHOWS_NOISE}."
    low, high = (seeds_needed(fit, error, grid, margin) for error in _bounds(equal.standard_error, free))
    so = f"would probably, if PLW makes a difference of {unit.words(margin)}"
    return f"{cannot_tell}: {_seeds(low, high)} {so}."


def _bounds(standard_error: float, free: int) -> list[float]:
    """Between which the true standard error lies, by that of these runs. free: its degrees of freedom."""
    return [standard_error * math.sqrt(free / float(stats.chi2.ppf(share, free))) for share in (SURE, 1 - SURE)]


def _seeds(low: int, high: int | None = None) -> str:
    """A number of seeds, or a range."""
    if low > MOST_SEEDS:
        return f"more than {MOST_SEEDS} more seeds"
    if high is not None and high > MOST_SEEDS:
        return f"{low} to more than {MOST_SEEDS} more seeds"
    if high is not None and high > low:
        return f"{low} to {high} more seeds"
    return f"{low} more seed{'s' * (low > 1)}"


def seeds_for_noise(grid: Grid) -> int:
    """How many more seeds, at each PLW and model, let `fixed-tasks` be fitted; 0 where runs are enough for it."""
    lacking = fewest_runs(len(grid.terms), tasks=1) - len(grid.runs)
    return max(0, math.ceil(lacking / _cells(grid)))


def seeds_needed(fit: Fit, standard_error: float, grid: Grid, margin: float) -> int:
    """How many more seeds, at each PLW and model, let 4 of 5 such studies find a difference of the margin.

    standard_error: of a difference, as these runs have it. One at least; MOST_SEEDS + 1 where that many are too few.
    """
    cells, terms = _cells(grid), len(fit.coefficients)
    for more in range(1, MOST_SEEDS + 1):
        runs = fit.runs + more * cells
        reach = stats.t.ppf(1 - LEVEL / 2, runs - terms) + stats.t.ppf(POWER, runs - terms)
        if reach * standard_error * math.sqrt(fit.runs / runs) <= margin:
            return more
    return MOST_SEEDS + 1


def _cells(grid: Grid) -> int:
    """The runs that a further seed adds: one at each PLW and model."""
    return len(grid.runs.drop(columns="seed").drop_duplicates())
