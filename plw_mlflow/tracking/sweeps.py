"""Sweeps: the run of a sweep, and the runs of its cells.

A cell is known by its identity, a digest of everything that decides what comes out of it. Its runs have it as the tag
plw.identity, whichever sweep they were made for. A sweep's own cells are its children. Those that an earlier sweep of
the experiment has finished already become its cells too. All have the tag plw.cell_of.SWEEP.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import FileInfo
from mlflow.entities import Run as Entity

from plw_mlflow.config import flag, spell
from plw_mlflow.errors import Refused, UserError
from plw_mlflow.tracking import experiments, pages, signs
from plw_mlflow.tracking.cells import parameters
from plw_mlflow.tracking.claims import SILENT_SECONDS, Claims
from plw_mlflow.tracking.connection import check_reachable, get_run, patiently
from plw_mlflow.tracking.opening import open_run
from plw_mlflow.tracking.run import Run

MAX_RUNS = 50_000  # of an experiment; MLflow gives no more at once
OF_SWEEP = "sweep-"  # how the key of a sweep's view begins
NEW = "new"  # in place of a run's id: go on with none
WAIT_SECONDS = 2.0  # between two looks at a claim that another process holds


@dataclass(frozen=True)
class Attempt:
    """A run of a cell, as the store has it."""

    run_id: str
    status: str  # of MLflow: RUNNING, FINISHED, FAILED, KILLED, SCHEDULED
    is_scored: bool
    error: str  # why it has failed, in its own words; empty where it did not say
    progress: str  # how far it was when it said so last
    standing: str  # the last that the store has of its training: the name of a checkpoint, or of the registered model
    score: float | None
    is_child: bool  # whether the sweep's run is its parent
    is_adopted: bool  # whether its tag says that it is one of this sweep's cells

    @property
    def looks_open(self) -> bool:
        """Whether its process has not ended it: it is at work on the cell, or was killed."""
        return self.status in ("RUNNING", "SCHEDULED")

    @property
    def is_finished(self) -> bool:
        """Whether the cell needs no further run."""
        return self.status == "FINISHED" and self.is_scored


class Sweep:
    """The run of a sweep that is open, and what the store has of its cells."""

    def __init__(self, run: Run, claims: Claims, *, cells_are_here: bool) -> None:
        """cells_are_here: whether all cells run on this machine, where they end with this process."""
        self.run, self.claims, self._cells_are_here = run, claims, cells_are_here
        self._client = mlflow.MlflowClient()
        self._experiment = str(self._client.get_run(run.id).info.experiment_id)

    def attempts(self) -> dict[str, list[Attempt]]:
        """All runs of sweeps' cells in the experiment by the cell's identity, the newest first."""
        return _attempts(self._experiment, self.run.id)

    def claimed(self) -> set[str]:
        """What identifies the trainings (`Cell.training`) that other processes are at work on."""
        return {name.rpartition("-")[2] for name in self.claims.of_others(f"{self._experiment}-")}

    def abandoned(self) -> set[str]:
        """What identifies the trainings that processes which were killed have left claims of."""
        return {name.rpartition("-")[2] for name in self.claims.abandoned(f"{self._experiment}-")}

    def claim(self, training: str) -> bool:
        """Whether no other process is at work on a training, so that this one may be, until it releases it."""
        return self.claims.take(self._claim_name(training), is_here=self._cells_are_here)

    def held(self, training: str) -> str:
        """The claim of a training that this process is at work on.

        By it, the cell's process on another machine knows it. It is empty where that runs on this machine, and
        ends with this process.
        """
        return "" if self._cells_are_here else self.claims.held(self._claim_name(training))

    def release(self, training: str) -> None:
        """Let other processes see that this one is no longer at work on a training."""
        self.claims.release(self._claim_name(training))

    def open_cell(self, identity: str, name: str) -> str:
        """A new run for a cell, below the sweep's; returns its id."""
        tags = {"mlflow.parentRunId": self.run.id, "plw.identity": identity, f"plw.cell_of.{self.run.id}": "true"}
        child = patiently("opening a run", lambda: self._client.create_run(self._experiment, tags=tags, run_name=name))
        return str(child.info.run_id)

    def adopt(self, attempt: Attempt) -> None:
        """Make a cell that another sweep has finished one of this sweep's cells."""
        if not attempt.is_adopted:
            tag = f"plw.cell_of.{self.run.id}"
            patiently("adopting a cell", lambda: self._client.set_tag(attempt.run_id, tag, "true"))

    def log_file(self, run_id: str, path: Path) -> None:
        """Copy a file into the run of a cell."""
        patiently("logging a file", lambda: self._client.log_artifact(run_id, str(path)))

    def write_json(self, name: str, content: Any) -> None:
        """Make a file of the sweep's run, or replace it."""
        text = json.dumps(content, indent=1) + "\n"
        patiently(f"logging {name}", lambda: self._client.log_text(self.run.id, text, name))

    def read_json(self, name: str) -> Any:
        """What a file of the sweep's run holds; None where there is none, or where it was cut short."""

        def read() -> Any:
            if name not in {item.path for item in self._client.list_artifacts(self.run.id)}:
                return None
            with tempfile.TemporaryDirectory() as folder:
                return json.loads(Path(self._client.download_artifacts(self.run.id, name, folder)).read_text())

        with suppress(json.JSONDecodeError):
            return patiently(f"reading {name}", read)
        return None

    def save_view(self, name: str, tasks: Sequence[str], options: Sequence[str]) -> str:
        """Save the view of MLflow's list that shows the sweep's cells; gives its page. Those of removed sweeps go.

        tasks: metrics that the score is the mean of. options: those in which the cells differ.
        """
        key = f"{OF_SWEEP}{self.run.id}"
        tag, value = pages.view_tag(key, name, pages.sweep_view(self.run.id, tasks, options))
        with suppress(Refused):  # whoever may not change the experiment can work in it all the same
            patiently("saving a view", lambda: self._client.set_experiment_tag(self._experiment, tag, value))
            patiently("removing views", self._remove_views_of_removed_sweeps)
        return pages.list_page(self._experiment, key)

    def _remove_views_of_removed_sweeps(self) -> None:
        begin = pages.VIEW + OF_SWEEP
        tags = [name for name in self._client.get_experiment(self._experiment).tags if name.startswith(begin)]
        search = partial(self._client.search_runs, [self._experiment], "tags.`plw.grid` LIKE '%'")
        there = {begin + str(run.info.run_id) for run in search(max_results=MAX_RUNS)}
        for name in tags:
            if name not in there:
                self._client.delete_experiment_tag(self._experiment, name)

    def file_page(self, name: str) -> str:
        """The page that shows a file of the sweep's run."""
        return pages.file_page(self._experiment, self.run.id, name)

    @contextmanager
    def sole(self, what: str) -> Iterator[None]:
        """Within the block, no other process of the sweep does the same."""
        with _sole(self.claims, f"{self.run.id}-{what}"):
            yield

    @contextmanager
    def sole_in_store(self, what: str) -> Iterator[None]:
        """Within the block, no other process of any sweep does the same."""
        with _sole(self.claims, what):
            yield

    def _claim_name(self, training: str) -> str:
        return f"{self._experiment}-{training}"


