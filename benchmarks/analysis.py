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

Closed forms do all tables at once where there are any, and are compared with `models.fit` on some of them.

    python -m benchmarks.analysis --speed --json FILE

measures instead how long fits take, beside the limits set for two cores.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

from plw_mlflow.statistics import beta, design, mixed, models, over_tasks, questions
from plw_mlflow.statistics.design import Grid
from plw_mlflow.statistics.optimum import LEVEL

Array = NDArray[np.float64]
Found = dict[tuple[str, ...], Array]  # of each table: (test,) its p; (interval, effect, quantity) what became of it

PLWS = (0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1)  # arXiv:2401.13586v1
CURVE = np.array([0.05, -0.038])  # slope and bend on w_p that the study's short data show; vertex 0.66, PLW 0.25
EFFECTS = (1, 4)
SD_RESIDUAL = 0.01
SD_SLOPES = 0.06
TIED = -0.95  # correlation of slope and bend in the study's scores
UNEQUAL = 5.0  # largest residual SD of a task over the smallest
SEED = 1234
CHUNK = 250  # tables at a time
DRAWS = 199


# ------------------------------------------------------------------------------------------------ the tables


@dataclass(frozen=True)
class Setting:
    """What a table is drawn from."""

    tasks: int
    slopes: str = "none"  # none, free, or tied: correlated by TIED
    sd_run: float = 0.0
    unequal: bool = False  # whether tasks' residual SDs differ
    seeds: int = 1

    def __str__(self) -> str:
        words = [f"{self.tasks} tasks", f"slopes {self.slopes}", f"run SD {self.sd_run:g}"]
        words += ["unequal residuals"] * self.unequal + [f"{self.seeds} seeds"] * (self.seeds > 1)
        return ", ".join(words)

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run: model, dataset, plw, seed."""
        rows = product(("model-1", "model-2"), ("simulated",), map(float, PLWS), range(self.seeds))
        return pd.DataFrame(list(rows), columns=["model", "dataset", "plw", "seed"])


MAIN = [Setting(t, slopes, run) for t, slopes, run in product((8, 13, 40), ("none", "free"), (0.0, 0.001, 0.005))]
FURTHER = [
    Setting(t, slopes, run, unequal)
    for t, (slopes, unequal), run in product((8, 13, 40), (("tied", False), ("none", True)), (0.0, 0.001, 0.005))
]


@cache
def empty(setting: Setting) -> Grid:
    """A setting's design, without scores: [R, T] of NaN."""
    runs = setting.runs
    names = [f"task-{number:02d}" for number in range(setting.tasks)]
    table = runs.merge(pd.DataFrame({"task": names}), how="cross").assign(metric="acc", score=0.0)
    return design.grid(table, "simulated", design.transform("power", runs["plw"]))


def draw(setting: Setting, number: int) -> Array:
    """The scores of one table, [R, T], under a mean curve of nothing; the same whatever else is drawn."""
    kind = ("none", "free", "tied").index(setting.slopes)
    random = np.random.default_rng(
        [SEED, setting.tasks, kind, round(1e6 * setting.sd_run), setting.unequal, setting.seeds, number]
    )
    grid, tasks = empty(setting), setting.tasks
    level = random.random(tasks)
    correlation = TIED if setting.slopes == "tied" else 0.0
    root = np.linalg.cholesky([[1, correlation], [correlation, 1]]) * SD_SLOPES * (setting.slopes != "none")
    slopes = root @ random.normal(size=(2, tasks))
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
        """How far the slope at w, [..., B] or [..., 1], is from 0 beyond its reach; below 0 in Fieller's set."""
        ones = np.ones(np.broadcast_shapes(w.shape, (len(self.curve),)))
        return np.abs(self.curve[:, 0] + 2 * self.curve[:, 1] * w) - self.reach(np.stack([ones, 2 * w * ones], axis=-1))

    def vertex(self) -> Array:
        """[B]"""
        return -self.curve[:, 0] / (2 * self.curve[:, 1])


