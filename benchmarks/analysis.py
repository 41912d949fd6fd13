"""How far the analysis can be trusted, on simulated tables of scores:  python -m benchmarks.analysis --json FILE

A table is 2 models x the study's 10 PLWs x 1 seed, scored on 8, 13 or 40 tasks. Tasks differ in level (evenly over
0..1, so with the study's SD of 0.29) and, in half of the settings, in slope and bend (SD 0.06 each); a score has a
residual SD of 0.01, and in some settings a run moves its scores on all tasks alike. The mean curve is nothing, for the
type-I error of the joint tests at 0.05, or `CURVE`, the study's, once and four times as strong, for the coverage of the
95 % intervals of its vertex, in w_p.

Intervals without an end (Fieller's, where the bend could be 0) and those not given (delta method, without a maximum
inside the range) count as covering; `open` is their share. `holds` is the share of intervals that hold the vertex
whether open or not: what the method promises. `whole` is the share of intervals that cover the range from end to end;
widths are of what lies within the range, which is 1 wide.

Closed forms do all tables at once where there are any, and are compared with `fitting.fit` on some of them.

    python -m benchmarks.analysis --few-runs --json FILE

does the same for studies of 3 to 10 runs, of one model, by the methods that lead at each number of tasks: from how many
runs on is a test's level near what it claims? `fitting.MIN_FREE` rests on it.

    python -m benchmarks.analysis --these-tasks --json FILE

does the same for the question about these very tasks: the tasks' curves then average to the mean curve exactly, and how
they differ says nothing of it. By `fixed-tasks`, and by the other closed forms for comparison.

    python -m benchmarks.analysis --speed --json FILE

measures instead how long fits take, beside the limits set for two cores.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from scipy import special, stats

from plw_mlflow.analysis import analyze
from plw_mlflow.analysis.statistics import (
    beta,
    bootstrap,
    design,
    fitting,
    fixed_tasks,
    inference,
    over_tasks,
    parametric,
    random_slopes,
)
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.transforms import Array, make_transform

Found = dict[tuple[str, ...], Array]  # of each table: (test,) its p; (interval, effect, quantity) what became of it

CURVE = np.array([0.05, -0.038])  # slope and bend on w_p that the study's short data show; vertex 0.66, PLW 0.25
VERTEX = float(-CURVE[0] / (2 * CURVE[1]))
EFFECTS = (1, 4)
SD_RESIDUAL = 0.01
SD_SLOPES = 0.06
TIED = -0.95  # correlation of slope and bend in the study's scores
UNEQUAL = 5.0  # largest residual SD of a task over the smallest
RUN_SDS = (0.0, 0.001, 0.005)
SEED = 1234
CHUNK = 250  # tables at a time
DRAWS = 199
POINTS = 200  # at which the width of a set is measured


# ------------------------------------------------------------------------------------------------ the tables


@dataclass(frozen=True)
class Setting:
    """What a table is drawn from."""

    tasks: int
    slopes: str = "none"  # none, free, tied: correlated by TIED, or small: a tenth of free ones
    sd_run: float = 0.0
    unequal: bool = False  # whether tasks' residual SDs differ
    seeds: int = 1
    tried: int = len(PUBLISHED_PLWS)  # PLWs, spread over the published ones
    models: int = 2
    centred: bool = False  # whether tasks' curves average to the mean curve exactly, not only on average over tables

    def __str__(self) -> str:
        words = [f"{self.tasks} tasks", f"slopes {self.slopes}", f"run SD {self.sd_run:g}"]
        words += (
            ["of these tasks"] * self.centred
            + ["unequal residuals"] * self.unequal
            + [f"{self.seeds} seeds"] * (self.seeds > 1)
        )
        words += [f"{self.tried} PLWs"] * (self.tried < len(PUBLISHED_PLWS)) + ["1 model"] * (self.models == 1)
        return ", ".join(words)

    @property
    def plws(self) -> tuple[float, ...]:
        """Those tried."""
        last = len(PUBLISHED_PLWS) - 1
        return tuple(PUBLISHED_PLWS[round(place)] for place in np.linspace(0, last, self.tried))

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run: model, dataset, plw, seed."""
        rows = product(("model-1", "model-2")[: self.models], ("simulated",), self.plws, range(self.seeds))
        return pd.DataFrame(list(rows), columns=["model", "dataset", "plw", "seed"])


