"""Which study finds the best PLW: how many tasks, seeds and PLWs it takes, and which PLWs to run next.

A study is simulated from what makes its scores (`Truth`) and analysed as the report's lead model does (`crossed`). All
that model sees of a table is the mean and the covariance of the tasks' curves and two mean squares of the residuals.
Scores being normal and every task being scored on every run, these four are independent with known distributions. So
they are drawn, not scores, and a table costs the same whatever its size: 10,000 of a design take some 60 ms.

Letters: N tables, R runs, T tasks, C candidates, D draws. Curves are (slope, bend) on w_p; levels of tasks and models
are left out, as each task's curve has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from plw_mlflow.analysis.statistics import fitting, over_tasks
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.fitting import MIN_FREE
from plw_mlflow.analysis.statistics.optimum import LEVEL, maximisers
from plw_mlflow.analysis.statistics.over_tasks import Curves
from plw_mlflow.analysis.statistics.questions import POWER
from plw_mlflow.analysis.statistics.table import RUN
from plw_mlflow.errors import UserError
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.transforms import Array, Transform

TASKS = (4, 5, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 70, 100)  # those of the designs that a plan compares
SEEDS = (1, 2, 3, 5, 10)
SPACED = (4, 5, 6, 8, 12, 16, 24)  # numbers of PLWs, equally spaced on w_p
HALVINGS = 12  # of the way between an optimum and an end of the range, in search of its interval's border
BEND = np.array([0.0, 1.0])
CANDIDATES = 101  # PLWs, equally spaced on w_p, among which the next ones are looked for


# ------------------------------------------------------------------------------------------- what makes scores


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What makes a table: score = level + (slope + task's) w_p + (bend + task's) w_p^2 + run's luck + residual."""

    slope: float
    bend: float
    task_slope_sd: float  # between tasks
    task_bend_sd: float
    task_correlation: float  # of tasks' slopes and bends; near -1 where PLW 1 does the same to all tasks
    run_sd: float  # of a run's luck, common to its tasks
    residual_sd: float
    transform: Transform

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in STATED}
        faults = [f"{name} must be a number, got {value}" for name, value in given.items() if not math.isfinite(value)]
        faults += [
            f"{name} must be 0 or more, got {given[name]}" for name in STATED if "sd" in name and given[name] < 0
        ]
        if abs(self.task_correlation) > 1:
            faults.append(f"task_correlation must lie in -1..1, got {self.task_correlation}")
        if self.residual_sd == 0:
            faults.append("residual_sd must be above 0: without residuals nothing can be tested")
        if faults:
            raise UserError("; ".join(faults))

    @property
    def between(self) -> Array:
        """Covariance of tasks' slopes and bends, [2, 2]."""
        covariance = self.task_correlation * self.task_slope_sd * self.task_bend_sd
        return np.array([[self.task_slope_sd**2, covariance], [covariance, self.task_bend_sd**2]])

    @property
    def best(self) -> float:
        """The w_p of the highest score within the range: the optimum, or an end."""
        return float(maximisers(np.array([self.slope]), np.array([self.bend]), *self.transform.ends)[0])

    @property
    def best_plw(self) -> float:
        """Its PLW."""
        return float(self.transform.back(self.best))

    @property
    def has_optimum(self) -> bool:
        """Whether the best PLW lies inside the range."""
        low, high = self.transform.ends
        return low < self.best < high

    def spelled(self) -> str:
        """As `stated` reads it."""
        return ",".join(f"{name}={getattr(self, name):.4g}" for name in STATED)


STATED = tuple(field.name for field in fields(Truth) if field.name != "transform")


def stated(text: str) -> Truth:
    """The truth a person states: "slope=0.05,bend=-0.04,...", each number of STATED by its name; on PLW^0.30103.

    Raises UserError for a name that is missing, unknown or given twice, or a value that cannot be.
    """
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in STATED or name in values:
            raise UserError(f"assume has {part!r}, but takes each of {', '.join(STATED)} once, as name=number")
        try:
            values[name] = float(value)
        except ValueError:
            raise UserError(f"assume: {name} must be a number, got {value!r}") from None
    if missing := [name for name in STATED if name not in values]:
        raise UserError(f"assume lacks {', '.join(missing)}; --power prints all of them for a table of scores")
    return Truth(**values, transform=Transform("power", PUBLISHED_PLWS))


def estimated(grid: Grid) -> Truth:
    """The truth by moments of a data set's scores.

    What differs between tasks is the covariance of their curves less the part that the residuals explain; where that
    leaves a direction with less than nothing, none (Amemiya 1985, doi:10.1080/00031305.1985.10479402). Estimates are
    taken as if they were exact, so a chance peak makes too good a study.

    Raises UserError where `crossed` cannot be fitted.
    """
    return _moments(*_lead(grid))


