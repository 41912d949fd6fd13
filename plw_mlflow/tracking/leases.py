"""Leases: a cell on another machine is at work only while the sweep that has claimed it gives signs of life.

On one machine, the kernel ends a cell with its sweep. On a cluster, a cell may be cut off from its sweep, or leave the
queue when the sweep is long dead, while another sweep takes the cell over after claims.SILENT_SECONDS. So such a cell
is told its claim. It opens its run once it has seen a sign of life; without one for INTERRUPT_SECONDS it interrupts
itself, as SIGTERM would; and it kills itself after KILL_SECONDS, or when the claim is no longer its sweep's. While the
store is away, nobody can take a cell over, and a cell goes on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.exceptions import MlflowException

from plw_mlflow.tracking.connection import patiently

CLAIM = "PLW_CLAIM"  # set in the environment of a cell that runs elsewhere: the claim's name and its holder
LOOK_SECONDS = 5.0  # between two looks at the claim
INTERRUPT_SECONDS = 75.0
KILL_SECONDS = 135.0  # less than claims.SILENT_SECONDS by more than the time of two signs


@contextmanager
def holding_lease() -> Iterator[None]:
    """Within the block, this process ends when its sweep does not hold the claim any longer.

    It does nothing where the process has no claim, as on the sweep's own machine. Raises KeyboardInterrupt where no
    sign of life is seen.
    """
    if not (claim := os.environ.get(CLAIM)):
        yield
        return
    name, holder = claim.split()
    ended = threading.Event()
    sign = _await_sign(name, holder, ended)
    thread = threading.Thread(target=_watch, args=(name, holder, sign, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _await_sign(name: str, holder: str, ended: threading.Event) -> str:
    """Return the first sign of life that the holder gives from now on."""
    first = sign = patiently("looking at a claim", lambda: _sign(name, holder))
    looks = INTERRUPT_SECONDS / LOOK_SECONDS
    while sign is not None and sign == first and looks > 0:
        ended.wait(LOOK_SECONDS)
        looks -= 1
        sign = patiently("looking at a claim", lambda: _sign(name, holder))
    if sign is None or sign == first:
        print("the sweep that this cell belongs to has ended, or has given the cell up; the cell ends, too", flush=True)
        raise KeyboardInterrupt
    return sign


def _watch(name: str, holder: str, last: str, ended: threading.Event) -> None:
    silent_seconds = 0.0  # while the store answered
    while not ended.wait(LOOK_SECONDS):
        try:
            sign = _sign(name, holder)
        except Exception:  # the store is away
            continue
        before = silent_seconds
        silent_seconds = silent_seconds + LOOK_SECONDS if sign == last else 0.0
        if sign is None or silent_seconds > KILL_SECONDS:
            os.kill(os.getpid(), signal.SIGKILL)  # and not a word to the run, which is another process's now
            return
        if before <= INTERRUPT_SECONDS < silent_seconds:
            os.kill(os.getpid(), signal.SIGTERM)
        last = sign


def _sign(name: str, holder: str) -> str | None:
    """The last sign of life of a claim; None where it is no longer the holder's."""
    try:
        tags = mlflow.MlflowClient().get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return str(tags.get("plw.alive", "")) if tags.get("plw.holder") == holder else None
