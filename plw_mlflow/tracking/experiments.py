"""Experiments: where runs belong. Cells and sweeps have one of their own, and what only looks at things another.

MLFLOW_EXPERIMENT_NAME and MLFLOW_EXPERIMENT_ID name others, and so does `mlflow run --experiment-name`.
"""

from __future__ import annotations

import os
from contextlib import suppress

import mlflow
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from plw_mlflow.errors import UserError
from plw_mlflow.tracking import pages
from plw_mlflow.tracking.connection import get_run

CELLS = "plw"  # the experiment of cells and sweeps
LOOKING = "plw-looking"  # of the commands that look at data, scores or models, and train nothing

_DESCRIPTIONS = {
    CELLS: """\
Which prompt loss weight (PLW) suits a model and its data?

Each run is a *cell*: one model that was trained on one data set at one PLW with one seed, and scored on benchmarks. A
*sweep* is a run with its cells below it. Its description has the answer, and its files have `report.html`.

**[The list of cells with PLW, prompt share and score]({cells})** (also under *Views*) and
**[their scores against the PLW]({charts})**. Select cells and press *Compare* to see all that differs between them.
`prompt_share` is the prompts' share of the loss weight, and `w_p` is PLW^0.30103, on which scores are fitted.

Runs are made by commands such as

```sh
python -m entrypoints.sweep --plw 0,0.01,0.1,0.242,0.5,1 --dataset my_instructions.jsonl
```
""",
    LOOKING: """\
Looks at data, scores and models: runs of `prepare`, `analyze` and `advise`, and of `evaluate` on models that no cell
has trained.

Models that were trained at some prompt loss weight, and sweeps over them, are runs of the experiment `plw`.
""",
}


def given_id() -> str | None:
    """The id of the experiment that new runs belong to, where the environment gives it, and no name."""
    return None if os.environ.get("MLFLOW_EXPERIMENT_NAME") else os.environ.get("MLFLOW_EXPERIMENT_ID") or None


def experiment_id(default: str = CELLS) -> str:
    """The id of the experiment that new runs belong to, which is made if it does not exist.

    default: as of `known_experiment_id`, whose errors are raised here, too.
    """
    if (known := known_experiment_id(default)) is not None:
        return known
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    try:
        made = str(mlflow.MlflowClient().create_experiment(name or default))
    except MlflowException as error:  # another process has made it meanwhile
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment_id(default)
    if not name and default == CELLS:
        _tell_of_earlier_cells()
    return made


def known_experiment_id(default: str = CELLS) -> str | None:
    """The id of the experiment that new runs belong to; None where it does not exist yet.

    default: its name where the environment names no experiment. Raises UserError where the environment gives a name and
    an id that are of two experiments.
    """
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        return str(get_run(run_id).info.experiment_id)
    if given := given_id():
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if (found := mlflow.MlflowClient().get_experiment_by_name(name or default)) is None:
        return None
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if name and given and given != found.experiment_id:
        raise UserError(
            f"MLFLOW_EXPERIMENT_NAME is {name!r}, whose id is {found.experiment_id}, but MLFLOW_EXPERIMENT_ID is "
            f"{given}; unset one of them"
        )
    return str(found.experiment_id)


def describe(experiment_id: str, kind: str) -> None:
    """Say on an experiment's page what its runs are, unless somebody has described it.

    The one that every store begins with is left without a description, since it is for all kinds of runs, and so is
    one of another name in which somebody only looks.

    kind: CELLS or LOOKING. An experiment of cells gets the view that lists them, too.
    """
    client = mlflow.MlflowClient()
    experiment = client.get_experiment(experiment_id)
    with suppress(MlflowException):  # whoever may not change it can work in it all the same
        for name, value in _missing_tags(experiment, kind).items():
            client.set_experiment_tag(experiment_id, name, value)


def _missing_tags(experiment: Experiment, kind: str) -> dict[str, str]:
    tags: dict[str, str] = {}
    if kind == CELLS:
        name, view = pages.view_tag(pages.ALL_CELLS, "Cells", pages.all_cells_view())
        tags[name] = view
    if experiment.name != "Default" and (kind == CELLS or experiment.name == LOOKING):
        cells = pages.list_page(experiment.experiment_id, pages.ALL_CELLS)
        text = _DESCRIPTIONS[kind].replace("{cells}", cells).replace("{charts}", pages.charts(cells))
        tags["mlflow.note.content"] = text
    return {name: value for name, value in tags.items() if name not in experiment.tags}


def _tell_of_earlier_cells() -> None:
    """Say how to go on with the cells of an earlier version, which are in the experiment Default."""
    with suppress(MlflowException):  # the store may have no such experiment
        if mlflow.MlflowClient().search_runs(["0"], "tags.`plw.cell` LIKE '%'", max_results=1):
            print(
                "note: this store has cells in the experiment Default, where earlier versions put them; to go on with "
                f"those, set MLFLOW_EXPERIMENT_NAME=Default (new runs go to the experiment {CELLS})",
                flush=True,
            )