def _moments(whole: Grid, curves: Curves) -> Truth:
    root = np.linalg.cholesky(curves.of_noise * curves.bread[1:3, 1:3])
    inverse = np.linalg.inv(root)
    values, vectors = np.linalg.eigh(inverse @ curves.between[1:3, 1:3] @ inverse.T)
    half = root @ vectors * np.sqrt(np.maximum(values - 1, 0))
    covariance = half @ half.T
    slope_sd, bend_sd = np.sqrt(np.diag(covariance))
    joint = slope_sd * bend_sd
    return Truth(
        slope=float(curves.coefficients[1]),
        bend=float(curves.coefficients[2]),
        task_slope_sd=float(slope_sd),
        task_bend_sd=float(bend_sd),
        task_correlation=float(np.clip(covariance[0, 1] / joint, -1, 1)) if joint > 0 else 0.0,
        run_sd=math.sqrt(max(0.0, float(curves.var_run))),
        residual_sd=math.sqrt(float(curves.of_noise)),
        transform=whole.transform,
    )


def _lead(grid: Grid) -> tuple[Grid, Curves]:
    fitting.fit("crossed", grid)  # refuses what cannot be fitted
    whole, _ = grid.complete
    curves = over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=True)
    if curves.of_noise <= 1e-24 * float(np.abs(whole.scores).max()) ** 2:
        raise UserError("scores follow a curve exactly; without residuals nothing can be planned, check the scores")
    return whole, curves


# ------------------------------------------------------------------------------------------------- simulation


@dataclass(frozen=True)
class Design:
    """A study in which every model is trained at every PLW with every seed, and scored on every task."""

    tasks: int
    seeds: int
    plws: tuple[float, ...]
    models: int = 1

    def __post_init__(self) -> None:
        if self.tasks < 4 or len(set(self.plws)) < 3 or self.free < 1:
            raise UserError(
                f"{self.tasks} task{'s' * (self.tasks != 1)} and {self.runs} runs at {len(set(self.plws))} PLWs "
                f"cannot be analysed over tasks: 4 tasks, 3 PLWs and {self.models + 3} runs are the least"
            )

    @property
    def runs(self) -> int:
        """What the study costs: trainings. Tasks cost evaluation only."""
        return self.seeds * len(self.plws) * self.models

    @property
    def free(self) -> int:
        """Degrees of freedom of a task's residuals; a model's mean takes one."""
        return self.runs - 2 - self.models

    def bread(self, transform: Transform) -> Array:
        """Covariance of a task's slope and bend under residuals of variance 1, [2, 2]."""
        w = transform(self.plws)
        rise = np.column_stack([w - w.mean(), w**2 - (w**2).mean()])
        return np.asarray(np.linalg.inv(rise.T @ rise) / (self.seeds * self.models))


@dataclass(frozen=True)
class Answers:
    """What the lead model says of N tables, as `fitting.fit` does."""

    joint_p: Array  # [N]
    best: Array  # [N], w_p of the highest point within the range: the optimum, or an end
    has_optimum: NDArray[np.bool_]  # [N]
    interval: Array  # [N, 2], Fieller's on w_p, cut to the range
    is_located: NDArray[np.bool_]  # [N], whether there is an optimum and its interval ends; if not, it is the range


def draw(truth: Truth, design: Design, draws: int, seed: int) -> Curves:
    """What the lead model sees of so many tables, of slope and bend alone."""
    random = np.random.default_rng(seed)
    tasks, free, bread = design.tasks, design.free, design.bread(truth.transform)
    noise, luck = truth.residual_sd**2, truth.run_sd**2
    of_task = truth.between + noise * bread
    root = np.linalg.cholesky(of_task / tasks + luck * bread)
    curves = np.array([truth.slope, truth.bend]) + random.standard_normal((draws, 2)) @ root.T
    # Wishart by Bartlett's decomposition: a triangle of chi and one normal.
    triangle = np.zeros((draws, 2, 2))
    triangle[:, 0, 0] = np.sqrt(random.chisquare(tasks - 1, draws))
    triangle[:, 1, 1] = np.sqrt(random.chisquare(tasks - 2, draws))
    triangle[:, 1, 0] = random.standard_normal(draws)
    half = np.linalg.cholesky(of_task) @ triangle
    spread = half @ half.swapaxes(1, 2) / (tasks - 1)
    of_runs = (luck + noise / tasks) * random.chisquare(free, draws) / free
    of_noise = noise * random.chisquare(free * (tasks - 1), draws) / (free * (tasks - 1))
    return Curves(curves, spread, bread, of_runs, of_noise, tasks, free, np.eye(2), runs_differ=True)


