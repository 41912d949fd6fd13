"""The statistical models of one data set's scores, by name.

crossed     a curve per task, tested over tasks; runs' common luck is counted where it shows. The report leads with it.
task-t      the same without the luck: t and Hotelling's T^2 over tasks.
lmm-slopes  random intercept and curve by task, random intercept by run, residual variance by task, model effect.
lmm         random intercept by task: the first version of the study.
beta        beta family, logit link, random intercept by task, Laplace: its fourth version.
ols-task    fixed intercept by task: its draft.
fixed-tasks a fixed curve per task; the mean curve is tested by the residuals of runs' means: of these very tasks alone.

`lmm`, `beta` and `ols-task` assume that scores are independent and that PLW has the same effect on every task. Where
either is wrong, their p-values are too small; benchmarks/analysis.py measures by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from plw_mlflow.analysis.statistics import beta, fixed_tasks, inference, over_tasks, random_intercept, random_slopes
from plw_mlflow.analysis.statistics.design import Grid, is_close_together, is_of_curve
from plw_mlflow.analysis.statistics.optimum import Parabola
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array

# Degrees of freedom that runs must leave beyond the fixed part. With fewer, a run's luck cannot be told from an effect,
# and tests at 0.05 reject in more than 0.10 of the tables without one (docs/statistics.md, "Too few runs"). A test on
# one task counts luck as noise, and keeps its level with any number of runs.
MIN_FREE = 4


@dataclass(frozen=True)
class JointTest:
    """A test of the whole curve (w_p and w_p^2) against no effect of PLW."""

    test: str
    statistic: float
    df1: float
    df2: float | None  # None for chi^2
    p: float


@dataclass(frozen=True)
class Fit:
    """One statistical model of one data set's scores; a dictionary has one entry per term."""

    model: str  # the statistical model's name
    dataset: str
    scale: str  # what was done to the scores before the fit
    axis: str  # on which the curve is a parabola
    n: int  # scores
    runs: int
    tasks: int
    fewest_runs: int  # of such a study that let its tests be near the error rates they claim
    plws: list[float]  # tried, ascending: what the transform to the axis goes by, as by the next one
    prompt_odds: tuple[float, float]  # loss weight of prompts over completions, at PLW 0 and 1; (0, 1) on other axes
    coefficients: dict[str, float]  # for `beta` of the logit
    standard_errors: dict[str, float]
    degrees_of_freedom: dict[str, float | None]  # of the t tests; None where they are infinite
    p_values: dict[str, float]  # two-sided, without the intercept
    covariance: list[list[float]]  # of the coefficients, rows and columns as in `coefficients`
    centre: list[float]  # means of 1, w_p, w_p^2 over the scores: where the curve's level is the scores' own mean
    variances: dict[str, float]
    is_singular: bool
    converged: bool
    loglik: float | None  # restricted where `is_restricted`; None for fits that are not by likelihood
    is_restricted: bool
    aic: float | None  # by maximum likelihood, as is the other
    bic: float | None
    joint_tests: list[JointTest]  # the first is the model's own
    vertex_wp: float | None  # where the parabola turns, be it a maximum or not; None for a straight line
    vertex_wp_se: float | None  # delta method
    has_interior_optimum: bool  # a maximum inside 0..1, or inside the range of PLWs if that goes further
    optimum_plw: float | None  # None without an interior optimum, as is the interval by the delta method
    # 95 % set of the PLWs within the range at which the curve may have its maximum, by Fieller's method, as none, one
    # or two intervals; None where the curve bends upwards. It leads: its coverage holds where the bend is uncertain.
    optimum_set: list[list[float]] | None
    optimum_set_is_unbounded: bool  # the set goes on without end on w_p: the bend could be 0
    delta_interval: list[float] | None  # 95 %: delta method and t on w_p, cut to the range, then mapped to PLW
    interior_probability: float  # of a maximum inside the range, by what the data leave of the coefficients
    notes: list[str] = field(default_factory=list)  # what a reader must know before using the numbers

    @property
    def joint_p(self) -> float:
        """Of the model's own joint test."""
        return self.joint_tests[0].p

    @property
    def has_too_few_runs(self) -> bool:
        """Whether error rates are not near what they claim, so that nothing may be concluded."""
        return self.runs < self.fewest_runs


