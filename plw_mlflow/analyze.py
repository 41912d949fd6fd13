"""From a table of scores to what it says about PLW: does it matter, which value is best, how sure is that.

Scores are fitted per data set against `w_p = PLW^0.30103`, on which the study's scores are a parabola. The mixed
model is fitted here rather than by statsmodels, whose intercept is off by 1e-3; for a random intercept the
likelihood has a closed form in the variance ratio, so the fit is one search in one number and equals lme4's.
A slip of scales (BLEU in 0..100 beside accuracies in 0..1) changes every answer, so it is refused, not guessed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from plw_mlflow.mixed import fit_random_intercept, group_means

# log10(2) in the rounding of arXiv:2401.13586v1, section 4, chosen there so that PLW 0.1 becomes w_p 0.5.
EXPONENT = 0.30103
LEVEL = 0.05  # of every test; intervals are at 1 - LEVEL
SCHEMA = "plw_mlflow.fit/1"
MIN_PLWS = 3  # that a parabola can be fitted to

NAMES = ["model", "dataset", "task", "metric"]
COLUMNS = ["model", "dataset", "plw", "seed", "task", "metric", "score"]
SCORE = ["model", "dataset", "plw", "seed", "task"]  # what one score is of
SCALES = ("none", "fraction")
TERMS = ("intercept", "w_p", "w_p^2")


@dataclass(frozen=True)
class Fit:
    """One statistical model of one data set's scores; a dictionary has one entry per term of the curve."""

    model: str  # the statistical model's name, "lmm"
    dataset: str
    scale: str  # what was done to the scores before the fit
    n: int  # scores
    tasks: int
    plws: list[float]  # distinct, ascending
    coefficients: dict[str, float]
    standard_errors: dict[str, float]
    p_values: dict[str, float]  # two-sided, without the intercept
    degrees_of_freedom: int  # of those tests and of the interval
    covariance: list[list[float]]  # of the coefficients, rows and columns as in `coefficients`
    var_task: float  # between tasks; 0 when the fit is singular
    var_residual: float
    is_singular: bool
    loglik: float  # restricted (REML)
    joint_chisq: float  # likelihood ratio, by ML, of the curve against no effect of PLW; 2 degrees of freedom
    joint_p: float
    vertex_wp: float | None  # where the parabola turns, be it a maximum or not; None for a straight line
    vertex_wp_se: float | None  # delta method
    has_interior_optimum: bool  # a maximum inside 0..1, or inside the range of PLWs if that goes further
    optimum_plw: float | None  # None without an interior optimum, as is the interval
    optimum_interval: list[float] | None  # 95 %: delta method and t on w_p, cut to the range, then mapped to PLW
    notes: list[str]  # what a reader must know before using the numbers

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        b1, b2 = self.coefficients["w_p"], self.coefficients["w_p^2"]
        matters = self.joint_p < LEVEL
        lead = f"{'PLW matters here' if matters else 'No significant effect of PLW'} (p = {self.joint_p:.2g})"
        if self.optimum_plw is not None and self.optimum_interval is not None:
            low, high = self.optimum_interval
            where = f"PLW {self.optimum_plw:.3g} (95 % interval {low:.3g} to {high:.3g})"
            return f"{lead}: scores peak at {where}." if matters else f"{lead}; the peak at {where} may be chance."
        ends = {plw: b1 * w_p(plw) + b2 * w_p(plw) ** 2 for plw in (self.plws[0], self.plws[-1])}
        end = f"the curve is highest at PLW {max(ends, key=lambda plw: ends[plw]):.3g}, an end of the range tried"
        return f"{lead}: no interior optimum; {end}." if matters else f"{lead}, and no interior optimum."


def w_p(plw: float) -> float:
    """The study's transform of a PLW."""
    return float(plw**EXPONENT)


# ------------------------------------------------------------------------------------------------ the table


