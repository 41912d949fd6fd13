"""An analysis in words: the verdicts, and the table that the terminal shows."""

from __future__ import annotations

import numpy as np

from plw_mlflow.analysis.answers import Analysis, Answer
from plw_mlflow.analysis.statistics.equivalence import Equivalence
from plw_mlflow.analysis.statistics.fitting import Fit, JointTest
from plw_mlflow.analysis.statistics.joint import Joint
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.transforms import EXPONENT, TERMS, make_transform

AS_GOOD = 2.0  # difference of AIC within which two descriptions count as equally good


def verdict(fit: Fit, equal: Equivalence | None = None, holm_p: float | None = None) -> str:
    """The answer of a fit in one sentence or two; holm_p: its p where several data sets are looked at."""
    if fit.has_too_few_runs:
        return (
            f"Too few runs to tell whether PLW matters: there are {fit.runs}, and it takes at least {fit.fewest_runs}. "
            "So few show an effect where there is none far more often than in 1 of 20 cases, so neither p-values nor "
            "intervals can be relied on."
        )
    p = fit.joint_p if holm_p is None else holm_p
    matters = p < LEVEL
    if matters or fit.joint_p >= LEVEL:
        finding = f"{'PLW matters here' if matters else 'No significant effect of PLW'} (p = {fit.joint_p:.2g})"
    else:
        finding = f"PLW may matter here (p = {fit.joint_p:.2g} by itself, {p:.2g} corrected for the other data sets)"
    equivalence = ""
    if equal is not None and equal.p is not None:
        start = " All differences" if equal.p < LEVEL else " Not all differences"
        equivalence = f"{start} between the PLWs tried are shown to be within {equal.margin:g} (p = {equal.p:.2g})."
    if fit.optimum_plw is not None:
        unsure = "; where is not settled" if fit.optimum_set_is_unbounded and matters else ""
        place = f"PLW {fit.optimum_plw:.3g} (95 % interval {interval(fit)}{unsure})"
        peak = f": scores peak at {place}." if matters else f"; the peak at {place} may be chance."
        return finding + peak + equivalence
    end = f"the curve is highest at PLW {highest_end(fit):.3g}, an end of the range tried"
    return finding + (f": no interior optimum; {end}." if matters else ", and no interior optimum.") + equivalence


def interval(fit: Fit) -> str:
    """The 95 % interval of the optimum in words: Fieller's, whose coverage holds also where the bend is uncertain."""
    return set_in_words(fit.optimum_set, fit.plws)


def set_in_words(optimum_set: list[list[float]] | None, plws: list[float]) -> str:
    """The intervals of a fit's optimum in words; plws: those tried, which say how far the range goes."""
    if not optimum_set:
        return "none of the range"
    whole = [min(0.0, plws[0]), max(1.0, plws[-1])]
    if len(optimum_set) == 1 and np.allclose(optimum_set[0], whole, rtol=1e-9, atol=1e-12):
        return "all of the range"
    return " or ".join(f"{low:.3g} to {high:.3g}" for low, high in optimum_set)


def highest_end(fit: Fit) -> float:
    """The end of the PLWs tried at which the curve is higher."""
    ends = make_transform(fit.axis, fit.plws, fit.prompt_odds)([fit.plws[0], fit.plws[-1]])
    heights = [fit.coefficients["w_p"] * w + fit.coefficients["w_p^2"] * w**2 for w in ends]
    return fit.plws[0] if heights[0] > heights[1] else fit.plws[-1]