@dataclass(frozen=True)
class _Result:
    """What fitting a model yields, before it is interpreted."""

    grid: Grid
    terms: tuple[str, ...]
    coefficients: Array
    covariance: Array
    freedom: Callable[[Array], float]
    joint: list[JointTest]
    variances: dict[str, float]
    is_singular: bool = False
    converged: bool = True
    loglik: float | None = None
    is_restricted: bool = False
    aic_bic: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    keeps_level: bool = False  # with any number of runs, as luck is in its residuals


def fewest_runs(terms: int, tasks: int) -> int:
    """How many runs a study needs for its tests to keep near their nominal error rates; terms: of the fixed part."""
    return terms + (MIN_FREE if tasks > 1 else 1)


def fit(model: str, grid: Grid, scale: str = "none") -> Fit:
    """Fit one model. Raises UserError, in a line, where these scores do not allow it."""
    if is_close_together(grid.x):
        raise UserError("PLWs lie too close together to fit a curve")
    result = FITS[model](grid)
    return _conclude(model, result, scale)


def _over_tasks(grid: Grid, *, runs_differ: bool) -> _Result:
    whole, left_out = grid.complete
    if len(whole.scores) == 0:
        raise UserError("no run is scored on every task; use lmm-slopes")
    if len(whole.tasks) < 4:
        few = "" if len(whole.tasks) == len(grid.tasks) else " that at least half of the runs are scored on"
        raise UserError(f"a joint test over tasks needs 4 tasks or more, there {_counted(len(whole.tasks))}{few}")
    if len(set(whole.runs["plw"])) < 3:
        raise UserError("the runs scored on every task have fewer than 3 PLWs; use lmm-slopes")
    curves = over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=runs_differ)
    joint = hotelling(curves)
    notes = [f"Left out: {', '.join(left_out)}."] if left_out else []
    if curves.counts_runs:
        notes.append("Runs seem to differ by more than their tasks' noise, which is counted.")
    elif curves.deducts:
        notes.append("Runs differ by less than their tasks' noise would make them, which is deducted in part.")
    elif runs_differ:
        notes.append("Runs do not clearly differ by more than their tasks' noise, so that is not counted.")
    return _Result(
        whole,
        whole.terms,
        curves.coefficients,
        curves.covariance,
        lambda contrast: float(curves.degrees_of_freedom(contrast)),
        [joint],
        {f"task {term}": float(curves.between[i, i]) for i, term in enumerate(whole.terms[:3])}
        | {"run": max(0.0, float(curves.var_run)), "residual": float(curves.of_noise)},
        notes=tuple(notes),
    )


def hotelling(curves: over_tasks.MeanCurve) -> JointTest:
    """The joint test over tasks, of one table. Raises UserError as it does."""
    f, df1, df2, p = curves.joint_test()
    return JointTest("Hotelling's T^2 over tasks", float(f), df1, float(df2), float(p))