def main_settings(tasks: Sequence[int]) -> list[Setting]:
    """With and without slopes and run noise."""
    return [Setting(*values) for values in product(tasks, ("none", "free"), (0.0, 0.001, 0.005))]


def further_settings(tasks: Sequence[int]) -> list[Setting]:
    """With slopes that are tied or small, with residuals that differ, and with 8 runs or 4 instead of 20."""
    kinds: list[dict[str, Any]] = [{"slopes": "tied"}, {"unequal": True}, {"slopes": "small"}, {"tried": 4}]
    kinds.append({"tried": 4, "models": 1})
    return [Setting(t, sd_run=run, **kind) for t, kind, run in product(tasks, kinds, (0.0, 0.001, 0.005))]


def settings_of_these(tasks: Sequence[int]) -> list[Setting]:
    """Questions about these tasks: their curves average to the mean curve exactly; 20 runs and 40, and fewer."""
    kinds: list[dict[str, Any]] = [{}, {"seeds": 2}, {"unequal": True}, *({"tried": n, "models": 1} for n in (5, 4))]
    chosen = [Setting(t, "free", sd, centred=True, **kind) for kind, t, sd in product(kinds, tasks, RUN_SDS)]
    return chosen + [Setting(t, "none", sd, seeds=seeds) for seeds, t, sd in product((1, 2), tasks, RUN_SDS)]


def few_runs(method: str) -> list[Setting]:
    """One model and a run at each of 3 to 10 PLWs, on tasks that PLW moves alike, with up to as much luck as noise.

    Each method at the numbers of runs and tasks at which it may lead. Tasks that differ in their curves drown a run's
    luck, so tests over tasks are nearer to their level there. Of `lmm` also 20 runs, two seeds of the published PLWs:
    what more runs do not mend.
    """
    sds = (0.0, 0.005) if method == "lmm-slopes" else (0.0, 0.001, 0.002, 0.005, 0.01)
    runs = (4, 5, 6, 7, 8, 10)
    tasks = {"crossed": (4, 8, 13, 40, 100), "lmm-slopes": (4, 13), "lmm": (2, 3), "ols-task": (1,)}[method]
    sizes = [*product((3,), (2, 3, 4, 8, 13, 40))] if method == "lmm" else []  # of 3 runs no other can be fitted
    sizes += product(runs, tasks)
    chosen = [Setting(t, sd_run=sd, tried=number, models=1) for (number, t), sd in product(sizes, sds)]
    many = product(tasks, sds) if method == "lmm" else []
    return chosen + [Setting(t, sd_run=sd, seeds=2, models=1) for t, sd in many]


@cache
def empty(setting: Setting) -> Grid:
    """A setting's design, without scores: [R, T] of NaN."""
    runs = setting.runs
    names = [f"task-{number:02d}" for number in range(setting.tasks)]
    table = runs.merge(pd.DataFrame({"task": names}), how="cross").assign(metric="acc", score=0.0)
    return design.grid(table, "simulated", make_transform("w_p", runs["plw"]))