def read_scores(path: Path) -> pd.DataFrame:
    """Read a score table from CSV, checked; each row is labelled by its line in the file, the header being line 1."""
    try:
        data = Path(path).read_bytes()
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), skipinitialspace=True, strict=True)
        lines = [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give --scores a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error}); save it as one") from None
    if not lines:
        raise ValueError(f"{path}: empty; a score table has the columns {','.join(COLUMNS)}")
    (_, header), *rows = lines
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, row {line}: {len(row)} fields, but the header has {len(header)}; mend the row")
    table = pd.DataFrame([row for _, row in rows], columns=header, index=[line for line, _ in rows])
    table.attrs = {"source": str(path), "file_sha256": hashlib.sha256(data).hexdigest()}
    return check(table)


def first(mask: Any) -> Any:
    """The label of the first row of which a mask holds."""
    return mask.index[np.argmax(mask)]


def check(table: pd.DataFrame) -> pd.DataFrame:
    """A copy of a score table with columns typed, or a ValueError that names its first fault and the row's label."""
    source = table.attrs.get("source", "score table")

    def refuse(bad: Any, column: str, demand: str) -> None:
        if bad.any():
            row = first(bad)
            raise ValueError(f"{source}, row {row}: {column} is {str(table[column][row])!r}, {demand}")

    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{source}: no column {', '.join(missing)}; a score table has {','.join(COLUMNS)}")
    if not table.columns.is_unique:
        raise ValueError(f"{source}: column {table.columns[table.columns.duplicated()][0]} occurs twice; keep one")
    if table.empty:
        raise ValueError(f"{source}: holds no scores; run evaluate first, or give another table")
    if not table.index.is_unique:  # row labels name a fault, so each must mean one row
        table = table.reset_index(drop=True)
    typed = table.copy()
    for column in NAMES:
        refuse(table[column].isna() | (table[column].astype(str).str.strip() == ""), column, "a name is needed")
        typed[column] = table[column].astype(str)
    for column in ["plw", "seed", "score", *(column for column in ("stderr", "n") if column in table)]:
        numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
        is_blank = table[column].isna() | (table[column].astype(str).str.strip() == "")
        is_optional = column in ("stderr", "n")
        refuse(~np.isfinite(numbers) & ~(is_blank & is_optional), column, "but must be a finite number; mend the row")
        refuse(numbers.abs() > 1e12, column, "too large to be one; mend the row")
        if column != "score":
            refuse(numbers < 0, column, "but must be 0 or more; mend the row")
        typed[column] = numbers
    refuse(typed["seed"] % 1 != 0, "seed", "but must be a whole number; mend the row")
    typed["seed"] = typed["seed"].astype("int64")

    for task, metrics in typed.groupby("task")["metric"].unique().items():
        if len(metrics) > 1:
            both = " and ".join(sorted(metrics))
            raise ValueError(f"{source}: task {task} has the metrics {both}; choose one metric per task, drop the rest")
    if (again := typed.duplicated(SCORE)).any():
        row = first(again)
        same = typed.groupby(SCORE).ngroup()
        earlier = first(same == same[row])
        raise ValueError(f"{source}, row {row}: scores the same {', '.join(SCORE)} as row {earlier}; keep one of them")
    for dataset, part in typed.groupby("dataset"):
        where = f"{source}: data set {dataset}"
        if part["task"].nunique() < 2:
            raise ValueError(f"{where} has only the task {part['task'].iloc[0]}; a fit over tasks needs 2 or more")
        if (plws := part["plw"].nunique()) < MIN_PLWS:
            raise ValueError(f"{where} has {plws} distinct PLW{'s' * (plws > 1)}; a curve needs {MIN_PLWS} or more")
        if part.groupby("task")["score"].nunique().max() == 1:
            raise ValueError(f"{where} has constant scores within every task, nothing to fit; check the evaluation")
    return typed