def table_text(analysis: Analysis) -> str:
    """The analysis as the terminal shows it: a line per fit, then each answer in words."""
    fits = analysis.fits
    width = max(8, *(len(fit.dataset) for fit in fits))
    terms = "  ".join(f"{f'{term} (SE)':19}  {'p':7}" for term in (analysis.axis, f"{analysis.axis}^2"))
    lines = [f"{'data set':{width}}  {'model':11}    n  tasks   {terms}  joint p  optimum PLW"]
    for fit in fits:
        terms = "  ".join(
            f"{f'{fit.coefficients[term]:+.4g} ({fit.standard_errors[term]:.2g})':19}  {fit.p_values[term]:<7.2g}"
            for term in TERMS[1:]
        )
        optimum = "no interior optimum" if fit.optimum_plw is None else f"{fit.optimum_plw:.4f}"
        lines.append(
            f"{fit.dataset:{width}}  {fit.model:11} {fit.n:4}  {fit.tasks:5}   {terms}  {fit.joint_p:<7.2g}  {optimum}"
        )
    for answer in analysis.answers:
        lines += ["", *answer_lines(answer)]
        lines += [f"  note: {note}" for note in answer.lead.notes]
    for question in _differences(analysis):
        lines += ["", question]
    for (what, reason), datasets in analysis.refusals_by_reason.items():
        lines.append(f"not done: {what} of {', '.join(datasets)}: {reason}")
    return "\n".join(lines)


def verdicts(analysis: Analysis) -> str:
    """What the analysis says in short: three lines for each data set, and one for each comparison of curves."""
    lines = [line for answer in analysis.answers for line in answer_lines(answer)]
    return "\n".join([*lines, *_differences(analysis)])


def answer_lines(answer: Answer) -> list[str]:
    """What to do, then both questions with their answers, a line each."""
    return [
        f"{answer.dataset}: {answer.advice}",
        *(f"- {finding.question} {finding.verdict}" for finding in answer.findings),
    ]


def _differences(analysis: Analysis) -> list[str]:
    """Whether curves differ, a line for each column by which they were compared."""
    lines = []
    for difference in analysis.differences:
        tests = ", ".join(f"{test.test} p = {test.p:.2g}" for test in difference.tests)
        conclusion = "Too few runs to tell" if difference.has_too_few_runs else tests
        lines.append(f"Does the curve differ by {difference.by}? {conclusion}.")
    if analysis.joint is not None:
        lines.append(joint_words(analysis.joint))
    return lines


def joint_words(joint: Joint) -> str:
    """Which axis describes all data sets by one curve best, and whether one curve will do, by AIC."""
    best, in_w_p, each = joint.best, joint.of("w_p"), joint.of("w_p", each=True)
    if joint.of(None).aic <= best.aic:
        return "No single curve for all data sets is better (by AIC) than none, on any axis."
    gain = in_w_p.aic - best.aic
    beside = "" if best.axis == "w_p" else f", {gain:.1f} lower than in {AXIS_WORDS['w_p']}"
    first = f"Of single curves for all data sets, the one in {AXIS_WORDS[str(best.axis)]} has the lowest AIC{beside}."
    lead, other = best.aic - each.aic, f"{first} A curve for each data set in {AXIS_WORDS['w_p']} has an AIC"
    if lead > AS_GOOD:
        return f"{other} lower by {lead:.1f}, so a single one does not do."
    return f"{other} {'lower' if lead > 0 else 'higher'} by {abs(lead):.1f}, so a single one does as well."


