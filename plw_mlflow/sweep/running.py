"""Running: takes cells from the account, has an engine run them, and tells the account how each has ended.

An engine is a small class: it starts cells somewhere, says which of them have ended, and can end them all. Whether a
cell is to be run at all, once more or never again, is the account's to say.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from plw_mlflow.sweep.account import Account, Begun
from plw_mlflow.sweep.display import Lines

PATIENCE_SECONDS = 10  # in which cells that were interrupted at the terminal may end by themselves
PROGRESS = "progress.txt"  # in the folder of a cell that runs on this machine: how far it is
LOOK_SECONDS = 3.0  # between two looks into the store while other processes are at work on cells


@dataclass(frozen=True)
class Ended:
    """A cell whose process has ended."""

    begun: Begun
    exit_status: int | None  # None: the process was lost with its machine, which nobody blames the cell for
    log: Path  # what it has printed; there may be no such file


class Engine(Protocol):
    """Something that runs cells."""

    poll_seconds: float  # between two looks at what has ended

    def room(self, running: int) -> int | None:
        """How many cells may be started while so many run; None: as many as there are."""

    def start(self, cells: Sequence[Begun], folder: Path) -> None:
        """Start the processes of cells. What they print may go into a folder, which is there until the sweep ends."""

    def ended(self) -> list[Ended]:
        """The cells whose processes have ended since the last call."""

    def end(self, patience: float) -> None:
        """End the processes of all cells; they may save a checkpoint first.

        patience: seconds that those may have before, which an interrupt at the terminal has reached already.
        """


def run(account: Account, engine: Engine, shown: Lines) -> None:
    """Run cells until none is left. Raises KeyboardInterrupt where that was asked for, once the cells have ended."""
    with tempfile.TemporaryDirectory() as name, _interrupting(engine, account, shown):
        while True:
            _start(account, engine, shown, Path(name))
            for one in engine.ended():
                account.end(one.begun, one.exit_status, one.log)
                shown.ended(one.begun)
            shown.progressed(_progress(account, Path(name)))
            if not account.running and not account.left:
                return
            if engine.room(len(account.running)) != 0:
                account.look_again(LOOK_SECONDS)
            time.sleep(engine.poll_seconds)


def _start(account: Account, engine: Engine, shown: Lines, folder: Path) -> None:
    """Have the engine start the cells that it has room for."""
    room, cells = engine.room(len(account.running)), list[Begun]()
    while room is None or len(cells) < room:
        if (begun := account.begin_next()) is None:
            if account.left and not account.running:
                shown.waiting()
            break
        cells.append(begun)
    if cells:
        engine.start(cells, folder)
        for begun in cells:
            shown.begun(begun)


def _progress(account: Account, folder: Path) -> dict[str, str]:
    """How far the cells of this machine are, by their identities, as their processes wrote last."""
    texts = {}
    for begun in account.running.values():
        with suppress(OSError):  # it has not begun to train, or it runs on another machine
            texts[begun.cell.identity] = (folder / begun.run_id / PROGRESS).read_text(encoding="utf-8")
    return texts


@contextmanager
def _interrupting(engine: Engine, account: Account, shown: Lines) -> Iterator[None]:
    """Within the block, an interrupt reaches the cells; it is raised once they have ended, and their runs are marked.

    From the terminal, it has reached those of this machine already. SIGTERM comes to this process alone, and is passed
    on at once. Any other error ends the cells, too, since nobody would take note of how they end.
    """
    was_terminated = False

    def terminate(*_: object) -> None:
        nonlocal was_terminated
        was_terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if account.running:
            shown.interrupted()
        engine.end(PATIENCE_SECONDS if isinstance(error, KeyboardInterrupt) and not was_terminated else 0)
        account.interrupt()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