def answer(seen: Curves, transform: Transform) -> Answers:
    """The lead model's joint test and optimum of N tables."""
    low, high = transform.ends
    slope, bend = seen.coefficients.T
    vertex = -slope / (2 * bend)
    has_optimum = (bend < 0) & (low < vertex) & (vertex < high)
    bend_reach = _quantile(seen.degrees_of_freedom(BEND)) * np.sqrt(seen.covariance[:, 1, 1])
    is_located = has_optimum & (np.abs(bend) > bend_reach)
    interval = np.column_stack([_border(seen, vertex, end) for end in (low, high)])
    interval = np.where(is_located[:, None], interval, [low, high])
    return Answers(seen.joint_test()[3], maximisers(slope, bend, low, high), has_optimum, interval, is_located)


def _border(seen: Curves, vertex: Array, end: float) -> Array:
    """Where Fieller's set ends between the vertex and an end of the range, [N], by bisection; means nothing outside."""
    inside, outside = vertex, np.full_like(vertex, end)
    for step in range(1 + HALVINGS):
        tried = (inside + outside) / 2 if step else outside
        contrast = np.stack([np.ones_like(tried), 2 * tried], axis=-1)
        variance = np.einsum("ni,nij,nj->n", contrast, seen.covariance, contrast)
        slope = np.einsum("ni,ni->n", contrast, seen.coefficients)
        may_be_0 = slope**2 <= _quantile(seen.degrees_of_freedom(contrast)) ** 2 * variance
        inside, outside = np.where(may_be_0, tried, inside), np.where(may_be_0, outside, tried)
    return inside


def _quantile(freedom: Array) -> Array:
    """Of t, for a two-sided test; interpolated, as a plan by exact ones (`Curves.t_test`) takes 1.8 times as long."""
    known, values = _quantiles()
    return np.exp(np.interp(np.log(freedom), known, values))


@cache
def _quantiles() -> tuple[Array, Array]:
    freedom = np.geomspace(0.25, 1e9, 5001)
    return np.log(freedom), np.log(special.stdtrit(freedom, 1 - LEVEL / 2))


@dataclass(frozen=True)
class Estimate:
    """A figure of a simulation."""

    value: float
    error: float  # Monte-Carlo standard error


@dataclass(frozen=True)
class Outcome:
    """What a design gives."""

    design: Design
    power: Estimate  # share of tables whose joint test rejects at 0.05
    interior: Estimate  # share of tables with an optimum inside the range
    found: Estimate  # share with an interval no wider than wanted that holds the true optimum
    coverage: Estimate  # share of Fieller's sets that hold the true optimum
    median_width: Estimate  # of the interval, in PLW; of the range where the optimum is not located
    median_error: Estimate  # distance of the best PLW to the true one


def simulate(truth: Truth, design: Design, width: float, draws: int = 10_000, seed: int = 1234) -> Outcome:
    """Run a study so many times.

    width: of Fieller's 95 % interval of PLW*, wanted at most. It is in PLW, as a person thinks; equal widths there are
    not equal on w_p, so what is narrow depends on where the optimum lies. A narrow interval beside the optimum has not
    found it: those do not count as found.
    """
    seen = draw(truth, design, draws, seed)
    found = answer(seen, truth.transform)
    ends = truth.transform.back(found.interval)
    widths = ends[:, 1] - ends[:, 0]
    holds = seen.t_test(np.array([1, 2 * truth.best]))[3] >= LEVEL  # whether the slope there may be 0
    return Outcome(
        design,
        _share(found.joint_p < LEVEL),
        _share(found.has_optimum),
        _share(found.is_located & holds & (widths <= width) & truth.has_optimum),
        _share(holds),
        _median(widths),
        _median(np.abs(truth.transform.back(found.best) - truth.best_plw)),
    )


def _share(of: NDArray[np.bool_]) -> Estimate:
    if not len(of):
        return Estimate(math.nan, math.nan)
    value = float(of.mean())
    return Estimate(value, math.sqrt(value * (1 - value) / len(of)))


def _median(of: Array) -> Estimate:
    """The median, and half the distance of the order statistics a standard error of its rank to both sides."""
    step = 0.5 / math.sqrt(len(of))
    low, middle, high = np.quantile(of, [max(0.0, 0.5 - step), 0.5, min(1.0, 0.5 + step)])
    return Estimate(float(middle), float(high - low) / 2)