def draw(setting: Setting, number: int) -> Array:
    """The scores of one table, [R, T], under a mean curve of nothing; the same whatever else is drawn."""
    kind = ("none", "free", "tied", "small").index(setting.slopes)
    random = np.random.default_rng(
        [SEED, setting.tasks, kind, round(1e6 * setting.sd_run), setting.unequal, setting.seeds, number]
    )
    grid, tasks = empty(setting), setting.tasks
    level = random.random(tasks) if tasks > 3 else np.linspace(0.2, 0.8, tasks)  # so few are apart for sure
    correlation = TIED if setting.slopes == "tied" else 0.0
    sd = SD_SLOPES * {"none": 0, "small": 0.1}.get(setting.slopes, 1)
    root = np.linalg.cholesky([[1, correlation], [correlation, 1]]) * sd
    slopes = root @ random.normal(size=(2, tasks))
    slopes -= slopes.mean(1, keepdims=True) * setting.centred
    spread = math.log(UNEQUAL) / 2 * np.linspace(-1, 1, tasks) * setting.unequal
    noise = random.normal(size=grid.scores.shape) * SD_RESIDUAL * np.exp(spread)
    run = random.normal(0, setting.sd_run, len(grid.scores))
    return level + grid.curve[:, 1:] @ slopes + run[:, None] + noise


def tables(setting: Setting, first: int, last: int) -> Array:
    """Scores of tables number `first` to before `last`: [B, R, T]."""
    return np.stack([draw(setting, number) for number in range(first, last)])


# ------------------------------------------------------------------------------------ what methods say of them


@dataclass(frozen=True)
class Estimates:
    """Slope and bend of B tables, how sure they are, and the tests that both are 0."""

    curve: Array  # [B, 2]
    covariance: Array  # [B, 2, 2]
    spread: Array  # [B, 4, 4]: the variance of the estimated variance of a contrast c is (c x c)'spread (c x c)
    p: dict[str, Array]  # [B] each

    def moved(self, by: Array) -> Estimates:
        """The estimates after a curve was added to all scores, of methods that follow it."""
        return replace(self, curve=self.curve + by)

    def reach(self, contrast: Array) -> Array:
        """Half the width of the 95 % interval of a contrast of slope and bend, [..., B, 2], by t (Satterthwaite)."""
        square = (contrast[..., :, None] * contrast[..., None, :]).reshape(*contrast.shape[:-1], 4)
        variance = np.einsum("...bi,bi->...b", square, self.covariance.reshape(-1, 4))
        spread = np.einsum("...bi,bij,...bj->...b", square, self.spread, square)
        with np.errstate(divide="ignore"):
            freedom = np.minimum(2 * variance**2 / spread, 1e9)
        return special.stdtrit(freedom, 1 - LEVEL / 2) * np.sqrt(variance)

    def excess(self, w: Array) -> Array:
        """Distance of the slope at w, [..., B] or [..., 1], from 0, less its reach: below 0 in Fieller's set."""
        ones = np.ones(np.broadcast_shapes(w.shape, (len(self.curve),)))
        return np.abs(self.curve[:, 0] + 2 * self.curve[:, 1] * w) - self.reach(np.stack([ones, 2 * w * ones], axis=-1))


def _of_parts(curve: Array, parts: Array, freedoms: Array, p: dict[str, Array]) -> Estimates:
    """Estimates whose covariance is a sum of independent ones, [S, B, 2, 2], of so many degrees of freedom, [S]."""
    flat = parts.reshape(*parts.shape[:2], 4)
    spread = np.einsum("s,sbi,sbj->bij", 2 / freedoms, flat, flat)
    return Estimates(curve, np.asarray(parts.sum(0)), spread, p)


def over(setting: Setting, scores: Array, runs_differ: bool) -> Estimates:
    """`crossed` and `task-t`."""
    grid = empty(setting)
    curves = over_tasks.fit(scores, grid.x, grid.contrasts, runs_differ=runs_differ)
    kept = slice(1, 3)
    p = {"T^2": curves.joint_test()[3]}
    return _of_parts(curves.coefficients[:, kept], curves.parts[..., kept, kept], curves.freedoms, p)


