"""From a table of scores to what it says about PLW: does it matter, which value is best, how sure is that.

Every model is fitted to every data set's scores; the report leads with the first of LEADS that could be. What cannot be
fitted is listed with its reason, so that an analysis never stops at one model's demands.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from plw_mlflow.analysis.statistics import (
    bootstrap,
    design,
    differences,
    equivalence,
    fitting,
    multiple_testing,
    parametric,
    task_curves,
)
from plw_mlflow.analysis.statistics.bootstrap import Bootstrap
from plw_mlflow.analysis.statistics.differences import Difference
from plw_mlflow.analysis.statistics.equivalence import Equivalence
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.analysis.statistics.table import (
    COLUMNS,
    MIN_PLWS,
    SCALES,
    SCORE,
    check,
    fittable,
    missing_scores,
    read_scores,
    rescale,
    task_types,
    widest_difference,
)
from plw_mlflow.analysis.statistics.task_curves import TaskCurve
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import EXPONENT, TERMS, TRANSFORMS, make_transform

T = TypeVar("T")

SCHEMA = "plw_mlflow.fit/3"
LEADS = ("crossed", "lmm-slopes", "lmm", "ols-task")  # the first that could be fitted, to most scores, is the answer
MOST = 0.75  # of the scores
BOOTSTRAPS: tuple[bootstrap.Resampled, ...] = ("tasks", "seeds", "both")


@dataclass(frozen=True)
class Refusal:
    """Something that these scores do not allow, and why."""

    dataset: str
    what: str  # a model's name, or what else was asked
    reason: str


@dataclass(frozen=True)
class Variant:
    """The answer under another scale of scores or another transform of PLW."""

    name: str
    joint_p: float | None  # None where it could not be fitted
    optimum_plw: float | None
    optimum_set: list[list[float]] | None  # as of a fit
    reason: str | None = None


@dataclass(frozen=True)
class Answer:
    """What one data set's scores say."""

    dataset: str
    lead: Fit
    holm_p: float  # of the lead's joint test, for looking at all data sets of the table
    verdict: str
    equivalence: Equivalence | None
    bootstraps: list[Bootstrap]
    by_task: list[TaskCurve]
    by_type: list[tuple[str, Fit]]  # type of task, and the lead's model fitted to its tasks
    scales: list[Variant]
    transforms: list[Variant]

    @property
    def shows_effect(self) -> bool:
        """Whether an effect of PLW may be claimed."""
        return self.holm_p < LEVEL and not self.lead.has_too_few_runs


@dataclass(frozen=True)
class Analysis:
    """Everything that was asked of a table."""

    fits: list[Fit]  # data set by data set, the models in the order of MODELS
    refusals: list[Refusal]
    answers: list[Answer]  # a data set each
    differences: list[Difference]
    scale: str
    transform: str
    margin: float | None
    by: tuple[str, ...]