def fittable(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The data sets of a table that have PLWs enough for a curve, and the names of the others.

    For tables gathered from many runs, where one stray cell must not spoil the rest. If none has enough, all are
    kept, for `check` to say so.
    """
    plws = table.groupby("dataset")["plw"].nunique()
    thin = sorted(plws.index[plws < MIN_PLWS])
    if len(thin) == len(plws):
        return table, []
    kept = table[~table["dataset"].isin(thin)]
    kept.attrs = table.attrs
    return kept, thin


def rescale(table: pd.DataFrame, scale: str) -> pd.DataFrame:
    """A checked table with its scores on one scale.

    `none` leaves them alone but refuses scores above 1 beside scores in 0..1 (0 itself may be either). Negative scores
    say that the table is on neither scale (z-scores, log-likelihoods), so nothing is refused and the fit notes it.
    `fraction` divides by 100 the tasks that have scores above 1. A task with scores on both sides of 1 could be
    low percentages or a mix of units, which no rule can tell apart, so it is always refused.
    """
    source = table.attrs.get("source", "score table")
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, but must be one of {', '.join(SCALES)}")
    above, within = table["score"] > 1, table["score"].between(0, 1, inclusive="right")
    if not above.any() or (scale == "none" and (table["score"] < 0).any()):
        return table
    for task, rows in table.groupby("task")["score"]:
        if above[rows.index].any() and within[rows.index].any():
            low, high = first(within[rows.index]), first(above[rows.index])
            raise ValueError(
                f"{source}, row {high}: task {task} scores {rows[high]:g} here but {rows[low]:g} in row {low}, "
                "so its scale is not clear; write all its scores as fractions"
            )
    if scale == "none":
        if within.any():
            high, low = first(above), first(within)
            raise ValueError(
                f"{source}, row {high}: {table['task'][high]} scores {table['score'][high]:g} beside "
                f"{table['score'][low]:g} of {table['task'][low]} in row {low}; scales are mixed (0..100 beside 0..1): "
                "give --scale fraction to divide by 100 the tasks that exceed 1"
            )
        return table
    if (table["score"] > 100).any():
        row = first(table["score"] > 100)
        raise ValueError(f"{source}, row {row}: score {table['score'][row]:g} is no percentage; rescale it yourself")
    is_percent = table["task"].isin(table["task"][above])
    scaled = [column for column in ("score", "stderr") if column in table]
    rescaled = table.copy()
    rescaled[scaled] = table[scaled].where(~is_percent, table[scaled] / 100)
    return rescaled


def missing_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The scores a full grid of the table's models, data sets, PLWs, seeds and tasks would have and it has not."""
    grid = pd.MultiIndex.from_product([sorted(table[column].unique()) for column in SCORE], names=SCORE)
    return grid.difference(pd.MultiIndex.from_frame(table[SCORE])).to_frame(index=False)


# ---------------------------------------------------------------------------------------------- the fit


def lmm(table: pd.DataFrame, scale: str = "none") -> Fit:
    """Fit score ~ w_p + w_p^2 + (1 | task) by REML to the scores of one data set (checked, and on one scale).

    p-values and the interval use t with n - tasks - 2 degrees of freedom, those of the scores within tasks. This gives
    the p1 and p2 of lme4's reference rows to all their digits (the normal, or n - 3, does not), as it equals
    Satterthwaite's number when every task is scored at the same cells.
    """
    dataset, source = table["dataset"].iloc[0], table.attrs.get("source", "score table")
    where = f"{source}: data set {dataset}"
    table = table.sort_values(SCORE)  # sums then round alike whatever the order of rows
    y, w = table["score"].to_numpy(float), table["plw"].to_numpy(float) ** EXPONENT
    x = np.column_stack([np.ones_like(w), w, w**2])
    task, names = pd.factorize(table["task"])
    n, tasks, plws = len(y), len(names), sorted(set(table["plw"].tolist()))
    freedom = n - tasks - 2
    if freedom < 1:
        raise ValueError(f"{where} has {n} scores for {tasks} tasks, too few for a curve; score more cells")
    if np.linalg.cond(x / np.linalg.norm(x, axis=0)) > 1e9:
        raise ValueError(f"{where}: PLWs {plws[0]:g} to {plws[-1]:g} lie too close together to fit a curve")
    deviations = x[:, 1:] - group_means(x[:, 1:], task)[task], y - group_means(y[:, None], task)[task, 0]
    residual = deviations[1] - deviations[0] @ np.linalg.lstsq(*deviations)[0]
    if np.abs(residual).max() <= 1e-12 * np.abs(y).max():
        raise ValueError(f"{where} follows a curve exactly; without residuals nothing can be tested, check the scores")

    fit = fit_random_intercept(y, x, task)
    full, null = fit_random_intercept(y, x, task, reml=False), fit_random_intercept(y, x[:, :1], task, reml=False)
    chisq = max(0.0, 2 * (full.loglik - null.loglik))
    b, v = fit.coefficients, fit.covariance
    se = np.sqrt(np.diag(v))
    assert np.isfinite([*b, *se, fit.loglik]).all()

    top = max(1.0, w.max())
    vertex = vertex_se = optimum = interval = None
    if b[2] != 0:
        vertex = float(-b[1] / (2 * b[2]))
        slope = np.array([0, -1 / (2 * b[2]), b[1] / (2 * b[2] ** 2)])
        vertex_se = float(np.sqrt(slope @ v @ slope))
        if b[2] < 0 and 0 < vertex < top:
            reach = stats.t.ppf(1 - LEVEL / 2, freedom) * vertex_se
            ends = np.clip([vertex - reach, vertex + reach], 0, top)
            optimum, interval = vertex ** (1 / EXPONENT), (ends ** (1 / EXPONENT)).tolist()

    notes = []
    if y.min() < 0:
        notes.append("Some scores are negative, so on neither scale 0..1 nor 0..100; they were fitted as they are.")
    if is_singular := fit.var_group == 0:
        notes.append("Singular fit: tasks differ no more than residual noise, so this is ordinary least squares.")
    if b[2] >= 0:
        notes.append("The curve does not bend downwards, so it has no maximum inside the range.")
    elif vertex is not None and optimum is None:
        notes.append(f"The curve {'falls' if vertex <= 0 else 'rises'} over the whole range of PLW.")
    if vertex is not None and interval is not None:
        if interval[0] == 0 and ends[1] == top:
            notes.append("The optimum's interval covers the whole range: these scores do not locate it.")
        if not w.min() <= vertex <= w.max():
            notes.append(f"The optimum lies outside the PLWs tried ({plws[0]:g} to {plws[-1]:g}).")
    named = dict(zip(TERMS[1:], (2 * stats.t.sf(np.abs(b / se), freedom))[1:].tolist(), strict=True))
    return Fit(
        model="lmm",
        dataset=dataset,
        scale=scale,
        n=n,
        tasks=tasks,
        plws=plws,
        coefficients=dict(zip(TERMS, b.tolist(), strict=True)),
        standard_errors=dict(zip(TERMS, se.tolist(), strict=True)),
        p_values=named,
        degrees_of_freedom=freedom,
        covariance=v.tolist(),
        var_task=float(fit.var_group),
        var_residual=float(fit.var_residual),
        is_singular=is_singular,
        loglik=fit.loglik,
        joint_chisq=chisq,
        joint_p=float(stats.chi2.sf(chisq, 2)),
        vertex_wp=vertex,
        vertex_wp_se=vertex_se,
        has_interior_optimum=optimum is not None,
        optimum_plw=optimum,
        optimum_interval=interval,
        notes=notes,
    )


def analyze(table: pd.DataFrame, scale: str = "none") -> list[Fit]:
    """Check the table, bring it to one scale, and fit every data set."""
    scaled = rescale(check(table), scale)
    return [lmm(part, scale) for _, part in scaled.groupby("dataset")]


# ------------------------------------------------------------------------------------------- what it leaves


def to_json(fits: list[Fit], table: pd.DataFrame) -> dict[str, Any]:
    """What `fit.json` holds: every fit unrounded, and which scores it came from.

    `table.sha256` is of the sorted columns of the contract, so equal scores have it whatever their order or file.
    """
    table = check(table)
    canonical = table[COLUMNS].sort_values(SCORE).to_csv(index=False, lineterminator="\n")
    return {
        "schema": SCHEMA,
        "exponent": EXPONENT,
        "table": {
            "source": table.attrs.get("source"),
            "file_sha256": table.attrs.get("file_sha256"),
            "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "rows": len(table),
            "missing": missing_scores(table).to_dict("records"),
        },
        "fits": [{**asdict(fit), "verdict": fit.verdict} for fit in fits],
    }


def predict(fit_json: dict[str, Any], dataset: str, plw: float, model: str = "lmm") -> float:
    """The score a data set's curve gives at a PLW, for the mean of its tasks, on the scale of the fit."""
    if not (math.isfinite(plw) and plw >= 0):
        raise ValueError(f"plw must be 0 or more, got {plw}")
    fits = {fit["dataset"]: fit for fit in fit_json["fits"] if fit["model"] == model}
    if dataset not in fits:
        raise ValueError(f"no {model} fit of data set {dataset!r}; there are {', '.join(sorted(fits)) or 'none'}")
    b0, b1, b2 = (fits[dataset]["coefficients"][term] for term in TERMS)
    return float(b0 + b1 * w_p(plw) + b2 * w_p(plw) ** 2)


class Regression:
    """A fit as a model: what MLflow loads as the registered model plw-regression."""

    def __init__(self, fit_json: dict[str, Any]) -> None:
        self.fit_json = fit_json

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        """Columns dataset and plw in; score and optimum_plw (NaN without an interior optimum) out, a row each."""
        optimum = {fit["dataset"]: fit["optimum_plw"] for fit in self.fit_json["fits"] if fit["model"] == "lmm"}
        rows = zip(table["dataset"], table["plw"], strict=True)
        scores = [predict(self.fit_json, dataset, plw) for dataset, plw in rows]
        optima = [math.nan if optimum[name] is None else optimum[name] for name in table["dataset"]]
        return pd.DataFrame({"score": scores, "optimum_plw": optima}, index=table.index)


def _load_pyfunc(path: str) -> Regression:
    """MLflow's hook by which its pyfunc flavour loads a fit.json (`loader_module`), without a pickle."""
    return Regression(json.loads(Path(path).read_text()))


def table_text(fits: list[Fit]) -> str:
    """The fits as the terminal shows them: a line per fit, then its answer in words."""
    width = max(8, *(len(fit.dataset) for fit in fits))
    terms = "  ".join(f"{f'{term} (SE)':19}  {'p':7}" for term in TERMS[1:])
    lines = [f"{'data set':{width}}  model    n  tasks   {terms}  joint p  optimum PLW"]
    for fit in fits:
        terms = "  ".join(
            f"{f'{fit.coefficients[term]:+.4g} ({fit.standard_errors[term]:.2g})':19}  {fit.p_values[term]:<7.2g}"
            for term in TERMS[1:]
        )
        optimum = "no interior optimum" if fit.optimum_plw is None else f"{fit.optimum_plw:.4f}"
        lines.append(
            f"{fit.dataset:{width}}  {fit.model:5} {fit.n:4}  {fit.tasks:5}   {terms}  {fit.joint_p:<7.2g}  {optimum}"
        )
    for fit in fits:
        lines += ["", f"{fit.dataset}: {fit.verdict}", *(f"  {note}" for note in fit.notes)]
    return "\n".join(lines)