def pooled(setting: Setting, scores: Array, *, model_term: bool) -> tuple[Array, Array, Array, float]:
    """Curve [B, 2], sums of squares around it and around none, [B], and the rank of what the curve is fitted beside.

    Least squares within tasks, which is what a task's own intercept leaves, fixed, or random and not at 0.
    """
    grid = empty(setting)
    x = grid.x[:, 1:] if model_term else grid.curve[:, 1:]
    deviations = scores - scores.mean(1, keepdims=True)
    centred = x - x.mean(0)
    total = (deviations**2).sum((1, 2))

    def around(columns: Array) -> tuple[Array, Array]:
        coefficients = deviations.mean(2) @ np.linalg.pinv(columns).T
        explained = ((coefficients @ columns.T) ** 2).sum(1) * setting.tasks
        return coefficients, total - explained

    coefficients, full = around(centred)
    null = around(centred[:, 2:])[1] if x.shape[1] > 2 else total
    return coefficients[:, :2], full, null, float(x.shape[1])


def _bread(setting: Setting, model_term: bool) -> Array:
    """Covariance of slope and bend of the pooled curve, over the residual variance."""
    grid = empty(setting)
    x = grid.x if model_term else grid.curve
    return np.asarray(np.linalg.inv(x.T @ x)[1:3, 1:3] / setting.tasks)


def ols(setting: Setting, scores: Array) -> Estimates:
    """`ols-task`"""
    curve, full, null, rank = pooled(setting, scores, model_term=True)
    freedom = setting.tasks * (scores.shape[1] - 1) - rank
    covariance = (full / freedom)[:, None, None] * _bread(setting, True)
    p = stats.f.sf((null - full) / 2 / (full / freedom), 2, freedom)
    return _of_parts(curve, covariance[None], np.array([freedom]), {"F": p})


def lmm(setting: Setting, scores: Array) -> Estimates:
    """`lmm`, for complete tables whose tasks differ in level by more than noise: its likelihood is a product then."""
    curve, full, null, rank = pooled(setting, scores, model_term=False)
    runs = scores.shape[1]
    freedom = setting.tasks * (runs - 1) - rank
    covariance = (full / freedom)[:, None, None] * _bread(setting, False)
    p = {
        "likelihood ratio": stats.chi2.sf(setting.tasks * (runs - 1) * np.log(null / full), 2),
        "F": stats.f.sf((null - full) / 2 / (full / freedom), 2, freedom),
    }
    assert (runs * scores.mean(1).var(1) > 2 * full / freedom).all()  # else a task's variance may be 0
    return _of_parts(curve, covariance[None], np.array([freedom]), p)


def slopes(setting: Setting, scores: Array) -> Estimates:
    """`lmm-slopes`"""
    grid = empty(setting)
    rows = []
    for table in scores:
        has_runs = random_slopes.has_run_information(table, grid.x)
        fit = partial(random_slopes.fit, table, z=grid.curve, run_effect=has_runs)
        restricted = fit(grid.x)
        likely = fit(grid.x, reml=False, start=restricted)
        kept = [0, *range(3, grid.x.shape[1])]
        null = fit(grid.x[:, kept], reml=False, start=likely)
        gradient = restricted.uncertainty.covariance_gradient[:, 1:3, 1:3].reshape(-1, 4)
        rows.append(
            (
                restricted.coefficients[1:3],
                restricted.covariance[1:3, 1:3],
                gradient.T @ restricted.uncertainty.parameter_covariance @ gradient,
                inference.f_test(restricted, grid.contrasts)[3],
                inference.likelihood_ratio(likely, null)[2],
            )
        )
    curve, covariance, spreads, f, ratio = map(np.array, zip(*rows, strict=True))
    return Estimates(curve, covariance, spreads, {"F": f, "likelihood ratio": ratio})


