"""From a table of scores to what it says about PLW: does it matter, which value is best, how sure is that.

Every model is fitted to every data set's scores; the report leads with the first of LEADS that could be. What cannot be
fitted is listed with its reason, so that an analysis never stops at one model's demands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pandas as pd

from plw_mlflow.analysis import findings
from plw_mlflow.analysis.answers import Analysis, Answer, Refusal, Variant
from plw_mlflow.analysis.score_table import (
    SCALES,
    SCORE,
    check,
    in_prompt_odds,
    prompt_odds,
    rescale,
    task_types,
    widest_difference,
)
from plw_mlflow.analysis.statistics import (
    bootstrap,
    design,
    differences,
    equivalence,
    fitting,
    joint,
    multiple_testing,
    parametric,
    task_curves,
)
from plw_mlflow.analysis.statistics.differences import Difference
from plw_mlflow.analysis.statistics.equivalence import Equivalence
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.joint import Joint
from plw_mlflow.analysis.statistics.lack_of_fit import LackOfFit, misfits
from plw_mlflow.analysis.wording import verdict
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import AXES, SHARE_AXES, make_transform

T = TypeVar("T")

# The first of these that could be fitted to enough of the scores leads the report.
LEADS = ("crossed", "lmm-slopes", "lmm", "ols-task")
ENOUGH = 0.75  # of the scores
BOOTSTRAPS: tuple[bootstrap.Resampled, ...] = ("tasks", "seeds", "both")


def analyze(
    table: pd.DataFrame,
    scale: str = "none",
    *,
    axis: str = "w_p",
    margin: float | None = None,
    by: tuple[str, ...] = (),
    draws: int = 2000,
    refits: int = 0,
    seed: int = 1234,
) -> Analysis:
    """Check a table, bring it to one scale, fit every model to every data set, and answer every question.

    margin: a difference of scores that is as good as none, for the test of no effect. by: columns between whose values
    curves are compared; `dataset` always is. draws: of each bootstrap of the optimum, 0 for none. refits: of the
    parametric bootstraps of the mixed models' likelihood ratios, 0 for none.

    Raises UserError for a table or a margin that is at fault, or where no model can be fitted to a data set.
    """
    checked = check(table, by).sort_values([*SCORE, *by])  # sums then round alike whatever the order of rows
    scaled = rescale(checked, scale)
    widest = widest_difference(scaled, scale)
    if margin is not None and widest is not None and margin >= widest:
        raise UserError(
            f"margin is {margin:g}, but no two scores can differ by more than {widest:g}; "
            "give a margin on the scale of the scores"
        )
    types = task_types(checked)
    unit = findings.Unit(widest, has_points=scale in ("none", "fraction"))
    fits: list[Fit] = []
    refusals: list[Refusal] = []
    drafts: list[_Draft] = []
    for name, part in scaled.groupby("dataset"):
        dataset, attempts = str(name), _Attempts(str(name), refusals)
        grid = _grid(part, dataset, axis, also=by)
        fits_here = _fits(grid, scale, refits, seed, attempts)
        fits += fits_here
        lead = _lead(fits_here, len(part), refusals)
        assess = partial(equivalence.assess_equivalence, grid, margin, widest)
        over_tasks = next(iter(attempts.results([("equivalence", assess)])), None)
        resampled = attempts.results(
            (f"bootstrap over {over}", partial(bootstrap.bootstrap_optimum, grid, over, draws, seed))
            for over in BOOTSTRAPS
            if draws
        )
        answer = partial(
            Answer,
            dataset=dataset,
            bootstraps=resampled,
            by_task=task_curves.fit_task_curves(grid, types),
            by_type=_by_type(part, types, attempts, axis, scale, by),
            scales=[_variant(checked, lead, other, axis, other, by) for other in SCALES],
            axes=[_variant(checked, lead, scale, other, other, by) for other in _axes_of(part)],
        )
        fixed = next((fit for fit in fits_here if fit.model == findings.ON_THESE), None)
        of_these = None if fixed is None else assess(tasks_are_fixed=True)
        drafts.append(_Draft(answer, grid, lead, over_tasks, fixed, of_these, dict(attempts.refused)))
    return Analysis(
        fits=fits,
        refusals=refusals,
        answers=_concluded(drafts, unit, margin),
        differences=_differences(scaled, by, axis, refusals),
        joint=_joint(scaled, by, refusals),
        scale=scale,
        axis=axis,
        margin=margin,
        by=by,
    )


@dataclass(frozen=True)
class _Draft:
    """An answer before its p-values are corrected for the other data sets."""

    answer: Callable[..., Answer]  # which lacks what depends on the corrected ones
    grid: design.Grid
    lead: Fit
    over_tasks: Equivalence | None
    fixed: Fit | None  # by findings.ON_THESE
    of_these: Equivalence | None  # of the mean of these tasks
    refused: dict[str, str]  # reasons, by what was refused

    def concluded(
        self,
        holm_p: float,
        fixed_holm_p: float | None,
        misfit: LackOfFit | None,
        unit: findings.Unit,
        margin: float | None,
    ) -> Answer:
        """The answer, by the p-values corrected for the other data sets.

        misfit: of these tasks' mean, where no parabola describes it.
        """
        if self.fixed is not None and misfit is not None:
            return self._without_curve(self.fixed, misfit, holm_p, unit, margin)
        why_not = self.refused.get(findings.ON_THESE, "")
        these = findings.about_these(self.fixed, fixed_holm_p, self.of_these, len(self.grid.tasks), unit, why_not)
        reason = self.refused.get(findings.ON_OTHERS[0], "")
        others = findings.about_others(self.lead, holm_p, self.over_tasks, unit, reason)
        return self.answer(
            lead=self.lead,
            equivalence=self.over_tasks,
            holm_p=holm_p,
            verdict=verdict(self.lead, self.over_tasks, holm_p),
            these_tasks=these,
            other_tasks=others,
            advice=findings.advise(these, self.fixed, self.grid, unit, margin, why_not, others),
            matters_little=findings.smallest_that_matters_little(these, unit, margin) is not None,
        )

    def _without_curve(
        self, fixed: Fit, misfit: LackOfFit, holm_p: float, unit: findings.Unit, margin: float | None
    ) -> Answer:
        """The answer where no curve describes the scores, so that nothing is said of its shape."""
        verdict = findings.without_curve(misfit)
        return self.answer(
            lead=replace(self.lead, notes=[*self.lead.notes, verdict]),
            equivalence=None,
            holm_p=holm_p,
            verdict=verdict,
            these_tasks=findings.moved_without_curve(fixed, misfit, unit),
            other_tasks=findings.untold_without_curve(self.lead),
            advice=findings.advise_without_curve(misfit, unit, margin),
            matters_little=findings.as_good_as_none(misfit.widest, unit, margin) is not None,
            misfit=misfit,
        )


def _concluded(drafts: list[_Draft], unit: findings.Unit, margin: float | None) -> list[Answer]:
    """The answers with their p-values corrected for each other, and the verdicts these lead to."""
    by_lead = multiple_testing.adjust_by_holm({draft.lead.dataset: draft.lead.joint_p for draft in drafts})
    fixed = {draft.lead.dataset: draft.fixed.joint_p for draft in drafts if draft.fixed is not None}
    by_fixed = multiple_testing.adjust_by_holm(fixed)
    without_curve = misfits([draft.grid for draft in drafts if draft.fixed is not None])
    return [
        draft.concluded(by_lead[name], by_fixed.get(name), without_curve.get(name), unit, margin)
        for draft in drafts
        for name in [draft.lead.dataset]
    ]


def _fits(grid: design.Grid, scale: str, refits: int, seed: int, attempts: _Attempts) -> list[Fit]:
    """Every model that these scores allow. Raises UserError where they allow none."""
    fits = attempts.results((model, partial(fitting.fit, model, grid, scale)) for model in fitting.FITS)
    if not fits:
        reasons = "; ".join(f"{what}: {reason}" for what, reason in attempts.refused)
        raise UserError(f"{grid.source}: data set {grid.dataset} can be fitted by no model ({reasons})")
    return [_bootstrapped(fit, grid, refits, seed, attempts) for fit in fits] if refits else fits


def _bootstrapped(fit: Fit, grid: design.Grid, draws: int, seed: int, attempts: _Attempts) -> Fit:
    """The fit with the parametric bootstrap as a further joint test, if there is one for its model."""
    if fit.model not in parametric.RATIOS:
        return fit
    test = partial(parametric.joint_test, grid, fit.model, draws, seed)
    return replace(
        fit, joint_tests=[*fit.joint_tests, *attempts.results([(f"{fit.model}, parametric bootstrap", test)])]
    )


def _lead(fits: list[Fit], scores: int, refusals: list[Refusal]) -> Fit:
    """The fit that leads: of the first of LEADS that converged and uses ENOUGH of the scores, if there is one.

    Where that is not the first of LEADS, a note says why. `crossed` uses only the runs that are scored on every task:
    where few are, `lmm-slopes` knows more.
    """
    by_model = {fit.model: fit for fit in fits}
    candidates = [by_model[model] for model in LEADS if model in by_model] or fits
    sound = [fit for fit in candidates if fit.converged]
    lead = next((fit for fit in sound if fit.n >= ENOUGH * scores), (sound or candidates)[0])
    if lead.model == LEADS[0]:
        return lead
    if LEADS[0] in by_model:
        why = f"{LEADS[0]} can use {by_model[LEADS[0]].n} of {scores} scores only"
    else:
        reason = next(
            refusal.reason for refusal in refusals if (refusal.dataset, refusal.what) == (lead.dataset, LEADS[0])
        )
        why = f"{LEADS[0]} cannot be fitted ({reason})"
    why += "".join(
        f" and {fit.model} did not converge" for fit in candidates[: candidates.index(lead)] if not fit.converged
    )
    meaning = (
        ""
        if lead.model == "lmm-slopes"
        else ", and it takes all tasks as moved alike, so it speaks of these tasks alone"
        + "; nor does it count a run's luck" * (lead.tasks > 1)
    )
    return replace(lead, notes=[f"{lead.model} leads, as {why}{meaning}.", *lead.notes])


def lead_fit(grid: design.Grid, scale: str = "none") -> Fit:
    """The fit that leads the report of a data set's scores, alone. Raises UserError where there is none."""
    fits, reasons = [], []
    for model in LEADS:
        try:
            fits.append(fitting.fit(model, grid, scale))
        except ValueError as error:
            reasons.append(f"{model}: {error}")
        else:
            if fits[-1].converged and fits[-1].n >= ENOUGH * int((~np.isnan(grid.scores)).sum()):
                return fits[-1]
    if not fits:
        raise UserError("; ".join(reasons))
    return next((fit for fit in fits if fit.converged), fits[0])


