"""What an analysis of a score table says: an answer for each data set, with the fits that it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from plw_mlflow.analysis.statistics.bootstrap import Bootstrap
from plw_mlflow.analysis.statistics.differences import Difference
from plw_mlflow.analysis.statistics.equivalence import Equivalence
from plw_mlflow.analysis.statistics.fitting import Fit
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
    """Everything that an analysis of a table found."""

    fits: list[Fit]  # data set by data set, the models in the order of FITS
    refusals: list[Refusal]
    answers: list[Answer]  # a data set each
    differences: list[Difference]
    scale: str
    transform: str
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