def betas(setting: Setting, scores: Array) -> Estimates:
    """`beta`, of the middle half of 0..1, since scores outside have no likelihood."""
    grid, fits, lower = empty(setting), [], []
    for table in 0.25 + scores / 2:
        y, run, task = replace(grid, scores=table).long
        fits.append(beta.fit(y, grid.curve[run], task))
        lower.append(beta.fit(y, grid.curve[run][:, :1], task).loglik)
    ratio = 2 * (np.array([fitted.loglik for fitted in fits]) - lower)
    return Estimates(
        np.array([fitted.coefficients[1:] for fitted in fits]),
        np.array([fitted.covariance[1:, 1:] for fitted in fits]),
        np.zeros((len(fits), 4, 4)),
        {"likelihood ratio": stats.chi2.sf(np.maximum(ratio, 0), 2)},
    )


def fixed(setting: Setting, scores: Array) -> Estimates:
    """`fixed-tasks`"""
    grid = empty(setting)
    means = fixed_tasks.fit(scores, grid.x, grid.contrasts)
    p = {"F of runs' means": means.joint_test()[3]}
    return _of_parts(means.coefficients[:, 1:3], means.covariance[None, :, 1:3, 1:3], np.array([means.free]), p)


CLOSED: dict[str, Callable[[Setting, Array], Estimates]] = {
    "crossed": lambda setting, scores: over(setting, scores, runs_differ=True),
    "task-t": lambda setting, scores: over(setting, scores, runs_differ=False),
    "ols-task": ols,
    "lmm": lmm,
    "fixed-tasks": fixed,
}
ESTIMATES = CLOSED | {"lmm-slopes": slopes, "beta": betas}
BOOTSTRAPS: dict[str, bootstrap.Resampled] = {
    "bootstrap-tasks": "tasks",
    "bootstrap-seeds": "seeds",
    "bootstrap-both": "both",
}
PARAMETRIC = {"lmm-parametric": "lmm", "lmm-slopes-parametric": "lmm-slopes"}
TABLES = {
    **dict.fromkeys(CLOSED, 10_000),
    "lmm-slopes": 1000,
    "beta": 1000,
    **dict.fromkeys(BOOTSTRAPS, 500),
    **dict.fromkeys(PARAMETRIC, 500),
}


# --------------------------------------------------------------------------------------- what becomes of them


def outcomes(method: str, setting: Setting, first: int, last: int) -> Found:
    """What a method makes of tables `first` to before `last` of a setting."""
    scores, grid = tables(setting, first, last), empty(setting)
    if method in BOOTSTRAPS:
        return {key: row for effect in EFFECTS for key, row in _bootstrapped(method, setting, scores, effect).items()}
    if method in PARAMETRIC:
        rejects = [
            _rejects(PARAMETRIC[method], replace(grid, scores=table), seed) for seed, table in enumerate(scores, first)
        ]
        return {("likelihood ratio",): np.where(rejects, 0.0, 1.0)}
    estimates = ESTIMATES[method](setting, scores)
    rows: Found = {(test,): p for test, p in estimates.p.items()}
    for effect in EFFECTS:
        if method == "beta":  # a curve added to scores is no curve added to logits
            moved = betas(setting, scores + (grid.curve[:, 1:] @ (effect * CURVE))[:, None])
        else:
            moved = estimates.moved(effect * CURVE)
        for interval, row in (("Fieller", fieller(moved)), ("delta", delta(moved))):
            rows |= {(interval, str(effect), name): values for name, values in row.items()}
    return rows


def fieller(estimates: Estimates) -> dict[str, Array]:
    """Fieller's sets of the vertex: whether they hold the true one and are open, and the width within the range."""
    b = np.broadcast_to([0.0, 1.0], estimates.curve.shape)
    points = (np.arange(POINTS) + 0.5) / POINTS
    return {
        "holds": estimates.excess(np.array([VERTEX])) <= 0,
        "open": np.abs(estimates.curve[:, 1]) <= estimates.reach(b),
        "width": (estimates.excess(points[:, None]) <= 0).mean(0),
    }


