"""Load benchmark tasks: those of the named sets, those in `task_files`, and lm-evaluation-harness's own.

With a data folder, the tasks that `local_documents` knows read their documents there instead of from the hub.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plw_mlflow.config import ScoreOptions
from plw_mlflow.errors import UserError, first_line
from plw_mlflow.evaluation import local_documents, task_sets
from plw_mlflow.evaluation.local_documents import Documents
from plw_mlflow.evaluation.task_sets import Benchmark


@dataclass(frozen=True)
class Tasks:
    """Benchmark tasks that are ready to be run."""

    loaded: list[Any]  # the harness's task objects, with their documents
    manager: Any  # the harness's TaskManager that loaded them
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)  # how the sets run their tasks, by task
    # Tasks that run 0-shot because the file of their examples is missing: the number of shots they ask for, the file.
    without_examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    sha256: dict[str, dict[str, str]] = field(default_factory=dict)  # of the local files that each task has read
    not_run: dict[str, str] = field(default_factory=dict)  # tasks of the named sets that are not run, and why


def load_tasks(options: ScoreOptions) -> Tasks:
    """Load the tasks that `options.tasks` names.

    Raises UserError for an unknown task (with the nearest names), for one whose documents cannot be read, and for one
    that gives no score.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task_sets.check(options.tasks)
    benchmarks = {benchmark.task: benchmark for benchmark in task_sets.select(options.tasks)}
    manager = _manager(list(benchmarks))
    without_examples, sha256 = {}, {}
    for task in {leaf: None for name in benchmarks for leaf in _leaves(name, manager.task_index)}:
        changes: dict[str, Any] = {}
        if task in benchmarks and benchmarks[task].num_fewshot is not None:
            changes["num_fewshot"] = benchmarks[task].num_fewshot
        if options.data_dir is not None and task in local_documents.LOCAL:
            config = _config(task, manager) | changes
            documents = local_documents.find(task, options.data_dir)
            shots = config.get("num_fewshot") or 0
            _check_examples(task, documents, shots, options.data_dir)
            if shots and documents.examples is None:
                without_examples[task] = shots, local_documents.examples_files(task)
            changes |= local_documents.overrides(config, documents)
            sha256[task] = documents.sha256
        if changes:
            _change(task, changes, manager)
    loaded = _load(list(benchmarks), manager, options.tasks)
    for task, (shots, files) in without_examples.items():
        warnings.warn(f"{task} runs 0-shot, not {shots}: no {files} in {options.data_dir}", stacklevel=2)
    return Tasks(loaded, manager, benchmarks, without_examples, sha256, task_sets.not_run(options.tasks))


def _check_examples(task: str, documents: Documents, shots: int, folder: Path) -> None:
    """Raise UserError where there are too few examples. One of them may be the question itself, which is left out."""
    if documents.examples is not None and len(documents.examples) <= shots:
        raise UserError(
            f"task {task} draws {shots} examples, but {local_documents.examples_files(task)} in {folder} has "
            f"{len(documents.examples)}"
        )


def _config(task: str, manager: Any) -> dict[str, Any]:
    """The content of a task's file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(manager.task_index[task].yaml_path))


def _change(task: str, changes: dict[str, Any], manager: Any) -> None:
    """Have a task manager load a task with some values in place of those in its file."""
    from lm_eval.tasks._index import Entry, Kind

    config, tags = _config(task, manager) | changes, manager.task_index[task].tags
    manager.task_index[task] = Entry(task, Kind.TASK, yaml_path=None, cfg=config, tags=tags)


def _load(wanted: list[str], manager: Any, listed: str) -> list[Any]:
    """The harness's task objects for these names. `listed` names them in messages."""
    import datasets

    datasets.disable_progress_bars()  # some tasks pass over their documents several times, with a bar each
    try:
        loaded = list(manager.load(wanted)["tasks"].values())
    except (ConnectionError, OSError) as error:  # the hub, or a file
        raise UserError(
            f"the documents of {listed} cannot be read: {first_line(error)}; without a network, give local files by "
            "--data-dir"
        ) from None
    except ImportError as error:
        raise UserError(
            f"the tasks {listed} need a package that is not installed: {first_line(error)}; install it, or leave the "
            "task out"
        ) from None
    for task in loaded:
        if True not in task.higher_is_better().values():
            raise UserError(f"task {task.config.task} has no metric of which more is better, so it gives no score")
    return loaded


def _manager(wanted: list[str]) -> Any:
    """The harness's TaskManager for these tasks. Raises UserError where one of them is unknown.

    Reading the harness's whole index takes seconds. Most tasks lie in a folder whose name begins theirs, so that these
    folders are read first. Groups and tags may have parts elsewhere: for them the whole index is read.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    nearby = task_sets.nearby_folders(Path(lm_eval.tasks.__file__).parent, wanted)
    manager = TaskManager(include_path=[*nearby, task_sets.OWN_TASKS], include_defaults=False)
    single = {name for name, entry in manager.task_index.items() if entry.kind in (Kind.TASK, Kind.PY_TASK)}
    if set(wanted) <= single:
        return manager
    manager = TaskManager(include_path=task_sets.OWN_TASKS)
    task_sets.check_known(wanted, manager.task_index)
    return manager


def _leaves(name: str, index: dict[str, Any]) -> Iterator[str]:
    """The tasks that a name of the harness's index stands for: itself, or those of a group or tag."""
    from lm_eval.tasks._index import Kind

    entry = index.get(name)
    if entry is None:
        return  # a group may define a task of its own within itself
    if entry.kind == Kind.TAG:
        yield from sorted(entry.tags)
    elif entry.kind == Kind.GROUP:
        parts = entry.cfg.get("task") or []
        for part in parts if isinstance(parts, list) else [parts]:
            yield from _leaves(part if isinstance(part, str) else part.get("task") or part.get("group", ""), index)
    else:
        yield name
