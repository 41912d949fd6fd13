"""Evidence of where the best PLW lies: published tables and a person's own scores, as points beside generation ratios.

A point is where one curve is highest within PLW 0..1, on w_p = PLW^0.30103, with the variance that counts in pooling.
A flat curve has a highest point, too, but that says nothing: a curve that could be flat, or whose interval is the whole
range, gets infinite variance and so no weight. For any other curve, the weight is the precision beyond that of someone
who knows only that the best PLW lies within 0..1 (uniform on w_p, variance 1/12): 1/variance - 12. So wide intervals
weigh little.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from plw_mlflow.analysis.analyze import LEADS
from plw_mlflow.analysis.score_table import check, check_ratios, read_scores, rescale
from plw_mlflow.analysis.statistics import design, fitting
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.optimum import LEVEL, maximisers
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import CURVE_TERMS, EXPONENT, make_transform

TABLES = Path(__file__).resolve().parents[2] / "paper" / "tables"
STUDY, WIT, VAUGHN, OWN = "Huerta-Enochian and Ko 2024", "WIT 2025", "Vaughn 2024", "own runs"
DRAWS = 20_000  # of a curve's coefficients; seeded, so the same every time
EVEN = 1 / 12  # variance of the even distribution on 0..1


@dataclass(frozen=True)
class EvidencePoint:
    """Where one curve is highest."""

    study: str
    dataset: str
    model: str  # the language model or models
    scores: str  # which the curve is of
    ratio: float  # generation ratio of the data set
    ratio_is: str  # printed, measured, given or guessed
    w: float  # w_p of the highest score within 0..1
    low: float  # 95 % interval of it, which is 0 and 1 for a curve that could be flat
    high: float
    variance: float  # of w as evidence; infinite where it is no evidence
    p: float | None  # of no effect of PLW at all; None where nothing printed tells
    fit: str  # the statistical model
    has_too_few_runs: bool = False  # whether its curve's error rates are not near what they claim, so no evidence

    @property
    def plw(self) -> float:
        """The best PLW."""
        return to_plw(self.w)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return to_plw(self.low), to_plw(self.high)

    @property
    def what(self) -> str:
        """Which of its data set's curves it is of."""
        return f"{self.model}, {self.scores}"

    @property
    def is_located(self) -> bool:
        """Whether it says anything of where the best PLW lies."""
        return math.isfinite(self.variance)


def to_plw(w: float) -> float:
    """The PLW of a w_p, which is taken to the nearest end where it lies outside 0..1."""
    return float(np.clip(w, 0, 1) ** (1 / EXPONENT))


def locate(fit: Fit) -> tuple[float, float, float, float]:
    """Where a fitted curve is highest within 0..1, a 95 % interval of it, and the variance that counts as evidence.

    All in w_p. If the joint 95 % region of the coefficients holds the flat curve (p of 0.05 or more), or the runs are
    too few to tell, any w_p may be the best. Else they are drawn from what the data leave of them (t around the
    estimates). Where between two PLWs tried a curve is highest is the parabola's word alone, so each draw is then moved
    by up to half the gap.
    """
    draw = np.random.default_rng(1234)
    slope_bend = np.array([fit.coefficients[term] for term in CURVE_TERMS])
    w = float(maximisers(slope_bend[:1], slope_bend[1:], 0, 1)[0])
    if fit.joint_p >= LEVEL or fit.has_too_few_runs:
        return w, 0.0, 1.0, math.inf
    covariance = np.array(fit.covariance)[1:3, 1:3]
    freedom = min(fit.degrees_of_freedom[term] or math.inf for term in CURVE_TERMS)
    noise = draw.multivariate_normal(np.zeros(2), covariance, DRAWS)
    if math.isfinite(freedom):
        noise *= np.sqrt(freedom / draw.chisquare(freedom, DRAWS))[:, None]
    slopes, bends = (slope_bend + noise).T
    best = maximisers(slopes, bends, 0, 1)
    is_anywhere = np.ptp(np.quantile(best, [LEVEL / 2, 1 - LEVEL / 2])) == 1
    edges = np.unique(np.clip([0, *np.array(fit.plws) ** EXPONENT, 1], 0, 1))
    gaps = np.diff(edges)[np.clip(np.searchsorted(edges, best, "right") - 1, 0, len(edges) - 2)]
    best = np.clip(best + (draw.random(DRAWS) - 0.5) * gaps, 0, 1)
    low, high = np.quantile(best, [LEVEL / 2, 1 - LEVEL / 2])
    knowledge = 1 / float(((best - w) ** 2).mean()) - 1 / EVEN
    return w, float(low), float(high), math.inf if is_anywhere or knowledge <= 0 else 1 / knowledge