def _slopes(grid: Grid) -> _Result:
    if len(grid.tasks) < 4:
        raise UserError(f"random slopes by task need 4 tasks or more, there {_counted(len(grid.tasks))}")
    has_runs = random_slopes.has_run_information(grid.scores, grid.x)
    settings: dict[str, Any] = {"weights": grid.weights, "run_effect": has_runs}
    restricted = random_slopes.fit(grid.scores, grid.x, grid.curve, **settings)
    likely = random_slopes.fit(grid.scores, grid.x, grid.curve, reml=False, start=restricted, **settings)
    kept = [i for i, term in enumerate(grid.terms) if not is_of_curve(term)]
    null = random_slopes.fit(grid.scores, grid.x[:, kept], grid.curve, reml=False, start=likely, **settings)
    f, df1, df2, p = inference.f_test(restricted, grid.contrasts)
    chisq, df, lrt_p = inference.likelihood_ratio(likely, null)
    notes = [] if grid.runs["model"].nunique() > 1 else ["One model, so there is no effect of models."]
    notes += [] if has_runs else ["No effect of runs: these scores cannot tell it from the rest."]
    notes += [f"At zero: the variance of {part}." for part in restricted.at_zero]
    variances = {f"task {term}": float(restricted.cov_task[i, i]) for i, term in enumerate(grid.terms[:3])}
    variances |= {"run": restricted.var_run, "residual": float(np.mean(restricted.var_residual))}
    variances |= {f"residual {task}": float(v) for task, v in zip(grid.tasks, restricted.var_residual, strict=True)}
    return _Result(
        grid,
        grid.terms,
        restricted.coefficients,
        restricted.covariance,
        partial(inference.satterthwaite, restricted),
        [
            JointTest("F, Satterthwaite", f, df1, df2, p),
            JointTest("likelihood ratio", chisq, df, None, lrt_p),
        ],
        variances,
        is_singular=restricted.is_singular,
        converged=restricted.converged and likely.converged and null.converged,
        loglik=restricted.loglik,
        is_restricted=True,
        aic_bic=inference.aic_bic(likely),
        notes=tuple(notes),
    )


def _intercepts(grid: Grid) -> _Result:
    y, run, task = grid.long
    _need_tasks(grid)
    x, terms = grid.curve[run], grid.terms[:3]
    _need_residuals(y, x, task)
    restricted = random_intercept.fit(y, x, task)
    likely = random_intercept.fit(y, x, task, reml=False)
    null = random_intercept.fit(y, x[:, :1], task, reml=False)
    chisq, df, p = inference.likelihood_ratio(likely, null)
    f, df1, df2, f_p = inference.f_test(restricted, np.eye(3)[1:])
    return _Result(
        grid,
        terms,
        restricted.coefficients,
        restricted.covariance,
        partial(inference.satterthwaite, restricted),
        [JointTest("likelihood ratio", chisq, df, None, p), JointTest("F, Satterthwaite", f, df1, df2, f_p)],
        {"task intercept": restricted.var_group, "residual": restricted.var_residual},
        is_singular=restricted.is_singular,
        loglik=restricted.loglik,
        is_restricted=True,
        aic_bic=inference.aic_bic(likely),
    )


def _beta(grid: Grid) -> _Result:
    y, run, task = grid.long
    _need_tasks(grid)
    x, terms = grid.curve[run], grid.terms[:3]
    _need_residuals(y, x, task)
    _need_fractions(grid)
    fitted = beta.fit(y, x, task)
    null = beta.fit(y, x[:, :1], task)
    if not (np.isfinite(fitted.covariance).all() and math.isfinite(null.loglik)):
        raise UserError("the fit did not converge")
    chisq = max(0.0, 2 * (fitted.loglik - null.loglik))
    parameters = x.shape[1] + 2
    return _Result(
        grid,
        terms,
        fitted.coefficients,
        fitted.covariance,
        lambda _: math.inf,
        [JointTest("likelihood ratio", chisq, 2, None, float(stats.chi2.sf(chisq, 2)))],
        {"task intercept": fitted.var_group, "phi": fitted.phi},
        is_singular=fitted.var_group == 0,
        converged=fitted.converged and null.converged,
        loglik=fitted.loglik,
        aic_bic=(2 * (parameters - fitted.loglik), parameters * math.log(len(y)) - 2 * fitted.loglik),
        notes=("Coefficients are of the logit.",),
    )


