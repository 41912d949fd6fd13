"""The report: one HTML file that answers whether PLW matters here, and every file an analysis leaves.

Jinja2 escapes whatever comes from the data; figures are embedded, so the file can be mailed or logged as it is. What it
says is in assets/report.html, what it is said of is gathered here.
"""

from __future__ import annotations

import base64
import json
import platform
import re
import shlex
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from plw_mlflow import __version__, drawing
from plw_mlflow.analysis import figures
from plw_mlflow.analysis.analyze import (
    EXPONENT,
    LEVEL,
    TERMS,
    Analysis,
    Answer,
    Fit,
    check,
    highest_end,
    interval,
    rescale,
    set_in_words,
    to_json,
)
from plw_mlflow.analysis.figures import OptimumEstimate
from plw_mlflow.analysis.statistics.fitting import JointTest
from plw_mlflow.analysis.statistics.table import RUN, SCORE
from plw_mlflow.environment import outputs, provenance
from plw_mlflow.errors import UserError, printable

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
MISSING_SHOWN = 100  # rows; fit.json has them all
PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "jinja2")

SCALES = {
    "none": "as they are",
    "fraction": "0..100 divided by 100",
    "minmax": "each task 0 to 1",
    "zscore": "each task mean 0, SD 1",
}
TRANSFORMS = {
    "power": f"PLW^{EXPONENT}",
    "logit": "logit of PLW",
    "rank": "rank of PLW",
    "none": "PLW itself",
}
# What each statistical model is, and what it can be trusted for.
FITS = {
    "crossed": (
        "A curve per task by least squares; the mean curve is tested with the tasks as the sample. What a run's luck "
        "adds to all its tasks is counted where residuals show it, and deducted in part where they show less than "
        "none.",
        "For tasks like these, however they differ. Needs four tasks and runs scored on every task; with few tasks it "
        "finds only clear effects.",
    ),
    "task-t": (
        "The same without the runs' luck: t and Hotelling's T² over tasks.",
        "Exact where runs differ by no more than noise; elsewhere its p-values are mostly too small.",
    ),
    "lmm-slopes": (
        "score ~ w_p + w_p² + model + (w_p + w_p² | task) + (1 | run), a residual variance per task, by REML.",
        "For tasks like these; takes incomplete runs and the scores' own standard errors. With few tasks its "
        "likelihood-ratio p is too small; the F test is nearer.",
    ),
    "lmm": (
        "score ~ w_p + w_p² + (1 | task), by REML: the first version of the study.",
        "Takes PLW as moving every task alike and scores as independent. Where either fails, p-values are too small "
        "and intervals too narrow.",
    ),
    "beta": (
        "As lmm, for scores of a beta distribution, on the logit, by Laplace: the study's fourth version.",
        "As lmm, and for scores within 0..1 only. Coefficients are of the logit, not of the score.",
    ),
    "ols-task": (
        "A fixed level per task, least squares: the study's draft.",
        "As lmm, and for these very tasks only.",
    ),
}


@dataclass(frozen=True)
class Claim:
    """What kind of claim an answer is."""

    kind: str  # effect, none (shown to be as good as none), or open, which too few runs are always
    title: str
    meaning: str


def claim(answer: Answer, looks: int) -> Claim:
    """What an answer claims, when `looks` data sets were looked at."""
    lead, equal = answer.lead, answer.equivalence
    if lead.has_too_few_runs:
        return Claim(
            "open",
            "Too few runs to tell",
            "So few runs do not show how much a run's own luck moves its scores, and luck then looks like an effect.",
        )
    is_small = equal is not None and equal.p is not None and equal.p < LEVEL
    if answer.holm_p < LEVEL:
        within = ", smaller than the margin" if is_small else ""
        if lead.optimum_plw is None:
            return Claim(
                "effect",
                f"An effect{within}, no best value inside",
                "The scores change along PLW, but have no peak inside the range: look at its ends.",
            )
        if lead.optimum_set_is_unbounded:
            return Claim(
                "effect",
                f"An effect{within}, its peak not settled",
                "The scores change along PLW and the curve peaks inside the range. But it might as well not bend, and "
                "be highest elsewhere.",
            )
        return Claim(
            "effect",
            f"An effect{within}, and a peak",
            "The scores change along PLW and the curve peaks inside the range. The interval says how well the peak is "
            "located.",
        )
    if is_small and equal is not None:
        return Claim(
            "none",
            "As good as no effect",
            f"This is shown, not just a lack of evidence: every difference between PLWs tried is smaller than the "
            f"margin of {equal.margin:g}.",
        )
    if lead.joint_p < LEVEL:
        return Claim(
            "open",
            "A hint, not a finding",
            f"Significant by itself, but not when corrected for looking at {looks} data sets.",
        )
    limit = ""
    if equal is not None:
        reach = "the whole range" if equal.smallest_margin is None else f"{equal.smallest_margin:.2g}"
        limit = f" Differences of up to {reach} between PLWs are not ruled out."
    return Claim(
        "open", "Open", f"The scores show no effect, and do not show that there is none: a large p is not proof.{limit}"
    )