def analyze(
    table: pd.DataFrame,
    scale: str = "none",
    *,
    transform: str = "power",
    margin: float | None = None,
    by: tuple[str, ...] = (),
    draws: int = 2000,
    refits: int = 0,
    seed: int = 1234,
) -> Analysis:
    """Check a table, bring it to one scale, and ask it everything.

    margin: a difference of scores that is as good as none, for the test of no effect. by: columns between whose values
    curves are compared; `dataset` always is. draws: of each bootstrap of the optimum, 0 for none. refits: of the
    parametric bootstraps of the mixed models' likelihood ratios, 0 for none.

    Raises UserError for a table or a margin that is at fault, or where no model can be fitted to a data set.
    """
    checked = check(table, by).sort_values([*SCORE, *by])  # sums then round alike whatever the order of rows
    scaled = rescale(checked, scale)
    source = table.attrs.get("source", "score table")
    widest = widest_difference(scaled, scale)
    if margin is not None and widest is not None and margin >= widest:
        raise UserError(
            f"margin is {margin:g}, but no two scores can differ by more than {widest:g}; "
            "give a margin on the scale of the scores"
        )
    types = task_types(checked)
    fits: list[Fit] = []
    refusals: list[Refusal] = []
    answers: list[Answer] = []
    for dataset, part in scaled.groupby("dataset"):
        tries = _Tries(str(dataset), refusals)
        grid = _grid(part, str(dataset), transform, also=by)
        here = tries.every((model, partial(fitting.fit, model, grid, scale)) for model in fitting.FITS)
        if refits:
            here = [_bootstrapped(fit, grid, refits, seed, tries) for fit in here]
        fits += here
        if not here:
            reasons = "; ".join(f"{one.what}: {one.reason}" for one in refusals if one.dataset == dataset)
            raise UserError(f"{source}: data set {dataset} can be fitted by no model ({reasons})")
        lead = _lead(here, len(part), refusals)
        equal = tries.every([("equivalence", partial(equivalence.assess_equivalence, grid, margin, widest))])
        answers.append(
            Answer(
                str(dataset),
                lead,
                math.nan,
                "",
                equal[0] if equal else None,
                tries.every(
                    (f"bootstrap over {over}", partial(bootstrap.bootstrap_optimum, grid, over, draws, seed))
                    for over in BOOTSTRAPS
                    if draws
                ),
                task_curves.fit_task_curves(grid, types),
                _by_type(part, types, tries, transform, scale, by),
                [_variant(checked, str(dataset), lead.model, other, transform, other, by) for other in SCALES],
                [_variant(checked, str(dataset), lead.model, scale, other, other, by) for other in TRANSFORMS],
            )
        )
    adjusted = multiple_testing.adjust_by_holm({answer.dataset: answer.lead.joint_p for answer in answers})
    answers = [
        replace(
            answer,
            holm_p=adjusted[answer.dataset],
            verdict=verdict(answer.lead, answer.equivalence, adjusted[answer.dataset]),
        )
        for answer in answers
    ]
    return Analysis(
        fits, refusals, answers, _differences(scaled, by, transform, refusals), scale, transform, margin, by
    )


def _bootstrapped(fit: Fit, grid: design.Grid, draws: int, seed: int, tries: _Tries) -> Fit:
    """The fit with one joint test more, if it is of a model that has it."""
    if fit.model not in parametric.RATIOS:
        return fit
    test = partial(parametric.joint_test, grid, fit.model, draws, seed)
    return replace(fit, joint_tests=[*fit.joint_tests, *tries.every([(f"{fit.model}, parametric bootstrap", test)])])


def _lead(fits: list[Fit], scores: int, refusals: list[Refusal]) -> Fit:
    """The fit of the first of LEADS that converged and uses most of the scores, if there is one; why it is not first.

    `crossed` takes runs that are scored on every task alone: where that leaves little, `lmm-slopes` knows more.
    """
    by_model = {one.model: one for one in fits}
    there = [by_model[model] for model in LEADS if model in by_model] or fits
    sound = [one for one in there if one.converged]
    lead = next((one for one in sound if one.n >= MOST * scores), (sound or there)[0])
    if lead.model == LEADS[0]:
        return lead
    if LEADS[0] in by_model:
        why = f"{LEADS[0]} can use {by_model[LEADS[0]].n} of {scores} scores only"
    else:
        reason = next(one.reason for one in refusals if (one.dataset, one.what) == (lead.dataset, LEADS[0]))
        why = f"{LEADS[0]} cannot be fitted ({reason})"
    why += "".join(f" and {one.model} did not converge" for one in there[: there.index(lead)] if not one.converged)
    meaning = (
        ""
        if lead.model == "lmm-slopes"
        else ", and it takes all tasks as moved alike, so it speaks of these tasks alone"
        + "; nor does it count a run's luck" * (lead.tasks > 1)
    )
    return replace(lead, notes=[f"{lead.model} leads, as {why}{meaning}.", *lead.notes])


class _Tries:
    """Calls that may refuse, whose reasons are kept."""

    def __init__(self, dataset: str, refusals: list[Refusal]) -> None:
        self._dataset, self._refusals = dataset, refusals

    def every(self, named: Iterable[tuple[str, Callable[[], T]]]) -> list[T]:
        """What the calls give, without those that refuse."""
        found = []
        for what, call in named:
            try:
                found.append(call())
            except ValueError as error:
                self.note(what, str(error))
        return found

    def note(self, what: str, reason: str) -> None:
        """Keep a reason."""
        self._refusals.append(Refusal(self._dataset, what, reason))