def _ols(grid: Grid) -> _Result:
    y, run, task = grid.long
    tasks = len(grid.tasks)
    dummies = (task[:, None] == np.arange(tasks - 1)).astype(float) - (task == tasks - 1)[:, None]
    x = np.column_stack([grid.x[run], dummies])
    n, p = x.shape
    if n <= p:
        raise UserError(f"{n} scores are too few for {p} coefficients and a residual; score more cells")
    _need_residuals(y, grid.curve[run], task)
    q, r = np.linalg.qr(x)
    coefficients = np.linalg.solve(r, q.T @ y)
    residual = y - x @ coefficients
    variance = float(residual @ residual) / (n - p)
    inverse = np.linalg.inv(r)
    kept = len(grid.terms)
    covariance = (variance * inverse @ inverse.T)[:kept, :kept]
    curve = grid.contrasts @ coefficients[:kept]
    f = float(curve @ np.linalg.solve(grid.contrasts @ covariance @ grid.contrasts.T, curve)) / 2
    loglik = -n / 2 * (1 + math.log(2 * math.pi * variance * (n - p) / n))
    return _Result(
        grid,
        grid.terms,
        coefficients[:kept],
        covariance,
        lambda _: float(n - p),
        [JointTest("F", f, 2, n - p, float(stats.f.sf(f, 2, n - p)))],
        {"residual": variance},
        loglik=loglik,
        aic_bic=(2 * (p + 1 - loglik), (p + 1) * math.log(n) - 2 * loglik),
    )


def _fixed(grid: Grid) -> _Result:
    whole, left_out = grid.of_these
    means = fixed_tasks.fit(whole.scores, whole.x, whole.contrasts)
    f, df1, df2, p = means.joint_test()
    return _Result(
        whole,
        whole.terms,
        means.coefficients,
        means.covariance,
        lambda _: float(means.free),
        [JointTest("F of runs' means", float(f), df1, df2, float(p))],
        {"residual of a run's mean": float(means.variance)},
        notes=(f"Left out: {', '.join(left_out)}.",) if left_out else (),
        keeps_level=True,
    )


FITS: dict[str, Callable[[Grid], _Result]] = {
    "crossed": partial(_over_tasks, runs_differ=True),
    "task-t": partial(_over_tasks, runs_differ=False),
    "lmm-slopes": _slopes,
    "lmm": _intercepts,
    "beta": _beta,
    "ols-task": _ols,
    "fixed-tasks": _fixed,
}


def _counted(tasks: int) -> str:
    return f"{'is' if tasks == 1 else 'are'} {tasks}"


def _need_tasks(grid: Grid) -> None:
    if len(grid.tasks) < 2:
        raise UserError(f"it has only the task {grid.tasks[0]}; a variance over tasks needs 2 or more")
    n = int((~np.isnan(grid.scores)).sum())
    if n - len(grid.tasks) - 2 < 1:
        raise UserError(f"{n} scores for {len(grid.tasks)} tasks are too few for a curve; score more cells")


def _need_fractions(grid: Grid) -> None:
    """Raise UserError that names the first score which the beta family does not have, and what helps."""
    y, run, task = grid.long
    if (is_outside := ~((y > 0) & (y < 1))).any():
        at = int(np.argmax(is_outside))
        of = grid.runs.loc[run[at]]
        way_out = "--scale fraction divides scores of 0..100 by 100" if y[at] > 1 else "the other models take it"
        raise UserError(
            f"score {y[at]:g} of task {grid.tasks[task[at]]} at PLW {of['plw']:g}, seed {of['seed']} is not strictly "
            f"between 0 and 1, and the beta family has no other; {way_out}"
        )


def _need_residuals(y: Array, x: Array, task: NDArray[np.intp]) -> None:
    def centred(columns: Array) -> Array:
        return columns - random_intercept.group_means(columns, task)[task]

    rise, deviation = centred(x[:, 1:]), centred(y[:, None])[:, 0]
    residual = deviation - rise @ np.linalg.lstsq(rise, deviation)[0]
    if np.abs(residual).max() <= 1e-12 * np.abs(y).max():
        raise UserError("scores follow a curve exactly; without residuals nothing can be tested, check the scores")