def delta(estimates: Estimates) -> dict[str, Array]:
    """The same of intervals by the delta method; without a maximum inside the range none is given, which is 1 wide."""
    slope, bend = estimates.curve.T
    vertex = -slope / (2 * bend)
    reach = estimates.reach(np.stack([np.ones_like(vertex), 2 * vertex], axis=1)) / (2 * np.abs(bend))
    is_open = ~((bend < 0) & (vertex > 0) & (vertex < 1))
    return {
        "holds": np.abs(vertex - VERTEX) <= reach,
        "open": is_open,
        "width": np.where(is_open, 1, np.clip(vertex + reach, 0, 1) - np.clip(vertex - reach, 0, 1)),
    }


def _rejects(model: str, grid: Grid, seed: int) -> bool:
    """Whether `parametric.joint_test` by DRAWS gives p <= 0.05; it stops drawing where that is no longer possible."""
    ratios = parametric.RATIOS[model](grid, np.random.default_rng(seed))
    seen, as_large = next(ratios), 0
    for _ in range(DRAWS):
        as_large += next(ratios) >= seen
        if (1 + as_large) / (1 + DRAWS) > LEVEL + 1e-12:
            return False
    return True


def _bootstrapped(method: str, setting: Setting, scores: Array, effect: int) -> Found:
    grid = empty(setting)
    curve = (grid.curve[:, 1:] @ (effect * CURVE))[:, None]
    ends = []
    for seed, table in enumerate(scores):
        resampled = bootstrap.bootstrap_optimum(replace(grid, scores=table + curve), BOOTSTRAPS[method], DRAWS, seed)
        ends.append(grid.transform(resampled.interval))
    low, high = np.array(ends).T
    key = "percentile", str(effect)
    return {
        (*key, "holds"): (low <= VERTEX) & (high >= VERTEX),
        (*key, "open"): np.zeros(len(low), bool),
        (*key, "width"): high - low,
    }


@dataclass(frozen=True)
class Row:
    """One line of the printed table: what tables of a setting show of a method's test or interval."""

    setting: str
    method: str
    of: str  # the test; or the interval and how many times the curve
    tables: int
    rate: float  # of rejections; or of intervals that hold the vertex or are open
    holds: float | None = None  # the rest is of intervals alone
    open: float | None = None
    whole: float | None = None
    width: float | None = None  # median

    @property
    def error(self) -> float:
        """Standard error of the rate, were the nominal one true."""
        return math.sqrt(LEVEL * (1 - LEVEL) / self.tables)

    def __str__(self) -> str:
        line = f"{self.setting:<60}{self.method:<22}{self.of:<20}{self.tables:>6}{self.rate:>8.3f} ±{self.error:.3f}"
        if self.holds is None:
            return line
        return f"{line}{self.holds:>8.3f}{self.open:>8.3f}{self.whole:>8.3f}{self.width:>8.3f}"

    def row(self) -> dict[str, Any]:
        """As all benchmarks write it, and what else is known; the ratio is of what is promised to what is missed."""
        is_test = self.holds is None
        return {
            "case": f"{self.setting}: {self.method}",
            "metric": f"{'type-I error' if is_test else 'coverage'}, {self.of}",
            "ours": self.rate,
            "peer": "nominal",
            "peer_value": LEVEL if is_test else 1 - LEVEL,
            "ratio": LEVEL / max(self.rate if is_test else 1 - self.rate, 1 / self.tables),
            **{name: value for name, value in asdict(self).items() if value is not None},
        }


HEADER = (
    f"{'setting':<60}{'method':<22}{'test or interval':<20}{'tables':>6}{'rate':>8} ±error"
    f"{'holds':>8}{'open':>8}{'whole':>8}{'width':>8}"
)


