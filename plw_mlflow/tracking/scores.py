"""Scores: what an evaluation has found, as metrics, tables and tags of the cell's run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import Metric

from plw_mlflow.config import spell
from plw_mlflow.environment import outputs
from plw_mlflow.evaluation import questions, task_sets
from plw_mlflow.evaluation.scores import Evaluation
from plw_mlflow.tracking import cards, inputs
from plw_mlflow.tracking.connection import patiently
from plw_mlflow.tracking.run import Run

METRICS_AT_ONCE = 1000  # MLflow takes no more in one request


def log_scores(
    run: Run, evaluation: Evaluation, rows: list[dict[str, Any]], score_tasks: Sequence[str] | None = None
) -> None:
    """Log every score as TASK/METRIC, the run's score table, every question's scores, and the per-sample log.

    The questions of one evaluation are the artifact questions/EVALUATION.parquet.

    rows: of the score table. Rows of tasks that were scored before stay in it unless the task is scored again here.
    score_tasks: the tasks that the run's metric `score` is the mean of, by `Score.key`. Unset, these are the tasks
        scored now. The run's tag plw.score_tasks, where it exists, comes first. `score` is logged once the table has
        all of them; the run is then scored.
    """
    now = time.time()
    evaluation_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}"
    patiently("logging the scores", lambda: _log_scores(run, evaluation, rows, score_tasks, now, evaluation_id))
    if evaluation.samples:
        samples = pd.DataFrame(evaluation.samples).assign(evaluation=evaluation_id)
        patiently("logging the samples", lambda: _log_samples(run, samples, evaluation_id))
    patiently("describing the model", lambda: cards.write(run, read_scores(run)))


def read_scores(run: Run) -> pd.DataFrame:
    """The run's score table so far, empty if nothing was scored."""
    if "scores.csv" not in {item.path for item in run.client.list_artifacts(run.id)}:
        return pd.DataFrame()
    with tempfile.TemporaryDirectory() as folder:
        return pd.read_csv(run.client.download_artifacts(run.id, "scores.csv", folder))


