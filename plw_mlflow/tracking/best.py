"""Best: the alias `best` of a registered model, which a sweep gives to the version that scored highest in it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlflow

from plw_mlflow.config import counted
from plw_mlflow.errors import UserError
from plw_mlflow.tracking import comparable, logged_models
from plw_mlflow.tracking.cells import cell_columns, parameters
from plw_mlflow.tracking.comparable import Cell
from plw_mlflow.tracking.connection import get_run, patiently
from plw_mlflow.tracking.score_table import ScoredCells

MAX_LISTED = 10  # cells that a model version's tag lists as beaten


def mark_best(sweep: str, finished: Collection[str], cells: int) -> list[str]:
    """Give the alias `best` of each registered model to the sweep's best version of it; returns a sentence on each.

    finished: the runs of its finished cells. cells: how many it has.

    The alias moves only if the sweep is complete, has two cells or more, and its scores are comparable with one another
    and with those of the benchmarks. It then moves away from a version that scored less on the same tasks, or that has
    no comparable score. A version that was scored in another way keeps it, since nobody knows which of the two is
    better. The version's tags plw.best_... say which cells it has beaten. It is a whole model: where the best cell has
    logged an adapter, that is merged into its base and logged first.
    """
    if len(finished) < cells:
        are = "is" if 1 in (len(finished), cells) else "are"
        only = f"{len(finished)} of {counted(cells, 'cell')} {are} finished and scored"
        return [f"the alias best stays where it is, as {only}"]
    try:
        scored = ScoredCells(sweep=sweep, only=finished)
        scored.check()
    except ValueError as error:
        return [f"the alias best stays where it is: {error}"]
    by_name: dict[str, list[Cell]] = {}
    for cell in scored.newest:
        try:
            name, _ = _version(cell)
        except UserError as error:
            return [f"the alias best stays where it is: {error}"]
        by_name.setdefault(name, []).append(cell)
    return [_mark_best_of(name, group, sweep) for name, group in by_name.items()]


def _mark_best_of(name: str, group: list[Cell], sweep: str) -> str:
    """Give the alias of one registered model to the best of its cells, or say why it stays where it is."""
    stays = f"the alias best of {name} stays where it is"
    if reason := _why_not_comparable(group):
        return f"{stays}, {reason}"
    if len(group) == 1:
        return f"{stays}, as one cell alone is no best one"
    best, *others = sorted(group, key=_score, reverse=True)
    version = _version(best)[1]
    holder = _holder(name)
    if holder is None:
        before = "no version"
    elif str(holder.version) == version:
        return f"the alias best of {name} stays with version {version}: {_describe(best)}"
    else:
        held = _cell_of(holder)
        before = f"version {holder.version}"
        if held is None:
            before += ", whose run is no longer there"
        elif not _is_comparable(held.run) or "score" not in held.run.data.metrics:
            before += ", which has no comparable score"
        elif _scoring(held) != _scoring(best):
            return (
                f"{stays}, with version {holder.version}, which was scored by other tasks, questions, versions or "
                f"arithmetic than this sweep, so that nobody knows which is better; to move it nevertheless: mlflow."
                f"MlflowClient().set_registered_model_alias({name!r}, 'best', '{version}')"
            )
        elif _score(held) >= _score(best):
            return f"{stays}, with version {holder.version}: {_describe(held)}; here {_describe(best)}"
        else:
            before += f": {_describe(held)}"
    try:
        version = _as_whole_model(best, name, version)
    except UserError as error:
        return f"{stays}, as the best cell's adapter cannot be made a whole model ({_describe(best)}): {error}"
    beaten = [_describe(cell) for cell in others]
    more = f"; and {len(beaten) - MAX_LISTED} more" if len(beaten) > MAX_LISTED else ""
    tags = {
        "score": repr(_score(best)),
        "sweep": sweep,
        "of": f"{len(group)} cells",
        "beat": "; ".join(beaten[:MAX_LISTED]) + more,
        "before": before,
    }
    patiently("marking the best model", lambda: _move_alias(name, version, tags))
    return (
        f"best: models:/{name}@best is version {version} now, before {before}; it is the best of {len(group)} cells: "
        f"{_describe(best)}; next {beaten[0]}"
    )


def _why_not_comparable(group: list[Cell]) -> str | None:
    """Why the scores of cells do not say which cell is best; None if they do."""
    tasks = group[0].run.data.tags.get("plw.score_tasks")
    for cell in group:
        if not _is_comparable(cell.run):
            caveat = cell.run.data.tags.get("plw.score_caveat", "it does not say why")
            return f"as the score of run {cell.run_id} is not comparable ({caveat})"
        if cell.run.data.tags.get("plw.score_tasks") != tasks:
            return f"as the scores of runs {cell.run_id} and {group[0].run_id} are of other tasks"
    return None


def _as_whole_model(cell: Cell, name: str, version: str) -> str:
    """The version of a cell's whole model, which is logged now if the cell has logged its adapter alone."""
    if mlflow.MlflowClient().get_model_version(name, version).tags.get("plw.form") != logged_models.ADAPTER:
        return version
    print(f"merging the adapter of run {cell.run_id} into its base, for models:/{name}@best", flush=True)
    return logged_models.log_merged(cell.run_id)


def _move_alias(name: str, version: str, tags: dict[str, str]) -> None:
    client = mlflow.MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, version, f"plw.best_{key}", value)
    client.set_registered_model_alias(name, "best", version)


def _holder(name: str) -> mlflow.entities.model_registry.ModelVersion | None:
    """The version that has the alias."""
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, "best")
    except mlflow.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _cell_of(version: mlflow.entities.model_registry.ModelVersion) -> Cell | None:
    """The cell whose model a version is; None where its run is no longer there."""
    try:
        run = get_run(str(version.run_id))
    except ValueError:
        return None
    return Cell(run, parameters(run), {})


def _version(cell: Cell) -> tuple[str, str]:
    """The name and the version that a cell's model is registered under, the whole model's if there are two.

    Raises UserError where it is not registered.
    """
    tags = cell.run.data.tags
    name, _, version = tags.get("plw.merged_version", tags.get("plw.model_version", "")).rpartition("/")
    if not name:
        raise UserError(f"run {cell.run_id} has registered no model")
    return name, version


def _score(cell: Cell) -> float:
    return float(cell.run.data.metrics["score"])


def _describe(cell: Cell) -> str:
    """A cell and its score in words."""
    columns = cell_columns(dict(cell.params))
    method = cell.params["method"]
    return f"{_score(cell):.4g} (PLW {columns['plw']:g}, {method}, seed {columns['seed']}, run {cell.run_id})"


def _is_comparable(run: mlflow.entities.Run) -> bool:
    return run.data.tags.get("plw.score_comparable") == "true"


def _scoring(cell: Cell) -> dict[str, Any]:
    """How the tasks that count in a cell's score were scored."""
    counted = [key.rpartition("/")[0] for key in cell.run.data.tags.get("plw.score_tasks", "").split(",")]
    return comparable.scoring(cell, counted)
