"""Simulated studies: what the lead model would conclude from many tables of one design.

A study is simulated from what makes its scores (`Truth`) and analysed as the report's lead model does (`crossed`). All
that model sees of a table is the mean and the covariance of the tasks' curves and two mean squares of the residuals.
Scores being normal and every task being scored on every run, these four are independent with known distributions. So
they are drawn, not scores, and a table costs the same whatever its size: 10,000 of a design take some 60 ms.

Letters: N tables, T tasks. Curves are (slope, bend) on w_p; levels of tasks and models are left out, as each task's
curve has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from plw_mlflow.analysis.score_table import RUN
from plw_mlflow.analysis.statistics import fitting, over_tasks
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.optimum import LEVEL, maximisers
from plw_mlflow.analysis.statistics.over_tasks import MeanCurve
from plw_mlflow.errors import UserError
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.transforms import Array, Transform

HALVINGS = 12  # of the way between an optimum and an end of the range, in search of its interval's border
BEND = np.array([0.0, 1.0])


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
        """As `parse_truth` reads it."""
        return ",".join(f"{name}={getattr(self, name):.4g}" for name in STATED)


STATED = tuple(field.name for field in fields(Truth) if field.name != "transform")


def parse_truth(text: str) -> Truth:
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
    return Truth(**values, transform=Transform("w_p", PUBLISHED_PLWS))


def estimate_truth(grid: Grid) -> Truth:
    """Estimate the truth behind a data set's scores by the method of moments.

    What differs between tasks is the covariance of their curves less the part that the residuals explain; where that
    leaves a direction with less than nothing, none (Amemiya 1985, doi:10.1080/00031305.1985.10479402). The
    estimates are then taken as exact, so a peak that is due to chance makes a study look better than it is.

    Raises UserError where `crossed` cannot be fitted.
    """
    return moments(*fit_mean_curve(grid))


def moments(whole: Grid, curves: MeanCurve) -> Truth:
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


def fit_mean_curve(grid: Grid) -> tuple[Grid, MeanCurve]:
    fitting.fit("crossed", grid)  # refuses what cannot be fitted
    whole, _ = grid.complete
    curves = over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=True)
    if curves.of_noise <= 1e-24 * float(np.abs(whole.scores).max()) ** 2:
        raise UserError("scores follow a curve exactly; without residuals nothing can be planned, check the scores")
    return whole, curves


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
class TableFits:
    """What the lead model concludes from N tables, as `fitting.fit` does from one."""

    joint_p: Array  # [N]
    best: Array  # [N], w_p of the highest point within the range: the optimum, or an end
    has_optimum: NDArray[np.bool_]  # [N]
    interval: Array  # [N, 2], Fieller's on w_p, cut to the range
    is_located: NDArray[np.bool_]  # [N], whether there is an optimum and its interval ends; if not, it is the range


def draw(truth: Truth, design: Design, draws: int, seed: int) -> MeanCurve:
    """What the lead model sees of simulated tables: the mean curve of each, of slope and bend alone."""
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
    between = half @ half.swapaxes(1, 2) / (tasks - 1)
    of_runs = (luck + noise / tasks) * random.chisquare(free, draws) / free
    of_noise = noise * random.chisquare(free * (tasks - 1), draws) / (free * (tasks - 1))
    return MeanCurve(curves, between, bread, of_runs, of_noise, tasks, free, np.eye(2), runs_differ=True)


def fit_tables(tables: MeanCurve, transform: Transform) -> TableFits:
    """The lead model's joint test and optimum of N tables."""
    low, high = transform.ends
    slope, bend = tables.coefficients.T
    vertex = -slope / (2 * bend)
    has_optimum = (bend < 0) & (low < vertex) & (vertex < high)
    bend_reach = _quantile(tables.degrees_of_freedom(BEND)) * np.sqrt(tables.covariance[:, 1, 1])
    is_located = has_optimum & (np.abs(bend) > bend_reach)
    interval = np.column_stack([_border(tables, vertex, end) for end in (low, high)])
    interval = np.where(is_located[:, None], interval, [low, high])
    return TableFits(tables.joint_test()[3], maximisers(slope, bend, low, high), has_optimum, interval, is_located)


