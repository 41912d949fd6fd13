"""Ending: what a sweep says when its cells have ended: PLW against score, the verdict, and where to look."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from plw_mlflow import tracking
from plw_mlflow.analysis import analyze, report, wording
from plw_mlflow.config import SweepConfig, digest
from plw_mlflow.environment import outputs
from plw_mlflow.sweep.account import Account

IN_DATA_NAME = ("invert", "mix", "mix_invert", "mix_share")  # options that the data set's name contains


def end(config: SweepConfig, account: Account, decided: Sequence[str] = ()) -> None:
    """Analyse the finished cells, mark the best model, and print and log what came out.

    Where nothing has changed since the last analysis, which another process may have made, that one's words are shown.

    decided: what the description is to tell of how the cells were chosen.
    """
    finished, failed = len(account.finished), len(account.failed)
    counts = f"{finished} of {len(account.cells)} cells finished" + (f", {failed} failed" if failed else "")
    print(f"\n{counts}", flush=True)
    runs = {cell.identity: account.finished_attempt(cell).run_id for cell in account.finished}
    run, of_runs = account.sweep.run, digest(runs)
    with account.sweep.sole("end"):
        if run.read_tag("analysed") == of_runs and config.output is None:
            print("\n" + account.sweep.description().partition("\n\n")[2])
        elif runs:
            print("\n".join(tracking.mark_best(run.id, len(account.cells))))
            account.sweep.describe("\n\n".join([counts, *_analyse(config, account), *decided]))
            run.tag(analysed=of_runs)
        else:
            account.sweep.describe(counts)


def _analyse(config: SweepConfig, account: Account) -> list[str]:
    """Fit the scores of the finished cells, log the report, and print and give the tables and the verdicts.

    If they cannot be fitted (with two PLWs, say), a line says why.
    """
    run = account.sweep.run
    also = tuple(name for name in config.listed() if name not in IN_DATA_NAME)
    try:
        table = tracking.score_table(sweep=run.id, also=also)
    except ValueError as error:
        print(f"the scores are not analysed: {error}")
        return []
    for note in table.attrs["notes"]:
        print(f"note: {note}")
    text = means(table, also)
    print(f"\n{text}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.output or Path(scratch)
        run.log_files(outputs.write(folder, {"scores.csv": outputs.table(table)}))
        try:
            analysis = analyze.analyze(table, by=also)
        except ValueError as error:
            print(f"the scores are not analysed: {error}")
            return [text]
        command = f"python -m entrypoints.analyze --run-id {run.id}" + (f" --by {','.join(also)}" if also else "")
        run.log_files(report.write(analysis, table, folder, command))
        tracking.log_regression(folder / "fit.json")
        verdicts = wording.table_text(analysis)
        print(f"\n{verdicts}")
        return [text, verdicts]


def means(table: pd.DataFrame, by: tuple[str, ...] = ()) -> str:
    """PLW against the mean score of its cells, with its standard error: a line a PLW, a column a data set.

    A cell's score is the mean of its tasks'. With several cells of one PLW and data set (seeds, say), the standard
    error is that of their mean; with one, it is that which the number of questions leaves.
    """
    curve = ["dataset", *by]
    cells = table.groupby([*curve, "model", "seed", "plw"], dropna=False).agg(
        score=("score", "mean"),
        tasks=("score", "size"),
        **({"variance": ("stderr", lambda errors: (errors**2).sum(skipna=False))} if "stderr" in table else {}),
    )
    lines: dict[str, dict[object, str]] = {}
    for key, group in cells.reset_index().groupby([*curve, "plw"]):
        *names, plw = key
        error = math.nan
        if len(group) > 1:
            error = group["score"].std(ddof=1) / math.sqrt(len(group))
        elif "variance" in group:
            error = math.sqrt(group["variance"].iloc[0]) / group["tasks"].iloc[0]
        shown = f"{group['score'].mean():.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
        lines.setdefault(", ".join(map(str, names)), {})[plw] = shown
    wide = pd.DataFrame(lines).sort_index()
    wide.index = [f"{plw:g}" for plw in wide.index]
    wide.index.name = "PLW"
    return wide.reset_index().to_string(index=False, na_rep="")
