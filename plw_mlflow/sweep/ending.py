"""Ending: what a sweep says when its cells have ended: PLW against score, the verdict, and where to look."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pandas as pd

from plw_mlflow import drawing, tracking
from plw_mlflow.analysis import analyze, report, wording
from plw_mlflow.analysis.answers import Analysis
from plw_mlflow.analysis.means import in_words, mean_scores
from plw_mlflow.config import SweepConfig, counted, digest
from plw_mlflow.environment import outputs
from plw_mlflow.evaluation import questions, task_sets
from plw_mlflow.sweep.account import Account
from plw_mlflow.tracking import pages

OF_ANSWERS = ("p", "peak_plw", "p_other_tasks")  # metrics of the sweep's run
FENCE = "```"  # around a table in Markdown
MAX_LISTED = 10  # failed cells in the run's description, which has a limit
MAX_FIGURES = 3  # in the run's description
FIGURE_PIXELS = 760  # of width there, where MLflow shows figures in their own size
SHOWN = "description"  # the folder of the files that the run's description shows
FAILURE_CHARACTERS = 200  # of the reason of each there


def end(config: SweepConfig, account: Account, decided: Sequence[str] = ()) -> None:
    """Analyse the finished cells, mark the best model, and print and log what came out.

    Where nothing has changed since the last analysis, which another process may have made, that one's words are shown.

    decided: what the description is to tell of how the cells were chosen.
    """
    run = account.sweep.run
    runs = {cell.identity: account.finished_attempt(cell).run_id for cell in account.finished}
    with account.sweep.sole("end"):
        analysed = digest(runs | {"shown": SHOWN})  # analyses of earlier versions have left no figures for the page
        said = run.read_tag("conclusion") if run.read_tag("analysed") == analysed else None
        if said is not None and config.output is not None:
            outputs.write(config.output, run.files(_report_files(run)))
        if said is None and runs:
            mark_best = partial(tracking.mark_best, run.id, set(runs.values()), len(account.cells))
            # One sweep at a time, since the worse of two that end together could be the last to move the alias. The
            # price is that one waits while the other merges its best adapter.
            is_complete = len(runs) == len(account.cells)
            with account.sweep.sole_in_store("best") if is_complete else nullcontext():
                best = tracking.patiently("marking the best model", mark_best)
            said = "\n\n".join([*_analyse(config, account, set(runs.values())), *best])
            run.tag(conclusion=said, analysed=analysed)
        print("\n" + "\n".join(line for line in (said or "").splitlines() if line != FENCE))
        if config.output is not None and runs:
            print("\n".join(_write_questions(config.output, run, config.by(), set(runs.values()))))
        cells = account.sweep.save_view(config.sweep_name(), (run.read_tag("tasks") or "").split(), config.differing())
        run.describe("\n\n".join(_description(account, said or "", cells, decided)))
    print("\n" + "\n".join([_counts(account), *_remarks(account)]))
    if "report.html" in _report_files(run):
        print(f"report: {config.output / 'report.html' if config.output else f'report.html of run {run.id}'}")
    print(f"run {run.id}\n{run.address()}\nits cells: {pages.address(cells)}")


def _description(account: Account, said: str, cells: str, decided: Sequence[str]) -> list[str]:
    """What the sweep's page says first, in Markdown: the answer, links, curves, means, and what became of its cells.

    cells: the page that lists these.
    """
    run, files = account.sweep.run, _report_files(account.sweep.run)
    answer = sorted(said.split("\n\n"), key=lambda part: part.startswith(FENCE))  # the table of means last
    links = [f"[cells with PLW, prompt share and score]({cells})", f"[charts]({pages.charts(cells)})"]
    if "report.html" in files:
        links.append(f"[the report]({account.sweep.file_page('report.html')})")
    figures = [pages.image(run.id, f"{SHOWN}/{name}", "score against PLW") for name in _curves(files)]
    told = [*_remarks(account), *_failures(account), *decided]
    return [*answer[:1], " · ".join([*links, _counts(account)]), *figures, *answer[1:], *told]


def _curves(files: Sequence[str]) -> list[str]:
    """Those of a report's files that show score against PLW, as many as the run's description shows."""
    return [name for name in files if name.startswith("curve-") and name.endswith(".png")][:MAX_FIGURES]


def _report_files(run: tracking.Run) -> list[str]:
    """The names of the files that the last analysis has logged."""
    return (run.read_tag("report_files") or "").split()


def _counts(account: Account) -> str:
    finished, failed = len(account.finished), len(account.failed)
    return f"{finished} of {counted(len(account.cells), 'cell')} finished" + (f", {failed} failed" if failed else "")


def _remarks(account: Account) -> list[str]:
    """What has to be said of the scores of the finished cells."""
    told = {task_sets.remark(cell.config.tasks, cell.config.dataset) for cell in account.finished}
    return sorted(filter(None, told))


def _failures(account: Account) -> list[str]:
    """The cells that have failed, with the reason of each, as a list in Markdown."""
    failed = [account.failure(cell) for cell in account.failed]
    lines = [
        f"- {text if len(text) <= FAILURE_CHARACTERS else text[: FAILURE_CHARACTERS - 2] + ' …'}" for text in failed
    ]
    more = [f"- and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return ["Failed:\n" + "\n".join(lines[:MAX_LISTED] + more)] if lines else []


def _analyse(config: SweepConfig, account: Account, finished: set[str]) -> list[str]:
    """Fit the scores of the finished cells and log the report; gives the table and the verdicts, in Markdown.

    finished: their runs.

    If they cannot be fitted (with two PLWs, say), a line says why.
    """
    run = account.sweep.run
    also = config.by()
    try:
        table = tracking.patiently(
            "reading the scores", lambda: tracking.score_table(sweep=run.id, also=also, only=finished)
        )
    except ValueError as error:
        return [f"The scores are not analysed: {error}"]
    said = [f"{FENCE}\n{means(table, also)}\n{FENCE}"]
    numbers = _best(table, also)
    run.tag(tasks=" ".join(dict.fromkeys(f"{row.task}/{row.metric}" for row in table.itertuples())))
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.output or Path(scratch)
        files = outputs.write(folder, {"scores.csv": outputs.table(table)})
        try:
            analysis = analyze.analyze(table, by=also)
        except ValueError as error:
            said += [f"Note: {note}" for note in table.attrs["notes"]]  # which otherwise are in the report
            said.append(f"The scores are not analysed: {error}")
        else:
            command = f"python -m entrypoints.analyze --run-id {run.id}" + (f" --by {','.join(also)}" if also else "")
            files += report.write(analysis, table, folder, command)
            tracking.log_regression(folder / "fit.json")
            said.append(wording.verdicts(analysis))
            numbers |= _peaks(analysis)
        gone = [name for name in run.metrics() if name.rpartition("/")[2] in OF_ANSWERS]  # of an earlier analysis
        run.log_metrics(dict.fromkeys(gone, math.nan) | numbers)
        run.log_files(files)
        for name in _curves([file.name for file in files]):
            run.log_bytes(f"{SHOWN}/{name}", drawing.smaller((folder / name).read_bytes(), FIGURE_PIXELS))
        run.tag(report_files=" ".join(sorted(file.name for file in files)))
    return said


def _write_questions(folder: Path, run: tracking.Run, also: tuple[str, ...], finished: set[str]) -> list[str]:
    """Write every question's scores of all cells into the output folder; gives a line on each that has kept none.

    They are only there, as each cell's run has its own already.
    """
    try:
        asked = tracking.questions(sweep=run.id, also=also, only=finished)
    except ValueError as error:  # cells of earlier versions have kept none, or are not comparable
        return [f"note: {outputs.QUESTIONS} is not written: {error}"]
    outputs.write(folder, {outputs.QUESTIONS: questions.parquet(asked)})
    return [f"note: {note}" for note in asked.attrs["notes"]]


def _best(table: pd.DataFrame, by: tuple[str, ...]) -> dict[str, float]:
    """The highest mean score of the cells that differ in nothing but their seed, and its PLW."""
    scores = table.groupby(list(dict.fromkeys([*by, "dataset", "model", "plw"])), dropna=False)["score"].mean()
    return {"best_score": float(scores.max()), "best_plw": float(scores.index.tolist()[int(scores.argmax())][-1])}


def _peaks(analysis: Analysis) -> dict[str, float]:
    """The p-values of each data set's two answers, and where its tasks' mean curve peaks, as far as the runs tell."""
    numbers: dict[str, float] = {}
    for answer in analysis.answers:
        before = f"{answer.dataset}/" if len(analysis.answers) > 1 else ""
        values = (answer.these_tasks.p, answer.these_tasks.peak_plw, answer.other_tasks.p)
        numbers |= {before + name: value for name, value in zip(OF_ANSWERS, values, strict=True) if value is not None}
    return numbers


def means(table: pd.DataFrame, by: tuple[str, ...] = ()) -> str:
    """PLW against the mean score of its cells, with its standard error: a line a PLW, a column a data set.

    Below are lines on what was left out.
    """
    rows = mean_scores(table, by)
    rows["shown"] = [in_words(score, error) for score, error in zip(rows["score"], rows["error"], strict=True)]
    wide = rows.pivot_table(index="plw", columns="curve", values="shown", aggfunc="first", sort=True)
    wide.index = [f"{plw:g}" for plw in wide.index]
    wide.index.name = "PLW"
    wide.columns.name = None
    return "\n".join([wide.reset_index().to_string(index=False, na_rep=""), *rows.attrs["notes"]])