def _of_parts(curve: Array, parts: Sequence[tuple[Array, float]], p: dict[str, Array]) -> Estimates:
    """Estimates whose covariance is a sum of independent estimates ([B, 2, 2], degrees of freedom)."""
    flat = [(covariance.reshape(-1, 4), freedom) for covariance, freedom in parts]
    spread = sum(2 / freedom * np.einsum("bi,bj->bij", part, part) for part, freedom in flat)
    return Estimates(curve, np.sum([covariance for covariance, _ in parts], axis=0), np.asarray(spread), p)


def _hotelling(curve: Array, parts: Sequence[tuple[Array, float]]) -> Array:
    inverse = np.linalg.inv(np.sum([covariance for covariance, _ in parts], axis=0))
    spread = np.zeros(len(curve))
    for covariance, freedom in parts:
        share = covariance @ inverse
        spread += (np.einsum("bij,bji->b", share, share) + np.einsum("bii->b", share) ** 2) / freedom
    denominator = 6 / spread - 1
    statistic = np.einsum("bi,bij,bj->b", curve, inverse, curve) * denominator / (denominator + 1) / 2
    return np.asarray(stats.f.sf(statistic, 2, denominator))


def over(setting: Setting, scores: Array, runs_differ: bool) -> Estimates:
    """`crossed` and `task-t`."""
    x, tasks = empty(setting).x, setting.tasks
    hat = np.linalg.pinv(x)
    by_task = scores.transpose(0, 2, 1) @ hat.T  # [B, T, P]
    residuals = scores - x @ by_task.transpose(0, 2, 1)
    luck, free = residuals.mean(2), len(x) - x.shape[1]
    of_runs = (luck**2).sum(1) / free
    of_noise = ((residuals - luck[:, :, None]) ** 2).sum((1, 2)) / (free * (tasks - 1))
    slopes = by_task[:, :, 1:3]
    curve = slopes.mean(1)
    apart = slopes - curve[:, None]
    parts = [(apart.transpose(0, 2, 1) @ apart / (tasks * (tasks - 1)), float(tasks - 1))]
    if runs_differ:
        p = stats.f.sf(of_runs * tasks / of_noise, free, free * (tasks - 1))
        counted = np.where(p < over_tasks.COUNTED, 1.0, 0.0)[:, None, None]
        bread = (hat @ hat.T)[1:3, 1:3]
        parts += [
            (counted * of_runs[:, None, None] * bread, float(free)),
            (-counted * of_noise[:, None, None] / tasks * bread, float(free * (tasks - 1))),
        ]
    return _of_parts(curve, parts, {"T^2": _hotelling(curve, parts)})


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
    return _of_parts(curve, [(covariance, freedom)], {"F": p})


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
    return _of_parts(curve, [(covariance, freedom)], p)


def slopes(setting: Setting, scores: Array) -> Estimates:
    """`lmm-slopes`"""
    grid = empty(setting)
    found = []
    for table in scores:
        restricted = mixed.fit_random_slopes(table, grid.x, grid.curve)
        likely = mixed.fit_random_slopes(table, grid.x, grid.curve, reml=False, start=restricted)
        kept = [0, *range(3, grid.x.shape[1])]
        null = mixed.fit_random_slopes(table, grid.x[:, kept], grid.curve, reml=False, start=likely)
        gradient = restricted.uncertainty.covariance_gradient[:, 1:3, 1:3].reshape(-1, 4)
        found.append(
            (
                restricted.coefficients[1:3],
                restricted.covariance[1:3, 1:3],
                gradient.T @ restricted.uncertainty.parameter_covariance @ gradient,
                mixed.f_test(restricted, grid.contrasts)[3],
                mixed.likelihood_ratio(likely, null)[2],
            )
        )
    curve, covariance, spread, f, ratio = map(np.array, zip(*found, strict=True))
    return Estimates(curve, covariance, spread, {"F": f, "likelihood ratio": ratio})


