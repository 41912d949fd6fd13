"""Which PLWs to run next, to know better where the optimum is.

Letters: C candidates, D draws, P columns of the fixed design.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.optimum import LEVEL, maximisers
from plw_mlflow.analysis.statistics.simulation import fit_mean_curve, moments, round_plws
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array

CANDIDATES = 101  # PLWs, equally spaced on w_p, among which the next ones are looked for


@dataclass(frozen=True)
class Proposal:
    """Which PLWs to run next, to know better where the optimum is.

    Standard errors are the optimum's, on w_p: means over the curves that the scores allow, so above that of the fit,
    as flatter curves than the estimated one are among them.
    """

    dataset: str
    plws: list[float]  # the most useful first; one that occurs again, or was tried, is run with a new seed
    runs: int  # that they take: one at each for each model
    error_now: float
    error_then: float
    error_at_last: float  # with any number of runs, as tasks differ
    share_that_stays: float  # of the optimum's variance with any number of runs
    interior_probability: float  # of a maximum inside the range, which the errors take for granted

    def text(self) -> str:
        """As the terminal shows it."""
        return (
            f"{self.dataset}: run next, with new seeds, PLW {', '.join(f'{plw:g}' for plw in self.plws)} "
            f"({self.runs} run{'s' * (self.runs > 1)}).\n"
            f"  Expected standard error of the optimum on w_p: {self.error_now:.3g} now, {self.error_then:.3g} then, "
            f"{self.error_at_last:.3g} with any number of runs.\n"
            f"  {self.share_that_stays:.0%} of its variance is differences between tasks, which more tasks reduce and "
            f"runs do not. A maximum inside the range has probability {self.interior_probability:.2f}."
        )


def propose(grid: Grid, number: int, draws: int = 4000, seed: int = 1234) -> Proposal:
    """The PLWs whose runs most reduce the expected standard error of the optimum, one after the other.

    The expectation is over what the scores leave of slope and bend (t around the estimates), where these have a maximum
    inside the range: a c-optimal design averaged over the posterior (Chaloner and Larntz 1989,
    doi:10.1016/0378-3758(89)90004-9). Of the standard error, since the variance has no expectation (the bend may be
    near 0); the mean log, which is more usual, chose worse after poor first PLWs. A run at a PLW already tried counts
    as any other.

    Raises UserError where `crossed` cannot be fitted, or where a maximum inside the range is all but ruled out.
    """
    if number < 1:
        raise UserError(f"the number of next PLWs must be 1 or more, got {number}")
    whole, curves = fit_mean_curve(grid)
    truth, tasks = moments(whole, curves), len(whole.tasks)
    random = np.random.default_rng(seed)
    root = np.linalg.cholesky(curves.covariance[1:3, 1:3])
    freedom = curves.degrees_of_freedom(whole.contrasts[1])
    widening = np.sqrt(freedom / random.chisquare(freedom, draws))
    drawn = curves.coefficients[1:3] + random.standard_normal((draws, 2)) @ root.T * widening[:, None]
    low, high = whole.transform.ends
    best = maximisers(drawn[:, 0], drawn[:, 1], low, high)
    inside = (low < best) & (best < high)
    if inside.mean() < LEVEL:
        raise UserError(
            f"a maximum inside the range has probability {inside.mean():.2g}, so no runs are proposed to locate one"
        )
    # The vertex's variance is that of slope + 2 w bend at it, over 4 bend^2: [D, 3] for entries 00, 01 and 11.
    bend, best = drawn[inside, 1], best[inside]
    gradient = np.column_stack([np.ones_like(best), 4 * best, 4 * best**2]) / (4 * bend**2)[:, None]

    def variances(inverses: NDArray[np.floating]) -> Array:
        """Of the vertex of each draw under each (X'X)^-1, [..., P, P]: [..., D]."""
        covariance = truth.between / tasks + (truth.run_sd**2 + truth.residual_sd**2 / tasks) * inverses[..., 1:3, 1:3]
        return covariance[..., [0, 0, 1], [0, 1, 1]] @ gradient.T

    even = round_plws(whole.transform.back(np.linspace(low, high, CANDIDATES)))
    candidates = np.unique([*even, *whole.runs["plw"]])
    w = whole.transform(candidates)
    kinds = np.unique(whole.x[:, 3:], axis=0)  # a model each
    rows = [np.column_stack([np.ones_like(w), w, w**2, np.tile(kind, (len(w), 1))]) for kind in kinds]  # [C, P] each
    added = sum(row[:, :, None] * row[:, None] for row in rows)  # [C, P, P]
    information = whole.x.T @ whole.x
    now = variances(np.linalg.inv(information))
    chosen = []
    for _ in range(number):
        expected = np.sqrt(variances(np.linalg.inv(information + added))).mean(1)
        chosen.append(int(expected.argmin()))
        information = information + added[chosen[-1]]
    then, last = variances(np.linalg.inv(information)), np.maximum(variances(np.zeros_like(information)), 0)
    return Proposal(
        grid.dataset,
        candidates[chosen].tolist(),
        number * len(kinds),
        float(np.sqrt(now).mean()),
        float(np.sqrt(then).mean()),
        float(np.sqrt(last).mean()),
        float((last / now).mean()),
        float(inside.mean()),
    )