def estimates(answer: Answer, fits: list[Fit]) -> list[OptimumEstimate]:
    """The best PLW by every model (`fits`, of the answer's data set), bootstrap, type of task and task."""

    def of_fit(group: str, name: str, fit: Fit, is_lead: bool = False) -> list[OptimumEstimate]:
        best = highest_end(fit) if fit.optimum_plw is None else fit.optimum_plw
        delta = [] if fit.delta_interval is None else [fit.delta_interval]
        shared: dict[str, Any] = {
            "plw": fit.optimum_plw,
            "highest": best,
            "interior": fit.interior_probability,
            "is_lead": is_lead,
        }
        rows = [OptimumEstimate(group, name, "delta", intervals=delta, is_unbounded=False, **shared)]
        if fit.optimum_set is not None:
            unbounded = fit.optimum_set_is_unbounded
            rows.insert(
                0, OptimumEstimate(group, name, "Fieller", intervals=fit.optimum_set, is_unbounded=unbounded, **shared)
            )
        return rows

    found = [one for fit in fits for one in of_fit("Model", fit.model, fit, fit.model == answer.lead.model)]
    for one in answer.bootstraps:
        name = "tasks and seeds" if one.over == "both" else one.over
        found.append(
            OptimumEstimate("Bootstrap over", name, "percentiles", None, None, [one.interval], False, one.interior)
        )
    for kind, fit in answer.by_type:
        found += of_fit("Type of task", f"{kind} ({fit.model})", fit)
    for task in answer.by_task:
        own = [] if task.delta_interval is None else [task.delta_interval]
        best = task.best_plw, task.optimum_plw
        found.append(
            OptimumEstimate("Task", task.task, "delta", best[1], best[0], own, False, task.interior_probability)
        )
    return found


def interval_text(one: OptimumEstimate) -> str:
    """The interval of an estimate in words."""
    if not one.intervals:
        return "unbounded, none of it inside" if one.is_unbounded else "none inside"
    inside = " and ".join(f"{low:.3g} to {high:.3g}" for low, high in one.intervals)
    return f"{inside}, and on beyond: unbounded" if one.is_unbounded else inside


def name_test(test: JointTest) -> str:
    """A joint test by name, with its statistic."""
    name = test.test.replace("^2", "²")
    if test.df2 is None:
        return f"{name}: χ²({test.df1:g}) = {test.statistic:.3g}"
    statistic = f"F({test.df1:g}, {test.df2:.3g}) = {test.statistic:.3g}"
    return statistic if name == "F" else f"{name}: {statistic}"


def remarks(fit: Fit) -> str:
    """What must be known of a fit before its numbers are used, in a few words."""
    said = {
        "too few runs": fit.has_too_few_runs,
        "did not converge": not fit.converged,
        "singular": fit.is_singular,
        "coefficients of the logit": fit.model == "beta",
        f"{fit.runs} runs, {fit.tasks} tasks": any(note.startswith("Left out") for note in fit.notes),
    }
    return ", ".join(words for words, holds in said.items() if holds)


