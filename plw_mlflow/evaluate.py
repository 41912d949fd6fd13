"""Evaluate: benchmark scores of a model, by lm-evaluation-harness, as rows of the score table.

Tasks are the harness's own, or the toy laboratory's. With a data folder, a task named in LOCAL reads its
documents from a file there, in the hub's format, so that prompts and metrics stay the harness's.
"""

from __future__ import annotations

import csv
import difflib
import json
import logging
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from plw_mlflow import models
from plw_mlflow.config import ScoreOptions, names
from plw_mlflow.errors import first_line

TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"
# The harness gives these on 0..100; the second line is TruthfulQA's.
PERCENT_METRICS = re.compile(r"bleu|chrf|ter|(bleu|rouge[12L])_(max|diff)")
BOOTSTRAP_ROUNDS = 100  # of corpus metrics' standard errors; the harness takes no more for BLEU either


@dataclass(frozen=True)
class Score:
    """One metric of one task; the score on 0..1."""

    task: str
    metric: str
    score: float
    stderr: float | None
    n: int  # documents scored
    num_fewshot: int
    task_version: str
    is_primary: bool  # the first metric of which more is better; it stands for its task in the score table
    truncated: int = 0  # requests whose context was cut from the left to fit the model's window
    windowed: int = 0  # requests whose continuation alone is longer than the window, scored window by window


@dataclass(frozen=True)
class Evaluation:
    """All scores of one model."""

    scores: list[Score]
    results: dict[str, Any]  # the harness's own results, without its samples

    @property
    def primary(self) -> list[Score]:
        """One score per task."""
        return [score for score in self.scores if score.is_primary]

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks: the cell's `score`."""
        return statistics.fmean(score.score for score in self.primary)


@dataclass(frozen=True)
class Tasks:
    """Benchmark tasks, ready to be run."""

    loaded: list[Any]  # the harness's task objects, their documents read
    manager: Any  # the harness's TaskManager they come from


