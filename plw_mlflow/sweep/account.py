"""Account: what has become of each cell of a sweep, by what the tracking store has.

Several processes may work on one sweep, on one machine or on many. Each takes the claim of a cell before it begins it,
looks once more whether the cell is still to be run, and releases the claim when the outcome is in the store.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plw_mlflow import tracking
from plw_mlflow.environment.processes import was_interrupted
from plw_mlflow.sweep.grid import Cell
from plw_mlflow.tracking import Attempt, Sweep

# How often a cell is begun here that is cut short each time and gets no further: it may be what ends its machine, or be
# given too little time.
MOST_CUT_SHORT = 5

State = Literal["finished", "failed", "cut short", "left"]


@dataclass(frozen=True)
class Begun:
    """A cell that this process is at work on."""

    cell: Cell
    run_id: str
    since: float  # by time.monotonic
    claim: str = ""  # the claim's name and its holder, for a cell on another machine


def state(attempts: Sequence[Attempt]) -> State:
    """What has become of a cell by its runs, the newest first."""
    if any(attempt.is_finished for attempt in attempts):
        return "finished"
    if not attempts:
        return "left"
    return "failed" if attempts[0].status == "FAILED" else "cut short"


def states(cells: Sequence[Cell], attempts: Mapping[str, Sequence[Attempt]]) -> dict[str, State]:
    """What has become of each cell, by its identity."""
    return {cell.identity: state(attempts.get(cell.identity, [])) for cell in cells}


class Account:
    """What has become of each cell of a sweep that this process works on."""

    def __init__(self, cells: Sequence[Cell], sweep: Sweep, *, retries_failed: bool) -> None:
        self.cells, self.sweep = cells, sweep
        self.running: dict[str, Begun] = {}  # by identity, here
        self.elsewhere: set[str] = set()  # identities of cells that other processes are at work on
        self.attempts: dict[str, list[Attempt]] = {}  # by identity, as the store had them last
        self._looked_at = 0.0
        self._cut_short = Counter[tuple[str, str]]()  # how often a cell was, by its identity and how far it had got
        # Runs that had failed before, whose cells are tried again; a new failure is final.
        self._retried: set[str] = set()
        self.look()
        self._retried = {one[0].run_id for one in self.attempts.values() if retries_failed and state(one) == "failed"}

    @property
    def finished(self) -> list[Cell]:
        """The cells that are finished."""
        return self._in_state("finished")

    @property
    def failed(self) -> list[Cell]:
        """The cells that have failed, and are not tried again."""
        return [cell for cell in self._in_state("failed") if not self._is_open(cell)]

    @property
    def cut_short(self) -> list[Cell]:
        """The cells that were begun by processes that are gone, and are to go on."""
        at_work = {*self.elsewhere, *self.running}
        return [cell for cell in self._in_state("cut short") if cell.identity not in at_work]

    @property
    def left(self) -> list[Cell]:
        """The cells that are neither finished nor failed, nor running here."""
        return [cell for cell in self.cells if self._is_open(cell) and cell.identity not in self.running]

    def add(self, cells: Sequence[Cell]) -> None:
        """Take further cells into the account."""
        self.cells = [*self.cells, *cells]
        self.look()

    def look(self) -> None:
        """Ask the store what has become of the cells, and which other processes are at work on some."""
        claimed = self.sweep.claimed()
        self.attempts = self.sweep.attempts()
        self.elsewhere = {cell.identity for cell in self.cells if self._is_open(cell) and cell.training in claimed}
        self._looked_at = time.monotonic()

    def look_again(self, seconds: float) -> None:
        """Ask the store anew, if the last answer is older than so many seconds."""
        if time.monotonic() - self._looked_at > seconds:
            self.look()

    def begin_next(self) -> Begun | None:
        """Take the next cell that is to be run; None where there is none that no other process is at work on."""
        trained_here = {begun.cell.training for begun in self.running.values()}
        for cell in self.left:
            if cell.identity in self.elsewhere or cell.training in trained_here:
                continue
            if not self.sweep.claim(cell.training):
                self.elsewhere.add(cell.identity)
                continue
            self.look()  # as another process may have finished it just before the claim was free
            if self._is_open(cell):
                begun = Begun(cell, self._run_of(cell), time.monotonic(), self.sweep.held(cell.training))
                self.running[cell.identity] = begun
                return begun
            self.sweep.release(cell.training)
        return None

    def end(self, begun: Begun, exit_status: int | None, log: Path) -> None:
        """Take note of how the process of a cell has ended, and give the cell's claim back.

        exit_status: None where the process was lost with its machine. The cell is then run again, as one that was
        interrupted is, unless it gets no further.
        """
        if log.exists():
            self.sweep.log_file(begun.run_id, log)
        self.look()
        if begun.cell not in self.finished:
            if exit_status is None:
                self._take_note_of_cut(begun, "its machine was lost")
            elif was_interrupted(exit_status):
                self._take_note_of_cut(begun, "it was interrupted")
            else:
                tracking.fail(begun.run_id, _reason(exit_status, log))
            self._retried -= {attempt.run_id for attempt in self._attempts_of(begun.cell)}
            self.look()
        del self.running[begun.cell.identity]
        self.sweep.release(begun.cell.training)

    def interrupt(self) -> None:
        """Mark the runs of the cells that this process was at work on, unless they have done so themselves."""
        for begun in self.running.values():
            tracking.kill(begun.run_id, in_haste=True)

    def clear(self) -> None:
        """Remove what killed processes have left behind of cells that are over: claims, and runs that look open."""
        abandoned = self.sweep.abandoned()
        for cell in self.cells:
            is_suspect = cell.training in abandoned or any(attempt.looks_open for attempt in self._attempts_of(cell))
            if not is_suspect or not self.sweep.claim(cell.training):
                continue
            self.look()
            if not self._is_open(cell):  # nobody else is at work on it now
                for attempt in self._attempts_of(cell):
                    if attempt.looks_open:
                        tracking.kill(attempt.run_id)
            self.sweep.release(cell.training)
        self.look()

    def adopt(self) -> None:
        """Make the finished cells of other sweeps cells of this one."""
        for cell in self.finished:
            self.sweep.adopt(self.finished_attempt(cell))

    def finished_attempt(self, cell: Cell) -> Attempt:
        """The run of a finished cell."""
        return next(attempt for attempt in self.attempts[cell.identity] if attempt.is_finished)

    def failure(self, cell: Cell) -> str:
        """A failed cell, and why it has failed."""
        attempt = self.attempts[cell.identity][0]
        return f"{cell.name} ({attempt.error or 'it did not say why'}; run {attempt.run_id})"

    def _take_note_of_cut(self, begun: Begun, how: str) -> None:
        """Leave a cell that was cut short to be run again, or fail it where that leads nowhere."""
        identity = begun.cell.identity
        far = next((one.standing for one in self._attempts_of(begun.cell) if one.run_id == begun.run_id), "")
        self._cut_short[identity, far] += 1
        if self._cut_short[identity, far] < MOST_CUT_SHORT:
            tracking.kill(begun.run_id)
            return
        why = f"it was cut short {MOST_CUT_SHORT} times without getting further; the last time, {how}"
        tracking.fail(begun.run_id, why)

    def _attempts_of(self, cell: Cell) -> list[Attempt]:
        return self.attempts.get(cell.identity, [])

    def _in_state(self, wanted: State) -> list[Cell]:
        return [cell for cell in self.cells if state(self._attempts_of(cell)) == wanted]

    def _is_open(self, cell: Cell) -> bool:
        """Whether a cell is still to be run."""
        attempts = self._attempts_of(cell)
        now = state(attempts)
        return now in ("left", "cut short") or (now == "failed" and attempts[0].run_id in self._retried)

    def _run_of(self, cell: Cell) -> str:
        """The run in which a cell is to be run: the one that was cut short, or a new one."""
        attempts = self._attempts_of(cell)
        if state(attempts) == "cut short" and attempts[0].is_child:
            return attempts[0].run_id
        return self.sweep.open_cell(cell.identity, cell.name)


def _reason(exit_status: int, log: Path) -> str:
    """Why a cell has failed that did not say so itself: the last line that it has printed, and how it has ended."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    ended = f"killed by signal {-exit_status}" if exit_status < 0 else f"exit status {exit_status}"
    if exit_status == 0:
        return "it has ended without a score"
    return f"{ended}; its last line: {lines[-1]}" if lines else ended
