"""Which PLWs to run next, to know better where the optimum is.

Letters: C candidates, D draws, P columns of the fixed design.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plw_mlflow.analysis.statistics import fitting
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.optimum import LEVEL, Parabola, maximisers
from plw_mlflow.analysis.statistics.simulation import fit_mean_curve, moments, round_plws
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array, Transform

CANDIDATES = 101  # PLWs, equally spaced on w_p, among which the next ones are looked for


class NoOptimumError(UserError):
    """A maximum inside the range is all but ruled out, so that no runs can locate one."""


@dataclass(frozen=True)
class Proposal:
    """Which PLWs to run next, to know better where the optimum is.

    Standard errors are the optimum's, on the axis: means over the curves that the scores allow, so above that of the
    fit, as flatter curves than the estimated one are among them.
    """

    dataset: str
    model: str  # the statistical model by which they were chosen
    plws: list[float]  # the most useful first; one that occurs again, or was tried, is run with a new seed
    runs: int  # that they take: one at each for each model
    error_now: float
    error_then: float
    error_at_last: float  # with any number of runs, as tasks differ
    share_that_stays: float  # of the optimum's variance with any number of runs
    interior_probability: float  # of a maximum inside the range, which the errors take for granted
    axis: str  # on which the curve is a parabola
    width_then: float  # of the optimum's 95 % interval in PLW, if slope and bend stay as they are estimated now

    def text(self) -> str:
        """As the terminal shows it."""
        stays = (
            f"{self.share_that_stays:.0%} of its variance is differences between tasks, which more tasks reduce and "
            "runs do not."
            if self.model == "crossed"
            else f"That is by {self.model}, which takes all tasks as moved alike."
        )
        return (
            f"{self.dataset}: run next, with new seeds, PLW {', '.join(f'{plw:g}' for plw in self.plws)} "
            f"({self.runs} run{'s' * (self.runs > 1)}).\n"
            f"  Expected standard error of the optimum on {self.axis}: {self.error_now:.3g} now, "
            f"{self.error_then:.3g} then, {self.error_at_last:.3g} with any number of runs.\n"
            f"  {stays} A maximum inside the range has probability {self.interior_probability:.2f}."
        )


@dataclass(frozen=True)
class _Knowledge:
    """What scores say of slope and bend, and what further runs would add to that."""

    model: str
    runs: Grid  # those that it is known from
    x: Array  # [R, P], their fixed part
    coefficients: Array  # [2]
    covariance: Array  # [2, 2]
    freedom: float
    between: Array  # [2, 2], the covariance that any number of runs would leave
    of_run: float  # variance of a run's mean over tasks around the curve

    def covariances(self, inverses: NDArray[np.floating]) -> Array:
        """Of slope and bend with runs of each (X'X)^-1, [..., P, P]: [..., 2, 2]."""
        return np.asarray(self.between + self.of_run * inverses[..., 1:3, 1:3])


def _know(grid: Grid) -> _Knowledge:
    """By `crossed`; with fewer than 4 tasks, which do not allow it, by the model that leads the report then."""
    tasks = len(grid.tasks)
    if tasks >= 4:
        whole, curves = fit_mean_curve(grid)
        truth, tasks = moments(whole, curves), len(whole.tasks)
        freedom = float(curves.degrees_of_freedom(whole.contrasts[1]))
        estimate, covariance = curves.coefficients[1:3], curves.covariance[1:3, 1:3]
        of_run = truth.run_sd**2 + truth.residual_sd**2 / tasks
        return _Knowledge("crossed", whole, whole.x, estimate, covariance, freedom, truth.between / tasks, of_run)
    model = "lmm" if tasks > 1 else "ols-task"
    fit = fitting.fit(model, grid)
    return _Knowledge(
        model,
        grid,
        grid.curve if model == "lmm" else grid.x,
        np.array([fit.coefficients[term] for term in ("w_p", "w_p^2")]),
        np.array(fit.covariance)[1:3, 1:3],
        fit.degrees_of_freedom["w_p"] or math.inf,
        np.zeros((2, 2)),
        fit.variances["residual"] / tasks,
    )


def propose(
    grid: Grid, number: int, left: Mapping[float, int] | None = None, *, draws: int = 4000, seed: int = 1234
) -> Proposal:
    """The PLWs whose runs most reduce the expected standard error of the optimum, one after the other.

    left: the PLWs to choose from, and how often each can be chosen; unset, any of CANDIDATES any number of times.

    The expectation is over what the scores leave of slope and bend (t around the estimates), where these have a maximum
    inside the range: a c-optimal design averaged over the posterior (Chaloner and Larntz 1989,
    doi:10.1016/0378-3758(89)90004-9). Of the standard error, since the variance has no expectation (the bend may be
    near 0); the mean log, which is more usual, chose worse after poor first PLWs. A run at a PLW already tried counts
    as any other.

    Raises UserError where the scores allow no fit, or fewer can be chosen than asked for, and NoOptimumError where a
    maximum inside the range is all but ruled out.
    """
    if number < 1:
        raise UserError(f"the number of next PLWs must be 1 or more, got {number}")
    if left is not None and sum(left.values()) < number:
        raise UserError(f"{sum(left.values())} runs are left to choose from, fewer than {number}")
    known = _know(grid)
    low, high = grid.transform.ends
    drawn = _draw(known, draws, seed)
    best = maximisers(drawn[:, 0], drawn[:, 1], low, high)
    inside = (low < best) & (best < high)
    if inside.mean() < LEVEL:
        raise NoOptimumError(
            f"a maximum inside the range has probability {inside.mean():.2g}, so no runs are proposed to locate one"
        )
    # The vertex's variance is that of slope + 2 w bend at it, over 4 bend^2: [D, 3] for entries 00, 01 and 11.
    bend, best = drawn[inside, 1], best[inside]
    gradient = np.column_stack([np.ones_like(best), 4 * best, 4 * best**2]) / (4 * bend**2)[:, None]

    def variances(inverses: NDArray[np.floating]) -> Array:
        """Of the vertex of each draw under each (X'X)^-1, [..., P, P]: [..., D]."""
        return known.covariances(inverses)[..., [0, 0, 1], [0, 1, 1]] @ gradient.T

    if left is None:
        even = round_plws(grid.transform.back(np.linspace(low, high, CANDIDATES)))
        candidates = np.unique([*even, *known.runs.runs["plw"]])
        times = np.full(len(candidates), number)
    else:
        candidates, times = np.array(list(left)), np.array(list(left.values()))
    w = grid.transform(candidates)
    kinds = np.unique(known.runs.x[:, 3:], axis=0)  # a model each
    beside = kinds[:, : known.x.shape[1] - 3]  # in the columns of the statistical model, which may know no models
    rows = [np.column_stack([np.ones_like(w), w, w**2, np.tile(kind, (len(w), 1))]) for kind in beside]  # [C, P] each
    added = sum(row[:, :, None] * row[:, None] for row in rows)  # [C, P, P]
    information = known.x.T @ known.x
    now = variances(np.linalg.inv(information))
    chosen: list[int] = []
    for _ in range(number):
        expected = np.sqrt(variances(np.linalg.inv(information + added))).mean(1)
        chosen.append(int(np.where(times > 0, expected, np.inf).argmin()))
        times[chosen[-1]] -= 1
        information = information + added[chosen[-1]]
    inverse = np.linalg.inv(information)
    then, last = variances(inverse), np.maximum(variances(np.zeros_like(information)), 0)
    return Proposal(
        grid.dataset,
        known.model,
        candidates[chosen].tolist(),
        number * len(kinds),
        float(np.sqrt(now).mean()),
        float(np.sqrt(then).mean()),
        float(np.sqrt(last).mean()),
        float((last / now).mean()),
        float(inside.mean()),
        grid.transform.name,
        _width(known, known.covariances(inverse), grid.transform),
    )


def _draw(known: _Knowledge, draws: int, seed: int) -> Array:
    """Slopes and bends that the scores allow, [D, 2]: t around the estimates."""
    random = np.random.default_rng(seed)
    root = np.linalg.cholesky(known.covariance)
    freedom = min(known.freedom, 1e9)
    widening = np.sqrt(freedom / random.chisquare(freedom, draws))
    return np.asarray(known.coefficients + random.standard_normal((draws, 2)) @ root.T * widening[:, None])


def _width(known: _Knowledge, covariance: Array, transform: Transform) -> float:
    """Of the optimum's interval in PLW under a covariance of slope and bend; of the range where none is located."""
    slope, bend = map(float, known.coefficients)
    parabola = Parabola(slope, bend, covariance, lambda _: known.freedom, *transform.ends)
    sets, is_unbounded = parabola.fieller_set()
    is_located = parabola.has_interior_maximum and not is_unbounded
    low, high = transform.back([sets[0][0], sets[-1][1]] if is_located else transform.ends)
    return float(high - low)