SCALE_WORDS = {
    "none": "as they are",
    "fraction": "0..100 divided by 100",
    "minmax": "each task 0 to 1",
    "zscore": "each task mean 0, SD 1",
}
AXIS_WORDS = {
    "w_p": f"PLW^{EXPONENT}",
    "plw": "PLW itself",
    "logit": "logit of PLW",
    "rank": "rank of PLW",
    "share": "the prompts' share of the loss weight",
    "w_share": f"the prompts' share^{EXPONENT}",
    "w_odds": f"(weight of prompts / weight of completions)^{EXPONENT}",
}
# What each statistical model is, and what it can be trusted for.
FIT_WORDS = {
    "crossed": (
        "A curve per task by least squares; the mean curve is tested with the tasks as the sample. Variation between "
        "runs that their tasks share is added to the variance where the residuals show it, and deducted in part where "
        "its estimate is negative.",
        "For tasks like these, however they differ. Needs four tasks and runs scored on every task; with few tasks it "
        "finds only clear effects.",
    ),
    "task-t": (
        "The same without variation between runs: t and Hotelling's T² over tasks.",
        "Exact where runs differ by no more than noise; elsewhere its p-values are mostly too small.",
    ),
    "lmm-slopes": (
        "score ~ w_p + w_p² + model + (w_p + w_p² | task) + (1 | run), a residual variance per task, by REML.",
        "For tasks like these; uses incomplete runs and the scores' own standard errors. With few tasks the p of its "
        "likelihood ratio is too small; that of the F test is closer to the truth.",
    ),
    "lmm": (
        "score ~ w_p + w_p² + (1 | task), by REML: the first version of the study.",
        "Assumes that PLW moves every task alike and that scores are independent. Where either is wrong, p-values are "
        "too small and intervals too narrow.",
    ),
    "beta": (
        "As lmm, but with beta-distributed scores and a logit link, by Laplace's approximation: the study's fourth "
        "version.",
        "As lmm, and only for scores within 0..1. Coefficients are of the logit, not of the score.",
    ),
    "ols-task": (
        "A fixed level per task, least squares: the study's draft.",
        "As lmm, and only for these very tasks.",
    ),
    "fixed-tasks": (
        "A fixed curve per task; their mean is tested by the residuals of runs' means over tasks, which have a run's "
        "luck in them.",
        "For these very tasks, however they differ. Exact with any number of tasks and runs, if runs are independent "
        "and residuals normal. Runs of one seed share examples and their order, which makes its p too large.",
    ),
}


def name_test(test: JointTest) -> str:
    """A joint test by name, with its statistic."""
    name = test.test.replace("^2", "²")
    if test.df2 is None:
        return f"{name}: χ²({test.df1:g}) = {test.statistic:.3g}"
    statistic = f"F({test.df1:g}, {test.df2:.3g}) = {test.statistic:.3g}"
    return statistic if name == "F" else f"{name}: {statistic}"


def remarks(fit: Fit) -> str:
    """What a reader must know of a fit before using its numbers, in a few words."""
    holds_by_words = {
        "too few runs": fit.has_too_few_runs,
        "did not converge": not fit.converged,
        "singular": fit.is_singular,
        "coefficients of the logit": fit.model == "beta",
        f"{fit.runs} runs, {fit.tasks} tasks": any(note.startswith("Left out") for note in fit.notes),
    }
    return ", ".join(words for words, holds in holds_by_words.items() if holds)


def stability(answer: Answer) -> str:
    """Whether the conclusion stays the same under other scales and on other axes."""
    if answer.lead.has_too_few_runs:
        return "With too few runs to tell, no scale or axis can be relied on."
    is_significant = answer.lead.joint_p < LEVEL
    named = [(SCALE_WORDS[variant.name], variant) for variant in answer.scales] + [
        (AXIS_WORDS[variant.name], variant) for variant in answer.axes
    ]
    tried = [(name, variant) for name, variant in named if variant.joint_p is not None]
    differing = [name for name, variant in tried if ((variant.joint_p or 0) < LEVEL) != is_significant]
    text = f"p by {answer.lead.model}, of this data set alone, is {'' if is_significant else 'not '}below {LEVEL}"
    if differing:
        text += f"; it is otherwise under {len(differing)} of {len(tried)}: {', '.join(differing)}."
    else:
        text += " under every scale and axis that could be fitted."
    peaks = [variant.optimum_plw for _, variant in tried if variant.optimum_plw is not None]
    if peaks and len(peaks) == len(tried) and min(peaks) < max(peaks):
        text += f" The peak moves between PLW {min(peaks):.3g} and {max(peaks):.3g}."
    elif peaks and len(peaks) < len(tried):
        text += f" A peak inside the range is found under {len(peaks)} of {len(tried)}."
    return text