@contextmanager
def open_sweep(config: Any, grid: str, contents: Mapping[str, str]) -> Iterator[Sweep]:
    """Open the run of a sweep: that of the same cells, if the experiment has one, or a new one.

    grid: identifies the cells by their options. contents: what identifies the content of each file, model and data set
    that they name, by its name.

    Raises UserError where a content has changed since the sweep began, and where config.run_id names no such sweep.
    """
    check_reachable()
    claims = Claims()
    with claims.giving_signs_of_life():
        experiment = experiments.experiment_id()
        with ExitStack() as stack:
            with _sole(claims, f"{experiment}-{grid}"):
                earlier = _earlier(config, experiment, grid)
                run_id = earlier or _new(experiment, grid, config.sweep_name())
                _check_contents(Run(run_id), contents)
                # Still alone, as it logs the options of a new sweep, which MLflow takes once.
                run = stack.enter_context(open_run(config, config.sweep_name(), run_id, goes_on=True))
            stack.enter_context(signs.giving(partial(_keep_running, run), signs.SIGN_SECONDS))
            yield Sweep(run, claims, cells_are_here=config.engine == "local")
            run.untag("status")  # of an earlier process that was interrupted or has failed


def check_named(config: Any, grid: str) -> None:
    """Raise UserError where config.run_id names a run that `open_sweep` would not go on with."""
    if config.run_id not in (None, NEW):
        check_reachable()
        _named(config, grid)


def _keep_running(run: Run) -> None:
    """Mark the run of a sweep as running which another process of the sweep has ended, as that was interrupted, say."""
    if run.client.get_run(run.id).info.status != "RUNNING":
        run.client.update_run(run.id, "RUNNING")


def finished_before() -> dict[str, list[Attempt]]:
    """All runs of sweeps' cells in the experiment by the cell's identity, newest first; nothing is opened."""
    check_reachable()
    experiment = experiments.known_experiment_id()
    return {} if experiment is None else _attempts(experiment, "")


@dataclass(frozen=True)
class Measured:
    """What a finished cell has taken."""

    run_id: str
    options: dict[str, str] = field(hash=False)  # as MLflow has them
    seconds: float  # from the start of its run to its end

    def stored_bytes(self) -> int:
        """The size of all that the store has of it: its model and its other artifacts."""
        client = mlflow.MlflowClient()
        outputs = client.get_run(self.run_id).outputs
        models = [output.model_id for output in outputs.model_outputs] if outputs else []
        listings = [partial(client.list_artifacts, self.run_id)]
        listings += [partial(client.list_logged_model_artifacts, model) for model in models]
        return sum(map(_bytes, listings))


def measured_before() -> list[Measured]:
    """What each finished and scored cell of the experiment has taken, the newest first."""
    check_reachable()
    experiment = experiments.known_experiment_id()
    runs = [] if experiment is None else _scored_runs(experiment)
    return [
        Measured(str(run.info.run_id), parameters(run), (run.info.end_time - run.info.start_time) / 1000)
        for run in runs
        if run.info.end_time
    ]


