"""What the models see of a score table: the scores as a matrix of runs by tasks, and the columns of the regression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from plw_mlflow.analysis.score_table import RUN
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import CURVE_TERMS, TERMS, Array, Transform, curve_terms


def is_of_curve(term: str) -> bool:
    """Whether a term is the curve's, or what a level of a factor adds to it."""
    return term in CURVE_TERMS or term.startswith(tuple(f"{part}:" for part in CURVE_TERMS))


@dataclass(frozen=True)
class Grid:
    """The scores of one data set (or of several, under `by`), as the models take them. R runs, T tasks, P terms."""

    dataset: str
    source: str  # for messages: where the scores are from
    transform: Transform
    scores: Array  # [R, T], NaN where missing
    weights: Array | None  # [R, T], of the scores' precision: n, or 1 / stderr^2; None where the table has neither
    runs: pd.DataFrame  # R rows: model, dataset, plw, seed
    tasks: tuple[str, ...]
    x: Array  # [R, P], the fixed part
    terms: tuple[str, ...]  # names of its columns, TERMS first
    notes: tuple[str, ...]  # what was left out
    by: str | None = None  # the column each of whose values has a curve of its own

    @cached_property
    def w(self) -> Array:
        """w_p of each run, [R]."""
        return self.transform(self.runs["plw"])

    @cached_property
    def curve(self) -> Array:
        """The random part, 1, w_p, w_p^2: [R, 3]."""
        return curve_terms(self.w)

    @cached_property
    def plws(self) -> list[float]:
        """Those tried, in order."""
        return sorted(set(self.runs["plw"]))

    @cached_property
    def steps(self) -> Array:
        """The fixed part with a column for each of `plws` in place of the curve, the levels beside them."""
        at = [(self.runs["plw"] == plw).to_numpy(float) for plw in self.plws]
        return np.column_stack([*at, self.x[:, len(TERMS) :]])

    @cached_property
    def contrasts(self) -> Array:
        """Which coefficients are the curve's, [2, P]. Raises UserError where the PLWs are too few for a curve."""
        if not {*CURVE_TERMS} <= {*self.terms}:
            plws = _numbers(self.plws)
            there = f"there is none but {plws}" if plws else "no run is scored on every task"
            raise UserError(f"a curve takes 3 PLWs, and {there}")
        return np.eye(len(self.terms))[[self.terms.index(term) for term in CURVE_TERMS]]

    @cached_property
    def long(self) -> tuple[Array, NDArray[np.intp], NDArray[np.intp]]:
        """Scores one by one: the scores [n], and the run and the task of each."""
        run, task = np.nonzero(~np.isnan(self.scores))
        return self.scores[run, task], run, task

    @cached_property
    def complete(self) -> tuple[Grid, tuple[str, ...]]:
        """The runs that have a score on every task, and what was left out for that.

        Tasks that fewer than half of the runs are scored on are left out first. Raises UserError where that leaves no
        task, and where some runs are left, but none at one of the PLWs: the rest then speaks of fewer PLWs than were
        tried.
        """
        is_scored = ~np.isnan(self.scores)
        tasks = is_scored.mean(0) >= 0.5
        runs: NDArray[np.bool_] = np.asarray(is_scored[:, tasks].all(axis=1))
        if not tasks.any():
            raise UserError("every task is scored on fewer than half of the runs; use lmm-slopes")
        left_out = self._listed(~tasks, "few runs have it")
        if gone := int((~runs).sum()):
            left_out.append(f"{gone} of {len(runs)} runs (not scored on every task)")
        if not left_out:
            return self, ()
        if runs.any() and self.lost_plws:
            raise UserError(f"no run at PLW {_numbers(self.lost_plws)} is scored on every task; use lmm-slopes")
        return self._part(runs, tasks), tuple(left_out)

    @cached_property
    def lost_plws(self) -> list[float]:
        """PLWs at which no run has a score on every task, of the tasks that at least half of the runs are scored on."""
        is_scored = ~np.isnan(self.scores)
        kept = self.runs[is_scored[:, is_scored.mean(0) >= 0.5].all(axis=1)]
        return sorted(set(self.runs["plw"]) - set(kept["plw"]))

    @cached_property
    def of_these(self) -> tuple[Grid, tuple[str, ...]]:
        """As `complete`, but where that would lose a PLW, all runs on the tasks that each of them has a score on.

        A question about these very tasks can do with fewer tasks, but not with fewer PLWs. Raises UserError where no
        task is left.
        """
        if not self.lost_plws:
            return self.complete
        tasks: NDArray[np.bool_] = np.asarray(~np.isnan(self.scores).any(axis=0))
        if not tasks.any():
            where = f"at PLW {_numbers(self.lost_plws)} " * (len(self.lost_plws) < len(set(self.runs["plw"])))
            raise UserError(f"no run {where}is scored on every task, and no task is scored on every run")
        return self._part(np.ones(len(self.runs), bool), tasks), tuple(self._listed(~tasks, "some runs lack it"))

    def _listed(self, tasks: NDArray[np.bool_], why: str) -> list[str]:
        return [f"task {name} ({why})" for name, is_listed in zip(self.tasks, tasks, strict=True) if is_listed]

    def _part(self, runs: NDArray[np.bool_], tasks: NDArray[np.bool_]) -> Grid:
        """Some runs and tasks of it."""
        kept = self.runs.loc[runs].reset_index(drop=True)
        x, terms = _columns(kept, self.transform, self._factors, self.by)
        return Grid(
            self.dataset,
            self.source,
            self.transform,
            self.scores[np.ix_(runs, tasks)],
            None if self.weights is None else self.weights[np.ix_(runs, tasks)],
            kept,
            tuple(name for name, kept in zip(self.tasks, tasks, strict=True) if kept),
            x,
            terms,
            self.notes,
            self.by,
        )

    @property
    def _factors(self) -> tuple[str, ...]:
        of_levels = [term for term in self.terms if "[" in term and not term.startswith(("w_p:", "w_p^2:"))]
        return tuple(dict.fromkeys(term.partition("[")[0] for term in of_levels))