def read_questions(run: Run, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Every question's scores of the run, of each task from its last evaluation; empty if it kept none.

    columns: those to read beside `task` and `evaluation` (unset: all).
    """
    names = sorted(item.path for item in run.client.list_artifacts(run.id, "questions"))
    wanted = None if columns is None else list(dict.fromkeys(["task", "evaluation", *columns]))
    with tempfile.TemporaryDirectory() as folder:
        files = [run.client.download_artifacts(run.id, name, folder) for name in names]
        parts = [pd.read_parquet(file, columns=wanted) for file in files]
    if not parts:
        return pd.DataFrame()
    found = pd.concat(parts, ignore_index=True)  # ids of evaluations are times, so the last one is the largest
    return found[found["evaluation"] == found.groupby("task")["evaluation"].transform("max")]


def log_measures(run: Run, measures: dict[str, float]) -> None:
    """Log the study's mechanism measures, each as measure/NAME."""
    metrics = {f"measure/{name}": value for name, value in measures.items()}
    patiently("logging the measures", lambda: mlflow.log_metrics(metrics, model_id=run.model_id))


def _log_scores(
    run: Run,
    evaluation: Evaluation,
    rows: list[dict[str, Any]],
    score_tasks: Sequence[str] | None,
    now: float,
    evaluation_id: str,
) -> None:
    score_tasks = _choose_score_tasks(run, evaluation, score_tasks)
    table = _with_earlier_rows(run, pd.DataFrame(rows))
    keys = [
        task_sets.key(row["task"], row["metric"], int(row["asked_fewshot"]))
        for row in table.fillna({"asked_fewshot": 0}).to_dict("records")
    ]
    counted = table[[key in score_tasks for key in keys]]
    is_complete = len(counted) == len(score_tasks)
    benchmarks = {task: inputs.benchmark(task, told) for task, told in evaluation.results.get("benchmarks", {}).items()}
    versions = {score.task: score.task_version for score in evaluation.scores}
    if benchmarks:
        inputs.log_benchmarks(run, list(benchmarks.values()), [versions.get(task, "") for task in benchmarks])

    def metric(name: str, value: float, task: str | None = None) -> Metric:
        """A score with what it was measured on; not on the run's own data set, which the model was trained on."""
        on = None if task is None else benchmarks.get(task)
        # One time for all, so that metrics that are sent twice are stored once.
        return Metric(
            *(name, value, int(now * 1000), 0),
            model_id=run.model_id,
            dataset_name=on.name if on else None,
            dataset_digest=on.digest if on else None,
            run_id=run.id,
        )

    metrics = [metric("score", float(counted["score"].mean()))] if is_complete else []
    for score in evaluation.scores:
        metrics.append(metric(f"{score.task}/{score.metric}", score.score, score.task))
        if score.stderr is not None:
            metrics.append(metric(f"{score.task}/{score.metric}_stderr", score.stderr, score.task))
    for start in range(0, len(metrics), METRICS_AT_ONCE):
        run.client.log_batch(run.id, metrics=metrics[start : start + METRICS_AT_ONCE])
    mlflow.log_text(outputs.table(table).decode(), "scores.csv")
    mlflow.log_dict(evaluation.results, f"harness/{evaluation_id}.json")
    if evaluation.questions:
        every = questions.table(evaluation, rows).assign(evaluation=evaluation_id)
        run.log_bytes(f"questions/{evaluation_id}.parquet", questions.parquet(every))
    run.tag(score_tasks=",".join(score_tasks), eval_precision=", ".join(_precisions(table)) or "unknown")
    if is_complete:
        _tag_as_scored(run, counted)
    else:
        _tag_as_not_scored(run)
        missing = [key for key in score_tasks if key not in keys]
        print(f"the run has no score yet, which is the mean of {len(score_tasks)} tasks: {', '.join(missing)} to come")


def _choose_score_tasks(run: Run, evaluation: Evaluation, score_tasks: Sequence[str] | None) -> list[str]:
    """The keys of the tasks that the run's `score` is the mean of."""
    scored_now = [score.key for score in evaluation.primary]
    tagged = run.read_tag("score_tasks")
    chosen = list(score_tasks or scored_now) if tagged is None else tagged.split(",")
    return scored_now if set(chosen) < set(scored_now) else chosen  # a larger set counts as a whole


def _with_earlier_rows(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """A score table, after the rows that the run has of other tasks."""
    earlier = read_scores(run)
    if earlier.empty:
        return table
    return pd.concat([earlier[~earlier["task"].isin(table["task"])], table], ignore_index=True)


def _tag_as_scored(run: Run, counted: pd.DataFrame) -> None:
    """Say on the run that it has its score, and whether that is comparable with scores of the same benchmarks."""
    caveats = zip(counted["task"], counted["caveat"].fillna(""), strict=True)
    reasons = [f"{task}: {caveat}" for task, caveat in caveats if caveat]
    prompts = sorted(set(counted["prompt"].fillna("harness")))
    if len(prompts) > 1:
        reasons.append(f"prompts differ: {', '.join(prompts)}")
    if len(precisions := _precisions(counted)) > 1:
        reasons.append(f"arithmetic differs: {', '.join(precisions)}")
    run.tag(status="scored", score_comparable=spell(not reasons))
    if reasons:
        run.tag(score_caveat="; ".join(reasons))
    else:
        run.untag("score_caveat")


def _precisions(table: pd.DataFrame) -> list[str]:
    """The types of the arithmetic of a score table; rows without one are older, from when there was float32 alone."""
    return sorted(set(table["precision"].fillna("float32")) - {""})


def _tag_as_not_scored(run: Run) -> None:
    """Take back that the run is scored, where it was: its score was of rows that are no longer in the table."""
    if run.client.get_run(run.id).data.tags.get("plw.status") == "scored":
        run.tag(status="trained")
        run.untag("score_comparable")
        run.untag("score_caveat")


def _log_samples(run: Run, samples: pd.DataFrame, evaluation_id: str) -> None:
    """Add an evaluation's samples to the run's table, unless an earlier attempt has added them and its answer was lost.

    Without new rows, `log_table` is called all the same, as it notes on the run that the table exists.
    """
    if "samples.json" in {item.path for item in run.client.list_artifacts(run.id)}:
        with tempfile.TemporaryDirectory() as folder:
            file = run.client.download_artifacts(run.id, "samples.json", folder)
            logged = pd.read_json(file, orient="split", convert_dates=False, dtype=False)
        if "evaluation" in logged and (logged["evaluation"] == evaluation_id).any():
            samples = samples[:0]
    mlflow.log_table(samples, "samples.json")