def betas(setting: Setting, scores: Array) -> Estimates:
    """`beta`, of the middle half of 0..1, since scores outside have no likelihood."""
    grid = empty(setting)
    found = []
    for table in scores:
        y, run, task = replace(grid, scores=0.25 + table / 2).long
        fitted = beta.fit_beta(y, grid.curve[run], task)
        null = beta.fit_beta(y, grid.curve[run][:, :1], task)
        chisq = max(0.0, 2 * (fitted.loglik - null.loglik))
        found.append((fitted.coefficients[1:], fitted.covariance[1:, 1:], stats.chi2.sf(chisq, 2)))
    curve, covariance, p = map(np.array, zip(*found, strict=True))
    return Estimates(curve, covariance, np.zeros((len(curve), 4, 4)), {"likelihood ratio": p})


ESTIMATES: dict[str, Callable[[Setting, Array], Estimates]] = {
    "crossed": lambda setting, scores: over(setting, scores, runs_differ=True),
    "task-t": lambda setting, scores: over(setting, scores, runs_differ=False),
    "ols-task": ols,
    "lmm": lmm,
    "lmm-slopes": slopes,
    "beta": betas,
}

# ------------------------------------------------------------------------------------------------- the counts


def tallies(method: str, setting: Setting, first: int, last: int) -> dict[str, float]:
    """Sums over tables: rejections at 0.05 of each test, and of each interval what became of it."""
    scores = tables(setting, first, last)
    if method == "bootstrap":
        return _bootstrapped(setting, scores)
    found = ESTIMATES[method](setting, scores)
    sums = {f"type I, {test}": float((p < LEVEL).sum()) for test, p in found.p.items()}
    curve = empty(setting).curve[:, 1:]
    for effect in EFFECTS:
        there = effect * CURVE
        # No added curve just shifts logits.
        estimates = betas(setting, scores + (curve @ there)[:, None]) if method == "beta" else found.moved(there)
        vertex, true = estimates.vertex(), -there[0] / (2 * there[1])
        gradient = np.stack([-1 / (2 * estimates.curve[:, 1]), -vertex / estimates.curve[:, 1]], axis=-1)
        reach = estimates.reach(gradient)
        is_inside = (estimates.curve[:, 1] < 0) & (vertex > 0) & (vertex < 1)
        ends = np.clip([vertex - reach, vertex + reach], 0, 1)
        is_open = np.abs(estimates.curve[:, 1]) <= estimates.reach(np.array([0.0, 1.0])[None].repeat(len(vertex), 0))
        holds = estimates.excess(np.array([true])) <= 0
        sums |= {
            f"delta x{effect}, covers": float((~is_inside | (np.abs(vertex - true) <= reach)).sum()),
            f"delta x{effect}, open": float((~is_inside).sum()),
            f"delta x{effect}, width": float(np.where(is_inside, ends[1] - ends[0], 1.0).sum()),
            f"Fieller x{effect}, covers": float((is_open | holds).sum()),
            f"Fieller x{effect}, holds": float(holds.sum()),
            f"Fieller x{effect}, open": float(is_open.sum()),
        }
    return sums


def _bootstrapped(setting: Setting, scores: Array) -> dict[str, float]:
    """Percentile intervals of the best PLW of resampled tasks; an interval from end to end is open."""
    grid, sums = empty(setting), dict[str, float]()
    for effect in EFFECTS:
        there = effect * CURVE
        true, moved = -there[0] / (2 * there[1]), scores + (grid.curve[:, 1:] @ there)[:, None]
        found = [questions.bootstrap(replace(grid, scores=table), "tasks", DRAWS) for table in moved]
        low, high = np.array([grid.transform(one.interval) for one in found]).T
        sums[f"percentile x{effect}, covers"] = float(((low <= true) & (true <= high)).sum())
        sums[f"percentile x{effect}, open"] = float(((low <= 0) & (high >= 1)).sum())
        sums[f"percentile x{effect}, width"] = float((high - low).sum())
    return sums


def simulate(
    method: str, setting: Setting, count: int, chunk: Callable[..., dict[str, float]] = tallies
) -> dict[str, float]:
    """Shares of tables, of a method in a setting."""
    whole: dict[str, float] = {}
    for first in range(0, count, CHUNK):
        for name, value in chunk(method, setting, first, min(first + CHUNK, count)).items():
            whole[name] = whole.get(name, 0.0) + value / count
    return whole