def _numbers(plws: list[float]) -> str:
    return ", ".join(f"{plw:g}" for plw in plws)


def grid(
    table: pd.DataFrame, dataset: str, transform: Transform, *, by: str | None = None, also: tuple[str, ...] = ()
) -> Grid:
    """The scores of a checked table on one scale, as a matrix.

    by: a column of the table, each of whose values gets a curve of its own: the difference to the mean curve.
    also: columns that tell runs apart beside the table's own.

    The fixed part is the curve and, where the table has several models (or data sets, or values of `also`), what each
    adds to the mean of them; a factor with one level has no column.
    """
    keys = list(dict.fromkeys([*RUN, *([by] if by else []), *also]))
    table = table.sort_values([*RUN, "task"])
    scores = table.pivot_table(index=keys, columns="task", values="score", sort=True, dropna=True)
    runs = scores.index.to_frame(index=False)
    x, terms = _columns(runs, transform, ("model", "dataset", *also), by)
    weights, notes = None, []
    for column in ("n", "stderr"):
        if column not in table or not (given := table[column]).notna().any():
            continue
        if not (is_given := given.notna() & (given > 0)).all():
            notes.append(f"{column} is not above 0 for {(~is_given).sum()} of {len(table)} scores, so it is not used.")
        else:
            amount = given if column == "n" else 1 / given**2
            weights = table.assign(weight=amount).pivot_table(index=keys, columns="task", values="weight").to_numpy()
            weights = np.where(np.isnan(weights), 1.0, weights)
            break
    return Grid(
        dataset,
        table.attrs.get("source", "score table"),
        transform,
        scores.to_numpy(float),
        weights,
        runs,
        tuple(scores.columns),
        x,
        terms,
        tuple(notes),
        by,
    )


def _columns(
    runs: pd.DataFrame, transform: Transform, factors: tuple[str, ...], by: str | None = None
) -> tuple[Array, tuple[str, ...]]:
    """The fixed part and its columns' names; factors are coded so that the intercept is the mean of their levels."""
    w = transform(runs["plw"])
    columns, terms = [np.ones_like(w), w, w**2], list(TERMS)
    for factor in dict.fromkeys([*factors, *([by] if by else [])]):
        levels = sorted(runs[factor].unique())
        for level in levels[:-1]:
            code = (runs[factor] == level).to_numpy(float) - (runs[factor] == levels[-1]).to_numpy(float)
            columns.append(code)
            terms.append(f"{factor}[{level}]")
            if factor == by:
                columns += [code * w, code * w**2]
                terms += [f"{term}:{factor}[{level}]" for term in CURVE_TERMS]
    x = np.column_stack(columns)
    kept = [0]
    for column in range(1, x.shape[1]):  # factors may say the same (a model per data set): the first one stays
        if not x[:, column].any():
            continue
        if np.linalg.matrix_rank(x[:, [*kept, column]] / np.linalg.norm(x[:, [*kept, column]], axis=0)) > len(kept):
            kept.append(column)
    return x[:, kept], tuple(terms[column] for column in kept)


def is_close_together(x: Array) -> bool:
    """Whether the columns cannot be told apart."""
    return not math.isfinite(condition := float(np.linalg.cond(x / np.linalg.norm(x, axis=0)))) or condition > 1e9
