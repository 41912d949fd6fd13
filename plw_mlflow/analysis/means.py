"""Raw scores: the mean of each PLW's cells, with its standard error, before anything is fitted."""

from __future__ import annotations

import math

import pandas as pd


def mean_scores(table: pd.DataFrame, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """PLW against the mean score of its cells: rows of curve (data set, and values of `by`), plw, score and error.

    A cell's score is the mean over the tasks that all cells of its curve are scored on; where there is no such task,
    over those it has. Where each model has several cells of one PLW (seeds, say), the standard error is that of the
    mean over models, models being given; else it is that which the number of questions leaves, and NaN where the table
    does not have the scores' own standard errors.
    """
    curve = list(dict.fromkeys(["dataset", *by]))
    table = _on_shared_tasks(table, curve)
    cell = list(dict.fromkeys([*curve, "model", "seed", "plw"]))
    cells = table.groupby(cell, dropna=False).agg(
        score=("score", "mean"),
        tasks=("score", "size"),
        **({"variance": ("stderr", lambda errors: (errors**2).sum(skipna=False))} if "stderr" in table else {}),
    )
    rows = []
    for key, group in cells.reset_index().groupby([*curve, "plw"]):
        *names, plw = key
        scores, error = group.groupby("model")["score"], math.nan
        if scores.size().min() > 1:
            error = math.sqrt((scores.var(ddof=1) / scores.size()).sum()) / len(scores)
        elif "variance" in group:
            error = math.sqrt((group["variance"] / group["tasks"] ** 2).sum()) / len(group)
        rows.append({"curve": ", ".join(map(str, names)), "plw": plw, "score": group["score"].mean(), "error": error})
    return pd.DataFrame(rows)


def _on_shared_tasks(table: pd.DataFrame, curve: list[str]) -> pd.DataFrame:
    """The scores on tasks that all cells of a curve have: a PLW that lacks a hard task would else look good."""
    cell = list(dict.fromkeys([*curve, "model", "seed", "plw"]))
    parts = []
    for _, part in table.groupby(curve, dropna=False):
        cells_of_task = part.drop_duplicates([*cell, "task"])["task"].value_counts()
        shared = cells_of_task.index[cells_of_task == len(part.drop_duplicates(cell))]
        parts.append(part[part["task"].isin(shared)] if len(shared) else part)
    return pd.concat(parts)


def in_words(score: float, error: float) -> str:
    """A mean with its standard error, if there is one."""
    return f"{score:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
