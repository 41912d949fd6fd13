"""Task sets: benchmarks that are run together, how each is run, and which of its metrics is its score.

The sets named after the study, arXiv:2401.13586, run what the study ran, as far as that is known. docs/evaluation.md
says where they differ and what is unknown.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from plw_mlflow.config import split_list
from plw_mlflow.errors import UserError

OWN_TASKS = Path(__file__).resolve().parent / "task_files"
# In a task's file: a field that holds names, with the rest of its line and the indented or listed lines below it.
NAMING = re.compile(r"""^["']?(?:task|group|tag)["']? *:(.*(?:\n[ \t]*-.*|\n[ \t]+.*|\n[ \t]*#.*|\n(?=\n))*)""", re.M)
WORD = re.compile(r"""[^\s\[\],'"#-][^\s\[\],'"#]*""")

# The types of task that a score table may name. The first four are the study's; the last two are for other tasks.
TASK_TYPES = (
    "multiple-choice",
    "short-generation",
    "medium-generation",
    "long-generation",
    "generation",
    "likelihood",
)
# The type of a task that no set names, by the harness's name for what the task asks of a model.
TASK_TYPE_OF_OUTPUT = {
    "multiple_choice": "multiple-choice",
    "generate_until": "generation",
    "loglikelihood": "likelihood",
    "loglikelihood_rolling": "likelihood",
}


@dataclass(frozen=True)
class Benchmark:
    """One task, as a set runs it."""

    task: str  # of lm-evaluation-harness, or of plw_mlflow/evaluation/task_files
    metric: str | None = None  # the one that stands for the task (unset: the first of which more is better)
    num_fewshot: int | None = None  # examples before each question (unset: the task's own number)
    task_type: str | None = None  # as the study sorts its tasks (unset: by what the task asks of a model)
    is_scored: bool = True  # whether it has a row in the score table, and counts in `score`

    @property
    def key(self) -> str:
        """The measurement that makes the score, as `key` has it."""
        return key(self.task, str(self.metric), self.num_fewshot or 0)


def key(task: str, metric: str, num_fewshot: int) -> str:
    """A measurement, as TASK/METRIC@SHOTS: the same task with another number of shots is another measurement."""
    return f"{task}/{metric}@{num_fewshot}"


def _translation(task_type: str, *directions: str) -> tuple[Benchmark, ...]:
    return tuple(Benchmark(f"huerta2024_{direction}", "bleu", 0, task_type) for direction in directions)


WMT = ("wmt14-en-fr", "wmt14-fr-en", "wmt16-en-de", "wmt16-de-en")
CHOICE = (  # table 2 of version 1, all with the harness's own prompts
    Benchmark("arc_challenge", "acc_norm", 25, "multiple-choice"),
    Benchmark("piqa", "acc", 0, "multiple-choice"),
    Benchmark("winogrande", "acc", 5, "multiple-choice"),
)


def _version_1(scored: str, other: str) -> tuple[Benchmark, ...]:
    """The eight tasks of version 1. TruthfulQA is measured both ways, and `scored` is the one that counts."""
    truthful = (
        Benchmark(scored, "acc", 0, "short-generation"),  # the study's own label
        Benchmark(other, "acc", 0, "short-generation", is_scored=False),
    )
    return (*CHOICE, *truthful, *_translation("medium-generation", *WMT))


SETS: dict[str, tuple[Benchmark, ...]] = {
    "toy": (
        Benchmark("toy_choice", "acc", 0, "multiple-choice"),
        Benchmark("toy_short", "acc", 0, "short-generation"),
        Benchmark("toy_long", "bleu", 0, "long-generation"),
    ),
    # The study's text and table say MC1; its figures, and so all its numbers, show mc2.
    "huerta2024-v1": _version_1("truthfulqa_mc2", "truthfulqa_mc1"),
    "huerta2024-v1-mc1": _version_1("truthfulqa_mc1", "truthfulqa_mc2"),
    # Version 4 sorts its tasks in another way. Which of TruthfulQA-Gen's metrics it used is not known.
    "huerta2024-v4": (
        *CHOICE,
        Benchmark("truthfulqa_mc2", "acc", 0, "multiple-choice"),
        Benchmark("truthfulqa_gen", "bleu_acc", 0, "short-generation"),
        *_translation("short-generation", *WMT, "wmt16-en-ro", "wmt16-ro-en"),
    ),
}

# The tasks of a set that are not run, and why. They count nowhere, and not as zero.
NOT_RUN: dict[str, dict[str, str]] = {
    "huerta2024-v4": {
        "alpaca_eval": "its answers are judged by Mixtral 8x7B",
        "pandalm": "its answers are judged by PandaLM 7B",
    }
}


def _named(name: str) -> tuple[Benchmark, ...]:
    """What one name of a list means: a set, a part of it, or whatever the harness knows by that name."""
    set_name, _, task = name.partition(":")
    if not task or set_name not in SETS:
        return SETS.get(name, (Benchmark(name),))
    by_task = {benchmark.task: benchmark for benchmark in SETS[set_name]}
    if task not in by_task:
        raise UserError(f"set {set_name} has no task {task!r}; it has {', '.join(by_task)}")
    return (by_task[task],)


def select(listed: str) -> list[Benchmark]:
    """The benchmarks that a comma-separated list of sets, SET:TASK, tasks and groups names, each once.

    A task that is named by itself, too, is run as its set has it. Raises UserError where two sets differ in how they
    run a task, and for a task that its set does not have.
    """
    selected: dict[str, Benchmark] = {}
    for name in split_list(listed):
        for benchmark in _named(name):
            alone = Benchmark(benchmark.task)
            other = selected.get(benchmark.task, alone)
            if alone not in (other, benchmark) and other != benchmark:
                raise UserError(
                    f"the sets in tasks {listed} differ in how they run or score {benchmark.task}; score them apart"
                )
            selected[benchmark.task] = other if benchmark == alone else benchmark
    return list(selected.values())


def check(listed: str) -> None:
    """Raise UserError for a list with an unknown name, or one that gives no score.

    The harness needs seconds for the index of its tasks. Here its files are searched for names instead, which gives all
    names of the index and a few other words. The index refuses those later.
    """
    benchmarks = select(listed)
    if not any(benchmark.is_scored for benchmark in benchmarks):
        raise UserError(f"none of the tasks {listed} counts in its set's score; name one by itself, or another set")
    spec = importlib.util.find_spec("lm_eval")  # which does not import it
    if spec is None or not spec.submodule_search_locations:
        return  # importing it will say that it is missing
    harness = Path(spec.submodule_search_locations[0]) / "tasks"
    wanted = [benchmark.task for benchmark in benchmarks]
    if not _names_in(OWN_TASKS, *nearby_folders(harness, wanted)).issuperset(wanted):
        check_known(wanted, _names_in(OWN_TASKS, harness))


def nearby_folders(harness: Path, wanted: Collection[str]) -> list[Path]:
    """The folders among the harness's tasks where these tasks are likely to be: whose name begins a task's name."""
    folders = sorted(path for path in harness.iterdir() if path.is_dir())
    return [
        path
        for path in folders
        if any(name.startswith(path.name) or (path.name == "translation" and name.startswith("wmt")) for name in wanted)
    ]


def check_known(wanted: Iterable[str], known: Collection[str]) -> None:
    """Raise UserError for the wanted names that are unknown, with the nearest known ones."""
    unknown = []
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, [*SETS, *known], n=3)
            unknown.append(f"there is no task {name!r}" + (f"; the nearest are {', '.join(near)}" if near else ""))
    if unknown:
        raise UserError(
            f"{'; '.join(unknown)}; the sets are {', '.join(SETS)} "
            "(docs/evaluation.md), and lm_eval ls tasks lists the tasks, groups and tags of lm-evaluation-harness"
        )


