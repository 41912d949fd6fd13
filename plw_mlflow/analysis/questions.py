"""Question by question: two PLWs compared by what their runs answered to the same questions.

Every evaluation keeps each question's score (`questions.parquet`). The questions of two runs are the same where the
digests of their documents are; runs that were asked different ones are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from plw_mlflow.analysis.statistics import multiple_testing, paired
from plw_mlflow.analysis.statistics.paired import Comparison, Tested
from plw_mlflow.config import HELD_OUT
from plw_mlflow.environment import outputs
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array

FILE = outputs.QUESTIONS
CELL = ["dataset", "model", "plw", "seed"]
COLUMNS = ["task", "metric", "doc_id", "document", "value"]  # what is used of each question
MOST_NAMED = 5  # questions that differ, in an error

Values = dict[tuple[float, int], Array]  # by PLW and seed, the value on each question of a task, [Q]


@dataclass(frozen=True)
class Row:
    """One PLW compared with another on one task, or on all of them together."""

    group: dict[str, str]  # data set, model, and what else curves are told apart by
    plw: float
    against: float
    task: str
    metric: str
    tasks: int
    seeds: tuple[int, int]  # of each PLW
    are_paired: bool  # whether these are the same seeds
    found: Comparison
    holm_p: float = float("nan")  # of `found.paired`
    luck_holm_p: float = float("nan")  # of `found.with_luck`


@dataclass(frozen=True)
class Compared:
    """All comparisons with one PLW."""

    against: float
    rows: list[Row]
    plws: int  # of the data set that has most
    notes: list[str] = field(default_factory=list)


def read_beside(scores: Path, also: tuple[str, ...] = ()) -> pd.DataFrame:
    """The questions in the folder of a score table. Raises UserError where there are none that can be read."""
    path = scores.parent / FILE
    if not path.is_file():
        raise UserError(
            f"against compares by {path}, which is not there; main, evaluate and sweep write it beside scores.csv"
        )
    cell = [*CELL, *(name for name in also if name not in CELL)]
    try:
        table = pd.read_csv(scores, dtype=str, keep_default_na=False, skipinitialspace=True)
        table = _named(table[[*cell, "task", "metric"]], cell)
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        raise UserError(
            f"{scores} is no score table with the columns {', '.join(cell)}, task, metric ({error})"
        ) from None
    try:
        questions = _named(pd.read_parquet(path, columns=[*cell, *COLUMNS]), cell)
    except Exception as error:  # pyarrow's errors have no common base but this
        raise UserError(f"{path} holds no questions as main, evaluate and sweep write them ({error})") from None
    of_table = questions.merge(table[cell].drop_duplicates(), on=cell)
    if of_table.empty:
        raise UserError(f"{path} holds no questions of the runs in {scores}; they belong to another score table")
    of_table.attrs["metrics"] = dict(zip(table["task"], table["metric"], strict=True))
    return of_table


def _named(table: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """The table with PLWs and seeds as numbers and what else names a cell as text, as a CSV file has all of it."""
    kinds = {"plw": float, "seed": int}
    return table.astype({name: float if name in kinds else str for name in cell}).astype(kinds)


def compare(
    questions: pd.DataFrame, against: float, other: float | None = None, also: tuple[str, ...] = ()
) -> Compared:
    """Compare PLWs question by question, on each data set and model by itself.

    questions: a row for each question and metric of a run, of many runs. `attrs["metrics"]` has the metric to compare
    each task by, and `attrs["notes"]`, if it is there, a line on what is not among the questions. other: the only PLW
    that is compared with `against` (unset: all). also: columns beside data set and model that tell curves apart.

    Raises UserError where runs were asked different questions, and where no data set and model has runs to compare.
    """
    notes = list(questions.attrs.get("notes", []))
    # Each metric of held-out records is compared by itself.
    is_held_out = questions["task"].str.startswith(HELD_OUT)
    by_metric = questions["task"].where(~is_held_out, questions["task"] + " " + questions["metric"])
    questions = questions.assign(task=by_metric)
    of_held_out = questions[is_held_out].drop_duplicates("task")
    metrics = questions.attrs["metrics"] | dict(zip(of_held_out["task"], of_held_out["metric"], strict=True))
    questions = questions[questions["metric"] == questions["task"].map(metrics)]
    names = list(dict.fromkeys(["dataset", "model", *also]))
    rows: list[Row] = []
    lacking: list[str] = []
    for _, part in questions.groupby(names, dropna=False):
        group = {name: str(part[name].iloc[0]) for name in names}
        tasks: dict[str, Values] = {}
        for task, of_task in part.groupby("task"):
            if of_task["value"].isna().any():
                notes.append(f"{task} is left out: {metrics[str(task)]} has no value for a single question")
            else:
                tasks[str(task)] = _values(of_task, str(task), group)
        tried = sorted({plw for values in tasks.values() for plw, _ in values})
        if missing := [plw for plw in (against, other) if plw is not None and plw not in tried]:
            there = ", ".join(f"{plw:g}" for plw in tried) or "none"
            lacking.append(f"{_words(group)}: no questions of PLW {missing[0]:g}; there are those of PLW {there}")
            continue
        pairs = [plw for plw in tried if plw != against and other in (None, plw)]
        rows += _corrected(list(_rows(group, tasks, metrics, against, pairs)))
    if not rows:
        lonely = f"no two PLWs to compare: there is none beside {against:g} with questions of the same task"
        raise UserError("; ".join(lacking) or lonely)
    plws = int(questions.groupby("dataset")["plw"].nunique().max())
    return Compared(against, rows, plws, list(dict.fromkeys([*notes, *lacking])))


def _values(of_task: pd.DataFrame, task: str, group: dict[str, str]) -> Values:
    """Each run's values on the questions of a task. Raises UserError where runs were asked different ones."""
    documents = of_task.groupby("doc_id")["document"].nunique()
    changed = [int(number) for number in documents.index[documents > 1]]
    wide = of_task.pivot_table(index="doc_id", columns=["plw", "seed"], values="value", aggfunc="first", sort=True)
    runs = [(float(run[0]), int(run[1])) for run in wide.columns]
    if changed:
        digests = of_task[of_task["doc_id"] == changed[0]].groupby("document")[["plw", "seed"]].first()
        which = " and ".join(f"PLW {row.plw:g} seed {row.seed:g}" for row in digests.itertuples())
        raise UserError(
            f"{_words(group)}: runs were asked different questions of {task}: document {_some(changed)} of {which} "
            "are not the same text; score these runs again on one version of the benchmark (evaluate --run-id)"
        )
    absent = wide.isna()
    if absent.to_numpy().any():
        run = runs[int(absent.any().to_numpy().argmax())]
        numbers = [int(number) for number in wide.index[absent[run]]]
        raise UserError(
            f"{_words(group)}: runs were asked different questions of {task}: PLW {run[0]:g} seed {run[1]} was not "
            f"asked document {_some(numbers)}, which others were; score all with the same --limit (evaluate --run-id)"
        )
    return dict(zip(runs, wide.to_numpy().T, strict=True))


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    return shown + (f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else "")