def _conclude(model: str, result: _Result, scale: str) -> Fit:
    """The fit with its optimum, its tests, and notes on what a reader must know."""
    grid, b, v = result.grid, result.coefficients, result.covariance
    errors = np.sqrt(np.diag(v))
    freedoms = [result.freedom(row) for row in np.eye(len(b))]
    p = np.array([2 * stats.t.sf(abs(t), freedom) for t, freedom in zip(b / errors, freedoms, strict=True)])
    low, high = grid.transform.ends
    parabola = Parabola(float(b[1]), float(b[2]), v[1:3, 1:3], lambda c: result.freedom(_widen(c, len(b))), low, high)
    error = parabola.vertex_error()
    optimum = interval = None
    notes = list(grid.notes) + list(result.notes)
    if grid.scores[~np.isnan(grid.scores)].min() < 0 and scale in ("none", "fraction"):
        notes.append("Some scores are negative, so on neither scale 0..1 nor 0..100; they were fitted as they are.")
    if result.is_singular and "At zero" not in " ".join(notes):
        notes.append("Singular fit: tasks differ no more than residual noise.")
    if not result.converged:
        notes.append("The fit did not converge; do not use it.")
    if parabola.has_interior_maximum and parabola.vertex is not None:
        reach = parabola.delta_interval()
        assert reach is not None
        ends = np.clip(reach, low, high)
        optimum, interval = float(grid.transform.back(parabola.vertex)), grid.transform.back(ends).tolist()
        if not grid.w.min() <= parabola.vertex <= grid.w.max():
            tried = grid.plws
            notes.append(f"The optimum lies outside the PLWs tried ({tried[0]:g} to {tried[-1]:g}).")
    elif b[2] >= 0:
        notes.append("The curve does not bend downwards, so it has no maximum inside the range.")
    else:
        notes.append(f"The curve {'falls' if (parabola.vertex or 0) <= low else 'rises'} over the whole range of PLW.")
    pairs, is_unbounded = parabola.fieller_set()
    if optimum is not None and is_unbounded:
        notes.append("The bend could be none, and the optimum then anywhere: these scores do not locate it.")
    assert np.isfinite([*b, *errors]).all()
    return Fit(
        model=model,
        dataset=grid.dataset,
        scale=scale,
        axis=grid.transform.name,
        n=int((~np.isnan(grid.scores)).sum()),
        runs=len(grid.scores),
        tasks=len(grid.tasks),
        fewest_runs=fewest_runs(len(grid.terms), 1 if result.keeps_level else len(grid.tasks)),
        plws=list(grid.transform.plws),
        prompt_odds=grid.transform.prompt_odds,
        coefficients=dict(zip(result.terms, b.tolist(), strict=True)),
        standard_errors=dict(zip(result.terms, errors.tolist(), strict=True)),
        degrees_of_freedom={
            term: freedom if math.isfinite(freedom) else None
            for term, freedom in zip(result.terms, freedoms, strict=True)
        },
        p_values=dict(zip(result.terms[1:], p[1:].tolist(), strict=True)),
        covariance=v.tolist(),
        centre=grid.curve[grid.long[1]].mean(0).tolist(),
        variances=result.variances,
        is_singular=result.is_singular,
        converged=result.converged,
        loglik=result.loglik,
        is_restricted=result.is_restricted,
        aic=result.aic_bic[0] if result.aic_bic else None,
        bic=result.aic_bic[1] if result.aic_bic else None,
        joint_tests=result.joint,
        vertex_wp=parabola.vertex,
        vertex_wp_se=None if error is None else error[0],
        has_interior_optimum=optimum is not None,
        optimum_plw=optimum,
        optimum_set=[grid.transform.back(pair).tolist() for pair in pairs] if b[2] < 0 else None,
        optimum_set_is_unbounded=is_unbounded,
        delta_interval=interval,
        interior_probability=parabola.interior_probability(),
        notes=notes,
    )


def _widen(contrast: Array, size: int) -> Array:
    """A contrast of slope and bend as one of all coefficients."""
    whole = np.zeros(size)
    whole[1:3] = contrast
    return whole
