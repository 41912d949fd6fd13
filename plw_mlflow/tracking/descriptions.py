"""Descriptions: what the page of a cell's run says first, in Markdown, made of what the run holds."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from typing import Any

import mlflow
import pandas as pd

from plw_mlflow.config import MainConfig, TrainConfig, flag, spell
from plw_mlflow.tracking import pages
from plw_mlflow.tracking.cards import CAVEAT_CHARACTERS
from plw_mlflow.tracking.cells import cell_columns, parameters
from plw_mlflow.tracking.connection import patiently
from plw_mlflow.tracking.run import TAG_CHARACTERS, Run, listed
from plw_mlflow.tracking.scores import read_scores

PLACES = ("output", "checkpoint_dir", "cache_dir")  # options that do not say what a cell is
ALWAYS = ("plw", "model", "dataset", "method", "seed")  # options that a command names even where they are the defaults


def describe_cell(run: Run) -> None:
    """Say on the page of a cell's run what was trained on what, how well it does, and how to load and repeat it."""
    entity = patiently("reading the run", lambda: run.client.get_run(run.id))
    scores = _scores(patiently("reading the scores", lambda: read_scores(run)))
    caveat = entity.data.tags.get("plw.score_caveat", "")
    parts = [
        _summary(entity),
        _of_sweep(entity, run.client),
        "",  # where the scores go
        caveat and f"Not comparable: {textwrap.shorten(caveat, CAVEAT_CHARACTERS, placeholder=' …')}.",
        _losses(entity.data.metrics),
        _loading(entity.data.tags),
        f"To repeat it:\n\n```sh\n{_command(parameters(entity))}\n```",
        f"`python -m entrypoints.verify --run-id {run.id}` repeats it from what is recorded, and compares.",
        f"[The lengths of its data]({pages.file_page(entity.info.experiment_id, run.id, 'profile.png')})",
    ]
    parts[2] = listed(scores, TAG_CHARACTERS - len("\n\n".join(filter(None, parts))) - len("\n\n"))
    run.describe("\n\n".join(filter(None, parts)))


def _summary(run: mlflow.entities.Run) -> str:
    """A sentence or two on what was trained on what."""
    cell, metrics, method = cell_columns(parameters(run)), run.data.metrics, parameters(run)["method"]
    score = f"Score **{metrics['score']:.4g}** at " if "score" in metrics else ""
    share = f" Prompts have {metrics['prompt_share']:.1%} of the loss weight." if "prompt_share" in metrics else ""
    data = run.data.tags.get("plw.data_sha256", "")
    named = f" (SHA-256 {', '.join(part[:12] for part in data.split(','))})" if data else ""
    return (
        f"{score}**PLW {cell['plw']:g}**: {code(cell['model'])} trained on {code(cell['dataset'])}{named}, "
        f"method {method}, seed {cell['seed']}.{share}"
    )


def _of_sweep(run: mlflow.entities.Run, client: mlflow.MlflowClient) -> str:
    """Which sweep a cell was run for, and in which options its cells differ; empty where there was none."""
    parent = run.data.tags.get("mlflow.parentRunId")
    if parent is None:
        return ""
    sweep = patiently("reading the sweep's run", lambda: client.get_run(parent))
    listed, own = parameters(sweep), parameters(run)
    # An option that the sweep gives to all of its cells is spelt there as it is here, but for where files lie.
    differing = [name for name, value in own.items() if listed.get(name, value) != value and name not in PLACES]
    here = ", ".join(f"{flag(name)} {own[name]}" for name in differing)
    page = pages.run_page(sweep.info.experiment_id, parent)
    return f"Of the sweep [{sweep.info.run_name}]({page})" + (
        f"; what differs from its other cells: {here}." if here else "."
    )


def _scores(table: pd.DataFrame) -> list[str]:
    """The scores of a score table with their standard errors, a line each, as MLflow sets a table's columns close."""
    lines = []
    for row in table.to_dict("records"):
        error = f" ± {row['stderr']:.4f}" if pd.notna(row.get("stderr")) else ""
        lines.append(f"- {code(row['task'])} {row['metric']}: **{row['score']:.4f}{error}** ({row['n']} questions)")
    return lines


def _losses(metrics: Mapping[str, float]) -> str:
    """The last losses of the training, on prompts and on completions."""
    lines = []
    for part, prefix in (("training", "train"), ("validation", "eval")):
        values = [(of, metrics.get(f"{prefix}/{of}_loss")) for of in ("completion", "prompt")]
        if shown := ", ".join(f"{value:.4f} of {of}s" for of, value in values if value is not None):
            lines.append(f"- loss at the end, {part}: {shown}")
    return "\n".join(lines)


def _loading(tags: Mapping[str, str]) -> str:
    """How to load the model; empty where none was logged."""
    if "plw.model_version" not in tags:
        return ""
    uri = f"models:/{tags['plw.model_version']}"
    where = "in the folder that holds `mlflow.db`, or with `MLFLOW_TRACKING_URI` set"
    lines = ["import mlflow", "", f'mlflow.transformers.load_model("{uri}", return_type="components")']
    return "\n".join([f"To load it, {where}:", "", "```python", *lines, "```"])


def _command(params: Mapping[str, str]) -> str:
    """The command that gives a cell: its options as far as they are not the defaults of its preset."""
    kind: Any = MainConfig if "tasks" in params else TrainConfig
    default = kind(preset=params.get("preset") or "toy")
    words = ["python", "-m", f"entrypoints.{'main' if kind is MainConfig else 'train'}"]
    words += ["--preset", default.preset] if default.preset != kind.preset else []
    for name in (*ALWAYS, *(field for field in params if field not in (*ALWAYS, *PLACES))):
        if name in ALWAYS or (hasattr(default, name) and params[name] != spell(getattr(default, name))):
            words += [f"--{flag(name)}", params[name]]
    return shlex.join(words)


def code(text: object) -> str:
    """A text as code in Markdown, within one cell of a table."""
    return f"`{' '.join(str(text).replace('`', ' ').replace('|', ' ').split())}`"
