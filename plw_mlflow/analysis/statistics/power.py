"""Which study finds the best PLW: how many tasks, seeds and PLWs it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from plw_mlflow.analysis.statistics.fitting import MIN_FREE
from plw_mlflow.analysis.statistics.optimum import POWER
from plw_mlflow.analysis.statistics.simulation import Design, DesignResult, Truth, round_plws, simulate
from plw_mlflow.errors import UserError
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.transforms import Transform

TASKS = (4, 5, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 70, 100)  # those of the designs that a plan compares
SEEDS = (1, 2, 3, 5, 10)
SPACED = (4, 5, 6, 8, 12, 16, 24)  # numbers of PLWs, equally spaced on w_p


@dataclass(frozen=True)
class Plan:
    """How well many designs find the optimum, and which of them suffice."""

    dataset: str
    truth: Truth
    width: float  # wanted, of the 95 % interval of PLW*
    outcomes: tuple[DesignResult, ...]  # by runs, then tasks
    as_run: DesignResult | None  # of the study that the truth was estimated from, where it is complete

    @property
    def enough(self) -> tuple[DesignResult, ...]:
        """For each number of tasks the smallest design that finds the optimum 4 times in 5, fewest runs first.

        Left out are numbers of tasks that save no run.
        """
        kept: list[DesignResult] = []
        for result in self.outcomes:
            if result.found.value >= POWER and all(result.design.tasks < other.design.tasks for other in kept):
                kept.append(result)
        return tuple(kept)

    @property
    def nearest(self) -> DesignResult:
        """The design whose interval of the optimum is the narrowest."""
        return min(self.outcomes, key=lambda result: (result.median_width.value, result.median_error.value))

    def frame(self) -> pd.DataFrame:
        """A row per design."""
        figures = ("power", "interior", "found", "coverage", "median_width", "median_error")
        rows = []
        for result in (*([self.as_run] if self.as_run else []), *self.outcomes):
            row = {"dataset": self.dataset, "is_as_run": result is self.as_run, "runs": result.design.runs}
            row |= {"tasks": result.design.tasks, "seeds": result.design.seeds, "models": result.design.models}
            row |= {"plws": " ".join(f"{plw:g}" for plw in result.design.plws), "wanted_width": self.width}
            for name in figures:
                row |= {name: getattr(result, name).value, f"{name}_se": getattr(result, name).error}
            rows.append(row)
        return pd.DataFrame(rows)

    def text(self) -> str:
        """As the terminal shows it."""
        truth, least = self.truth, f"in {POWER:.0%} of such studies"
        lines = [
            f"{self.dataset}: how many runs find PLW* within {self.width:g}?",
            f"  simulated with {truth.spelled()}: PLW* = {truth.best_plw:.3g}",
            "  tasks  seeds  PLWs             runs   power   found  coverage  width  error",
        ]
        if self.as_run:
            few = ", with too few runs to tell" * (self.as_run.design.free < MIN_FREE)
            lines.append(f"{self._line(self.as_run)}  <- as it was run{few}")
        lines += [self._line(result) for result in self.enough or (self.nearest,)]
        tasks, runs = (max(getattr(result.design, name) for result in self.outcomes) for name in ("tasks", "runs"))
        compared = f"Of {len(self.outcomes)} designs of up to {tasks} tasks and {runs} runs"
        if self.enough:
            lines.append(f"  {compared}, those that find it {least}: fewest runs first, then fewer tasks at more runs.")
        else:
            lines[-1] += "  <- the nearest"
            lines.append(f"  {compared}, none finds it {least}.")
        if (
            self.enough
            and self.as_run
            and not any(result.design.tasks <= self.as_run.design.tasks for result in self.enough)
        ):
            tasks = self.as_run.design.tasks
            most = max(
                (result for result in self.outcomes if result.design.tasks == tasks),
                key=lambda result: result.found.value,
            )
            lines.append(f"  With its {tasks} tasks none does: {most.found.value:.0%} at best. More tasks are needed.")
        shown = sorted({result.design.plws for result in self.enough} - {PUBLISHED_PLWS}, key=len)
        if lists := [f"{len(plws)} are {', '.join(f'{plw:g}' for plw in plws)}" for plws in shown if len(plws) <= 8]:
            lines.append(f"  PLWs on w_p are equally spaced there: {'; '.join(lists)}.")
        lines.append(
            "  found: Fieller's 95 % interval is no wider than that and holds PLW*. width, error: medians of its width "
            "and of the estimate's error, in PLW."
        )
        return "\n".join(lines)

    def _line(self, result: DesignResult) -> str:
        design = result.design
        kind = "published" if design.plws == PUBLISHED_PLWS else "as tried" if result is self.as_run else "on w_p"
        figures = "".join(f"{estimate.value:8.3f}" for estimate in (result.power, result.found, result.coverage))
        return (
            f"  {design.tasks:5}  {design.seeds:5}  {f'{len(design.plws)} {kind}':15}  {design.runs:4}{figures}"
            f"    {result.median_width.value:.3f}  {result.median_error.value:.3f}"
        )


def plan(
    truth: Truth,
    width: float,
    *,
    dataset: str = "assumed",
    models: int = 1,
    as_run: Design | None = None,
    draws: int = 4000,
    seed: int = 1234,
) -> Plan:
    """Simulate every design of TASKS, SEEDS and PLWs: the published ten, or SPACED on w_p.

    models: how many are trained at each PLW and seed. Raises UserError where the truth has no optimum to find.
    """
    if not 0 < width < math.inf:
        raise UserError(f"width must be a number above 0, got {width}")
    if not truth.has_optimum:
        raise UserError(
            f"the curve has no maximum inside the range (slope {truth.slope:.3g}, bend {truth.bend:.3g}), so there is "
            "none to find; state another curve with --assume"
        )
    lists = [PUBLISHED_PLWS, *(spaced_plws(truth.transform, number) for number in SPACED)]
    designs = [
        Design(tasks, seeds, plws, models)
        for tasks in sorted({*TASKS, *([as_run.tasks] if as_run else [])})
        for seeds in SEEDS
        for plws in lists
        if seeds * len(plws) * models >= MIN_FREE + 2 + models  # fewer are too few to tell
    ]
    designs.sort(key=lambda design: (design.runs, design.tasks))
    outcomes = tuple(simulate(truth, design, width, draws, seed) for design in designs)
    return Plan(dataset, truth, width, outcomes, simulate(truth, as_run, width, draws, seed) if as_run else None)


def spaced_plws(transform: Transform, number: int) -> tuple[float, ...]:
    """PLWs equally spaced on w_p over the range, to 3 significant digits."""
    return tuple(round_plws(transform.back(np.linspace(*transform.ends, number))).tolist())
