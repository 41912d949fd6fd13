"""Tracking: everything that goes into MLflow or comes out of it. Nothing outside this package imports mlflow.

A cell is one run: `opening` opens it, and `run` is what it holds. Modules of their own log its data sets (`inputs`),
its curves while it trains (`curves`, over an `outbox`), its checkpoints (`resumption`), its model (`logged_models`) and
its scores (`scores`), and an analysis' fit (`regression`). A registered model has a card (`cards`), and `records` reads
back what a run holds of its cell. The scores of many runs make a `score_table` if the runs are
`comparable`, and the `best` of a sweep's models gets an alias. While a model trains, nothing waits for the store or
fails because it is away. Whatever comes after the training waits for the store (`connection`).
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training run reports to its own store alone
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# MLflow would retry 7 times, silently, which takes four minutes; 3 take 12 s. After that, `connection` takes over.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

from plw_mlflow.tracking.best import mark_best
from plw_mlflow.tracking.comparable import by_value
from plw_mlflow.tracking.connection import patiently
from plw_mlflow.tracking.descriptions import describe_cell
from plw_mlflow.tracking.experiments import LOOKING
from plw_mlflow.tracking.inputs import check_data, log_data, log_prompt_weight
from plw_mlflow.tracking.leases import CLAIM, holding_lease
from plw_mlflow.tracking.logged_models import (
    files_digest,
    is_logged,
    load_model,
    load_registered,
    log_adapter,
    log_merged,
    log_model,
    trained_in,
)
from plw_mlflow.tracking.opening import child_environment, fail, kill, open_run
from plw_mlflow.tracking.records import CURVES, Record, note_verification, reading, recorded, scratch_run
from plw_mlflow.tracking.regression import log_regression
from plw_mlflow.tracking.resumption import StoredCheckpoints, begin_cell
from plw_mlflow.tracking.run import Run
from plw_mlflow.tracking.score_table import generation_ratios, questions, score_table
from plw_mlflow.tracking.scores import log_measures, log_scores, read_questions, read_scores
from plw_mlflow.tracking.sweeps import (
    Attempt,
    Measured,
    Sweep,
    check_named,
    finished_before,
    measured_before,
    open_sweep,
)

__all__ = [
    "CLAIM",
    "CURVES",
    "LOOKING",
    "Attempt",
    "Measured",
    "Record",
    "Run",
    "StoredCheckpoints",
    "Sweep",
    "begin_cell",
    "by_value",
    "check_data",
    "check_named",
    "child_environment",
    "describe_cell",
    "fail",
    "files_digest",
    "finished_before",
    "generation_ratios",
    "holding_lease",
    "is_logged",
    "kill",
    "load_model",
    "load_registered",
    "log_adapter",
    "log_data",
    "log_measures",
    "log_merged",
    "log_model",
    "log_prompt_weight",
    "log_regression",
    "log_scores",
    "mark_best",
    "measured_before",
    "note_verification",
    "open_run",
    "open_sweep",
    "patiently",
    "questions",
    "read_questions",
    "read_scores",
    "reading",
    "recorded",
    "score_table",
    "scratch_run",
    "trained_in",
]
