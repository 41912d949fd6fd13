"""The report: one HTML file that answers whether PLW matters here, and every file an analysis leaves.

Jinja2 escapes whatever comes from the data; figures are embedded, so the file can be mailed or logged as it is. The
page's text is in assets/report.html; what the text speaks of is gathered here.
"""

from __future__ import annotations

import base64
import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from plw_mlflow import __version__, drawing
from plw_mlflow.analysis import figures, optima, questions, residuals, wording
from plw_mlflow.analysis.answers import Analysis, Answer
from plw_mlflow.analysis.axes import MOST_TASKS, percent, transform_of
from plw_mlflow.analysis.exports import answers_csv, axes_csv, fits_csv, tasks_csv, to_json
from plw_mlflow.analysis.findings import ON_THESE
from plw_mlflow.analysis.means import in_words, mean_scores
from plw_mlflow.analysis.optima import estimate_rows, estimates
from plw_mlflow.analysis.questions import Compared
from plw_mlflow.analysis.score_table import RUN, SCORE, check, rescale
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.analysis.wording import (
    highest_end,
    interval,
    joint_words,
    name_test,
    remarks,
    set_in_words,
    stability,
)
from plw_mlflow.environment import outputs, provenance
from plw_mlflow.errors import UserError, printable
from plw_mlflow.transforms import TERMS

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
MISSING_SHOWN = 100  # rows; fit.json has them all
PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "jinja2")


# ----------------------------------------------------------------------------------------------------- the page


def html(
    analysis: Analysis,
    table: pd.DataFrame,
    described: dict[str, Any],
    drawn: dict[tuple[str, str], bytes],
    command: str,
    compared: Compared | None = None,
) -> str:
    """The report of an analysis of a table.

    described: what fit.json holds. drawn: the SVG of each figure, by `drawings`' keys. command: how to make it again.
    compared: PLWs question by question, if that was asked for.
    """
    missing_tasks: dict[tuple[Any, ...], list[str]] = {}  # by cell
    for row in described["table"]["missing"]:
        missing_tasks.setdefault(tuple(row[column] for column in RUN), []).append(row["task"])
    return (
        _environment()
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            analysis=analysis,
            chapters=[
                {
                    "answer": answer,
                    "colour": colour_of(answer),
                    "estimates": estimate_rows(estimates(answer, analysis.fits_of(answer.dataset))),
                    "stability": stability(answer),
                    "residuals": ("residuals", answer.dataset) in drawn,
                }
                for answer in analysis.answers
            ],
            drawn=drawn,
            refusals=[(*refused, datasets) for refused, datasets in analysis.refusals_by_reason.items()],
            tasks_drawn=MOST_TASKS,
            means=raw_means(table, analysis.by),
            terms=TERMS,
            level=LEVEL,
            models=wording.FIT_WORDS,
            scales=wording.SCALE_WORDS,
            axes=wording.AXIS_WORDS,
            profile=profile(table, analysis.by),
            account=account(table, analysis.by),
            missing=list(missing_tasks.items()),
            missing_scores=len(described["table"]["missing"]),
            missing_shown=MISSING_SHOWN,
            table=described["table"],
            command=command,
            versions=versions(),
            compared=compared,
            compared_groups=[] if compared is None else questions.groups(compared),
            meaning=questions.meaning,
        )
    )


def _environment() -> jinja2.Environment:
    """What turns the template into a page: the escaping, and how numbers and results are written."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "p": lambda value: f"{value:.2g}",
        "plw": lambda value: f"{value:.3g}",
        "estimate": lambda value: f"{value:.4g}",
        "short": lambda value: f"{value:.3g}",
        "share": percent,
        "svg": lambda content: "data:image/svg+xml;base64," + base64.b64encode(content).decode(),
        "interval": optima.interval_text,
        "lead_interval": interval,
        "set": set_in_words,
        "test": name_test,
        "highest": highest_end,
        "joint": joint_words,
        "remarks": remarks,
        "reach": questions.reach,
    }
    return environment


def colour_of(answer: Answer) -> str:
    """How a card is marked: effect, none (as good as none), or unsure."""
    if answer.matters_little:
        return "none"
    return "effect" if answer.these_tasks.kind == "yes" else "unsure"


def raw_means(table: pd.DataFrame, by: tuple[str, ...] = ()) -> dict[str, Any]:
    """PLW against the mean score of its cells: curves, and for each PLW the texts of these, with the highest marked.

    None is marked in curves whose PLWs were scored by different models. The notes say what was left out.
    """
    rows = mean_scores(table, by)
    is_highest = rows["score"] == rows.groupby("curve")["score"].transform("max")
    rows["is_highest"] = is_highest & ~rows["curve"].isin(rows.attrs["unlike"])
    cells = {
        (plw, curve): (in_words(score, error), is_highest)
        for curve, plw, score, error, is_highest in rows.itertuples(index=False, name=None)
    }
    curves = sorted(rows["curve"].unique())
    by_plw = [(plw, [cells.get((plw, curve), ("", False)) for curve in curves]) for plw in sorted(rows["plw"].unique())]
    return {"curves": curves, "rows": by_plw, "notes": rows.attrs["notes"]}


def profile(table: pd.DataFrame, by: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a table of scores holds, before anything is fitted."""

    def listed(part: pd.DataFrame, column: str) -> list[Any]:
        return sorted(part[column].unique().tolist())

    columns = ["model", "plw", "seed", "task"]
    datasets = [
        {"name": name, "runs": len(part.drop_duplicates(list(dict.fromkeys([*RUN, *by])))), "scores": len(part)}
        | {column: listed(part, column) for column in columns}
        for name, part in table.groupby("dataset")
    ]
    tasks = []
    for name, part in table.groupby("task"):
        kinds = listed(part.dropna(subset="task_type"), "task_type") if "task_type" in part else []
        numbers = {"low": part["score"].min(), "mean": part["score"].mean(), "high": part["score"].max()}
        tasks.append({"name": name, "metric": part["metric"].iloc[0], "type": ", ".join(map(str, kinds))} | numbers)
    return {"datasets": datasets, "tasks": tasks, "scores": len(table)} | {
        name: listed(table, name) for name in columns
    }


