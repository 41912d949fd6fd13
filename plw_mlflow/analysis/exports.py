"""An analysis as data: the contents of fit.json, and of the CSV files beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import pandas as pd

from plw_mlflow.analysis.answers import Analysis
from plw_mlflow.analysis.score_table import (
    COLUMNS,
    SCORE,
    check,
    missing_scores,
)
from plw_mlflow.analysis.statistics import (
    fitting,
    multiple_testing,
)
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.wording import verdict
from plw_mlflow.transforms import EXPONENT, TERMS

SCHEMA = "plw_mlflow.fit/4"


def to_json(analysis: Analysis, table: pd.DataFrame) -> dict[str, Any]:
    """What `fit.json` holds: every fit unrounded, and which scores it came from.

    `table.sha256` is of the sorted columns of the contract, so equal scores have it whatever their order or file.
    """
    table = check(table, analysis.by)
    leads = {answer.dataset: answer for answer in analysis.answers}
    holm_p = {
        (dataset, model): p
        for model in fitting.FITS
        for dataset, p in multiple_testing.adjust_by_holm(
            {fit.dataset: fit.joint_p for fit in analysis.fits if fit.model == model}
        ).items()
    }

    def concluded(fit: Fit) -> dict[str, Any]:
        """What is concluded from a fit: of a lead, the answer's own words, of others the same by their own p-values."""
        answer = leads[fit.dataset]
        if answer.lead.model == fit.model:
            return {"holm_p": answer.holm_p, "verdict": answer.verdict}
        p = holm_p[fit.dataset, fit.model]
        return {"holm_p": p, "verdict": answer.verdict if answer.misfit else verdict(fit, answer.equivalence, p)}

    canonical = table[COLUMNS].sort_values(SCORE).to_csv(index=False, lineterminator="\n")
    return {
        "schema": SCHEMA,
        "exponent": EXPONENT,
        "scale": analysis.scale,
        "axis": analysis.axis,
        "table": {
            "source": table.attrs.get("source"),
            "file_sha256": table.attrs.get("file_sha256"),
            "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "rows": len(table),
            "missing": missing_scores(table).to_dict("records"),
            "left_out": table.attrs.get("left_out", []),
            "notes": table.attrs.get("notes", []),
        },
        "fits": [
            {**asdict(fit), "joint_p": fit.joint_p, "has_too_few_runs": fit.has_too_few_runs, **concluded(fit)}
            for fit in analysis.fits
        ],
        "refusals": [asdict(item) for item in analysis.refusals],
        "answers": [
            {
                **{name: value for name, value in asdict(answer).items() if name != "lead"},
                "lead": answer.lead.model,
                "by_type": [{"task_type": kind, **asdict(fit), "joint_p": fit.joint_p} for kind, fit in answer.by_type],
            }
            for answer in analysis.answers
        ],
        "differences": [asdict(item) for item in analysis.differences],
        "joint": None if analysis.joint is None else asdict(analysis.joint),
    }


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
            | {name: fit[name] for name in ("scale", "axis", "n", "runs", "tasks")}
            | {"joint_test": fit["joint_tests"][0]["test"], "joint_p": fit["joint_p"]}
            | {name: fit[name] for name in ("holm_p", "has_too_few_runs", "optimum_plw")}
            | {"optimum_set": json.dumps(fit["optimum_set"])}
            | {"optimum_set_is_unbounded": fit["optimum_set_is_unbounded"], "delta_low": low, "delta_high": high}
            | {name: fit[name] for name in ("interior_probability", "loglik", "aic", "bic")}
            | {name: fit[name] for name in ("is_singular", "converged")}
        )
    return pd.DataFrame(rows)


def axes_csv(described: dict[str, Any]) -> pd.DataFrame:
    """A row per joint description of all data sets: likelihood, AIC, and the error on each data set left out of it."""
    joint = described["joint"]
    return pd.DataFrame(
        [
            {name: fit[name] for name in ("axis", "curves", "parameters", "loglik", "aic")}
            | {f"left_out_{dataset}": error for dataset, error in (fit["left_out"] or {}).items()}
            for fit in joint["fits"]
        ]
    )


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