class _Attempts:
    """Calls that raise an error where the scores do not allow them; each error's message is kept as a refusal."""

    def __init__(self, dataset: str, refusals: list[Refusal]) -> None:
        self._dataset, self._refusals = dataset, refusals

    @property
    def refused(self) -> list[tuple[str, str]]:
        """What was refused for this data set, and why."""
        return [(refusal.what, refusal.reason) for refusal in self._refusals if refusal.dataset == self._dataset]

    def results(self, named: Iterable[tuple[str, Callable[[], T]]]) -> list[T]:
        """What the calls return, without those that raise an error."""
        results = []
        for name, call in named:
            try:
                results.append(call())
            except ValueError as error:
                self.note(name, str(error))
        return results

    def note(self, what: str, reason: str) -> None:
        """Keep a reason."""
        self._refusals.append(Refusal(self._dataset, what, reason))


def _by_type(
    part: pd.DataFrame, types: dict[str, str], attempts: _Attempts, axis: str, scale: str, by: tuple[str, ...]
) -> list[tuple[str, Fit]]:
    """The tasks of each type by themselves, fitted by the first of LEADS that they allow."""
    fits = []
    kinds = part["task"].map(types)
    for kind in sorted(kinds.dropna().unique()):
        of_kind = part[kinds == kind]
        if len(of_kind) == len(part):
            continue
        grid = _grid(of_kind, part["dataset"].iloc[0], axis, also=by)
        reasons: list[str] = []
        for model in LEADS:
            try:
                fits.append((str(kind), fitting.fit(model, grid, scale)))
            except ValueError as error:
                reasons.append(f"{model}: {error}")
            else:
                break
        else:
            attempts.note(f"{kind} tasks", "; ".join(reasons))
    return fits


