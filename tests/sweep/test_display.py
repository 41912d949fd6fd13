"""Does whoever watches a sweep see how far it is, in a terminal and in a log file?"""

import io
import sys
import time

import pytest
from rich.console import Console

from plw_mlflow.config import MainConfig
from plw_mlflow.errors import PrintableStream
from plw_mlflow.sweep import display
from plw_mlflow.sweep.account import Begun
from plw_mlflow.sweep.grid import Cell
from plw_mlflow.tracking import Attempt

CELLS = [Cell(MainConfig(plw=plw), f"plw {plw:g}", f"cell{plw:g}", f"cell{plw:g}") for plw in (0.0, 0.1, 0.5, 1.0)]


class Account:
    """What a display reads of an account."""

    def __init__(self):
        self.cells, self.left = CELLS, list(CELLS)
        self.finished, self.failed, self.cut_short = [], [], []
        self.running, self.elsewhere, self.attempts = {}, set(), {}

    def begin(self, cell, seconds_ago=0.0):
        self.left.remove(cell)
        self.running[cell.identity] = Begun(cell, "run", time.monotonic() - seconds_ago)
        return self.running[cell.identity]

    def end(self, cell, **attempt):
        del self.running[cell.identity]
        self.attempts[cell.identity] = [attempt_of(**attempt)]
        (self.failed if attempt["status"] == "FAILED" else self.finished).append(cell)

    def finished_attempt(self, cell):
        return self.attempts[cell.identity][0]


def attempt_of(status, error="", progress="", score=None):
    return Attempt("run", status, score is not None, error, progress, "", score, True, False)


def picture(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table.picture())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_table_shows_counts_the_best_score_and_how_far_each_cell_is():
    account = Account()
    table = display.LiveTable(account)
    first = account.begin(CELLS[0], seconds_ago=60)
    table.begun(first)
    account.end(CELLS[0], status="FINISHED", score=0.25)
    table.ended(first)
    table.begun(account.begin(CELLS[1], seconds_ago=12))
    account.elsewhere = {"cell1"}
    account.attempts["cell1"] = [attempt_of("RUNNING", progress="7 of 90 steps, loss 3.1")]
    table.progressed({"cell0.1": "50 of 150 steps, loss 1.234"})
    assert [" ".join(line.split()) for line in picture(table)] == [
        # One of 60 s has 48 to go, two more begin after it, and two at a time are run: here and elsewhere.
        "4 cells: 1 finished, 1 running, 1 elsewhere, 1 left, about 84 s to go",
        "best so far: score 0.25, plw 0",
        "cell how far since",
        "plw 0.1 50 of 150 steps, loss 1.234 12 s",
        "plw 1 7 of 90 steps, loss 3.1 elsewhere",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_long_names_are_broken_and_how_far_a_cell_is_can_be_read(width):
    account = Account()
    table = display.LiveTable(account)
    account.running["long"] = Begun(
        Cell(MainConfig(), "plw 0.1 " + "data " * 20, "long", "long"), "run", time.monotonic()
    )
    table.progressed({"long": "50 of 150 steps, loss 1.234"})
    lines = picture(table, width)
    assert max(map(len, lines)) <= width
    assert width == 40 or any("50 of 150 steps, loss 1.234" in line for line in lines)
    assert sum(line.count("data") for line in lines) == 20


def test_a_log_file_gets_a_line_for_each_thing_that_happens(capsys):
    account = Account()
    with display.shown(account) as lines:
        assert type(lines) is display.Lines
        for cell, ended in ((CELLS[0], {"status": "FINISHED", "score": 0.5}), (CELLS[1], {"status": "FAILED"})):
            begun = account.begin(cell, seconds_ago=100)
            lines.begun(begun)
            account.end(cell, **ended, error="out of memory")
            lines.ended(begun)
    first, *told = capsys.readouterr().out.splitlines()
    assert first == "0 of 4 cells are finished already"
    assert [line.partition(" ")[2] for line in told] == [
        "cell 1 of 4, plw 0: begins (run run)",
        "cell 1 of 4, plw 0: finished in 2 min, score 0.5; 1 finished, 0 running, 3 left, about 5 min to go",
        "cell 2 of 4, plw 0.1: begins (run run)",
        "cell 2 of 4, plw 0.1: FAILED after 2 min: out of memory; "
        "1 finished, 0 running, 1 failed, 2 left, about 3 min to go",
    ]


@pytest.mark.parametrize(
    ("finished", "cells", "expected"),
    [(0, 1, "0 of 1 cell is finished already"), (1, 4, "1 of 4 cells is finished already")],
)
def test_one_cell_is_told_in_the_singular(finished, cells, expected, capsys):
    account = Account()
    account.cells, account.finished = CELLS[:cells], CELLS[:finished]
    display.Lines(account)
    assert capsys.readouterr().out == f"{expected}\n"


def test_what_had_become_of_the_cells_and_what_an_interrupt_waits_for_is_said(capsys):
    account = Account()
    account.cut_short, account.failed = CELLS[:1], CELLS[1:3]
    lines = display.Lines(account)
    account.begin(CELLS[0])
    lines.interrupted()
    assert capsys.readouterr().out.splitlines() == [
        "0 of 4 cells are finished already; 1 was cut short before, and will go on where that was; "
        "2 have failed before (--retry-failed runs them again)",
        "interrupted: waiting for the cell that runs to save a checkpoint and end",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_keeps_failures_above_the_table_and_is_driven_by_nothing_that_they_say(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", PrintableStream(terminal))
    monkeypatch.setenv("TERM", "xterm")
    account = Account()
    with display.shown(account) as table:
        begun = account.begin(CELLS[0])
        table.begun(begun)
        account.end(CELLS[0], status="FAILED", error="\x1b[2J out of memory")
        table.ended(begun)
    text = terminal.getvalue()
    assert "\x1b[?25l" in text  # the cursor is hidden while the table moves
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "cell 1 of 4, plw 0: FAILED after 0 s: \\x1b[2J out of memory" in text
    assert "begins" not in text


@pytest.mark.parametrize(("seconds", "words"), [(41.2, "41 s"), (700, "12 min"), (12_300, "3.4 h")])
def test_durations_are_as_a_person_says_them(seconds, words):
    assert display.duration(seconds) == words
