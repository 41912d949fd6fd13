"""Tracking: everything that goes into MLflow or comes out of it. Nothing outside this package imports mlflow.

A cell is one run (`run`, `opening`), with its curves (`curves`) and the checkpoints that the store has of it
(`stored`). A score table is what many runs give together (`table`), if they are `comparable`. While a model trains,
nothing waits for the store or fails because it is away; what comes after the training waits for it (`connection`).
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training run reports to its own store alone
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# MLflow's own 7 are silent, and take four minutes of whoever has asked; 3 take 12 s. Then `connection` takes over.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

from plw_mlflow.tracking.opening import child_environment, fail, kill, open_run, open_sweep
from plw_mlflow.tracking.run import NoRun, Run, load_registered
from plw_mlflow.tracking.table import generation_ratios, mark_best, score_table

__all__ = [
    "NoRun",
    "Run",
    "child_environment",
    "fail",
    "generation_ratios",
    "kill",
    "load_registered",
    "mark_best",
    "open_run",
    "open_sweep",
    "score_table",
]
