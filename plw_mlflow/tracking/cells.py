"""Cells: what a run's parameters say about the cell that the run is of."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click
import mlflow

from plw_mlflow.config import UNSET, CellOptions, DataOptions, data_name, shown_name
from plw_mlflow.errors import UserError

CELL_FIELDS = tuple(field.name for field in fields(CellOptions))


def parameters(run: mlflow.entities.Run) -> dict[str, str]:
    """A run's parameters, unquoted. Parameters that were left unset have the value that their preset gave them."""
    tags = run.data.tags
    return {
        name: tags.get(f"plw.preset.{name}", "") if value in UNSET else unquoted(value)
        for name, value in run.data.params.items()
    }


def check_is_of_cell(run: mlflow.entities.Run) -> None:
    """Raise UserError where a run is not that of a cell."""
    if "plw.cell" in run.data.tags:
        return
    if "plw.grid" in run.data.tags:
        raise UserError(f"run {run.info.run_id} is that of a sweep, and a cell's is needed: give one of those below it")
    raise UserError(f"run {run.info.run_id} is not the run of a cell: it has no tag plw.cell")


def unquoted(value: str) -> str:
    """A parameter as the caller gave it: `mlflow run` has quoted it for a shell if it holds a blank, say."""
    try:
        parts = shlex.split(value)
    except ValueError:  # a lone quotation mark
        return value
    return parts[0] if len(parts) == 1 and shlex.quote(parts[0]) == value else value


def cell_columns(params: dict[str, str], shown: Callable[[str], str] = shown_name) -> dict[str, Any]:
    """The columns model, dataset, plw and seed of a cell's rows in the score table.

    The data set's name says what was done to the data, such as inversion and mixing.

    shown: how to write the name of the model and of each data set.
    """

    def is_true(name: str) -> bool:
        return bool(click.BOOL(params.get(name) or "false"))  # as the caller spelled it; older runs lack some

    options = DataOptions(
        invert=is_true("invert"),
        mix=params.get("mix") or None,
        mix_invert=is_true("mix_invert"),
        mix_share=float(params.get("mix_share") or DataOptions.mix_share),
    )
    data = data_name(params["dataset"], options, shown)
    return {"model": shown(params["model"]), "dataset": data, "plw": float(params["plw"]), "seed": int(params["seed"])}
