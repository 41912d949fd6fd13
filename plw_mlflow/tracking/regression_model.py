"""A fit as a registered model. MLflow runs this file to load it ("models from code"), so nothing is pickled.

The numbers are those of fit.json. A data frame goes in with the columns dataset, plw and, if wanted, task. The columns
score, low, high and optimum_plw come out, a row for each: the score at that PLW on the curve of the data set's leading
model, its 95 % interval, and the PLW at which the curve is highest inside the range (NaN without an interior optimum).
Where the analysis says that there are too few runs, or that no parabola describes the scores, low, high and optimum_plw
are NaN.

Without a task, the score is the mean over the tasks and models that were scored, and the interval is that of the curve
around their mean, which leaves out how tasks in general differ in level. With a task, it is that task's own curve.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel
from scipy import stats

from plw_mlflow.transforms import TERMS, Transform

ALPHA = 0.05  # 1 minus the intervals' coverage


class Regression(PythonModel):
    """The curves of a fit.json."""

    def load_context(self, context: Any) -> None:
        """Read the file that MLflow keeps beside this one."""
        self.use(json.loads(Path(context.artifacts["fit"]).read_text()))

    def use(self, fit_json: dict[str, Any]) -> None:
        """Take the curves of the contents of a fit.json."""
        fits = {(fit["dataset"], fit["model"]): fit for fit in fit_json["fits"]}
        self._answers = {
            answer["dataset"]: (answer, fits[answer["dataset"], answer["lead"]]) for answer in fit_json["answers"]
        }

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """A row for each row of `model_input`. Raises ValueError for unknown data sets and tasks, and PLWs below 0."""
        tasks = model_input["task"] if "task" in model_input else [None] * len(model_input)
        rows = [
            self._predict_row(str(dataset), float(plw), None if task is None or pd.isna(task) else str(task))
            for dataset, plw, task in zip(model_input["dataset"], model_input["plw"], tasks, strict=True)
        ]
        return pd.DataFrame(rows, columns=["score", "low", "high", "optimum_plw"], index=model_input.index)

    def _predict_row(self, dataset: str, plw: float, task: str | None) -> tuple[float, float, float, float]:
        if not (math.isfinite(plw) and plw >= 0):
            raise ValueError(f"plw must be 0 or more, got {plw}")
        if dataset not in self._answers:
            raise ValueError(f"no fit of data set {dataset!r}; there are {', '.join(sorted(self._answers))}")
        answer, lead = self._answers[dataset]
        w = float(Transform(lead["axis"], tuple(lead["plws"]), tuple(lead["prompt_odds"]))(plw))
        point = np.array([1.0, w, w**2])  # of the curve, in terms of TERMS
        if task is None:
            curve, offset = lead, point - lead["centre"]
            freedoms = [lead["degrees_of_freedom"][term] for term in TERMS[1:]]
            freedom = min(math.inf if degrees is None else degrees for degrees in freedoms)
        else:
            by_task = {task_curve["task"]: task_curve for task_curve in answer["by_task"]}
            if task not in by_task:
                raise ValueError(f"no curve of task {task!r} on {dataset}; there are {', '.join(by_task) or 'none'}")
            curve, offset = by_task[task], point
            freedom = curve["degrees_of_freedom"]
        score = float(point @ [curve["coefficients"][term] for term in TERMS])
        variance = offset @ np.array(curve["covariance"])[:3, :3] @ offset
        half_width = float(stats.t.ppf(1 - ALPHA / 2, freedom) * math.sqrt(max(0.0, variance)))
        if lead["has_too_few_runs"] or answer.get("misfit"):  # a fit.json of an earlier version has no such entry
            return score, math.nan, math.nan, math.nan
        optimum = curve["optimum_plw"]
        return score, score - half_width, score + half_width, math.nan if optimum is None else optimum


mlflow.models.set_model(Regression())