def _by_type(
    part: pd.DataFrame, types: dict[str, str], tries: _Tries, transform: str, scale: str, by: tuple[str, ...]
) -> list[tuple[str, Fit]]:
    """Each type's tasks by themselves, by the first of LEADS that so few allow."""
    found = []
    kinds = part["task"].map(types)
    for kind in sorted(kinds.dropna().unique()):
        of_kind = part[kinds == kind]
        if len(of_kind) == len(part):
            continue
        grid = _grid(of_kind, part["dataset"].iloc[0], transform, also=by)
        reasons: list[str] = []
        for model in LEADS:
            try:
                found.append((str(kind), fitting.fit(model, grid, scale)))
            except ValueError as error:
                reasons.append(f"{model}: {error}")
            else:
                break
        else:
            tries.note(f"{kind} tasks", "; ".join(reasons))
    return found


def grids(
    table: pd.DataFrame, scale: str = "none", transform: str = "power", by: tuple[str, ...] = ()
) -> list[design.Grid]:
    """A table's data sets as the models take them. Raises UserError as `analyze` does."""
    scaled = rescale(check(table, by), scale)
    return [_grid(part, str(dataset), transform, also=by) for dataset, part in scaled.groupby("dataset")]


def _grid(
    part: pd.DataFrame, dataset: str, transform: str, by: str | None = None, also: tuple[str, ...] = ()
) -> design.Grid:
    return design.grid(part, dataset, make_transform(transform, part["plw"]), by=by, also=also)


def _variant(
    checked: pd.DataFrame, dataset: str, model: str, scale: str, transform: str, name: str, by: tuple[str, ...]
) -> Variant:
    """The lead's answer under another scale or transform."""
    try:
        scaled = rescale(checked, scale)
        found = fitting.fit(model, _grid(scaled[scaled["dataset"] == dataset], dataset, transform, also=by), scale)
    except ValueError as error:
        return Variant(name, None, None, None, str(error))
    return Variant(name, found.joint_p, found.optimum_plw, found.optimum_set)


def _differences(
    scaled: pd.DataFrame, by: tuple[str, ...], transform: str, refusals: list[Refusal]
) -> list[Difference]:
    """The tests between the values of columns, over all data sets together."""
    asked = list(dict.fromkeys([*(["dataset"] if scaled["dataset"].nunique() > 1 else []), *by]))

    def compare(column: str) -> Difference:
        return differences.compare_curves(_grid(scaled, "all", transform, column, by), column)

    return _Tries("all", refusals).every((f"by {column}", partial(compare, column)) for column in asked)


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
        lead = f"{'PLW matters here' if matters else 'No significant effect of PLW'} (p = {fit.joint_p:.2g})"
    else:
        lead = f"PLW may matter here (p = {fit.joint_p:.2g} by itself, {p:.2g} corrected for the other data sets)"
    nothing = ""
    if equal is not None and equal.p is not None:
        start = " All differences" if equal.p < LEVEL else " Not all differences"
        nothing = f"{start} between the PLWs tried are shown to be within {equal.margin:g} (p = {equal.p:.2g})."
    if fit.optimum_plw is not None:
        unsure = "; where is not settled" if fit.optimum_set_is_unbounded and matters else ""
        where = f"PLW {fit.optimum_plw:.3g} (95 % interval {interval(fit)}{unsure})"
        found = f": scores peak at {where}." if matters else f"; the peak at {where} may be chance."
        return lead + found + nothing
    end = f"the curve is highest at PLW {highest_end(fit):.3g}, an end of the range tried"
    return lead + (f": no interior optimum; {end}." if matters else ", and no interior optimum.") + nothing


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
    ends = make_transform(fit.transform, fit.plws)([fit.plws[0], fit.plws[-1]])
    heights = [fit.coefficients["w_p"] * w + fit.coefficients["w_p^2"] * w**2 for w in ends]
    return fit.plws[0] if heights[0] > heights[1] else fit.plws[-1]