# ------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """What many designs give, and which of them suffice."""

    dataset: str
    truth: Truth
    width: float  # wanted, of the 95 % interval of PLW*
    outcomes: tuple[Outcome, ...]  # by runs, then tasks
    as_run: Outcome | None  # of the study that the truth was estimated from, where it is complete

    @property
    def enough(self) -> tuple[Outcome, ...]:
        """For each number of tasks the smallest design that finds the optimum 4 times in 5, fewest runs first.

        Left out are numbers of tasks that save no run.
        """
        kept: list[Outcome] = []
        for one in self.outcomes:
            if one.found.value >= POWER and all(one.design.tasks < other.design.tasks for other in kept):
                kept.append(one)
        return tuple(kept)

    @property
    def nearest(self) -> Outcome:
        """The design that knows the optimum best."""
        return min(self.outcomes, key=lambda one: (one.median_width.value, one.median_error.value))

    def frame(self) -> pd.DataFrame:
        """A row per design."""
        figures = ("power", "interior", "found", "coverage", "median_width", "median_error")
        rows = []
        for one in (*([self.as_run] if self.as_run else []), *self.outcomes):
            row = {"dataset": self.dataset, "is_as_run": one is self.as_run, "runs": one.design.runs}
            row |= {"tasks": one.design.tasks, "seeds": one.design.seeds, "models": one.design.models}
            row |= {"plws": " ".join(f"{plw:g}" for plw in one.design.plws), "wanted_width": self.width}
            for name in figures:
                row |= {name: getattr(one, name).value, f"{name}_se": getattr(one, name).error}
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
        lines += [self._line(one) for one in self.enough or (self.nearest,)]
        tasks, runs = (max(getattr(one.design, name) for one in self.outcomes) for name in ("tasks", "runs"))
        compared = f"Of {len(self.outcomes)} designs of up to {tasks} tasks and {runs} runs"
        if self.enough:
            lines.append(f"  {compared}, those that find it {least}: fewest runs first, then fewer tasks at more runs.")
        else:
            lines[-1] += "  <- the nearest"
            lines.append(f"  {compared}, none finds it {least}.")
        if self.enough and self.as_run and not any(one.design.tasks <= self.as_run.design.tasks for one in self.enough):
            tasks = self.as_run.design.tasks
            most = max((one for one in self.outcomes if one.design.tasks == tasks), key=lambda one: one.found.value)
            lines.append(f"  With its {tasks} tasks none does: {most.found.value:.0%} at best. More tasks are needed.")
        shown = sorted({one.design.plws for one in self.enough} - {PUBLISHED_PLWS}, key=len)
        if lists := [f"{len(plws)} are {', '.join(f'{plw:g}' for plw in plws)}" for plws in shown if len(plws) <= 8]:
            lines.append(f"  PLWs on w_p are equally spaced there: {'; '.join(lists)}.")
        lines.append(
            "  found: Fieller's 95 % interval is no wider than that and holds PLW*. width, error: medians of its width "
            "and of the estimate's error, in PLW."
        )
        return "\n".join(lines)

    def _line(self, one: Outcome) -> str:
        design = one.design
        kind = "published" if design.plws == PUBLISHED_PLWS else "as tried" if one is self.as_run else "on w_p"
        figures = "".join(f"{estimate.value:8.3f}" for estimate in (one.power, one.found, one.coverage))
        return (
            f"  {design.tasks:5}  {design.seeds:5}  {f'{len(design.plws)} {kind}':15}  {design.runs:4}{figures}"
            f"    {one.median_width.value:.3f}  {one.median_error.value:.3f}"
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
    lists = [PUBLISHED_PLWS, *(spaced(truth.transform, number) for number in SPACED)]
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


def spaced(transform: Transform, number: int) -> tuple[float, ...]:
    """PLWs equally spaced on w_p over the range, to 3 significant digits."""
    return tuple(_rounded(transform.back(np.linspace(*transform.ends, number))).tolist())


def _rounded(plws: Array) -> Array:
    return np.array([float(f"{plw:.3g}") for plw in plws])


def design_of(grid: Grid) -> Design | None:
    """The design of a data set's scores, None where it is not complete."""
    runs = grid.runs
    cells = runs.groupby(["model", "plw"]).size()
    names = runs["model"].nunique()
    plws = tuple(sorted(set(runs["plw"])))
    if set(runs) - set(RUN):  # other columns tell runs apart, and a design knows none
        return None
    if np.isnan(grid.scores).any() or cells.nunique() > 1 or len(cells) < names * len(plws):
        return None
    return Design(len(grid.tasks), int(cells.iloc[0]), plws, names)


# ------------------------------------------------------------------------------------------------------- next


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


def next_plws(grid: Grid, number: int, draws: int = 4000, seed: int = 1234) -> Proposal:
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
    whole, curves = _lead(grid)
    truth, tasks = _moments(whole, curves), len(whole.tasks)
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

    even = _rounded(whole.transform.back(np.linspace(low, high, CANDIDATES)))
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