def summary(setting: Setting, method: str, rows: Found) -> Iterator[Row]:
    """A line per test and interval."""
    for key, p in rows.items():
        if len(key) == 1:
            yield Row(str(setting), method, key[0], len(p), float((p < LEVEL + 1e-12).mean()))
    for interval, effect in dict.fromkeys(key[:2] for key in rows if len(key) == 3):
        holds, is_open, width = (rows[interval, effect, name] for name in ("holds", "open", "width"))
        yield Row(
            str(setting),
            method,
            f"{interval}, curve x{effect}",
            len(holds),
            float(np.logical_or(holds, is_open).mean()),
            float(holds.mean()),
            float(is_open.mean()),
            float((width > 1 - 1e-9).mean()),
            float(np.median(width)),
        )


def differences(setting: Setting, method: str, number: int) -> float:
    """The largest difference between our numbers and `fitting.fit`'s of one table: estimates, p, ends of intervals."""
    grid = empty(setting)
    curve = (grid.curve[:, 1:] @ CURVE)[:, None]
    scores = tables(setting, number, number + 1) + curve
    fitted = fitting.fit(method, replace(grid, scores=scores[0] if method != "beta" else 0.25 + scores[0] / 2))
    ours = ESTIMATES[method](setting, scores)
    p = {
        test.test.partition(",")[0].removeprefix("Hotelling's ").removesuffix(" over tasks"): test.p
        for test in fitted.joint_tests
    }
    pairs = [(ours.p[test][0], value) for test, value in p.items()]
    pairs += zip(ours.curve[0], (fitted.coefficients["w_p"], fitted.coefficients["w_p^2"]), strict=True)
    pairs += zip(ours.covariance[0].flat, np.array(fitted.covariance)[1:3, 1:3].flat, strict=True)
    pairs.append((float(fieller(ours)["open"][0]), float(fitted.optimum_set_is_unbounded)))
    if fitted.delta_interval:
        vertex = float(-ours.curve[0, 0] / (2 * ours.curve[0, 1]))
        reach = float(ours.reach(np.array([[1, 2 * vertex]]))[0] / (2 * abs(ours.curve[0, 1])))
        ends = grid.transform.back(np.clip([vertex - reach, vertex + reach], 0, 1))
        pairs += zip(ends, fitted.delta_interval, strict=True)
    return float(max(abs(a - b) for a, b in pairs))


def settings(method: str, tasks: Sequence[int]) -> list[Setting]:
    """What a method is tried on."""
    chosen = main_settings(tasks)
    if method in CLOSED:
        chosen += further_settings(tasks)
    if method in PARAMETRIC:
        chosen = [setting for setting in chosen if setting.sd_run != 0.001]
    if method in ("bootstrap-seeds", "bootstrap-both"):
        chosen = [replace(setting, seeds=3) for setting in chosen]
    return chosen


