"""Scores: the harness's results as rows of the score table, and how that table is written and printed."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from plw_mlflow.environment import outputs
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation import task_sets
from plw_mlflow.evaluation.prompting import HARNESS
from plw_mlflow.evaluation.task_sets import Benchmark

# The metrics that the harness gives as percentages. Those with _max and _diff are TruthfulQA's.
PERCENT_METRICS = re.compile(r"bleu|chrf|ter|(bleu|rouge[12L])_(max|diff)")


@dataclass(frozen=True)
class Score:
    """One metric of one task, on 0..1."""

    task: str
    metric: str
    score: float
    stderr: float | None
    n: int  # documents scored
    num_fewshot: int  # examples before each question
    task_version: str
    is_primary: bool  # it stands for its task in the score table, and counts in the mean
    prompt: str = HARNESS  # or "template NAME"
    harness_version: str = ""
    task_type: str = ""  # one of task_sets.TASK_TYPES
    truncated: int = 0  # requests whose context was cut from the left to fit the model's window
    windowed: int = 0  # requests whose continuation alone is longer than the window, scored window by window
    asked_fewshot: int = 0  # the examples that the task or its set wants before each question
    caveat: str = ""  # what was not done as the task or its set wants it
    precision: str = ""  # the type of the arithmetic it was computed in; empty where a server has computed it

    @property
    def key(self) -> str:
        """The measurement that the number is of, as `task_sets.key` spells it."""
        return task_sets.key(self.task, self.metric, self.asked_fewshot)


@dataclass(frozen=True)
class Evaluation:
    """All scores of one model."""

    scores: list[Score]
    results: dict[str, Any]  # the harness's own results, without its samples
    samples: list[dict[str, Any]] = field(default_factory=list)  # rows of the per-sample log
    questions: list[dict[str, Any]] = field(
        default_factory=list
    )  # every question's scores, as `questions.row` has them
    not_run: dict[str, str] = field(default_factory=dict)  # tasks of the named sets that are not run, and why

    @property
    def primary(self) -> list[Score]:
        """One score for each task."""
        return [score for score in self.scores if score.is_primary]

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks: the cell's `score`."""
        return statistics.fmean(score.score for score in self.primary)


def percent(metric: str) -> int:
    """What a value of a metric is divided by to be on 0..1: 100 for a percentage, 1 otherwise."""
    return 100 if PERCENT_METRICS.fullmatch(metric) else 1


def of_results(results: dict[str, Any], benchmarks: dict[str, Benchmark]) -> list[Score]:
    """The harness's results as scores, of which one for each task that counts is primary.

    benchmarks: what the named sets say of a task. For a task of no set, the primary score is the first one on 0..1 of
    which more is better. Raises UserError where a task that counts has no primary score.
    """
    scores = []
    for task in results["results"]:
        if task not in results["n-samples"]:
            continue  # a group, whose tasks have rows of their own
        benchmark = benchmarks.get(task) or Benchmark(task)
        of_task = list(_of_task(task, results, benchmark))
        if benchmark.is_scored and not any(score.is_primary for score in of_task):
            raise UserError(f"task {task} has no metric on 0 to 1 of which more is better, so it gives no score")
        scores += of_task
    return scores


def _of_task(task: str, results: dict[str, Any], benchmark: Benchmark) -> Iterator[Score]:
    """The scores of one task. The harness's keys are "METRIC,FILTER"; a filter other than "none" joins the name."""
    values, rises = results["results"][task], results["higher_is_better"].get(task, {})
    has_primary = False
    for key in values:
        if "," not in key or "_stderr," in key:
            continue
        metric, filter_name = key.split(",")
        name = metric if filter_name == "none" else f"{metric}-{filter_name}"
        score = values[key] / percent(metric)
        if 1 < score < 1 + 1e-9:  # sacreBLEU gives 100.00000000000004 for a perfect translation
            score = 1.0
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        is_primary = (
            not has_primary
            and benchmark.is_scored
            and benchmark.metric in (None, name)
            and rises.get(metric) is True
            and 0 <= score <= 1
        )
        has_primary |= is_primary
        yield Score(
            task=task,
            metric=name,
            score=score,
            stderr=stderr / percent(metric) if isinstance(stderr, float) else None,
            n=results["n-samples"][task]["effective"],
            num_fewshot=results["n-shot"].get(task) or 0,
            task_version=str(results["versions"].get(task)),
            is_primary=is_primary,
        )


def table(evaluation: Evaluation, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the score table: `cell` (model, dataset, plw, seed) with the primary score of each task."""
    return [
        cell | {name: value for name, value in asdict(score).items() if name != "is_primary"}
        for score in evaluation.primary
    ]


def write(rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Write rows of the score table to FOLDER/scores.csv, if a folder is given."""
    if folder is None:
        return
    text = StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({name: outputs.no_formula(value) for name, value in row.items()} for row in rows)
    outputs.write(folder, {"scores.csv": text.getvalue().encode()})


def text(evaluation: Evaluation) -> str:
    """The scores as a person reads them."""
    lines = [f"{'task':<28}{'metric':<14}{'score':>8}{'stderr':>9}{'n':>7}"]
    for score in evaluation.scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        lines.append(f"{score.task:<28}{score.metric:<14}{score.score:>8.4f}{stderr:>9}{score.n:>7}")
    lines.append(f"{'score (mean over tasks)':<42}{evaluation.mean:>8.4f}")
    lines += [f"computed in {name}" for name in sorted({score.precision for score in evaluation.scores} - {""})]
    lines += [f"{task} is not run: {reason}" for task, reason in evaluation.not_run.items()]
    return "\n".join(lines)