def _border(tables: MeanCurve, vertex: Array, end: float) -> Array:
    """Where Fieller's set ends between the vertex and an end of the range, [N], by bisection; means nothing outside."""
    inside, outside = vertex, np.full_like(vertex, end)
    for step in range(1 + HALVINGS):
        tried = (inside + outside) / 2 if step else outside
        contrast = np.stack([np.ones_like(tried), 2 * tried], axis=-1)
        variance = np.einsum("ni,nij,nj->n", contrast, tables.covariance, contrast)
        slope = np.einsum("ni,ni->n", contrast, tables.coefficients)
        may_be_0 = slope**2 <= _quantile(tables.degrees_of_freedom(contrast)) ** 2 * variance
        inside, outside = np.where(may_be_0, tried, inside), np.where(may_be_0, outside, tried)
    return inside


def _quantile(freedom: Array) -> Array:
    """Of t, for a two-sided test; interpolated: exact ones (`MeanCurve.t_test`) make a plan take 1.8 times as long."""
    log_freedoms, values = _quantiles()
    return np.exp(np.interp(np.log(freedom), log_freedoms, values))


@cache
def _quantiles() -> tuple[Array, Array]:
    freedom = np.geomspace(0.25, 1e9, 5001)
    return np.log(freedom), np.log(special.stdtrit(freedom, 1 - LEVEL / 2))


@dataclass(frozen=True)
class MonteCarloEstimate:
    """A number that a simulation estimates."""

    value: float
    error: float  # Monte-Carlo standard error


@dataclass(frozen=True)
class DesignResult:
    """How often, and how well, a design finds the optimum."""

    design: Design
    power: MonteCarloEstimate  # share of tables whose joint test rejects at 0.05
    interior: MonteCarloEstimate  # share of tables with an optimum inside the range
    found: MonteCarloEstimate  # share with an interval no wider than wanted that holds the true optimum
    coverage: MonteCarloEstimate  # share of Fieller's sets that hold the true optimum
    median_width: MonteCarloEstimate  # of the interval, in PLW; of the range where the optimum is not located
    median_error: MonteCarloEstimate  # distance of the best PLW to the true one


def simulate(truth: Truth, design: Design, width: float, draws: int = 10_000, seed: int = 1234) -> DesignResult:
    """Simulate a study `draws` times.

    width: of Fieller's 95 % interval of PLW*, wanted at most. It is in PLW, which people think in; equal widths in PLW
    are not equal on w_p, so what is narrow depends on where the optimum lies. A narrow interval that misses the optimum
    does not count as finding it.
    """
    tables = draw(truth, design, draws, seed)
    fits = fit_tables(tables, truth.transform)
    ends = truth.transform.back(fits.interval)
    widths = ends[:, 1] - ends[:, 0]
    holds = tables.t_test(np.array([1, 2 * truth.best]))[3] >= LEVEL  # whether the slope there may be 0
    return DesignResult(
        design,
        _share(fits.joint_p < LEVEL),
        _share(fits.has_optimum),
        _share(fits.is_located & holds & (widths <= width) & truth.has_optimum),
        _share(holds),
        _median(widths),
        _median(np.abs(truth.transform.back(fits.best) - truth.best_plw)),
    )


def _share(of: NDArray[np.bool_]) -> MonteCarloEstimate:
    if not len(of):
        return MonteCarloEstimate(math.nan, math.nan)
    value = float(of.mean())
    return MonteCarloEstimate(value, math.sqrt(value * (1 - value) / len(of)))


def _median(of: Array) -> MonteCarloEstimate:
    """The median, and half the distance of the order statistics a standard error of its rank to both sides."""
    step = 0.5 / math.sqrt(len(of))
    low, middle, high = np.quantile(of, [max(0.0, 0.5 - step), 0.5, min(1.0, 0.5 + step)])
    return MonteCarloEstimate(float(middle), float(high - low) / 2)


def round_plws(plws: Array) -> Array:
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