def to_json(analysis: Analysis, table: pd.DataFrame) -> dict[str, Any]:
    """What `fit.json` holds: every fit unrounded, and which scores it came from.

    `table.sha256` is of the sorted columns of the contract, so equal scores have it whatever their order or file.
    """
    table = check(table, analysis.by)
    leads = {answer.dataset: answer for answer in analysis.answers}
    holm_p = {
        (dataset, model): p
        for model in fitting.FITS
        for dataset, p in multiple_testing.adjust_by_holm(
            {fit.dataset: fit.joint_p for fit in analysis.fits if fit.model == model}
        ).items()
    }

    def concluded(fit: Fit) -> dict[str, Any]:
        """What is concluded from a fit: of a lead, the answer's own words, of others the same by their own p-values."""
        answer = leads[fit.dataset]
        if answer.lead.model == fit.model:
            return {"holm_p": answer.holm_p, "verdict": answer.verdict}
        p = holm_p[fit.dataset, fit.model]
        return {"holm_p": p, "verdict": verdict(fit, answer.equivalence, p)}

    canonical = table[COLUMNS].sort_values(SCORE).to_csv(index=False, lineterminator="\n")
    return {
        "schema": SCHEMA,
        "exponent": EXPONENT,
        "scale": analysis.scale,
        "transform": analysis.transform,
        "table": {
            "source": table.attrs.get("source"),
            "file_sha256": table.attrs.get("file_sha256"),
            "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "rows": len(table),
            "missing": missing_scores(table).to_dict("records"),
            "left_out": table.attrs.get("left_out", []),
            "notes": table.attrs.get("notes", []),
        },
        "fits": [
            {**asdict(fit), "joint_p": fit.joint_p, "has_too_few_runs": fit.has_too_few_runs, **concluded(fit)}
            for fit in analysis.fits
        ],
        "refusals": [asdict(one) for one in analysis.refusals],
        "answers": [
            {
                **{name: value for name, value in asdict(answer).items() if name != "lead"},
                "lead": answer.lead.model,
                "by_type": [{"task_type": kind, **asdict(fit), "joint_p": fit.joint_p} for kind, fit in answer.by_type],
            }
            for answer in analysis.answers
        ],
        "differences": [asdict(one) for one in analysis.differences],
    }


def table_text(analysis: Analysis) -> str:
    """The analysis as the terminal shows it: a line per fit, then each answer in words."""
    fits = analysis.fits
    width = max(8, *(len(fit.dataset) for fit in fits))
    terms = "  ".join(f"{f'{term} (SE)':19}  {'p':7}" for term in TERMS[1:])
    lines = [f"{'data set':{width}}  {'model':10}    n  tasks   {terms}  joint p  optimum PLW"]
    for fit in fits:
        terms = "  ".join(
            f"{f'{fit.coefficients[term]:+.4g} ({fit.standard_errors[term]:.2g})':19}  {fit.p_values[term]:<7.2g}"
            for term in TERMS[1:]
        )
        optimum = "no interior optimum" if fit.optimum_plw is None else f"{fit.optimum_plw:.4f}"
        lines.append(
            f"{fit.dataset:{width}}  {fit.model:10} {fit.n:4}  {fit.tasks:5}   {terms}  {fit.joint_p:<7.2g}  {optimum}"
        )
    for answer in analysis.answers:
        lines += ["", f"{answer.dataset} ({answer.lead.model}): {answer.verdict}"]
        lines += [f"  {note}" for note in answer.lead.notes]
        if answer.holm_p != answer.lead.joint_p and not answer.lead.has_too_few_runs:
            lines.append(f"  p = {answer.holm_p:.2g} when corrected for {len(analysis.answers)} data sets (Holm).")
    for one in analysis.differences:
        tests = ", ".join(f"{test.test} p = {test.p:.2g}" for test in one.tests)
        said = "Too few runs to tell" if one.has_too_few_runs else tests
        lines += ["", f"Does the curve differ by {one.by}? {said}."]
    refused: dict[tuple[str, str], list[str]] = {}
    for refusal in analysis.refusals:
        refused.setdefault((refusal.what, refusal.reason), []).append(refusal.dataset)
    lines += [f"not done: {what} of {', '.join(datasets)}: {reason}" for (what, reason), datasets in refused.items()]
    return "\n".join(lines)


__all__ = [
    "EXPONENT",
    "LEVEL",
    "MIN_PLWS",
    "SCALES",
    "TERMS",
    "TRANSFORMS",
    "Analysis",
    "Answer",
    "Fit",
    "analyze",
    "check",
    "fittable",
    "grids",
    "missing_scores",
    "read_scores",
    "rescale",
    "to_json",
    "verdict",
]
