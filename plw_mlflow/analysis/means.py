"""Raw scores: the mean of each PLW's cells, with its standard error, before anything is fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import pandas as pd

MOST_NAMED = 5  # tasks in a note


def mean_scores(table: pd.DataFrame, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """PLW against the mean score of its cells: rows of curve (data set, and values of `by`), plw, score and error.

    All PLWs of a curve are scored alike: by the models that have cells at each of them, which count alike, on the tasks
    that all cells of these have. The attribute `notes` says what is left out for that, and where no model or no task is
    left, so that the means are of what there is; the attribute `unlike` has the curves whose PLWs no model has all of.

    The standard error is that of a mean over these very models. Where each has several cells of one PLW (seeds, say),
    it is by how these differ; else it is what the number of questions leaves, and NaN where the table does not have the
    scores' own standard errors.
    """
    curve = list(dict.fromkeys(["dataset", *by]))
    rows, notes, unlike = [], list[str](), list[str]()
    for names, part in table.groupby(curve):
        name = ", ".join(map(str, names))
        alike, said, has_all = _alike(part, curve)
        notes += [f"{name}: {text}" for text in said]
        unlike += [] if has_all else [name]
        for plw, (score, error) in _means(alike, curve).items():
            rows.append({"curve": name, "plw": plw, "score": score, "error": error})
    means = pd.DataFrame(rows)
    means.attrs |= {"notes": notes, "unlike": unlike}
    return means


def _alike(part: pd.DataFrame, curve: list[str]) -> tuple[pd.DataFrame, list[str], bool]:
    """A curve's scores that are of the same models and tasks at every PLW, what was left out, and if a model has all.

    A PLW that lacks a weak model, or a hard task, would else look good.
    """
    notes, plws = [], set(part["plw"])
    lacks = {str(model): sorted(plws - set(its["plw"])) for model, its in part.groupby("model")}
    of_all = [model for model, lacking in lacks.items() if not lacking]
    if not of_all:
        notes.append("no model has cells at every PLW, so the means of two PLWs may be of different models")
    elif len(of_all) < len(lacks):
        told = [f"{model} (no cells at PLW {_numbers(lacking)})" for model, lacking in lacks.items() if lacking]
        notes.append(f"the means leave out {', '.join(told)}")
        part = part[part["model"].isin(of_all)]
    cell = list(dict.fromkeys([*curve, "model", "seed", "plw"]))
    counts = part.drop_duplicates([*cell, "task"])["task"].value_counts()
    shared = counts.index[counts == len(part.drop_duplicates(cell))]
    if len(shared) == 0:
        notes.append("no task is scored in every cell, so the means of two PLWs may be of different tasks")
    elif len(shared) < len(counts):
        notes.append(f"the means leave out {_named(set(counts.index) - set(shared))} (some cells lack them)")
        part = part[part["task"].isin(shared)]
    return part, notes, bool(of_all)


def _means(part: pd.DataFrame, curve: list[str]) -> dict[Any, tuple[float, float]]:
    """The mean score of each PLW of a curve, and its standard error."""
    keys = list(dict.fromkeys([*curve, "model", "seed", "plw"]))
    errors = {"variance": ("stderr", lambda errors: (errors**2).sum(skipna=False))} if "stderr" in part else {}
    cells = part.groupby(keys, dropna=False).agg(score=("score", "mean"), tasks=("score", "size"), **errors)
    found: dict[Any, tuple[float, float]] = {}
    for plw, group in cells.reset_index().groupby("plw"):
        scores, error = group.groupby("model")["score"], math.nan
        models, seeds = len(scores), scores.size()
        if seeds.min() > 1:
            error = math.sqrt((scores.var(ddof=1) / seeds).sum()) / models
        elif "variance" in group:
            variance = (group["variance"] / group["tasks"] ** 2).groupby(group["model"]).sum(min_count=1)
            error = math.sqrt((variance / seeds**2).sum(skipna=False)) / models
        found[plw] = float(scores.mean().mean()), error
    return found


def _numbers(plws: Sequence[float]) -> str:
    return ", ".join(f"{plw:g}" for plw in plws)


def _named(tasks: Set[str]) -> str:
    named = sorted(tasks)[:MOST_NAMED]
    return f"{', '.join(named)}" + f" and {len(tasks) - MOST_NAMED} more" * (len(tasks) > MOST_NAMED)


def in_words(score: float, error: float) -> str:
    """A mean with its standard error, if there is one."""
    return f"{score:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
