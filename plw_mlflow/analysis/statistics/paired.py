"""Paired: two PLWs compared question by question, since models of both were asked the same ones.

The difference is taken on each question, so what makes a question hard or easy for both models is not in its error.
That error is of the questions: it says what the same trained models would score on other questions like these. What
other trainings would give is not in it. Where there are several seeds, they show that luck, and it can be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.transforms import Array

FEWEST = 2  # degrees of freedom that luck is estimated with; with one, the test finds twice as much as it should


@dataclass(frozen=True)
class Tested:
    """A difference with its error, 95 % interval, and p against none."""

    error: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Luck:
    """How much runs that differ only in their seed differ in score, beyond what their answers to questions vary."""

    variance: float  # of a run, of its mean over the tasks
    spread: float  # the same with what answers vary, from which it was estimated
    freedom: float  # degrees of freedom of that estimate


@dataclass(frozen=True)
class Comparison:
    """The mean score of one PLW less that of another, on the same questions of one task or more."""

    difference: float
    questions: int
    test: str  # of `paired`
    gained: int | None  # questions that only the first answers right, where each answer is right or wrong
    lost: int | None  # questions that only the second does
    paired: Tested  # these trained models, on other questions like these
    unpaired: Tested  # the same, by the two scores' own standard errors, as if they were of different questions
    with_luck: Tested | None  # other trainings of both, on other questions like these; None where no seeds show luck


def compare(first: Sequence[Array], second: Sequence[Array], luck: Luck | None = None) -> Comparison:
    """Compare two PLWs; first, second: for each task, the value of each seed's run on each question, [S, Q].

    Several tasks have equal weights, however many questions they have.
    """
    tasks = len(first)
    by_question = [mine.mean(0) - other.mean(0) for mine, other in zip(first, second, strict=True)]  # [Q] each
    difference = float(np.mean([d.mean() for d in by_question]))
    parts = np.array([d.var(ddof=1) / len(d) for d in by_question]) / tasks**2
    freedom = _freedom(parts, np.array([len(d) - 1 for d in by_question]))
    error = float(np.sqrt(parts.sum()))
    paired, test, gained, lost = _t_test(difference, error, freedom), "paired t", None, None
    if tasks == 1 and len(first[0]) == len(second[0]) == 1 and _are_right_or_wrong(first[0], second[0]):
        gained, lost = int((by_question[0] > 0).sum()), int((by_question[0] < 0).sum())
        low, high = score_interval(gained, lost, len(by_question[0]))
        paired, test = Tested(error, low, high, float(mcnemar(gained, lost))), "McNemar, mid-p"
    elif error == 0 and difference != 0:  # the same on every question, of which a t test would be certain
        number = sum(len(d) for d in by_question)
        low, high = sorted(difference * end for end in score_interval(number, 0, number))
        paired, test = Tested(error, low, high, float(mcnemar(number, 0))), "sign test, mid-p"
    own = sum(float(values.mean(0).var(ddof=1)) / values.shape[1] for values in [*first, *second])
    unpaired = _t_test(difference, own**0.5 / tasks, np.inf)
    with_luck = None
    if luck is not None:
        share = 1 / len(first[0]) + 1 / len(second[0])
        with_luck = _with_luck(difference, error, freedom, share, luck)
    questions = sum(len(d) for d in by_question)
    return Comparison(difference, questions, test, gained, lost, paired, unpaired, with_luck)


def mcnemar(gained: Array | int, lost: Array | int) -> Array:
    """McNemar's exact test of as many gained as lost questions, by its mid-p.

    The exact p counts the whole probability of what was found, which makes it too large on average; the mid-p counts
    half of it (Fagerland, Lydersen and Laake 2013).
    """
    fewer, number = np.minimum(gained, lost), np.add(gained, lost)
    mid = 2 * stats.binom.cdf(fewer, number, 0.5) - stats.binom.pmf(fewer, number, 0.5)
    return np.minimum(1.0, mid)


def score_interval(gained: int, lost: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares of right answers to the same questions: Bonett and Price's.

    It is Wald's with one more question gained and one more lost, so that it has a width where none was (2012).
    """
    number = questions + 2
    more, less = (gained + 1) / number, (lost + 1) / number
    half = float(stats.norm.isf(LEVEL / 2)) * np.sqrt((more + less - (more - less) ** 2) / number)
    return max(-1.0, more - less - half), min(1.0, more - less + half)


def luck_of(scores: Array, noise: Array, plws: Sequence[object], seeds: Sequence[object]) -> Luck | None:
    """The luck of training that runs show which share their PLW and differ in their seed; None if these are too few.

    scores: of runs, [R], each the mean over the tasks. noise: the variance of each that comes from how answers to
    single questions vary between seeds, [R]; NaN where there is one seed. What all runs of a seed share is no luck
    here, as it drops out of differences between PLWs; but it counts as luck where else too few runs would be left.
    """
    for labels in ((plws, seeds), (plws,)):
        columns = [np.array([label == one for label in given], float) for given in labels for one in set(given)]
        design = np.stack(columns, axis=1)  # [R, P + S]
        freedom = len(scores) - int(np.linalg.matrix_rank(design))
        if freedom >= FEWEST:
            residuals = scores - design @ np.linalg.lstsq(design, scores)[0]
            spread = float(residuals @ residuals) / freedom
            return Luck(max(0.0, spread - float(np.nanmean(noise))), spread, freedom)
    return None


def answer_noise(values: Array) -> float:
    """How much the mean of a run varies because its answers to single questions do: [S, Q] of one PLW and task.

    NaN for one seed. It is the residual of questions and seeds, over the number of questions.
    """
    seeds, questions = values.shape
    if seeds < 2 or questions < 2:
        return float("nan")
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return float((residuals**2).sum()) / (seeds - 1) / (questions - 1) / questions


def _with_luck(difference: float, error: float, freedom: float, share: float, luck: Luck) -> Tested:
    """share: the variance of the difference over that of one run.

    Degrees of freedom are by Satterthwaite, but no fewer than the less certain of the two variances has. Where answers
    vary less in these runs than in others, no luck may be left of a large spread, and the formula would give next to
    none. The levels in docs/statistics.md are those of this choice.
    """
    variances = np.array([error**2, share * luck.variance])
    uncertain = np.array([error**2, share * luck.spread])
    total = float(variances.sum())
    squares = float((uncertain**2 / np.array([freedom, luck.freedom])).sum())
    by_formula = total**2 / squares if squares else np.inf
    return _t_test(difference, total**0.5, max(by_formula, min(freedom, luck.freedom)))


def _t_test(difference: float, error: float, freedom: float) -> Tested:
    if error == 0:  # every question has the same difference
        return Tested(error, difference, difference, 1.0 if difference == 0 else 0.0)
    half = float(stats.t.isf(LEVEL / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    return Tested(error, difference - half, difference + half, p)


def _freedom(parts: Array, freedoms: Array) -> float:
    """Degrees of freedom of a sum of estimated variances (Satterthwaite)."""
    squares = float((parts**2 / freedoms).sum())
    return float(parts.sum()) ** 2 / squares if squares else np.inf


def _are_right_or_wrong(*values: Array) -> bool:
    return all(np.isin(one, (0, 1)).all() for one in values)