def _names_in(*folders: Path) -> set[str]:
    """The names of tasks, groups and tags in the YAML files of folders and those below, and some other words."""
    words: set[str] = set()
    for folder in folders:
        for parent, _, files in os.walk(folder):
            for file in files:
                if file.endswith("yaml") or "." not in file:  # files that others include may have no ending
                    text = Path(parent, file).read_text(encoding="utf-8", errors="replace")
                    for values in NAMING.findall(text):
                        words.update(WORD.findall(values))
    return words


def remark(listed: str, dataset: str) -> str | None:
    """What has to be said of a score on a list of tasks after training on a data set, if anything has."""
    asks_of_toy = [name for name in split_list(listed) if name.partition(":")[0].partition("_")[0] == "toy"]
    if not asks_of_toy or dataset.startswith("toy-"):
        return None
    return (
        f"note: {', '.join(asks_of_toy)} asks about the toy laboratory's invented people alone, so this score says "
        f"nothing of {dataset}; --tasks names benchmarks that do"
    )


def not_run(listed: str) -> dict[str, str]:
    """The tasks of the named sets that are not run, and why."""
    return {task: reason for name in split_list(listed) for task, reason in NOT_RUN.get(name, {}).items()}


def whole(keys: Iterable[str]) -> list[str]:
    """The keys of the whole set that some keys belong to: of the first set that has them all, or else only these."""
    given = list(keys)
    for benchmarks in SETS.values():
        of_set = [benchmark.key for benchmark in benchmarks if benchmark.is_scored]
        if set(given) <= set(of_set):
            return of_set
    return given


def task_type(task: str, output_type: str) -> str:
    """The type of a task: that of the first set that has it, or else what goes with its output type in the harness."""
    of_sets = {benchmark.task: benchmark.task_type for set_ in reversed(SETS.values()) for benchmark in set_}
    return of_sets.get(task) or TASK_TYPE_OF_OUTPUT.get(output_type, "")