def _words(group: dict[str, str]) -> str:
    return ", ".join(group.values())


def _rows(
    group: dict[str, str], tasks: dict[str, Values], metrics: dict[str, str], against: float, plws: list[float]
) -> Iterator[Row]:
    """The comparisons of one group: for each PLW, on its benchmarks together if there are several, and on each task."""
    for plw in plws:
        both = [task for task, values in tasks.items() if {plw, against} <= {one for one, _ in values}]
        benchmarks = [task for task in both if not task.startswith(HELD_OUT)]
        for chosen in ([benchmarks] if len(benchmarks) > 1 else []) + [[task] for task in both]:
            of_these = [tasks[task] for task in chosen]
            mine, theirs, are_paired = _seeds(of_these, plw, against)
            if not mine or not theirs:
                continue  # the tasks were scored in different runs
            first, second = (
                [np.stack([values[one, seed] for seed in seeds]) for values in of_these]
                for one, seeds in ((plw, mine), (against, theirs))
            )
            found = paired.compare(first, second, _luck(of_these, are_paired=are_paired))
            name = chosen[0] if len(chosen) == 1 else f"mean of {len(chosen)} tasks"
            metric = metrics[chosen[0]] if len(chosen) == 1 else ""
            yield Row(group, plw, against, name, metric, len(chosen), (len(mine), len(theirs)), are_paired, found)


def _seeds(tasks: list[Values], plw: float, against: float) -> tuple[list[int], list[int], bool]:
    """The seeds of the runs to compare: those that both PLWs have on all tasks, or else each PLW's own."""
    mine, theirs = (
        set.intersection(*({seed for one, seed in values if one == of} for values in tasks)) for of in (plw, against)
    )
    common = mine & theirs
    return (sorted(common), sorted(common), True) if common else (sorted(mine), sorted(theirs), False)


def _luck(tasks: list[Values], *, are_paired: bool) -> paired.Luck | None:
    """The luck of training, of the mean over tasks, that the runs of all PLWs show which have them all."""
    runs = sorted(set.intersection(*(set(values) for values in tasks)))
    scores = np.array([np.mean([values[run].mean() for values in tasks]) for run in runs])
    noise = {
        plw: sum(paired.answer_noise(np.stack([values[run] for run in runs if run[0] == plw])) for values in tasks)
        / len(tasks) ** 2
        for plw in {plw for plw, _ in runs}
    }
    seeds = [seed if are_paired else 0 for _, seed in runs]
    return paired.luck_of(scores, np.array([noise[plw] for plw, _ in runs]), [plw for plw, _ in runs], seeds)


def _corrected(rows: list[Row]) -> list[Row]:
    """Rows with p-values corrected by Holm, for each other: benchmarks, their means, and held-out records apart."""
    corrected = []
    for kind in {_kind(row) for row in rows}:
        family = {number: row for number, row in enumerate(rows) if _kind(row) == kind}
        plain = multiple_testing.adjust_by_holm({number: row.found.paired.p for number, row in family.items()})
        lucky = multiple_testing.adjust_by_holm(
            {number: row.found.with_luck.p for number, row in family.items() if row.found.with_luck is not None}
        )
        corrected += [
            (number, replace(row, holm_p=plain[number], luck_holm_p=lucky.get(number, float("nan"))))
            for number, row in family.items()
        ]
    return [row for _, row in sorted(corrected, key=lambda pair: pair[0])]