def stability(answer: Answer) -> str:
    """How the conclusion fares under other scales and transforms."""
    if answer.lead.has_too_few_runs:
        return "With too few runs to tell, no scale or transform can be relied on."
    is_significant = answer.lead.joint_p < LEVEL
    named = [(SCALES[one.name], one) for one in answer.scales] + [
        (TRANSFORMS[one.name], one) for one in answer.transforms
    ]
    tried = [(name, one) for name, one in named if one.joint_p is not None]
    other = [name for name, one in tried if ((one.joint_p or 0) < LEVEL) != is_significant]
    text = f"p by {answer.lead.model}, of this data set alone, is {'' if is_significant else 'not '}below {LEVEL}"
    if other:
        text += f"; it is otherwise under {len(other)} of {len(tried)}: {', '.join(other)}."
    else:
        text += " under every scale and transform that could be fitted."
    peaks = [one.optimum_plw for _, one in tried if one.optimum_plw is not None]
    if peaks and len(peaks) == len(tried) and min(peaks) < max(peaks):
        text += f" The peak moves between PLW {min(peaks):.3g} and {max(peaks):.3g}."
    elif peaks and len(peaks) < len(tried):
        text += f" A peak inside the range is found under {len(peaks)} of {len(tried)}."
    return text


# ----------------------------------------------------------------------------------------------------- the page


def html(
    analysis: Analysis,
    table: pd.DataFrame,
    described: dict[str, Any],
    drawn: dict[tuple[str, str], bytes],
    command: str,
) -> str:
    """The report of an analysis of a table.

    described: what fit.json holds. drawn: the SVG of each figure, by `drawings`' keys. command: how to make it again.
    """
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
        "share": figures.percent,
        "svg": lambda content: "data:image/svg+xml;base64," + base64.b64encode(content).decode(),
        "interval": interval_text,
        "lead_interval": interval,
        "set": set_in_words,
        "test": name_test,
        "highest": highest_end,
        "remarks": remarks,
    }
    cells: dict[tuple[Any, ...], list[str]] = {}
    for row in described["table"]["missing"]:
        cells.setdefault(tuple(row[column] for column in RUN), []).append(row["task"])
    refusals: dict[tuple[str, str], list[str]] = {}
    for one in analysis.refusals:
        refusals.setdefault((one.what, one.reason), []).append(one.dataset)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        analysis=analysis,
        chapters=[
            {
                "answer": answer,
                "claim": claim(answer, len(analysis.answers)),
                "estimates": _rows(estimates(answer, _of(analysis, answer))),
                "stability": stability(answer),
                "residuals": ("residuals", answer.dataset) in drawn,
            }
            for answer in analysis.answers
        ],
        drawn=drawn,
        refusals=[(*what, datasets) for what, datasets in refusals.items()],
        tasks_drawn=figures.MOST_TASKS,
        terms=TERMS,
        level=LEVEL,
        models=FITS,
        scales=SCALES,
        transforms=TRANSFORMS,
        profile=profile(table, analysis.by),
        account=account(table, analysis.by),
        missing=list(cells.items()),
        missing_scores=len(described["table"]["missing"]),
        missing_shown=MISSING_SHOWN,
        table=described["table"],
        command=command,
        versions=versions(),
    )


def _of(analysis: Analysis, answer: Answer) -> list[Fit]:
    return [fit for fit in analysis.fits if fit.dataset == answer.dataset]