def _scored_runs(experiment: str) -> list[Entity]:
    filters = "tags.`plw.status` = 'scored' and attributes.status = 'FINISHED'"
    search = partial(mlflow.MlflowClient().search_runs, [experiment], filters, max_results=MAX_RUNS)
    return list(patiently("looking for cells", search))


def _bytes(listing: Callable[[str | None], Sequence[FileInfo]], path: str | None = None) -> int:
    """The size of the files that a store lists under a path."""
    return sum(_bytes(listing, item.path) if item.is_dir else item.file_size or 0 for item in listing(path))


@contextmanager
def _sole(claims: Claims, name: str) -> Iterator[None]:
    """Within the block, this process holds a claim; it waits for others that hold it."""
    has_waited = False
    while not claims.take(name):
        if not has_waited:
            minutes = SILENT_SECONDS // 60
            print(f"waiting for another process of a sweep; if it has died elsewhere, {minutes:g} minutes", flush=True)
        has_waited = True
        time.sleep(WAIT_SECONDS)
    yield
    claims.release(name)  # after an error, all claims are removed by `giving_signs_of_life`


def _earlier(config: Any, experiment: str, grid: str) -> str | None:
    """The id of the sweep's run to go on with, if there is one."""
    if config.run_id == NEW:
        return None
    if config.run_id is not None:
        return _named(config, grid)
    runs = mlflow.MlflowClient().search_runs(
        [experiment], f"tags.`plw.grid` = '{grid}'", order_by=["attributes.start_time DESC"], max_results=1
    )
    return str(runs[0].info.run_id) if runs else None


def _named(config: Any, grid: str) -> str:
    """The id of the run that config.run_id names. Raises UserError where it is not that of a sweep of these cells."""
    run = get_run(config.run_id)
    if "plw.grid" not in run.data.tags:
        raise UserError(f"run {config.run_id} is not the run of a sweep")
    if run.data.tags["plw.grid"] != grid:
        raise UserError(f"run {config.run_id} is of a sweep of other cells{_first_difference(config, run)}")
    return str(run.info.run_id)


def _first_difference(config: Any, run: Entity) -> str:
    """The first option in which a sweep's run differs from a config, as the end of a sentence."""
    params = parameters(run)
    deciding = {"adaptive"} | set().union(*(cell.definition() for cell in config.cells()))
    for name in (option.name for option in fields(config) if option.name in deciding):
        here, there = spell(getattr(config, name)), params.get(name)
        if there is not None and sorted(here.split(",")) != sorted(there.split(",")):
            return f": {flag(name)} is {there or 'unset'} there, and {here or 'unset'} here"
    return ""


def _check_contents(earlier: Run, contents: Mapping[str, str]) -> None:
    """Raise UserError where something that a sweep reads is no longer what it was when the sweep began.

    The run of a sweep that begins gets the contents as its tag.
    """
    if (tag := earlier.read_tag("contents")) is None:
        earlier.tag(contents=json.dumps(contents, sort_keys=True))
        return
    before = json.loads(tag)
    for name, content in contents.items():
        if before.get(name, content) != content:
            raise UserError(
                f"{name} has changed since the sweep {earlier.id} began (it was {before[name][:16]}, and is "
                f"{content[:16]}); put it back, or begin a sweep anew: --run-id {NEW}"
            )


def _new(experiment: str, grid: str, name: str) -> str:
    """The id of a new run for a sweep: the one that `mlflow run` has begun, if there is one."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        Run(run_id).tag(grid=grid)
        return run_id
    # With its tag from the start, so that it is found again whenever this process is killed.
    run = mlflow.MlflowClient().create_run(experiment, tags={"plw.grid": grid}, run_name=name)
    return str(run.info.run_id)


def _attempts(experiment: str, sweep: str) -> dict[str, list[Attempt]]:
    found = patiently(
        "looking for cells",
        lambda: mlflow.MlflowClient().search_runs(
            [experiment],
            "tags.`plw.identity` LIKE '%'",
            order_by=["attributes.start_time DESC"],
            max_results=MAX_RUNS,
        ),
    )
    by_identity: dict[str, list[Attempt]] = {}
    for run in found:
        by_identity.setdefault(run.data.tags["plw.identity"], []).append(_attempt(run, sweep))
    return by_identity


def _attempt(run: Entity, sweep: str) -> Attempt:
    tags, info = run.data.tags, run.info
    return Attempt(
        run_id=str(info.run_id),
        status=str(info.status),
        is_scored=tags.get("plw.status") == "scored",
        error=tags.get("plw.error", ""),
        progress=tags.get("plw.progress", ""),
        standing=tags.get("plw.model_version") or tags.get("plw.checkpoint", ""),
        score=run.data.metrics.get("score"),
        is_child=tags.get("mlflow.parentRunId") == sweep,
        is_adopted=f"plw.cell_of.{sweep}" in tags,
    )