def compare(setting: Setting, count: int = 5) -> float:
    """The largest relative difference of the closed forms from `models.fit`, over some tables."""
    worst = 0.0
    scores = tables(setting, 0, count)
    for method in ("crossed", "task-t", "lmm", "ols-task"):
        found = ESTIMATES[method](setting, scores)
        for number, table in enumerate(scores):
            fit = models.fit(method, replace(empty(setting), scores=table))
            theirs = [fit.coefficients["w_p"], fit.coefficients["w_p^2"], fit.covariance[1][1], fit.covariance[2][2]]
            theirs += [one.p for one in fit.joint_tests]
            ours = [*found.curve[number], *np.diag(found.covariance[number]), *(p[number] for p in found.p.values())]
            worst = max(worst, float(np.max(np.abs(np.array(ours) / theirs - 1))))
    return worst


# -------------------------------------------------------------------------------------------------- the speed


def speeds() -> Iterator[dict[str, Any]]:
    """Seconds of fits beside the limits set for them, on two cores."""
    small, large = Setting(13, "free", 0.001, seeds=3), Setting(50, "free", 0.001, seeds=50)
    for setting, limit in ((small, 2.0), (large, 30.0)):
        grid = replace(empty(setting), scores=0.25 + draw(setting, 0) / 2)
        size = f"{len(grid.scores)} runs x {setting.tasks} tasks"
        total = 0.0
        for model in models.MODELS:
            started = time.perf_counter()
            models.fit(model, grid)
            total += (seconds := time.perf_counter() - started)
            yield {"what": f"{size}, {model}", "seconds": seconds, "limit": None}
        yield {"what": f"{size}, every model", "seconds": total, "limit": limit}
    grid = replace(empty(small), scores=0.25 + draw(small, 0) / 2)
    started = time.perf_counter()
    for over_what in ("tasks", "seeds", "both"):
        questions.bootstrap(grid, over_what, 2000)
    yield {"what": "2,000 bootstrap fits of each kind", "seconds": time.perf_counter() - started, "limit": 60.0}
    start = mixed.fit_random_slopes(grid.scores, grid.x, grid.curve, reml=False)
    random = np.random.default_rng(SEED)
    started = time.perf_counter()
    for _ in range(2000):
        noise = random.normal(0, SD_RESIDUAL / 2, grid.scores.shape)
        mixed.fit_random_slopes(grid.scores + noise, grid.x, grid.curve, reml=False, start=start)
    yield {"what": "2,000 refits of lmm-slopes by ML", "seconds": time.perf_counter() - started, "limit": 60.0}


COUNTS = {"crossed": 10_000, "task-t": 10_000, "ols-task": 10_000, "lmm": 10_000, "lmm-slopes": 300, "beta": 200}
COUNTS["bootstrap"] = 500


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--methods", default=",".join(COUNTS), show_default=True)
@click.option("--tables", "count", type=int, help="Tables a setting (unset: as many as a method's cost allows).")
@click.option("--further", is_flag=True, help="Slopes that are tied to each other, and tasks of unequal noise.")
@click.option("--speed", is_flag=True, help="How long fits take, instead.")
@click.option("--processes", default=2, show_default=True)
def main(file: Path, methods: str, count: int | None, further: bool, speed: bool, processes: int) -> None:
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(
            "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )
        file.write_text(json.dumps(rows, indent=1) + "\n")

    if speed:
        for row in speeds():
            tell(row)
        return
    settings = FURTHER if further else MAIN
    print(f"closed forms differ from models.fit by {max(map(compare, settings)):.1e} at most (relative)", flush=True)
    jobs = [(method, setting, count or COUNTS[method]) for method in methods.split(",") for setting in settings]
    with ProcessPoolExecutor(processes) as pool:
        waiting = [(job, pool.submit(simulate, *job)) for job in jobs]
        for (method, setting, tables_of), future in waiting:
            shares = {name: value for name, value in future.result().items()}
            tell({"method": method, "setting": str(setting), "tables": tables_of} | shares)


if __name__ == "__main__":
    main()
