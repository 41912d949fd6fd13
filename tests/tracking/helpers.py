"""What the tests of tracking do to runs."""

import hashlib

import torch

from plw_mlflow import tracking
from plw_mlflow.config import EvaluateConfig
from plw_mlflow.evaluation import questions
from plw_mlflow.evaluation.scores import Evaluation, Score, table
from plw_mlflow.training import checkpoints
from plw_mlflow.training.checkpoints import Checkpoint


def history(store, run_id, name):
    return [(point.step, point.value) for point in store.get_metric_history(run_id, name)]


def open_and_end(run_id=None):
    with tracking.open_run(EvaluateConfig(model="toy"), "name", run_id):
        pass


def saved(folder, step, cell="abc"):
    """A checkpoint's folder, as training leaves it."""
    writer = checkpoints.Writer(folder, cell, 9, lambda place: None)
    writer.save(Checkpoint(step, {"weight": torch.tensor([float(step)])}, {}))
    writer.wait()
    return folder / f"step-{step:06d}"


def scored(config, *scores):
    """A finished cell with a score per task."""
    with tracking.open_run(config, "cell") as run:
        run.tag(cell=f"{config.plw}/{config.method}")
        add_scores(run, *scores)
    return run


def add_scores(run, *scores, whole=None, caveats=None, precision="float32"):
    samples = [{"task": task, "prediction": "yes"} for task, _ in scores]
    found = [
        Score(task, "acc", score, 0.1, 5, 0, "1.0", True, caveat=(caveats or {}).get(task, ""), precision=precision)
        for task, score in scores
    ]
    benchmarks = {task: {"documents": 5, "sha256": hashlib.sha256(task.encode()).hexdigest()} for task, _ in scores}
    asked = [
        questions.row(task, "acc", number, [task, number], float(number < round(5 * score)), prompt="harness")
        for task, score in scores
        for number in range(5)
    ]
    evaluation = Evaluation(found, {"benchmarks": benchmarks}, samples, asked)
    tracking.log_scores(run, evaluation, table(evaluation, run.cell()), whole)
