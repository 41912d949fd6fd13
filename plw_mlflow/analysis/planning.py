"""What to run: design help for each data set of a table, as text and as files.

The statistics are in `statistics/power.py` and `statistics/next_plws.py`. Where a data set does not allow them, the
reason is kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from plw_mlflow.analysis.statistics import lack_of_fit, power, simulation
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.next_plws import Proposal, propose
from plw_mlflow.analysis.statistics.power import Plan
from plw_mlflow.environment import outputs


@dataclass(frozen=True)
class Planning:
    """Design help: plans and proposals for runs to come."""

    plans: list[Plan]  # a data set each, as are the proposals
    proposals: list[Proposal]
    refusals: list[str]  # a line each

    def text(self) -> str:
        """As the terminal shows it."""
        answers = [part.text() for part in self.plans] + [part.text() for part in self.proposals]
        return "\n\n".join([*answers, *self.refusals])

    def write(self, folder: Path) -> list[Path]:
        """Write power.csv (a row per design) and next.json (an entry per data set), each if there is any of it."""
        contents = {}
        if self.plans:
            frame = pd.concat([part.frame() for part in self.plans])
            contents["power.csv"] = outputs.table(frame)
        if self.proposals:
            contents["next.json"] = (json.dumps([asdict(part) for part in self.proposals], indent=1) + "\n").encode()
        return outputs.write(folder, contents)


def ask(grids: list[Grid], *, width: float | None, next_plws: int | None) -> Planning:
    """Design help from scores; for scores that no parabola describes, the reason why there is none.

    width: wanted, of the optimum's 95 % interval, in PLW; None makes no plan. next_plws: how many PLWs to propose; None
    makes no proposal.
    """
    plans, proposals, refusals = list[Plan](), list[Proposal](), list[str]()
    if width is None and next_plws is None:
        return Planning(plans, proposals, refusals)
    misfits = lack_of_fit.misfits(grids)
    for grid in grids:
        if grid.dataset in misfits:
            why = misfits[grid.dataset].why()
            refusals.append(f"not done: {grid.dataset}: runs are planned by a parabola, and {why}")
            continue
        try:
            if width is not None:
                as_run = simulation.design_of(grid)
                names = grid.runs["model"].nunique()
                truth = simulation.estimate_truth(grid)
                plans.append(power.plan(truth, width, dataset=grid.dataset, models=names, as_run=as_run))
        except ValueError as error:
            refusals.append(f"not done: {grid.dataset}, power: {error}")
        try:
            if next_plws is not None:
                proposals.append(propose(grid, next_plws))
        except ValueError as error:
            refusals.append(f"not done: {grid.dataset}, next PLWs: {error}")
    return Planning(plans, proposals, refusals)


def assume(stated: str, width: float) -> Planning:
    """Design help from numbers that a person states. Raises UserError where these are at fault or have no optimum."""
    return Planning([power.plan(simulation.parse_truth(stated), width)], [], [])
