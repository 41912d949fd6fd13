"""Resumption: how a cell that was cut short goes on in another run, on this machine or another one.

The store keeps checkpoints of unfinished cells, and any machine with the same store can go on from them. Two machines
must not do so at once, so a running process gives signs of life: it changes a tag of its run every few seconds. The
cell's folder on disk names, in the file run_id, the run that has worked there last.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
from mlflow.entities import RunStatus, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from plw_mlflow.environment import progress
from plw_mlflow.errors import UserError, first_line
from plw_mlflow.tracking import signs
from plw_mlflow.tracking.connection import get_run
from plw_mlflow.tracking.run import Run
from plw_mlflow.tracking.signs import SIGN_SECONDS
from plw_mlflow.training import checkpoints

CURVE_SECONDS = 15.0  # in which the curves up to a checkpoint have to arrive before it is copied into the store
SILENT_SECONDS = 60.0  # a run without a sign of life for so long is taken for dead
CHECKPOINTS = "checkpoints"  # artifact folder of an unfinished cell


def begin_cell(run: Run, cell: str, folder: Path, step: int) -> None:
    """Make a run the run of a cell, which goes on from the checkpoint of `step` in `folder`, or from 0.

    If an earlier run was cut short in that folder, its curves up to `step` are taken over. The earlier run then no
    longer stands for the cell, and says which run does.
    """
    marker = folder / "run_id"
    earlier_id = marker.read_text() if marker.exists() else None
    earlier = None
    if earlier_id is not None and earlier_id != run.id:
        with suppress(ValueError):  # the run is in another store
            earlier = get_run(earlier_id, even_deleted=True)
    run.curves.begin(folder, None if earlier is None else earlier_id, step)
    run.tag(cell=cell, status="training")
    if earlier is not None and earlier.info.lifecycle_stage == "active":  # nobody may change a deleted run
        _supersede(earlier, run)
    marker.write_text(run.id)


def _supersede(earlier: mlflow.entities.Run, run: Run) -> None:
    """Say on an earlier run of a cell, and on the one that goes on for it, which run stands for the cell now."""
    earlier_id = earlier.info.run_id
    run.tag(resumed_from=earlier_id)
    run.client.set_tag(earlier_id, "plw.superseded_by", run.id)
    Run(earlier_id).untag("cell")
    if earlier.info.status == RunStatus.to_string(RunStatus.RUNNING):
        run.client.set_terminated(earlier_id, RunStatus.to_string(RunStatus.KILLED))


class StoredCheckpoints:
    """The checkpoints of an unfinished cell that are in the store: those of its run, and of earlier runs of it."""

    def __init__(self, run: Run, cell: str) -> None:
        self._run, self._cell = run, cell
        self._has_own = False  # whether the store has a checkpoint of this run, or a part of one
        self._earlier_runs: list[str] = []  # other runs of the cell of which the store has one

    def fetch(self, folder: Path, newer_than: int) -> None:
        """Bring the newest checkpoint into the cell's folder, if it is of a step after `newer_than`.

        A checkpoint that is damaged, or of another cell or step, is left where it is, and a warning says why.

        Raises UserError where another machine is still at work on the cell.
        """
        names = self._names_by_run()
        self._has_own = self._run.id in names  # a pod or container that was started again goes on in its own run
        self._earlier_runs = [run_id for run_id in names if run_id != self._run.id]
        marker = folder / "run_id"
        ended = marker.read_text() if marker.exists() else None  # it held the folder's lock, which is ours now
        _await_silence([run_id for run_id in self._earlier_runs if run_id != ended])
        steps = {run_id: checkpoints.step_of(name) or 0 for run_id, name in names.items()}
        for run_id in sorted(names, key=steps.__getitem__, reverse=True):
            if steps[run_id] <= newer_than:
                return
            if self._download(run_id, names[run_id], folder):
                marker.write_text(run_id)
                return

    def store(self, saved: Path) -> None:
        """Copy a checkpoint's folder into the run, once the store has the curves up to it.

        The cell's older checkpoints are then removed from the store. Where the store does not take the new one, the
        older ones stay, and a warning says so.
        """
        if not self._run.curves.wait(CURVE_SECONDS):  # another machine would not find what is missing of the curves
            _warn_not_stored(saved, "it takes no metrics either")
            return
        client, run_id = self._run.client, self._run.id
        self._has_own = True
        try:
            client.log_artifacts(run_id, str(saved), f"{CHECKPOINTS}/{saved.name}")
            client.set_tag(run_id, "plw.checkpoint", f"{self._cell}/{saved.name}")  # complete from here on
            stored = {item.path for item in client.list_artifacts(run_id, CHECKPOINTS)}
        except Exception as error:  # of whichever store it is
            _warn_not_stored(saved, first_line(error))
            return
        for path in stored - {f"{CHECKPOINTS}/{saved.name}"}:
            _remove(run_id, path)
        self._remove_earlier()

    def remove(self) -> None:
        """Remove all the cell's checkpoints from the store."""
        self._remove_earlier()
        if self._has_own:
            _remove(self._run.id, CHECKPOINTS, tag="checkpoint")

    def _remove_earlier(self) -> None:
        while self._earlier_runs:
            _remove(self._earlier_runs.pop(), CHECKPOINTS, tag="checkpoint")

    def _names_by_run(self) -> dict[str, str]:
        """The name of the checkpoint that the store has of each run of the cell."""
        runs = self._run.client.search_runs(
            [self._run.client.get_run(self._run.id).info.experiment_id],
            filter_string=f"tags.`plw.checkpoint` LIKE '{self._cell}/%'",
        )
        names = {}
        for run in runs:
            name = run.data.tags["plw.checkpoint"].partition("/")[2]
            if checkpoints.step_of(name) is None:  # such a name could lead out of the folder
                warnings.warn(
                    f"run {run.info.run_id} names {name[:80]!r} as its checkpoint, which is none", stacklevel=3
                )
            else:
                names[run.info.run_id] = name
        return names

    def _download(self, run_id: str, name: str, folder: Path) -> bool:
        """Bring a run's checkpoint into `folder`. Returns whether it can be used; a warning says why it cannot."""
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                downloaded = Path(self._run.client.download_artifacts(run_id, f"{CHECKPOINTS}/{name}", scratch))
                checkpoints.check(downloaded, self._cell)
            except Exception as error:  # of whichever store it is, and of whatever lies there
                message = f"the checkpoint {name} of run {run_id} cannot be used ({first_line(error)})"
                warnings.warn(f"{message}; going on without it", stacklevel=3)
                return False
            os.replace(downloaded, folder / name)
        return True