def simulate(tried: dict[str, list[Setting]], most: int | None, processes: int) -> Iterator[Row]:
    """The lines of the table, as they come. tried: the settings of each method."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by each new process: all work is in small matrices
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting = []
        for method, chosen in tried.items():
            number = min(TABLES[method], most or TABLES[method])
            chunk = CHUNK if method in CLOSED else max(1, number // 20)
            ends = [*range(0, number, chunk), number]
            for setting in chosen:
                parts = [pool.submit(outcomes, method, setting, *between) for between in pairwise(ends)]
                waiting.append((setting, method, parts))
        for setting, method, parts in waiting:
            done = [part.result() for part in parts]
            yield from summary(setting, method, {key: np.concatenate([one[key] for one in done]) for key in done[0]})


# ------------------------------------------------------------------------------------------------------ speed


@dataclass(frozen=True)
class Timing:
    """How long something took, beside its limit."""

    case: str
    what: str
    seconds: float
    limit: float

    def __str__(self) -> str:
        return f"{self.case:<24}{self.what:<58}{self.seconds:>8.2f} s  limit {self.limit:g} s"

    def row(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "metric": f"seconds, {self.what}",
            "ours": self.seconds,
            "peer": "limit",
            "peer_value": self.limit,
            "ratio": self.limit / self.seconds,
        }


def speed() -> Iterator[Timing]:
    """Times of fits and bootstraps, by the clock."""

    def timed(case: str, what: str, limit: float, call: Callable[[], object]) -> Timing:
        started = time.perf_counter()
        call()
        return Timing(case, what, time.perf_counter() - started, limit)

    draws = 2000
    fitting.fit("lmm", _filled(Setting(8)))  # imports, and what else the first call brings
    for setting, limit in ((Setting(13, "free", 0.005, seeds=3), 2.0), (Setting(50, "free", 0.005, seeds=50), 30.0)):
        grid = _filled(setting)
        case = "{} runs x {} tasks".format(*grid.scores.shape)
        one_by_one = [timed(case, model, limit, partial(fitting.fit, model, grid)) for model in fitting.FITS]
        yield from one_by_one
        yield Timing(case, "all models", sum(one.seconds for one in one_by_one), limit)
        if limit > 2:
            table = _table(grid)
            yield timed(case, "a whole analysis, bootstraps among it", limit, partial(analyze.analyze, table))
            continue
        for over in BOOTSTRAPS.values():
            yield timed(
                case, f"{draws} bootstrap fits over {over}", 60, partial(bootstrap.bootstrap_optimum, grid, over, draws)
            )
        for model in PARAMETRIC.values():
            what = f"{draws} parametric bootstrap fits of {model} and its null"
            yield timed(case, what, 60, partial(parametric.joint_test, grid, model, draws))


def _filled(setting: Setting) -> Grid:
    """A table of a setting as a grid, within 0..1 for `beta`."""
    return replace(empty(setting), scores=0.25 + draw(setting, 0) / 2)


def _table(grid: Grid) -> pd.DataFrame:
    wide = grid.runs.assign(**dict(zip(grid.tasks, grid.scores.T, strict=True)))
    return wide.melt(list(grid.runs), var_name="task", value_name="score").assign(metric="acc")


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--speed", "is_speed", is_flag=True, help="Measure times instead.")
@click.option("--few-runs", "is_few", is_flag=True, help="Studies of 3 to 10 runs, by the methods that lead there.")
@click.option("--these-tasks", "is_of_these", is_flag=True, help="The question about these very tasks.")
@click.option("--methods", "named", default=",".join(TABLES), show_default=True, help="Comma-separated.")
@click.option("--tasks", "counts", default="8,13,40", show_default=True, help="Numbers of tasks, comma-separated.")
@click.option("--tables", type=click.IntRange(1), help="At most so many of each setting (unset: as the report has it).")
@click.option("--processes", default=2, show_default=True)
def main(
    file: Path,
    is_speed: bool,
    is_few: bool,
    is_of_these: bool,
    named: str,
    counts: str,
    tables: int | None,
    processes: int,
) -> None:
    rows: list[dict[str, Any]] = []

    def write(lines: Iterator[Row] | Iterator[Timing]) -> None:
        for line in lines:
            print(line, flush=True)
            rows.append(line.row())
            file.write_text(json.dumps(rows, indent=2) + "\n")

    if is_speed:
        return write(speed())
    methods, tasks = named.split(","), [int(count) for count in counts.split(",")]
    if unknown := [method for method in methods if method not in TABLES]:
        raise click.UsageError(f"no method {unknown[0]}; there are {', '.join(TABLES)}")
    if is_of_these:
        tried = {method: settings_of_these(tasks) for method in methods if method in CLOSED}
    elif is_few:
        tried = {method: few_runs(method) for method in methods if method in analyze.LEADS}
    else:
        tried = {method: settings(method, tasks) for method in methods}
    apart = [
        differences(setting, method, number)
        for method, chosen in tried.items()
        if method in ESTIMATES
        for setting in chosen
        for number in range(2)
    ]
    if apart:
        print(f"closed forms and fitting.fit differ by {max(apart):.1e} at most on {len(apart)} tables")
    print(HEADER, flush=True)
    write(simulate(tried, tables, processes))


if __name__ == "__main__":
    main()
