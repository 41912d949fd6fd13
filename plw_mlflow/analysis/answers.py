"""What an analysis of a score table says: an answer for each data set, with the fits that it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from plw_mlflow.analysis.statistics.bootstrap import Bootstrap
from plw_mlflow.analysis.statistics.differences import Difference
from plw_mlflow.analysis.statistics.equivalence import Equivalence
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.joint import Joint
from plw_mlflow.analysis.statistics.lack_of_fit import LackOfFit
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.analysis.statistics.task_curves import TaskCurve


@dataclass(frozen=True)
class Refusal:
    """Something that these scores do not allow, and why."""

    dataset: str
    what: str  # a model's name, or another question's
    reason: str


@dataclass(frozen=True)
class Variant:
    """The answer under another scale of scores or on another axis of PLW."""

    name: str
    joint_p: float | None  # None where it could not be fitted
    optimum_plw: float | None
    optimum_set: list[list[float]] | None  # as of a fit
    reason: str | None = None


@dataclass(frozen=True)
class Finding:
    """What one data set's scores answer to one question. What they do not tell is None."""

    question: str  # in words
    verdict: str  # the answer in words
    kind: str = "untold"  # yes, perhaps (not when corrected for the number of data sets), not shown, or untold
    model: str | None = None  # the statistical model that answers
    p: float | None = None  # of the joint test
    holm_p: float | None = None  # the same, corrected for looking at all data sets of the table
    peak_plw: float | None = None  # None also where there is no peak inside the range
    interval: list[list[float]] | None = None  # 95 %, of the peak, as none, one or several intervals
    interval_is_open: bool = False  # whether the curve might as well not bend, so that the peak is not settled
    equivalence: Equivalence | None = None  # how large differences between PLWs may be


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
    axes: list[Variant]
    these_tasks: Finding  # did PLW move these tasks?
    other_tasks: Finding  # would it move others like them? By the lead, if that takes tasks as a sample
    advice: str  # what to do, in one sentence
    matters_little: bool  # whether all differences between PLWs are shown to be as good as none
    misfit: LackOfFit | None = None  # where no parabola describes the scores, so that no fit's shape means anything

    @property
    def findings(self) -> tuple[Finding, Finding]:
        """Both answers, in the order in which they are told."""
        return self.these_tasks, self.other_tasks

    @property
    def shows_effect(self) -> bool:
        """Whether an effect of PLW may be claimed."""
        return self.holm_p < LEVEL and not self.lead.has_too_few_runs


@dataclass(frozen=True)
class Analysis:
    """Everything that an analysis of a table found."""

    fits: list[Fit]  # data set by data set, the models in the order of FITS
    refusals: list[Refusal]
    answers: list[Answer]  # a data set each
    differences: list[Difference]
    joint: Joint | None  # of all data sets; None for one, and where these scores do not allow it
    scale: str
    axis: str
    margin: float | None
    by: tuple[str, ...]

    @property
    def refusals_by_reason(self) -> dict[tuple[str, str], list[str]]:
        """The data sets of refusals, by what was refused and why."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for refusal in self.refusals:
            grouped.setdefault((refusal.what, refusal.reason), []).append(refusal.dataset)
        return grouped

    def fits_of(self, dataset: str) -> list[Fit]:
        """The fits of one data set."""
        return [fit for fit in self.fits if fit.dataset == dataset]

    def fit_of(self, dataset: str, model: str | None) -> Fit | None:
        """A model's fit of one data set, if there is one."""
        return next((fit for fit in self.fits_of(dataset) if fit.model == model), None)
