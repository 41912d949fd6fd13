"""Display: how far a sweep is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from plw_mlflow.sweep.account import Account, Begun, State
from plw_mlflow.sweep.grid import Cell


def plan(cells: Sequence[Cell], states: Mapping[str, State]) -> str:
    """The cells of a sweep, a line each with what has become of it, and how many there are of each kind."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{cell.name:<{width}}  {states[cell.identity]}" for cell in cells]
    counts = Counter(states[cell.identity] for cell in cells)
    return "\n".join([*lines, f"{len(cells)} cells: " + ", ".join(f"{n} {state}" for state, n in counts.items())])


class Lines:
    """A line for each thing that happens, for whoever reads a log file later."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._number = {cell.identity: number for number, cell in enumerate(account.cells, start=1)}
        self._is_waiting = False
        finished, failed = len(account.finished), len(account.failed)
        before = f", and {failed} have failed before (--retry-failed runs them again)" if failed else ""
        print(f"{finished} of {len(account.cells)} cells are finished already{before}", flush=True)

    def begun(self, begun: Begun) -> None:
        """A cell's process has been started."""
        self._is_waiting = False
        self._print(f"{self._name(begun)} begins (run {begun.run_id})")

    def ended(self, begun: Begun) -> None:
        """A cell's process has ended, and the account says how."""
        account, cell = self._account, begun.cell
        seconds = time.monotonic() - begun.since
        if cell in account.finished:
            score = account.finished_attempt(cell).score
            how = f"finished in {_duration(seconds)}" + (f", score {score:.4g}" if score is not None else "")
        elif cell in account.failed:
            how = f"FAILED after {_duration(seconds)}: {account.attempts[cell.identity][0].error}"
        else:
            how = f"was cut short after {_duration(seconds)}"
        counts = f"{len(account.finished)} finished, {len(account.running)} running, {len(account.failed)} failed"
        self._print(f"{self._name(begun)} {how}; {counts}, {len(account.left)} left{self._time_left()}")

    def waiting(self) -> None:
        """Nothing is left to be begun here, and other processes are at work on some cells."""
        if not self._is_waiting:
            self._is_waiting = True
            self._print(f"waiting for {len(self._account.left)} cells that other processes are at work on")

    def close(self) -> None:
        """Nothing more will happen."""

    def _time_left(self) -> str:
        """About how long the cells that are left will take, if those that ended here say so."""
        return ""

    def _name(self, begun: Begun) -> str:
        return f"cell {self._number[begun.cell.identity]} of {len(self._account.cells)}, {begun.cell.name}:"

    def _print(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
