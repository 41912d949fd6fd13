"""Stored: the checkpoints that the store has of an unfinished cell, and who is at work on it.

Any machine with the same store can go on from them. That two do so at once is kept from happening by signs of life: a
running process changes a tag of its run every few seconds.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.training import checkpoints

BEAT_SECONDS = 15.0  # between two signs of life of a run
SILENT_SECONDS = 60.0  # a run without one for so long is taken for dead
CHECKPOINTS = "checkpoints"  # artifact folder of an unfinished cell


class StoredCheckpoints:
    """The store's checkpoints of the cell that a run is of."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._client = mlflow.MlflowClient()
        self._has_one = False  # the store, of this run
        self._earlier: list[str] = []  # other runs of the cell of which it has one

    def fetch(self, cell: str, folder: Path, newer_than: int) -> None:
        """Bring the cell's newest, where it is of a step after `newer_than`, into `folder`.

        What is damaged, or of another cell or step, is left where it is, and a warning says why.

        Raises UserError where another machine is still at work on the cell.
        """
        runs = self._client.search_runs(
            [self._client.get_run(self._run_id).info.experiment_id],
            filter_string=f"tags.`plw.checkpoint` LIKE '{cell}/%'",
        )
        names = {run.info.run_id: run.data.tags["plw.checkpoint"].partition("/")[2] for run in runs}
        stored: dict[str, int] = {}
        for run_id, name in names.items():
            step = checkpoints.step_of(name)  # others could be names outside the folder
            if step is None:
                warnings.warn(f"run {run_id} names {name[:80]!r} as its checkpoint, which is none", stacklevel=2)
            else:
                stored[run_id] = step
        self._has_one = self._run_id in stored  # a restarted pod or container goes on in the run it began
        self._earlier = [run_id for run_id in stored if run_id != self._run_id]
        marker = folder / "run_id"
        ended = marker.read_text() if marker.exists() else None  # as the folder's lock is ours
        _await_silence([run_id for run_id in self._earlier if run_id != ended])
        for run_id, step in sorted(stored.items(), key=lambda item: item[1], reverse=True):
            if step <= newer_than:
                return
            name = names[run_id]
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    found = Path(self._client.download_artifacts(run_id, f"{CHECKPOINTS}/{name}", scratch))
                    checkpoints.check(found, cell)
                except Exception as error:  # of whichever store it is, and of whatever lies there
                    message = f"the checkpoint {name} of run {run_id} cannot be used ({first_line(error)})"
                    warnings.warn(f"{message}; going on without it", stacklevel=2)
                    continue
                os.replace(found, folder / name)
            marker.write_text(run_id)
            return

    def store(self, cell: str, saved: Path) -> None:
        """Copy a checkpoint's folder into the run; then the cell's older ones in the store are removed.

        Where the store does not take it, a warning says so, and the older ones stay.
        """
        self._has_one = True  # or will have a part of one
        try:
            self._client.log_artifacts(self._run_id, str(saved), f"{CHECKPOINTS}/{saved.name}")
            self._client.set_tag(self._run_id, "plw.checkpoint", f"{cell}/{saved.name}")  # complete from here on
            kept = {item.path for item in self._client.list_artifacts(self._run_id, CHECKPOINTS)}
        except Exception as error:  # of whichever store it is
            tell_not_stored(saved, first_line(error))
            return
        for path in kept - {f"{CHECKPOINTS}/{saved.name}"}:
            _remove(self._run_id, path)
        self._drop_earlier()

    def drop(self) -> None:
        """Remove the cell's checkpoints from the store."""
        self._drop_earlier()
        if self._has_one:
            _remove(self._run_id, CHECKPOINTS, tag="checkpoint")

    def _drop_earlier(self) -> None:
        while self._earlier:
            _remove(self._earlier.pop(), CHECKPOINTS, tag="checkpoint")


def tell_not_stored(saved: Path, why: str) -> None:
    """Warn that the store has not got a checkpoint."""
    message = f"the checkpoint {saved.name} is not in the store ({why})"
    warnings.warn(f"{message}; training goes on, and the next one will be copied there", stacklevel=3)


@contextmanager
def giving_signs_of_life(run_id: str) -> Iterator[None]:
    """Within the block, a thread changes the run's tag plw.alive every few seconds, whatever else goes on."""
    ended = threading.Event()

    def beat() -> None:
        client = mlflow.MlflowClient()
        while not ended.wait(BEAT_SECONDS):
            with suppress(Exception):  # a store that is away for a while is not this thread's business
                client.set_tag(run_id, "plw.alive", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(BEAT_SECONDS)


def _await_silence(run_ids: Sequence[str]) -> None:
    """Return once none of the runs is RUNNING, or has given a sign of life for SILENT_SECONDS.

    Raises UserError if one does meanwhile. No clocks of machines are compared.
    """
    client = mlflow.MlflowClient()

    def signs() -> dict[str, str | None]:
        runs = map(client.get_run, run_ids)
        return {r.info.run_id: r.data.tags.get("plw.alive") for r in runs if r.info.status == "RUNNING"}

    first, started = signs(), time.monotonic()
    if first:
        print(
            f"run {', '.join(first)} has not ended; waiting {SILENT_SECONDS:.0f} s to see whether it trains this cell"
        )
    while (now := signs()) and time.monotonic() < started + SILENT_SECONDS:
        if alive := [run_id for run_id, sign in now.items() if sign != first.get(run_id)]:
            raise UserError(
                f"another process is training this very cell, as run {', '.join(alive)}; wait for it, or end it"
            )
        time.sleep(min(1.0, SILENT_SECONDS / 10))


def _remove(run_id: str, path: str, tag: str | None = None) -> None:
    """Remove what is no longer needed from a run; that this fails is no reason to stop."""
    try:
        client = mlflow.MlflowClient()
        run = client.get_run(run_id)
        get_artifact_repository(run.info.artifact_uri).delete_artifacts(path)
        if tag is not None and f"plw.{tag}" in run.data.tags:
            client.delete_tag(run_id, f"plw.{tag}")
    except Exception as error:  # of whichever store it is
        warnings.warn(f"{path} of run {run_id} cannot be removed ({first_line(error)})", stacklevel=2)