def load_tasks(options: ScoreOptions) -> Tasks:
    """The tasks that `options.tasks` names.

    Raises ValueError for an unknown task (with the nearest names), or one whose documents cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    wanted, folder = names(options.tasks), options.data_dir
    nearby = [TASKS_FOLDER, *(Path(lm_eval.tasks.__file__).parent / group for group in _FOLDERS)]
    manager = TaskManager(include_path=nearby, include_defaults=False)
    if not set(wanted) <= set(manager.task_index):  # reading the whole index takes seconds: only where it is needed
        manager = TaskManager(include_path=TASKS_FOLDER)
    for name in wanted:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.task_index, n=3)
            raise ValueError(f"there is no task {name!r}" + (f"; the nearest are {', '.join(near)}" if near else ""))
    specs: list[str | dict[str, Any]] = [
        load_yaml(manager.task_index[name].yaml_path) | _documents(name, folder)
        if folder is not None and name in LOCAL
        else name
        for name in wanted
    ]
    try:
        loaded = list(manager.load(specs)["tasks"].values())
    except (ConnectionError, OSError) as error:  # the hub, or a file
        raise ValueError(
            f"the documents of {options.tasks} cannot be read: {first_line(error)}; "
            "without a network, give local files by --data-dir"
        ) from None
    for task in loaded:
        if True not in task.higher_is_better().values():
            raise ValueError(f"task {task.config.task} has no metric of which more is better, so it gives no score")
    return Tasks(loaded, manager)


def run(
    model: Any, tokenizer: Any, tasks: Tasks, options: ScoreOptions, seed: int, keep: Path | None = None
) -> Evaluation:
    """Score a causal language model on tasks, on the GPU if there is one.

    keep: a folder for finished requests, from which a scoring that was killed goes on (unset: they are not kept).
    """
    import torch

    from plw_mlflow.scoring import Scorer

    device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness leaves a loaded model where it is
    return score(Scorer(model.to(device), tokenizer, options.eval_batch_tokens, keep), tasks, options, seed)


def run_adapters(
    base: Any, tokenizer: Any, adapters: Sequence[Path], tasks: Tasks, options: ScoreOptions, seed: int
) -> Iterator[tuple[Path, Evaluation]]:
    """Score folders of LoRA adapters one after another, each on the one loaded base, which ends as it was."""
    for folder in adapters:
        adapted = models.load_adapter(base, folder)
        try:
            yield folder, run(adapted, tokenizer, tasks, options, seed)
        finally:
            adapted.unload()


def score(language_model: Any, tasks: Tasks, options: ScoreOptions, seed: int) -> Evaluation:
    """Score one of the harness's language models on tasks."""
    from lm_eval import evaluator

    evaluator.add_env_info = lambda results: None  # it starts pip and others, for seconds; environment.json says it
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has threads
    with redirect_stdout(StringIO()):  # it says when it bootstraps, and to whom is not clear
        found = evaluator.simple_evaluate(
            language_model,
            tasks=tasks.loaded,
            task_manager=tasks.manager,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed % 2**32,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None  # None is the answer to processes other than the first, of which there are none
    results = json.loads(json.dumps(found, default=str))
    cut = {name: getattr(language_model, name, {}) for name in ("truncated", "windowed")}
    results["cut"] = {name: dict(counts) for name, counts in cut.items()}
    scores = [
        replace(score, **{name: counts.get(score.task, 0) for name, counts in cut.items()})
        for score in _scores(results)
    ]
    _warn_of_cuts(cut)
    return Evaluation(scores, results)


def _warn_of_cuts(cut: dict[str, dict[str, int]]) -> None:
    what = {
        "truncated": "with a context cut from the left to fit the model's window",
        "windowed": "with an answer longer than the model's window, scored window by window",
    }
    for name, counts in cut.items():
        if counts:
            tasks = ", ".join(f"{count} of {task}" for task, count in sorted(counts.items()))
            warnings.warn(f"requests {what[name]}: {tasks}", stacklevel=3)


def _scores(results: dict[str, Any]) -> list[Score]:
    """The harness's results as rows. Its keys are "METRIC,FILTER"; a filter other than "none" is part of the name.

    Raises ValueError for a task without a metric on 0..1 of which more is better: it has no score to average.
    """
    scores = []
    for task, values in results["results"].items():
        if task not in results["n-samples"]:
            continue  # a group, whose tasks have rows of their own
        rises = results["higher_is_better"].get(task, {})
        has_primary = False
        for key in (key for key in values if "," in key and "_stderr," not in key):
            metric, kind = key.split(",")
            scale = 100 if PERCENT_METRICS.fullmatch(metric) else 1
            stderr = values.get(f"{metric}_stderr,{kind}")
            is_primary = not has_primary and rises.get(metric) is True and 0 <= values[key] / scale <= 1
            has_primary |= is_primary
            scores.append(
                Score(
                    task=task,
                    metric=metric if kind == "none" else f"{metric}-{kind}",
                    score=values[key] / scale,
                    stderr=stderr / scale if isinstance(stderr, float) else None,
                    n=results["n-samples"][task]["effective"],
                    num_fewshot=results["n-shot"].get(task) or 0,
                    task_version=str(results["versions"].get(task)),
                    is_primary=is_primary,
                )
            )
        if not has_primary:
            raise ValueError(f"task {task} has no metric on 0 to 1 of which more is better, so it gives no score")
    return scores


def table(evaluation: Evaluation, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the score table: `cell` (model, dataset, plw, seed) with each task's primary score."""
    return [
        cell | {key: value for key, value in asdict(score).items() if key != "is_primary"}
        for score in evaluation.primary
    ]


def write(rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Write rows of the score table to FOLDER/scores.csv, if there is a folder."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table_text(evaluation: Evaluation) -> str:
    """The scores as a person reads them."""
    lines = [f"{'task':<28}{'metric':<14}{'score':>8}{'stderr':>9}{'n':>7}"]
    for score in evaluation.scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        lines.append(f"{score.task:<28}{score.metric:<14}{score.score:>8.4f}{stderr:>9}{score.n:>7}")
    lines.append(f"{'score (mean over tasks)':<42}{evaluation.mean:>8.4f}")
    return "\n".join(lines)


# Tasks whose documents can come from a local file.


def _arc(path: Path) -> list[dict[str, Any]]:
    """Lines of question, choices and the answer's index, as the hub's ARC gives them."""
    documents = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
        choices = {"text": row["choices"], "label": labels}
        documents.append({"question": row["question"], "choices": choices, "answerKey": labels[row["answer"]]})
    return documents


_FOLDERS = ("arc",)  # of lm_eval/tasks, where the tasks below live
LOCAL: dict[str, tuple[str, Callable[[Path], list[dict[str, Any]]]]] = {
    "arc_easy": ("arc_easy_test.jsonl", _arc),
    "arc_challenge": ("arc_challenge_test.jsonl", _arc),
}


def _documents(name: str, folder: Path) -> dict[str, Any]:
    """What of a task's config makes it read a file. Raises ValueError where that is missing or damaged."""
    file, read = LOCAL[name]
    path = folder / file
    if not path.is_file():
        raise ValueError(f"task {name} reads {path}, which does not exist")
    try:
        documents = read(path)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not what task {name} reads: {type(error).__name__} {error}") from None
    return {
        "custom_dataset": partial(_as_dataset, documents),
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }


def _as_dataset(documents: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}