def account(table: pd.DataFrame, by: tuple[str, ...] = ()) -> dict[str, Any]:
    """How many scores each data set and model (and value of `by`) has at each PLW, and how many are all."""
    names = ["dataset", "model", *(column for column in by if column not in SCORE)]
    counts = table.pivot_table(index=names, columns="plw", values="score", aggfunc="size", fill_value=0)
    return {
        "names": names,
        "plws": counts.columns.tolist(),
        "rows": list(zip(counts.index, counts.to_numpy().tolist(), strict=True)),
        "distinct": len(table.drop_duplicates(SCORE)),
        "full": table["seed"].nunique() * table["task"].nunique(),
    }


def versions() -> dict[str, str]:
    """The versions that made the report: of this package with its commit, of Python, and of the packages it uses."""
    commit = provenance.commit()
    return {
        "plw_mlflow": __version__ + (f" (commit {commit})" if commit else ""),
        "Python": platform.python_version(),
    } | {name: metadata.version(name) for name in PACKAGES}


# ---------------------------------------------------------------------------------------------------- the files


def drawings(analysis: Analysis, scaled: pd.DataFrame) -> dict[tuple[str, str], Figure]:
    """Every figure, by what it shows and the data set (empty for all together); `scaled` is on the analysis' scale."""
    drawn: dict[tuple[str, str], Figure] = {}
    answers, by = analysis.answers, analysis.by
    if len(answers) > 1:
        drawn["overview", ""] = figures.draw_overview(answers, scaled, by)
    if able := [answer for answer in answers if answer.equivalence is not None and not answer.lead.has_too_few_runs]:
        drawn["no-effect", ""] = figures.draw_no_effect(able)
    for answer in answers:
        of_dataset = scaled[scaled["dataset"] == answer.dataset]
        these = analysis.fit_of(answer.dataset, ON_THESE)
        drawn["answer", answer.dataset] = figures.draw_answer(answer, these, of_dataset, by)
        drawn["curve", answer.dataset] = figures.draw_curve(
            answer.lead, of_dataset, by, shows_effect=answer.shows_effect
        )
        drawn["tasks", answer.dataset] = figures.draw_tasks(answer, of_dataset, by)
        shown = estimates(answer, analysis.fits_of(answer.dataset))
        if len(answer.by_task) > MOST_TASKS:
            shown = [estimate for estimate in shown if estimate.group != "Task"]
        drawn["optimum", answer.dataset] = optima.draw_optima(shown, transform_of(answer.lead, of_dataset))
        if len(left := residuals.residuals(answer.lead, of_dataset, by)):
            drawn["residuals", answer.dataset] = residuals.draw_residuals(left)
    panels = [figure.axes[0] for (what, _), figure in drawn.items() if what == "answer"]
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:  # on one axis of scores, so that a small effect looks small
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return drawn


def file_names(keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A file's name, without its ending, for each figure: letters that any file system takes, no two alike."""
    names: dict[tuple[str, str], str] = {}
    slugs: dict[str, str] = {"": ""}
    for _, dataset in keys:
        if dataset not in slugs:
            slug = re.sub(r"[^A-Za-z0-9.-]+", "-", dataset).strip("-.")[:80] or "dataset"
            number, unique = 1, slug  # two names may differ in signs or capitals only
            while unique.lower() in (taken.lower() for taken in slugs.values()):
                unique, number = f"{slug}-{number}", number + 1
            slugs[dataset] = unique
    for what, dataset in keys:
        names[what, dataset] = "-".join(filter(None, [what, slugs[dataset]]))
    return names


def write(
    analysis: Analysis, table: pd.DataFrame, directory: Path, command: str, compared: Compared | None = None
) -> list[Path]:
    """Write an analysis into a directory, and return the files' paths.

    `fit.json`, `report.html`, `fits.csv`, `answers.csv`, `tasks.csv`, `axes.csv` (of several data sets), and every
    figure as PNG and SVG. `table` is the one the analysis is of; its attribute `left_out`, if any, lists what was left
    out of it and why. `command` makes the analysis again. `compared`: PLWs question by question, if that was asked for.
    Everything is made before anything is written, and each file is put in place whole, so an error leaves the directory
    as it was.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; --output takes a directory")
    table = check(table, analysis.by)
    drawn = drawings(analysis, rescale(table, analysis.scale))
    names = file_names(list(drawn))
    svgs = {key: drawing.svg(figure) for key, figure in drawn.items()}
    described = to_json(analysis, table)
    for answer in described["answers"]:
        answer["figure"] = names["curve", answer["dataset"]] + ".png"
    page = html(analysis, table, described, svgs, command, compared)
    contents = {
        "report.html": page.encode(),
        "fit.json": (json.dumps(described, indent=2, allow_nan=False) + "\n").encode(),
    }
    for name, rows_of in (("fits", fits_csv), ("answers", answers_csv), ("tasks", tasks_csv)):
        contents[f"{name}.csv"] = outputs.table(rows_of(described))
    if analysis.joint is not None:
        contents["axes.csv"] = outputs.table(axes_csv(described))
    for key, figure in drawn.items():
        contents |= {f"{names[key]}.png": drawing.png(figure), f"{names[key]}.svg": svgs[key]}

    return outputs.write(directory, contents)