def published(task_types: Sequence[str] = ()) -> list[EvidencePoint]:
    """The published points; of the studies that tell scores by type of task, on tasks of these types alone."""
    points = study(task_types) + wit()
    return points + vaughn() if not task_types or "multiple-choice" in task_types else points


def printed_ratios() -> dict[str, float]:
    """Generation ratios of the study's data sets, by their names here and there."""
    return {row["dataset"]: float(row["completion_prompt_ratio"]) for row in _rows("v1_table1_dataset_stats.csv")}


def study(task_types: Sequence[str] = ()) -> list[EvidencePoint]:
    """The published study, arXiv:2401.13586v1: its three data sets, two models each; empty without such tasks.

    Where the curve over all tasks could be flat, as all three could, each type of task has one of its own beside it.
    """
    ratios = printed_ratios()
    table = read_scores(TABLES / "v1_scores.csv")
    if task_types:
        table = table[table["task_type"].isin(task_types)]
    points = []
    for point in _of_table(table, "none", STUDY, ratios, dict.fromkeys(ratios, "printed")):
        points.append(point)
        scores = table[table["dataset"] == point.dataset]
        if not point.is_located and scores["task_type"].nunique() > 1:
            for kind, part in scores.groupby("task_type"):
                (of_type,) = _of_table(part, "none", STUDY, ratios, dict.fromkeys(ratios, "printed"))
                points.append(replace(of_type, scores=f"{kind}: {of_type.scores}"))
    return points


def own(
    table: pd.DataFrame,
    scale: str,
    given: Mapping[str, float],
    measured: Mapping[str, float],
    task_types: Sequence[str] = (),
) -> list[EvidencePoint]:
    """A person's scores, a point for each data set.

    given, measured: generation ratios by data set; those of the study's data sets are known. task_types: as in
    `published`, where the table has a column task_type.

    Raises UserError for a table that is at fault, for a ratio of a data set that it lacks, and where a data set's ratio
    is not known or no curve can be fitted.
    """
    source = table.attrs.get("source", "score table")
    printed = printed_ratios()
    ratios = {**printed, **measured, **given}
    how = {**dict.fromkeys(printed, "printed"), **dict.fromkeys(measured, "measured"), **dict.fromkeys(given, "given")}
    scaled = rescale(check(table), scale)
    check_ratios(scaled, given)
    if unknown := sorted(set(scaled["dataset"]) - set(ratios)):
        raise UserError(
            f"{source}: the generation ratio of {', '.join(unknown)} is not known; "
            f'give it, as in --ratios "{unknown[0]}=0.5"'
        )
    if task_types and "task_type" in scaled:
        scaled = scaled[scaled["task_type"].isin(task_types)]
        if scaled.empty:
            raise UserError(f"{source}: has no task of the type {' or '.join(task_types)}; leave out --task-types")
    return _of_table(scaled, scale, OWN, ratios, how)


def wit() -> list[EvidencePoint]:
    """Weighted Instruction Tuning, arXiv:2507.07817: a point for each of five models on each of three data sets."""
    ratios = {row["dataset"]: row for row in _rows("wit_generation_ratios.csv")}
    table = wit_scores()
    points = []
    for pair, part in table[table["plw"] <= 1].groupby(["dataset", "task"]):
        dataset, model = map(str, pair)
        fit = fitting.fit("ols-task", _grid(part, dataset))
        place = model, "average of 5 benchmarks", float(ratios[dataset]["ratio"]), ratios[dataset]["how"]
        points.append(EvidencePoint(WIT, dataset, *place, *locate(fit), fit.joint_p, fit.model))
    return points