def _kind(row: Row) -> str:
    return "held-out" if row.task.startswith(HELD_OUT) else "mean" if row.tasks > 1 else "benchmark"


# ------------------------------------------------------------------------------------------------- telling


def frame(compared: Compared) -> pd.DataFrame:
    """A row per comparison."""
    return pd.DataFrame([_flat(row) for row in compared.rows])


def _flat(row: Row) -> dict[str, object]:
    found, luck = row.found, row.found.with_luck
    return {
        **row.group,
        "against": row.against,
        "plw": row.plw,
        "task": row.task,
        "metric": row.metric,
        "seeds": row.seeds[0],
        "seeds_against": row.seeds[1],
        "seeds_are_paired": row.are_paired,
        "questions": found.questions,
        "difference": found.difference,
        "error": found.paired.error,
        "low": found.paired.low,
        "high": found.paired.high,
        "test": found.test,
        "gained": found.gained,
        "lost": found.lost,
        "p": found.paired.p,
        "holm_p": row.holm_p,
        "unpaired_error": found.unpaired.error,
        "unpaired_p": found.unpaired.p,
        "with_luck_error": None if luck is None else luck.error,
        "with_luck_low": None if luck is None else luck.low,
        "with_luck_high": None if luck is None else luck.high,
        "with_luck_p": None if luck is None else luck.p,
        "with_luck_holm_p": None if luck is None else row.luck_holm_p,
    }


def groups(compared: Compared) -> list[tuple[str, list[Row]]]:
    """The rows of each data set, model and further column, under its name."""
    named: dict[str, list[Row]] = {}
    for row in compared.rows:
        named.setdefault(_words(row.group), []).append(row)
    return list(named.items())


def text(compared: Compared) -> str:
    """As the terminal shows it: a table for each data set and model, and what its columns are of."""
    lines = []
    for name, rows in groups(compared):
        width = max(len(row.task) for row in rows)
        has_luck = any(row.found.with_luck is not None for row in rows)
        lines += [
            "",
            f"{name}: PLWs less PLW {compared.against:g}, question by question (Holm-corrected p in brackets)",
        ]
        head = f"{'PLW':>6}  {'task':{width}}  questions  seeds  {'difference':10}  {'95 % interval':18}  {'p':17}"
        lines.append(head + "  unpaired p" + "  with luck: 95 %     p" * has_luck)
        for row in rows:
            found, luck = row.found, row.found.with_luck
            seeds = "/".join(map(str, dict.fromkeys(row.seeds)))
            line = (
                f"{row.plw:6g}  {row.task:{width}}  {found.questions:9}  {seeds:>5}"
                f"  {found.difference:+10.4f}  {reach(found.paired):18}  {in_brackets(found.paired.p, row.holm_p):17}"
                f"  {found.unpaired.p:<10.2g}"
            )
            if luck is not None:
                line += f"  {reach(luck):18}  {in_brackets(luck.p, row.luck_holm_p)}"
            lines.append(line.rstrip())
        lines += [f"  {sentence}" for sentence in meaning(rows)]
    return "\n".join([*lines[1:], *(f"note: {note}" for note in compared.notes)])


def reach(tested: Tested) -> str:
    return f"{tested.low:+.4f} to {tested.high:+.4f}"


def in_brackets(p: float, holm_p: float) -> str:
    return f"{p:.2g} ({holm_p:.2g})"


def meaning(rows: Sequence[Row]) -> list[str]:
    """What the p-values of a group's comparisons are of, in sentences."""
    tests = sorted({row.found.test for row in rows if row.tasks == 1})
    sentences = [
        f"The first interval and p ({' or '.join(tests)}) are of these trained models, on other questions like these. "
        "The unpaired p is by the two scores' own standard errors, which leave unused that the questions are the same."
    ]
    have_luck = {row.found.with_luck is not None for row in rows}
    if True in have_luck:
        sentences.append(
            "Luck of training is in the last interval and p alone, as far as the seeds show it: they say whether PLW "
            "makes a difference, the first ones whether these models differ."
        )
    if False in have_luck:
        which = "Where there are none of these" if True in have_luck else "Luck of training is not in them"
        sentences.append(
            f"{which}, as too few PLWs have several seeds, a difference may be one of two trainings, and not of PLW. "
            "Two seeds of each PLW would show that luck."
        )
    if any(not row.are_paired for row in rows):
        sentences.append("Where two PLWs have no seed in common, the means over the seeds of each are compared.")
    if any(row.metric == "completion_loss" for row in rows):
        sentences.append("A completion_loss is in nats a token, the mean over records, and less of it is better.")
    if any(row.metric == "bleu" for row in rows):
        sentences.append("BLEU is that of each sentence here, whose mean is not the BLEU of the corpus.")
    return sentences
