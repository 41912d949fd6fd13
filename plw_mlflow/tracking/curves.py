"""Training curves: a run's metrics over steps. Every step is in them once, whatever happens to store and process.

A point can be in three places: in the store, in the outbox of the process that trains, and, from each checkpoint on, in
a file beside that checkpoint, which holds what was in the outbox then. A run that goes on for one that was cut short
takes over what the store and the file have up to its checkpoint's step. It computes the later steps again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from plw_mlflow.errors import Refused, Unreachable, first_line
from plw_mlflow.tracking import connection, outbox
from plw_mlflow.tracking.outbox import Outbox, Point

SILENT_WAIT_SECONDS = 2.0  # of waiting before a line says so


class TrainingCurves:
    """The training curves of one run."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._client = mlflow.MlflowClient()
        self._outbox = Outbox(self._send)
        self._earlier_points: set[tuple[str, int]] = set()  # (metric, step), logged by earlier processes
        self._file: Path | None = None

    def begin(self, folder: Path, earlier: str | None, step: int) -> None:
        """Go on from a checkpoint in `folder`, and take over what an earlier run has logged up to its step.

        earlier: the run that was cut short there. None where there is none, or where it was this very run (of a pod,
            say, that was started again).
        """
        self._file = folder / "unsent.jsonl"
        self._earlier_points = {(point.name, point.step) for point in self._history(self._run_id)}
        points = outbox.read(self._file) + (self._history(earlier) if earlier and step > 0 else [])
        taken_over = {
            (point.name, point.step): point
            for point in points
            if 0 < step >= point.step and (point.name, point.step) not in self._earlier_points
        }
        self._earlier_points |= taken_over.keys()
        self._outbox.put(sorted(taken_over.values(), key=lambda point: point.step))
        self.save_unsent()  # the folder is this run's from now on, and nobody looks at the earlier one again

    def log_step(self, metrics: dict[str, float], step: int) -> None:
        """Add a step's metrics, unless an earlier process has logged them. Never waits for the store.

        They are sent together every few seconds.
        """
        now = int(time.time() * 1000)
        points = [Point(name, value, step, now) for name, value in metrics.items()]
        self._outbox.put(point for point in points if (point.name, point.step) not in self._earlier_points)

    def save_unsent(self) -> None:
        """Save what has not reached the store to a file, beside the checkpoint that is about to be written."""
        if self._file is None:
            return
        try:
            outbox.save(self._outbox.unsent, self._file)
        except OSError as error:
            warnings.warn(
                f"{self._file} cannot be written ({first_line(error)}); should this process be killed before the store "
                f"has everything, a part of the curves is lost",
                stacklevel=2,
            )

    def wait(self, seconds: float) -> bool:
        """Wait until the store has everything, for at most so many seconds. Returns whether it has."""
        return self._outbox.wait(seconds)

    def flush(self) -> None:
        """Wait until the store has everything.

        Raises Refused at once where the store refuses it (because the run was deleted, say), and Unreachable where the
        store stays away.
        """
        if self._outbox.wait(SILENT_WAIT_SECONDS):
            return
        limit = connection.WAIT_SECONDS
        if self._outbox.refusal is None:
            print(f"waiting for the tracking store to take the metrics, at most {limit:.0f} s", flush=True)
            if self._outbox.wait(limit):
                return
        if (refusal := self._outbox.refusal) is not None:
            kept = "" if self._file is None else f"; the checkpoints in {self._file.parent} are kept"
            raise Refused(f"{refusal}{kept}") from None
        raise Unreachable(
            f"the tracking store has not taken {len(self._outbox.unsent)} metrics of run {self._run_id} within "
            f"{limit:.0f} s ({self._outbox.trouble}); give the same command again when it is back"
        )

    def close(self, seconds: float) -> None:
        """Wait until the store has everything, for at most so many seconds, and send nothing after that."""
        self._outbox.wait(seconds)
        self._outbox.close()

    def values(self, name: str) -> dict[int, float]:
        """A metric's values in the store by step, in order. Of a step that was logged twice, the later value counts."""
        points = self._client.get_metric_history(self._run_id, name)
        by_step = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
        return dict(sorted(by_step.items()))

    def _history(self, run_id: str) -> list[Point]:
        names = [name for name in self._client.get_run(run_id).data.metrics if name.startswith(("train/", "eval/"))]
        return [
            Point(name, metric.value, metric.step, metric.timestamp)
            for name in names
            for metric in self._client.get_metric_history(run_id, name)
        ]

    def _send(self, points: Sequence[Point]) -> None:
        """Send points to the store.

        An SQL store keeps a point that it has already (of the same name, value, step and time) once. MLflow's file
        store, which has to be allowed by MLFLOW_ALLOW_FILE_STORE, does not: behind a server, it keeps the points of a
        request twice if its answer was lost.
        """
        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except (MlflowException, OSError) as error:
            if connection.is_refusal(error):
                raise connection.explained(f"sending the metrics of run {self._run_id}", error) from error
            raise