def _warn_not_stored(saved: Path, why: str) -> None:
    message = f"the checkpoint {saved.name} is not in the store ({why})"
    warnings.warn(f"{message}; training goes on, and the next one will be copied there", stacklevel=3)


@contextmanager
def giving_signs_of_life(run_id: str) -> Iterator[None]:
    """Within the block, a thread changes the run's tag plw.alive every few seconds, whatever else goes on.

    The tag plw.progress then says how far the run's work is.
    """
    client = mlflow.MlflowClient()

    def give_sign() -> None:
        sign = {"alive": signs.now(), "progress": progress.latest}
        client.log_batch(run_id, tags=[RunTag(f"plw.{name}", text) for name, text in sign.items() if text])

    with signs.giving(give_sign, SIGN_SECONDS):
        yield


def _await_silence(run_ids: Sequence[str]) -> None:
    """Return once each of the runs has ended, or has given no sign of life for SILENT_SECONDS.

    Raises UserError if one gives a sign meanwhile. Clocks of different machines are not compared.
    """
    client = mlflow.MlflowClient()

    def signs_of_running() -> dict[str, str | None]:
        runs = map(client.get_run, run_ids)
        return {run.info.run_id: run.data.tags.get("plw.alive") for run in runs if run.info.status == "RUNNING"}

    first, started = signs_of_running(), time.monotonic()
    if first:
        print(
            f"run {', '.join(first)} has not ended; waiting {SILENT_SECONDS:.0f} s to see whether it trains this cell"
        )
    while (latest := signs_of_running()) and time.monotonic() < started + SILENT_SECONDS:
        if alive := [run_id for run_id, sign in latest.items() if sign != first.get(run_id)]:
            raise UserError(
                f"another process is training this very cell, as run {', '.join(alive)}; wait for it, or end it"
            )
        time.sleep(min(1.0, SILENT_SECONDS / 10))


def _remove(run_id: str, path: str, tag: str | None = None) -> None:
    """Remove an artifact that is no longer needed from a run, and a tag. If that fails, a warning is all."""
    try:
        client = mlflow.MlflowClient()
        run = client.get_run(run_id)
        get_artifact_repository(run.info.artifact_uri).delete_artifacts(path)
        if tag is not None and f"plw.{tag}" in run.data.tags:
            client.delete_tag(run_id, f"plw.{tag}")
    except Exception as error:  # of whichever store it is
        warnings.warn(f"{path} of run {run_id} cannot be removed ({first_line(error)})", stacklevel=2)
