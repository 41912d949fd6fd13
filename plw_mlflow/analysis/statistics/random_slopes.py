"""A linear mixed model of scores with a curve by task, an effect of each run, and a residual variance by task.

statsmodels has neither crossed effects at this speed nor a residual variance by task, so the model is fitted here. A
run's effect ties all tasks together. Its inverse is a rank-one correction within the run (Sherman-Morrison), and the
tasks' curves follow by Woodbury's identity, so that the likelihood with its gradient costs about runs x (3 tasks)^2
instead of (runs x tasks)^3.

Letters: `n` scores, `R` runs, `T` tasks, `P` columns of the fixed design, `Q` of the random one (1, w, w^2: 3),
`K` variance parameters. "Deviance" is -2 log-likelihood, restricted if the fit is by REML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize

from plw_mlflow.analysis.statistics.inference import Uncertainty
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array

MAX_CONDITION = 1e9  # of a design; beyond it, columns cannot be told apart
SINGULAR = 1e-6  # a variance this small beside the noise of its own estimate counts as zero
FLOOR = 1e-6  # part of a task's variance around its own curve that stays residual
FLAT = 1e-5  # curvature of the deviance below this part of the usual one is none
DECREMENT = 1e-6  # what a converged fit may still gain in deviance, by its own quadratic approximation


# --------------------------------------------------------------------------------------------- random slopes


@dataclass(frozen=True)
class _Table:
    """What the likelihood is of, in a basis in which the numbers are near 1 and the search is round."""

    scores: Array  # [R, T] less x @ offset; 0 where missing
    weights: Array  # [R, T], of mean 1; 0 where missing
    x: Array  # [R, P] orthonormal
    z: Array  # [R, Q]: a task's curves as per-task least squares shows them are one unit wide in each column
    offset: Array  # [P], coefficients by ordinary least squares
    x_basis: Array  # [P, P]: the caller's design times this is `x`
    z_basis: Array  # [Q, Q]: likewise
    by_task: bool  # a residual variance for each task
    run_effect: bool
    floor: Array  # [T] or [1], below which no residual variance goes
    start: Array  # [K], variance parameters by moments
    unit: Array  # [K], about two standard errors of each

    @cached_property
    def squares(self) -> Array:
        """[R, Q*Q], the products of each run's row of `z`."""
        return (self.z[:, :, None] * self.z[:, None, :]).reshape(len(self.z), -1)

    @cached_property
    def is_scored(self) -> Array:
        """[R, T], 1 or 0."""
        return (self.weights > 0).astype(float)

    @cached_property
    def counts(self) -> Array:
        """[T], scores of each task."""
        return self.is_scored.sum(axis=0)

    @cached_property
    def constant(self) -> float:
        """What the deviance (ML) owes to the number of scores and their weights."""
        weights = self.weights[self.weights > 0]
        return float(len(weights) * math.log(2 * math.pi) - np.log(weights).sum())

    @cached_property
    def lower(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where the entries of the Cholesky factor of a task's covariance lie."""
        return np.tril_indices(self.z.shape[1])

    def unpack(self, parameters: Array) -> tuple[Array, float, Array]:
        """Cholesky factor [Q, Q] of the curves' covariance, SD of runs (either sign), residual variances [T] or [1]."""
        entries = len(self.lower[0])
        factor = np.zeros((self.z.shape[1],) * 2)
        factor[self.lower] = parameters[:entries]
        sd_run = float(parameters[entries]) if self.run_effect else 0.0
        # A task that the run effects follow exactly has none left: the floor keeps it from dividing by 0, and the cap
        # a search gone astray from overflow.
        log_variances = np.minimum(parameters[entries + self.run_effect :], np.log(self.floor) + 35)
        return factor, sd_run, self.floor + np.exp(log_variances)


@dataclass(frozen=True)
class _Solution:
    """The best coefficients at given variance parameters, and what the deviance's derivatives need."""

    table: _Table
    factor: Array  # [Q, Q]
    sd_run: float
    var_residual: Array  # [T] or [1]
    precision: Array  # [R, T], 1 / residual variance of a score; 0 where missing
    shrink: Array  # [R], part of a run's mean that the run's own effect does not take up
    rows: Array  # [R, TQ], precision times z
    gram: Array  # [TQ, TQ], Z'A Z with A the inverse covariance without the tasks' curves
    inner_inverse: Array  # [TQ, TQ], inverse of I + (I x L)' gram (I x L)
    coefficients: Array  # [P]
    whiten: Array  # [P, P], lower: inverse Cholesky factor of X'V^-1 X
    left: Array  # [1 + P, R, T], V^-1 times the residual and times the whitened fixed design, over `precision`
    deviance: float  # by ML
    log_information: float  # log |X'V^-1 X|, which REML adds


def _times(rows: Array, factor: Array, tasks: int) -> Array:
    """rows [m, TQ] times the block-diagonal matrix of `factor`."""
    return (rows.reshape(-1, tasks, len(factor)) @ factor).reshape(len(rows), -1)


def _solve(table: _Table, parameters: Array) -> _Solution:
    """Generalised least squares and the deviance at given variance parameters."""
    factor, sd_run, var_residual = table.unpack(parameters)
    x, z, (runs, tasks), q = table.x, table.z, table.scores.shape, len(factor)
    precision = table.weights / var_residual
    total = precision.sum(axis=1)
    shrink = 1 / (1 + sd_run**2 * total)
    tie = sd_run**2 * shrink  # A = diag(precision) - tie * precision precision' within a run
    rows = (precision[:, :, None] * z[:, None, :]).reshape(runs, tasks * q)
    gram = -(rows.T * tie) @ rows
    each = np.arange(tasks)
    gram.reshape(tasks, q, tasks, q)[each, :, each, :] += (precision.T @ table.squares).reshape(tasks, q, q)
    inner = _times(_times(gram, factor, tasks).T, factor, tasks)
    inner[np.diag_indices_from(inner)] += 1
    inner_cholesky = np.linalg.cholesky(inner)
    inner_half = linalg.lapack.dtrtri(inner_cholesky, lower=1)[0]

    # Scores and fixed columns by generalised least squares on the curves. Of v, `off` is what the curves leave and
    # `sphere` what they take, and u'V^-1 v = off_u'A off_v + sphere_u'sphere_v: sums, not differences of large numbers.
    cross = (shrink[:, None] * x).T @ rows
    pulled = precision * (table.scores - (tie * (precision * table.scores).sum(axis=1))[:, None])
    sphere = _times(np.vstack([(pulled.T @ z).reshape(1, -1), cross]), factor, tasks) @ inner_half.T @ inner_half
    off = -z @ (sphere.reshape(-1, tasks, q) @ factor.T).transpose(0, 2, 1)
    off[0] += table.scores
    off[1:] += x.T[:, :, None]
    left = off - (tie * (precision * off).sum(axis=2))[:, :, None]
    products = (precision * off).reshape(len(off), -1) @ left.reshape(len(off), -1).T + sphere @ sphere.T
    information_cholesky = np.linalg.cholesky(products[1:, 1:])
    whiten = linalg.lapack.dtrtri(information_cholesky, lower=1)[0]
    coefficients = whiten.T @ (whiten @ products[1:, 0])

    # The residual, and the fixed columns made orthonormal.
    turn = np.zeros_like(products)
    turn[0] = 1, *-coefficients
    turn[1:, 1:] = whiten
    off[0] -= np.tensordot(coefficients, off[1:], 1)
    left = np.tensordot(turn, left, 1)
    sphere = turn @ sphere
    misfit = float(np.vdot(precision * off[0], left[0]) + sphere[0] @ sphere[0])
    deviance = (
        table.constant
        + float((table.counts * np.log(var_residual)).sum())
        - np.log(shrink).sum()
        + 2 * np.log(np.diag(inner_cholesky)).sum()
        + misfit
    )
    return _Solution(
        table=table,
        factor=factor,
        sd_run=sd_run,
        var_residual=var_residual,
        precision=precision,
        shrink=shrink,
        rows=rows,
        gram=gram,
        inner_inverse=inner_half.T @ inner_half,
        coefficients=coefficients,
        whiten=whiten,
        left=left,
        deviance=float(deviance),
        log_information=2 * float(np.log(np.diag(information_cholesky)).sum()),
    )


def _deviance_and_gradient(table: _Table, parameters: Array, reml: bool) -> tuple[float, Array]:
    """The deviance, and its derivative by each parameter: trace(W dV) - r'V^-1 dV V^-1 r, W = V^-1 (P for REML)."""
    s = _solve(table, parameters)
    z, (runs, tasks), q = table.z, table.scores.shape, len(s.factor)
    tie = (s.sd_run**2 * s.shrink)[:, None]
    left = s.left if reml else s.left[:1]
    solved = s.precision * left

    # The quadratic forms; for REML those of the fixed columns are part of the trace and have the same sign.
    total = solved.sum(axis=2)
    curves = (solved.transpose(0, 2, 1) @ z).reshape(-1, q)
    by_residual = -(solved * left).sum(axis=0)
    by_run = -float(np.vdot(total, total))
    # Times the factor, Z'V^-1 Z is gram (I x L) inner^-1, again without a difference of large numbers.
    pair = s.gram.reshape(tasks, q, -1), _times(s.inner_inverse, s.factor.T, tasks).reshape(tasks, q, -1)
    by_factor = 2 * (np.tensordot(*pair, axes=((0, 2), (0, 2))) - curves.T @ (curves @ s.factor))

    # The traces with V^-1 = A - A Z W Z'A, W = (I x L) inner^-1 (I x L)'.
    woodbury = _times(_times(s.inner_inverse, s.factor.T, tasks).T, s.factor.T, tasks)
    seen = s.rows @ woodbury
    own = table.squares @ np.einsum("tatb->tab", woodbury.reshape(tasks, q, tasks, q)).reshape(tasks, -1).T
    tied = (seen.reshape(runs, tasks, q) @ z[:, :, None])[:, :, 0]
    all_tied = (seen * s.rows).sum(axis=1)
    by_residual += table.is_scored - s.precision * (tie + own - 2 * tie * tied + tie**2 * all_tied[:, None])
    by_run += float((s.precision.sum(axis=1) * s.shrink - s.shrink**2 * all_tied).sum())
    by_residual = by_residual.sum(axis=0) if table.by_task else by_residual.sum(keepdims=True)[0]
    gradient = np.concatenate(
        [
            by_factor[table.lower],
            [2 * s.sd_run * by_run] * table.run_effect,
            by_residual * (1 - table.floor / s.var_residual),
        ]
    )
    return s.deviance + (s.log_information if reml else 0.0), gradient


@dataclass(frozen=True)
class RandomSlopes:
    """A fitted model score = x'coefficients + z'curve of the task + effect of the run + residual.

    Curves are N(0, cov_task), run effects N(0, var_run), residuals N(0, var_residual of the task / weight).
    """

    coefficients: Array  # [P]
    covariance: Array  # [P, P], of the coefficients, (X'V^-1 X)^-1
    cov_task: Array  # [Q, Q]
    var_run: float  # 0 without a run effect
    var_residual: Array  # [T], of a score of weight 1; all equal if one variance was asked for
    loglik: float  # restricted if fitted by REML
    reml: bool
    n: int
    parameters: int  # coefficients and variances, as lme4 counts
    at_zero: tuple[str, ...]  # "curves", "runs", "residuals": which has a variance (in some direction) of about 0
    converged: bool
    evaluations: int
    table: _Table
    search: Array  # [K], the variance parameters as they were searched

    @property
    def is_singular(self) -> bool:
        """Whether the curves' covariance or the variance of runs is zero beside residual noise, in some direction."""
        return "curves" in self.at_zero or "runs" in self.at_zero

    @cached_property
    def uncertainty(self) -> Uncertainty:
        """Of the variance parameters: their Hessian by differences of the exact gradient.

        Directions in which the deviance does not curve upwards are left out (their variance counts as 0). A variance
        at zero curves, searched as a standard deviation or an entry of a Cholesky factor, but does not change the
        coefficients' covariance to first order: so it counts as known, as in lmerTest.
        """
        unit = self.table.unit
        size = len(self.search)
        hessian = np.empty((size, size))
        for k, step in enumerate(1e-3 * np.diag(unit)):
            up, down = (_deviance_and_gradient(self.table, self.search + way * step, self.reml)[1] for way in (1, -1))
            hessian[k] = unit * (up - down) / 2e-3
        values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        inverse = np.divide(1, values, where=values > FLAT, out=np.zeros(size))
        root = unit[:, None] * vectors
        return Uncertainty(2 * (root * inverse) @ root.T, _covariance_gradient(_solve(self.table, self.search)))


def _covariance_gradient(s: _Solution) -> Array:
    """[K, P, P], derivative of the coefficients' covariance C = (X'V^-1 X)^-1: C X'V^-1 dV V^-1 X C."""
    table, left = s.table, s.left[1:]
    solved = s.precision * left
    curves = solved.transpose(0, 2, 1) @ table.z  # [P, T, Q]
    by_curve = np.einsum("ita,jtb->abij", curves, curves @ s.factor)[table.lower]
    total = solved.sum(axis=2)
    by_run = 2 * s.sd_run * (total @ total.T)[None]
    by_residual = np.einsum("irt,jrt->tij", solved, left)
    if not table.by_task:
        by_residual = by_residual.sum(axis=0, keepdims=True)
    by_residual *= (1 - table.floor / s.var_residual)[:, None, None]
    forms = [by_curve + by_curve.transpose(0, 2, 1), *([by_run] if table.run_effect else []), by_residual]
    root = s.whiten @ table.x_basis.T
    return root.T @ np.concatenate(forms) @ root


def has_run_information(scores: Array, x: Array) -> bool:
    """Whether more runs have scores of several tasks (scores [R, T], NaN where missing) than the fixed design uses up.

    Where each run is scored on one task, or the design fits each run's mean, an effect of runs cannot be estimated.
    """
    several = (~np.isnan(scores)).sum(axis=1) > 1
    return bool(several.any() and several.sum() > np.linalg.matrix_rank(x[several]))


def _check(scores: Array, x: Array, z: Array, weights: Array, run_effect: bool) -> None:
    """Raise UserError for data from which the model cannot be estimated."""
    (runs, tasks), q = scores.shape, z.shape[1]
    is_scored = ~np.isnan(scores)
    if not len(x) == len(z) == runs or weights.shape != scores.shape:
        raise UserError(
            f"scores are of {runs} runs and {tasks} tasks, but the designs have {len(x)} and {len(z)} rows "
            f"and the weights are {weights.shape}; give a row per run"
        )
    if tasks < 2:
        raise UserError("one task cannot show how curves differ between tasks; give scores of 2 or more")
    if np.isinf(scores).any():
        raise UserError("a score is infinite; mend it, or leave it out as NaN")
    if not (np.isfinite(weights) & (weights > 0))[is_scored].all():
        raise UserError("a score's weight is not a finite number above 0; mend it, or leave the score out as NaN")
    if (few := is_scored.sum(axis=0).min()) <= q:
        raise UserError(f"a task has {few} scores, too few for a curve of {q} terms and residuals; leave the task out")
    if run_effect and not has_run_information(scores, x):
        raise UserError("too few runs have scores of several tasks to tell runs apart; fit without a run effect")


def _orthonormal(design: Array, name: str) -> Array:
    """The matrix that makes a design's columns orthogonal, of mean square 1."""
    r = np.linalg.qr(design).R
    # A column's diagonal entry is the part of it that earlier columns do not explain.
    if len(r) < r.shape[1] or not (np.abs(np.diag(r)) > np.linalg.norm(r, axis=0) / MAX_CONDITION).all():
        raise UserError(f"columns of the {name} design cannot be told apart; drop one, or spread the PLWs")
    return np.linalg.inv(r) * math.sqrt(len(design))


def _tabulate(scores: Array, x: Array, z: Array, weights: Array | None, by_task: bool, run_effect: bool) -> _Table:
    """Check the data, choose the basis, and guess the variances from per-task least squares."""
    weights = np.ones(scores.shape) if weights is None else weights
    _check(scores, x, z, weights, run_effect)
    is_run = ~np.isnan(scores).all(axis=1)
    scores, x, z, weights = scores[is_run], x[is_run], z[is_run], weights[is_run]
    is_scored = ~np.isnan(scores)
    weights = np.where(is_scored, weights, 0.0)
    weights /= (weights.sum(axis=0) / is_scored.sum(axis=0)) if by_task else weights.sum() / is_scored.sum()
    x_basis, z_basis = _orthonormal(x, "fixed"), _orthonormal(z, "random")
    x, z = x @ x_basis, z @ z_basis
    tasks, q = scores.shape[1], z.shape[1]
    cells = np.where(is_scored, scores, 0.0)
    offset = np.linalg.solve((x.T * is_scored.sum(axis=1)) @ x, x.T @ cells.sum(axis=1))  # leaves smaller numbers
    cells = np.where(is_scored, cells - (x @ offset)[:, None], 0.0)

    gram = np.einsum("rt,ra,rb->tab", weights, z, z)
    if np.linalg.cond(gram).max() > MAX_CONDITION:
        raise UserError(f"a task is scored at too few PLWs for a curve of {q} terms; leave the task out")
    # A curve per task for the scores and for each fixed column, whose own effects are those of what curves leave; by
    # the ridge, none where nothing is left.
    values = np.concatenate([cells[None], is_scored * x.T[:, :, None]])  # [1 + P, R, T]
    curves = np.linalg.solve(gram, ((weights * values).transpose(0, 2, 1) @ z)[..., None])[..., 0]
    left = is_scored * (values - z @ curves.transpose(0, 2, 1))
    products = np.tensordot(weights * left, left, ((1, 2), (1, 2)))
    own = np.linalg.solve(products[1:, 1:] + 1e-10 * is_scored.sum() * np.eye(x.shape[1]), products[1:, 0])
    residual, curves = left[0] - np.tensordot(own, left[1:], 1), curves[0] - np.tensordot(own, curves[1:], 1)
    count, freedom = is_scored.sum(axis=1), is_scored.sum(axis=0) - q
    var_residual = (weights * residual**2).sum(axis=0) / freedom
    if not by_task:
        var_residual = (var_residual @ freedom / freedom.sum())[None]
    if var_residual.min() <= 1e-24 * np.nanmax(scores**2):
        raise UserError("a task's scores follow a curve exactly, so its residual variance is 0; leave the task out")
    # The spread of curves with their noise: never singular, and each direction is about as wide as its likelihood.
    noise = (np.linalg.inv(gram) * np.broadcast_to(var_residual, tasks)[:, None, None]).mean(axis=0)
    factor = np.linalg.cholesky(np.cov(curves.T, ddof=0).reshape(q, q) + noise)
    own, sd_run, run_unit = var_residual, np.zeros(0), np.zeros(0)
    if run_effect:  # the mean product of two residuals of one run
        shared = ((residual.sum(axis=1) ** 2 - (residual**2).sum(axis=1)).sum() / (count * (count - 1)).sum())[None]
        typical = np.exp(np.log(var_residual).mean())
        var_run = np.clip(shared, typical / 20, typical)
        own = np.maximum(own - var_run, own / 20)
        sd_run = np.sqrt(var_run)
        run_unit = np.sqrt((var_run + 1 / (is_scored / own).sum(axis=1).mean()) / (4 * len(x)))
    is_diagonal = np.equal(*np.tril_indices(q))
    factor_unit = 1 / np.sqrt(np.where(is_diagonal, 4, 2) * tasks)
    residual_unit = 1 / np.sqrt(is_scored.sum(axis=0) if by_task else [is_scored.sum()])
    return _Table(
        scores=cells,
        weights=weights,
        x=x,
        z=z @ factor,
        offset=offset,
        x_basis=x_basis,
        z_basis=z_basis @ factor,
        by_task=by_task,
        run_effect=run_effect,
        floor=FLOOR * var_residual,
        start=np.concatenate([is_diagonal, sd_run, np.log(own)]),
        unit=np.concatenate([factor_unit, run_unit, residual_unit]),
    )


def _translate(fit: RandomSlopes, table: _Table) -> Array:
    """The variance parameters of a fit to other scores, in a table's basis."""
    old = fit.table
    if old.z.shape[1] != table.z.shape[1] or old.scores.shape[1] != table.scores.shape[1]:
        raise UserError("the fit to start from has other tasks or other random columns; start without it")
    factor = np.linalg.solve(table.z_basis, old.z_basis @ old.unpack(fit.search)[0])
    factor = np.linalg.qr(factor.T).R.T
    sizes = np.concatenate([factor[table.lower], [math.sqrt(fit.var_run)] * table.run_effect])
    variances = fit.var_residual if table.by_task else fit.var_residual.mean(keepdims=True)
    # A search does not move a variance off zero, where the deviance is level.
    low = 0.1 * table.start[: len(sizes)]  # 0 off the Cholesky factor's diagonal
    return np.concatenate([np.where(np.abs(sizes) < low, low, sizes), np.log(np.maximum(variances, table.floor * 1e4))])


@dataclass(frozen=True)
class _Found:
    """Where a search ended."""

    parameters: Array  # [K]
    deviance: float
    decrement: float  # what another step promises
    evaluations: int


def _search(table: _Table, start: Array, reml: bool) -> _Found:
    """Minimise the deviance by steps in the table's units, in which its curvature is near 1 in every direction."""

    def objective(step: Array) -> tuple[float, Array]:
        deviance, gradient = _deviance_and_gradient(table, start + table.unit * step, reml)
        return deviance, table.unit * gradient

    end = optimize.minimize(objective, np.zeros(len(start)), jac=True, method="BFGS", options={"gtol": 1e-5})
    decrement = max(end.jac @ end.hess_inv @ end.jac, end.jac @ end.jac)
    return _Found(start + table.unit * end.x, float(end.fun), float(decrement), end.nfev)


def fit(
    scores: Array,
    x: Array,
    z: Array,
    *,
    weights: Array | None = None,
    by_task: bool = True,
    run_effect: bool = True,
    reml: bool = True,
    start: RandomSlopes | None = None,
) -> RandomSlopes:
    """Fit random curves by task and an effect by run to a table of scores, by REML or ML.

    scores: [R, T], NaN where missing. x: [R, P], the fixed design, without the curve to test it. z: [R, Q], the random
        one, 1, w, w^2 as a rule.
    weights: [R, T], residual variances are var_residual / weight, as with n of a score or 1 / stderr^2. Only their
        ratios matter: they are scaled to mean 1 within each task, or over the table if tasks share a variance.
    by_task: a residual variance for each task, else one for all (lme4's model).
    start: a fit to similar scores; there is then one search instead of three, from its variances or from those of
        per-task least squares, whichever fit better. For bootstraps.

    Raises UserError for data from which the model cannot be estimated, saying what to leave out.
    """
    scores = np.asarray(scores, float)
    table = _tabulate(scores, x, z, weights, by_task, run_effect)
    entries = len(table.lower[0])
    if start:
        guesses = table.start, _translate(start, table)
        starts = [min(guesses, key=lambda guess: _deviance_and_gradient(table, guess, reml)[0])]
    else:
        # The likelihood can have several peaks, most where the run effects follow one task: hence other starts.
        alike, tied = table.start.copy(), table.start.copy()
        alike[:entries] *= 0.1
        tied[entries : entries + run_effect] = math.exp(table.start[entries + run_effect :].mean() / 2)
        starts = [table.start, alike, *([tied] if run_effect else [])]
    minimum = min((_search(table, guess, reml) for guess in starts), key=lambda minimum: minimum.deviance)

    solution = _solve(table, minimum.parameters)
    factor = table.z_basis @ solution.factor
    root = solution.whiten @ table.x_basis.T
    var_run = solution.sd_run**2
    is_zero = {
        "curves": np.linalg.svd(solution.factor, compute_uv=False).min() ** 2 < SINGULAR,
        "runs": run_effect and var_run * solution.precision.sum(axis=1).mean() < SINGULAR,
        "residuals": (solution.var_residual < 100 * table.floor).any(),
    }
    # log |X'V^-1 X| in the caller's columns
    basis = 2 * float(np.linalg.slogdet(table.x_basis)[1]) if reml else 0.0
    p = x.shape[1]
    return RandomSlopes(
        coefficients=table.x_basis @ (table.offset + solution.coefficients),
        covariance=root.T @ root,
        cov_task=factor @ factor.T,
        var_run=var_run,
        var_residual=np.broadcast_to(solution.var_residual, scores.shape[1]).copy(),
        loglik=-(minimum.deviance - basis - p * math.log(2 * math.pi) * reml) / 2,
        reml=reml,
        n=int(table.is_scored.sum()),
        parameters=p + len(minimum.parameters),
        at_zero=tuple(part for part, is_so in is_zero.items() if is_so),
        converged=bool(minimum.decrement < DECREMENT),
        evaluations=minimum.evaluations,
        table=table,
        search=minimum.parameters,
    )