def wit_ratios() -> dict[str, float]:
    """Generation ratios of WIT's data sets."""
    return {row["dataset"]: float(row["ratio"]) for row in _rows("wit_generation_ratios.csv")}


def wit_scores() -> pd.DataFrame:
    """WIT's 450 runs with a response weight above 0 as a score table, in which each language model plays a task.

    PLW = prompt weight / response weight. A run, in the sense of the models, is a pair of weights, which its seed
    numbers (0.2 and 1 are 210), so that pairs of one PLW stay apart.
    """
    table = pd.read_csv(TABLES / "wit_fig1_average_scores.csv")
    table = table[table["lambda_r"] > 0].reset_index(drop=True)
    return pd.DataFrame(
        {
            "model": "five models",
            "dataset": table["finetune_data"],
            "plw": (table["lambda_p"] / table["lambda_r"]).round(9),  # 0.6 / 0.2 and 3 are one PLW
            "seed": (100 * (10 * table["lambda_p"]).round() + (10 * table["lambda_r"]).round()).astype(int),
            "task": table["model"],
            "metric": "average",
            "score": table["avg_of_5_benchmarks"] / 100,
        }
    )


def vaughn() -> list[EvidencePoint]:
    """Vaughn's RACE experiment: accuracies in print, without errors; the PLWs on its plateau are equally good."""
    (ratio,) = (float(row["mean_Rg"]) for row in _rows("vaughn_generation_ratios.csv") if row["dataset"] == "RACE")
    (plateau,) = (row["plw"] for row in _rows("vaughn_race_results.csv") if row["stopping_rule"].startswith("plateau"))
    low, *_, high = (float(plw) ** EXPONENT for plw in plateau.split(";"))
    knowledge = 1 / (EVEN * (high - low) ** 2) - 1 / EVEN  # anywhere on the plateau
    place = "Llama-2-7b-chat", "RACE", ratio, "printed"
    return [EvidencePoint(VAUGHN, "RACE", *place, (low + high) / 2, low, high, 1 / knowledge, None, "plateau in print")]


def _of_table(
    table: pd.DataFrame, scale: str, study: str, ratios: Mapping[str, float], how: Mapping[str, str]
) -> list[EvidencePoint]:
    """A point for each data set of a checked table on one scale, from the curve over its tasks and models."""
    points = []
    for name, part in table[table["plw"] <= 1].groupby("dataset"):
        dataset = str(name)
        fit = _lead(_grid(part, dataset), scale)
        scores = f"{fit.tasks} tasks" if fit.tasks > 1 else str(part["task"].iloc[0])
        names = sorted(part["model"].unique())
        model = " and ".join(names) if len(names) < 3 else f"{len(names)} models"
        place = model, scores, ratios[dataset], how[dataset]
        points.append(EvidencePoint(study, dataset, *place, *locate(fit), fit.joint_p, fit.model, fit.has_too_few_runs))
    return points


def _grid(part: pd.DataFrame, dataset: str) -> design.Grid:
    if part["plw"].nunique() < 3:
        raise UserError(f"data set {dataset} has {part['plw'].nunique()} PLWs within 0..1; a curve needs 3 or more")
    return design.grid(part, dataset, make_transform("w_p", part["plw"]))


def _lead(grid: design.Grid, scale: str) -> Fit:
    """The model an analysis leads with: the first that these scores allow."""
    reasons = []
    for model in LEADS:
        try:
            return fitting.fit(model, grid, scale)
        except ValueError as error:
            reasons.append(f"{model}: {error}")
    raise UserError(f"{grid.source}: data set {grid.dataset} can be fitted by no model ({'; '.join(reasons)})")


def _rows(name: str) -> list[dict[str, str]]:
    with (TABLES / name).open(newline="") as file:
        return list(csv.DictReader(file))
