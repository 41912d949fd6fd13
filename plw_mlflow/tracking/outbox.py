"""Outbox: points of a run's curves, on their way to a store that may be away for a while.

Training puts points in and never waits for the store. A thread sends them in order, and while the store is away it
tries again for as long as the process lives. A request that broke may have been carried out or not, and is sent again
unchanged, so the store must keep a point once that is sent twice. Points that are not sent yet can be saved to a file,
from which another process goes on if this one is killed.

Nothing is thrown away to save memory. A point takes about 200 bytes, so 10,000 steps with seven metrics each take
14 MB if all of them are unsent.
"""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from plw_mlflow.errors import Refused, reason

PAUSE_SECONDS = 5.0  # points that are put in within this time are sent together
RETRY_SECONDS = (1.0, 10.0)  # between two attempts: at first, and at most; each pause is twice the one before
BATCH_POINTS = 1000  # in one request; MLflow's limit


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    step: int
    time_ms: int  # since 1970; tells a point that was sent twice from two points


class Outbox:
    """Sends points to a store, whenever that is there."""

    def __init__(self, send: Callable[[list[Point]], None]) -> None:
        """send: takes a batch of points to the store; called by one thread alone.

        It raises Refused where the store answers but does not accept them, and another error where it does not answer.
        """
        self._send = send
        self._points: list[Point] = []  # in order, those not known to have arrived
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._waiting = 0  # calls of `wait` at this moment
        self._failures = 0  # failed attempts to send
        self._is_closed = False
        self._trouble: Exception | None = None  # why the last attempt failed, None if it did not

    def put(self, points: Iterable[Point]) -> None:
        """Have points sent; if the store answers, that is within the next few seconds."""
        with self._changed:
            self._points += points
            if self._thread is None and self._points:
                # A daemon thread, so that a store that never comes back does not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Have everything sent now, and wait for at most so many seconds. Returns whether everything was sent.

        If the store has refused the points, it gets one more attempt and is not waited for.
        """
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            before = self._failures
            try:
                self._changed.wait_for(
                    lambda: not self._points or (self.refusal is not None and self._failures > before), seconds
                )
                return not self._points
            finally:
                self._waiting -= 1

    @property
    def refusal(self) -> Refused | None:
        """The store's refusal, if the last attempt to send the points ended in one."""
        return self._trouble if isinstance(self._trouble, Refused) else None

    @property
    def unsent(self) -> list[Point]:
        """The points not known to have arrived."""
        with self._changed:
            return list(self._points)

    @property
    def trouble(self) -> str:
        """Why the last attempt to send failed; empty if it did not."""
        return reason(self._trouble) if self._trouble else ""

    def close(self) -> None:
        """Make no further attempt."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _is_urgent(self) -> bool:
        """Whether the thread is to go on before its pause is over."""
        if self._trouble is None:
            return self._is_closed or len(self._points) >= BATCH_POINTS or self._waiting > 0
        return self._is_closed or (self.refusal is not None and self._waiting > 0)

    def _work(self) -> None:
        pause, away_since = PAUSE_SECONDS, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._points or self._is_closed)
                self._changed.wait_for(self._is_urgent, pause)
                if self._is_closed:
                    return
                batch = self._points[:BATCH_POINTS]
            try:
                self._send(batch)
            except Exception as error:  # whatever it is, it may pass, and is no reason to end a training
                if self._trouble is None:
                    pause, away_since = RETRY_SECONDS[0], time.monotonic()
                else:
                    pause = min(2 * pause, RETRY_SECONDS[1])
                if self._trouble is None or isinstance(error, Refused) != isinstance(self._trouble, Refused):
                    _warn(error)
                self._note_failure(error)
                continue
            if self._trouble is not None:
                seconds = time.monotonic() - away_since
                print(f"the tracking store takes metrics again, after {seconds:.0f} s", flush=True)
            pause = PAUSE_SECONDS
            self._note_sent(len(batch))

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            self._trouble = error
            self._failures += 1
            self._changed.notify_all()

    def _note_sent(self, count: int) -> None:
        with self._changed:
            self._trouble = None
            del self._points[:count]
            self._changed.notify_all()


def _warn(error: Exception) -> None:
    clock = time.strftime("%H:%M:%S UTC", time.gmtime())
    if isinstance(error, Refused):
        message = f"{reason(error)}. It is {clock}; training goes on, and its checkpoints are kept"
    else:
        message = (
            f"the tracking store takes no metrics since {clock} ({reason(error)}); training goes on, and they are "
            "sent when it takes them again"
        )
    warnings.warn(message, stacklevel=2)


def save(points: Iterable[Point], path: Path) -> None:
    """Write points to a file, a line each. The file is never half written: it holds the old points or the new ones."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.writelines(json.dumps(point) + "\n" for point in points)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read(path: Path) -> list[Point]:
    """The points of a file that `save` has written; none where there is no file."""
    if not path.exists():
        return []
    return [Point(*json.loads(line)) for line in path.read_text().splitlines()]
