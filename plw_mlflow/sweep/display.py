"""Display: how far a sweep is, as a table that changes in a terminal, or as lines in a log file."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import MappingProxyType
from typing import Any, TextIO, cast

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.table import Table
from rich.text import Text

from plw_mlflow.config import counted
from plw_mlflow.errors import PrintableStream, printable
from plw_mlflow.sweep.account import Account, Begun
from plw_mlflow.sweep.grid import Cell

REFRESHES_PER_SECOND = 2  # of the table


@contextmanager
def shown(account: Account) -> Iterator[Lines]:
    """What shows on standard output how far a sweep is, within the block."""
    # The table moves the cursor, which printable text cannot do. All else that is printed meanwhile stays printable.
    console = Console(file=getattr(sys.stdout, "unfiltered", sys.stdout), highlight=False)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        yield Lines(account)
        return
    table = LiveTable(account)
    above: Any = PrintableStream(cast(TextIO, FileProxy(console, console.file)))
    with (
        Live(
            get_renderable=table.picture,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ),
        redirect_stdout(above),
        redirect_stderr(above if sys.stderr.isatty() else sys.stderr),
    ):
        yield table


class Lines:
    """A line for each thing that happens, for whoever reads a log file later."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._is_waiting = False
        self._seconds: list[float] = []  # of each cell that has finished here
        self._at_a_time = 1  # the most cells that have run here at the same time
        finished, cells = len(account.finished), len(account.cells)
        before = [
            f"{finished} of {counted(cells, 'cell')} {'is' if 1 in (finished, cells) else 'are'} finished already"
        ]
        if cut := len(account.cut_short):
            before.append(f"{cut} {'was' if cut == 1 else 'were'} cut short before, and will go on where that was")
        if failed := len(account.failed):
            before.append(f"{failed} {'has' if failed == 1 else 'have'} failed before (--retry-failed runs them again)")
        print("; ".join(before), flush=True)

    def begun(self, begun: Begun) -> None:
        """A cell's process has been started."""
        self._is_waiting = False
        self._at_a_time = max(self._at_a_time, len(self._account.running))
        self._tell(f"{self._name(begun.cell)}: begins (run {begun.run_id})")

    def progressed(self, progress: Mapping[str, str]) -> None:
        """How far cells that run here are, by their identities. Those of which that is not known are left out."""

    def ended(self, begun: Begun) -> None:
        """A cell's process has ended, and the account says how."""
        account, cell = self._account, begun.cell
        seconds = time.monotonic() - begun.since
        has_failed = cell in account.failed
        if cell in account.finished:
            self._seconds.append(seconds)
            score = account.finished_attempt(cell).score
            how = f"finished in {duration(seconds)}" + (f", score {score:.4g}" if score is not None else "")
        elif has_failed:
            how = f"FAILED after {duration(seconds)}: {account.attempts[cell.identity][0].error}"
        else:
            how = f"was cut short after {duration(seconds)}"
        self._tell_end(f"{self._name(cell)}: {how}", has_failed=has_failed)

    def waiting(self) -> None:
        """Nothing is left to be begun here, and other processes are at work on some cells."""
        if not self._is_waiting:
            self._is_waiting = True
            self._tell(f"waiting for {counted(len(self._account.left), 'cell')} that other processes are at work on")

    def interrupted(self) -> None:
        """The sweep was interrupted, and its cells are being ended, which may take them a while."""
        count = len(self._account.running)
        cells = "the cell that runs" if count == 1 else f"the {count} cells that run"
        print(f"interrupted: waiting for {cells} to save a checkpoint and end", flush=True)

    def seconds_left(self) -> float | None:
        """About how long the rest takes, by the median of the cells that have finished here; None before the first.

        As many cells go on at a time as have run here at a time, and as other processes are at work on now.
        """
        if not self._seconds:
            return None
        each, now = statistics.median(self._seconds), time.monotonic()
        of_running = [max(0.0, each - (now - begun.since)) for begun in list(self._account.running.values())]
        total = sum(of_running) + each * len(self._account.left)
        return total / (self._at_a_time + len(self._account.elsewhere))

    def _counts(self) -> str:
        """How many cells there are of each kind, and the time left."""
        account = self._account
        elsewhere = len(account.elsewhere)
        counts = {"finished": len(account.finished), "running": len(account.running), "elsewhere": elsewhere}
        counts |= {"failed": len(account.failed), "left": len(account.left) - elsewhere}
        text = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n or kind not in ("elsewhere", "failed"))
        seconds = self.seconds_left() if account.running or account.left else None
        return text if seconds is None else f"{text}, about {duration(seconds)} to go"

    def _name(self, cell: Cell) -> str:
        cells = self._account.cells  # of which there may be more than at the beginning
        number = 1 + [one.identity for one in cells].index(cell.identity)
        return f"cell {number} of {len(cells)}, {cell.name}"

    def _tell(self, text: str) -> None:
        """Show that something has happened."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def _tell_end(self, text: str, *, has_failed: bool) -> None:
        """Show that a cell has ended."""
        del has_failed
        self._tell(f"{text}; {self._counts()}")


class LiveTable(Lines):
    """A table of the cells that are being run, below the counts of all. Failures alone stay, as lines above it."""

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._progress: Mapping[str, str] = MappingProxyType({})

    def progressed(self, progress: Mapping[str, str]) -> None:
        """How far cells that run here are, by their identities. Those of which that is not known are left out."""
        self._progress = progress

    def picture(self) -> Group:
        """The table as it is now. Called by another thread, too."""
        account, now = self._account, time.monotonic()
        rows = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        rows.add_column("cell")
        rows.add_column("how far", min_width=30)
        rows.add_column("since", min_width=9)
        for begun in list(account.running.values()):
            progress = self._progress.get(begun.cell.identity) or self._sign(begun.cell) or "starting"
            rows.add_row(_text(begun.cell.name), _text(progress), duration(now - begun.since))
        for cell in account.cells:
            if cell.identity in account.elsewhere:
                rows.add_row(_text(cell.name), _text(self._sign(cell) or "starting"), "elsewhere")
        head = [_text(f"{counted(len(account.cells), 'cell')}: {self._counts()}"), *self._best()]
        return Group(*head, *([rows] if rows.row_count else []))

    def _sign(self, cell: Cell) -> str:
        """How far a cell that runs somewhere was by the store's last answer; empty where that is not known."""
        attempts = self._account.attempts.get(cell.identity)
        return attempts[0].progress if attempts and attempts[0].status == "RUNNING" else ""

    def _best(self) -> list[Text]:
        """A line on the finished cell with the highest score, if there is one."""
        scores = {cell.name: self._account.finished_attempt(cell).score for cell in self._account.finished}
        known = {name: score for name, score in scores.items() if score is not None}
        if not known:
            return []
        best = max(known, key=known.__getitem__)
        return [_text(f"best so far: score {known[best]:.4g}, {best}")]

    def _tell(self, text: str) -> None:
        """The table shows it."""

    def _tell_end(self, text: str, *, has_failed: bool) -> None:
        if has_failed:
            super()._tell(text)


def _text(text: str) -> Text:
    return Text(printable(text))


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