def grids(table: pd.DataFrame, scale: str = "none", axis: str = "w_p", by: tuple[str, ...] = ()) -> list[design.Grid]:
    """A table's data sets as the models take them. Raises UserError as `analyze` does."""
    scaled = rescale(check(table, by), scale)
    return [_grid(part, str(dataset), axis, also=by) for dataset, part in scaled.groupby("dataset")]


def _grid(
    part: pd.DataFrame, dataset: str, axis: str, by: str | None = None, also: tuple[str, ...] = ()
) -> design.Grid:
    return design.grid(part, dataset, make_transform(axis, part["plw"], prompt_odds(part)), by=by, also=also)


def _joint(scaled: pd.DataFrame, by: tuple[str, ...], refusals: list[Refusal]) -> Joint | None:
    """All data sets described together, on every axis; None for one data set, or too few scores."""
    if scaled["dataset"].nunique() < 2:
        return None
    attempt = ("one curve for all data sets", partial(joint.compare_axes, scaled, by))
    return next(iter(_Attempts("all", refusals).results([attempt])), None)


def _axes_of(part: pd.DataFrame) -> list[str]:
    """The axes whose answers may differ on one data set: w_odds is w_p there, and shares may not be known."""
    known = () if prompt_odds(part) is None else SHARE_AXES
    return [axis for axis in AXES if axis != "w_odds" and (axis not in SHARE_AXES or axis in known)]


def _variant(checked: pd.DataFrame, lead: Fit, scale: str, axis: str, name: str, by: tuple[str, ...]) -> Variant:
    """The lead's answer under another scale or on another axis."""
    try:
        scaled = rescale(checked, scale)
        part = scaled[scaled["dataset"] == lead.dataset]
        fit = fitting.fit(lead.model, _grid(part, lead.dataset, axis, also=by), scale)
    except ValueError as error:
        return Variant(name, None, None, None, str(error))
    return Variant(name, fit.joint_p, fit.optimum_plw, fit.optimum_set)


def _differences(scaled: pd.DataFrame, by: tuple[str, ...], axis: str, refusals: list[Refusal]) -> list[Difference]:
    """The tests between the values of columns, over all data sets together."""
    columns = list(dict.fromkeys([*(["dataset"] if scaled["dataset"].nunique() > 1 else []), *by]))

    def compare(column: str) -> Difference:
        table = in_prompt_odds(scaled) if axis in SHARE_AXES else scaled
        return differences.compare_curves(_grid(table, "all", axis, column, by), column)

    return _Attempts("all", refusals).results((f"by {column}", partial(compare, column)) for column in columns)
