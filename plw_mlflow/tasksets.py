"""Task sets: which benchmarks stand together, how each is run, and which of its metrics makes its score.

The two named after the study, arXiv:2401.13586, run what it ran as far as that is known; docs/evaluation.md says where
they differ, and what is not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from plw_mlflow.config import names


@dataclass(frozen=True)
class Benchmark:
    """One task, as a set runs it."""

    task: str  # of lm-evaluation-harness, or of plw_mlflow/tasks
    metric: str | None = None  # the one that stands for the task (unset: the first of which more is better)
    num_fewshot: int | None = None  # examples before each question (unset: the task's own number)
    task_type: str | None = None  # as the study sorts its tasks (unset: by what the task asks of a model)
    is_scored: bool = True  # whether it has a row in the score table, and counts in `score`

    @property
    def key(self) -> str:
        """The measurement that makes the score, as `key` has it."""
        return key(self.task, str(self.metric), self.num_fewshot or 0)


def key(task: str, metric: str, num_fewshot: int) -> str:
    """What one number in `score` is, as TASK/METRIC@SHOTS. The same task with other shots is another measurement."""
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
    # Version 4 sorts its tasks anew. Which of TruthfulQA-Gen's metrics it used is not known.
    "huerta2024-v4": (
        *CHOICE,
        Benchmark("truthfulqa_mc2", "acc", 0, "multiple-choice"),
        Benchmark("truthfulqa_gen", "bleu_acc", 0, "short-generation"),
        *_translation("short-generation", *WMT, "wmt16-en-ro", "wmt16-ro-en"),
    ),
}

# What a set has that is not run, and why: it counts nowhere, least of all as zero.
NOT_RUN: dict[str, dict[str, str]] = {
    "huerta2024-v4": {
        "alpaca_eval": "its answers are judged by Mixtral 8x7B",
        "pandalm": "its answers are judged by PandaLM 7B",
    }
}


def _named(name: str) -> tuple[Benchmark, ...]:
    """What one name of a list means: a set, a part of it, or whatever the harness knows by that name."""
    of, _, part = name.partition(":")
    if not part or of not in SETS:
        return SETS.get(name, (Benchmark(name),))
    found = tuple(one for one in SETS[of] if one.task == part)
    if not found:
        raise ValueError(f"set {of} has no task {part!r}; it has {', '.join(one.task for one in SETS[of])}")
    return found


def select(listed: str) -> list[Benchmark]:
    """The benchmarks that a comma-separated list of sets, SET:TASK, tasks and groups names, each once.

    A task that is also named by itself is run as the set has it. Raises ValueError where two sets differ in one, and
    for a part that a set has not.
    """
    found: dict[str, Benchmark] = {}
    for name in names(listed):
        for benchmark in _named(name):
            alone = Benchmark(benchmark.task)
            other = found.get(benchmark.task, alone)
            if alone not in (other, benchmark) and other != benchmark:
                raise ValueError(
                    f"the sets in tasks {listed} differ in how they run or score {benchmark.task}; score them apart"
                )
            found[benchmark.task] = other if benchmark == alone else benchmark
    return list(found.values())


def not_run(listed: str) -> dict[str, str]:
    """The tasks of the named sets that are not run, with the reason."""
    return {task: reason for name in names(listed) for task, reason in NOT_RUN.get(name, {}).items()}


def whole(keys: Iterable[str]) -> list[str]:
    """The set that some scores (by `key`) are part of, by key: the first of SETS that has them all, or they alone."""
    given = list(keys)
    for benchmarks in SETS.values():
        listed = [one.key for one in benchmarks if one.is_scored]
        if set(given) <= set(listed):
            return listed
    return given


def task_type(task: str) -> str | None:
    """The type that the first set with a task gives it."""
    return next((one.task_type for some in SETS.values() for one in some if one.task == task), None)