def _rows(found: list[OptimumEstimate]) -> list[dict[str, Any]]:
    """Estimates as the table shows them: the intervals of one fit in one row."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        row = rows.setdefault((one.group, one.name), {"first": one, "delta": None, "fieller": None})
        row["fieller" if one.method == "Fieller" else "delta"] = one
    return list(rows.values())


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
    """What made the report: this package with its commit, Python, and the packages whose arithmetic it is."""
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
    if able := [one for one in answers if one.equivalence is not None and not one.lead.has_too_few_runs]:
        drawn["no-effect", ""] = figures.draw_no_effect(able)
    for answer in answers:
        mine = scaled[scaled["dataset"] == answer.dataset]
        drawn["curve", answer.dataset] = figures.draw_curve(answer.lead, mine, by, shows_effect=answer.shows_effect)
        drawn["tasks", answer.dataset] = figures.draw_tasks(answer, mine, by)
        shown = estimates(answer, _of(analysis, answer))
        if len(answer.by_task) > figures.MOST_TASKS:
            shown = [one for one in shown if one.group != "Task"]
        drawn["optimum", answer.dataset] = figures.draw_optima(shown, figures.transform_of(answer.lead, mine))
        if len(left := figures.residuals(answer.lead, mine, by)):
            drawn["residuals", answer.dataset] = figures.draw_residuals(left)
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


def fits_csv(described: dict[str, Any]) -> pd.DataFrame:
    """A row per fit and term."""
    rows = [
        {
            "dataset": fit["dataset"],
            "model": fit["model"],
            "term": term,
            "estimate": estimate,
            "standard_error": fit["standard_errors"][term],
            "df": fit["degrees_of_freedom"][term],  # blank where infinite
            "p": fit["p_values"].get(term),
        }
        for fit in described["fits"]
        for term, estimate in fit["coefficients"].items()
    ]
    return pd.DataFrame(rows)


def answers_csv(described: dict[str, Any]) -> pd.DataFrame:
    """A row per data set and model; the optimum's 95 % set, which may be several intervals, is written as JSON."""
    answers = {answer["dataset"]: answer for answer in described["answers"]}
    rows = []
    for fit in described["fits"]:
        low, high = fit["delta_interval"] or (None, None)
        answer = answers[fit["dataset"]]
        is_lead = answer["lead"] == fit["model"]
        rows.append(
            {name: fit[name] for name in ("dataset", "model")}
            | {"is_lead": is_lead}
            | {name: fit[name] for name in ("scale", "transform", "n", "runs", "tasks")}
            | {"joint_test": fit["joint_tests"][0]["test"], "joint_p": fit["joint_p"]}
            | {name: fit[name] for name in ("holm_p", "has_too_few_runs", "optimum_plw")}
            | {"optimum_set": json.dumps(fit["optimum_set"])}
            | {"optimum_set_is_unbounded": fit["optimum_set_is_unbounded"], "delta_low": low, "delta_high": high}
            | {name: fit[name] for name in ("interior_probability", "loglik", "aic", "bic")}
            | {name: fit[name] for name in ("is_singular", "converged")}
        )
    return pd.DataFrame(rows)


def tasks_csv(described: dict[str, Any]) -> pd.DataFrame:
    """A row per data set and task: its own curve."""
    columns = ["dataset", "task", "task_type", *TERMS, "df", "joint_p", "best_plw", "optimum_plw", "delta_low"]
    rows = []
    for answer in described["answers"]:
        for task in answer["by_task"]:
            low, high = task["delta_interval"] or (None, None)
            rows.append(
                {"dataset": answer["dataset"], **task["coefficients"], "df": task["degrees_of_freedom"]}
                | {name: task[name] for name in ("task", "task_type", "joint_p", "best_plw", "optimum_plw")}
                | {"delta_low": low, "delta_high": high, "interior_probability": task["interior_probability"]}
            )
    return pd.DataFrame(rows, columns=[*columns, "delta_high", "interior_probability"])


def write(analysis: Analysis, table: pd.DataFrame, directory: Path, command: str | None = None) -> list[Path]:
    """Write an analysis into a directory, and return the files' paths.

    `fit.json`, `report.html`, `fits.csv`, `answers.csv`, `tasks.csv`, and every figure as PNG and SVG. `table` is the
    one the analysis is of; its attribute `left_out`, if any, lists what was left out of it and why, a phrase each.
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
    page = html(analysis, table, described, svgs, command or _command(analysis, table))
    contents = {
        "report.html": page.encode(),
        "fit.json": (json.dumps(described, indent=2, allow_nan=False) + "\n").encode(),
    }
    for name, made in (("fits", fits_csv), ("answers", answers_csv), ("tasks", tasks_csv)):
        contents[f"{name}.csv"] = outputs.table(made(described))
    for key, figure in drawn.items():
        contents |= {f"{names[key]}.png": drawing.png(figure), f"{names[key]}.svg": svgs[key]}

    return outputs.write(directory, contents)


def _command(analysis: Analysis, table: pd.DataFrame) -> str:
    """The command that makes an analysis of a file again."""
    options = {
        "--scores": shlex.quote(table.attrs.get("source", "FILE.csv")),
        "--scale": "" if analysis.scale == "none" else analysis.scale,
        "--transform": "" if analysis.transform == "power" else analysis.transform,
        "--by": shlex.quote(",".join(analysis.by)) if analysis.by else "",
        "--margin": "" if analysis.margin is None else f"{analysis.margin:g}",
        "--output": "DIR",
    }
    given = " ".join(f"{name} {value}" for name, value in options.items() if value)
    return f"python -m entrypoints.analyze {given}"
