"""Does a log file get a line now and then, and a terminal a bar?"""

import io
import sys

import pytest

from plw_mlflow.environment import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(stream, monkeypatch, *, seconds_between_lines=0.0, **kwargs):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds_between_lines)
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BAR", 0.0)
    with progress.Progress("plw 0.1", 10, "steps", done=2, **kwargs) as shown:
        for loss in ("0.5", "0.4"):
            shown.update(1, loss=loss)
    return stream.getvalue()


def test_a_file_gets_plain_lines(monkeypatch):
    lines = ["plw 0.1: 3 of 10 steps, loss 0.5", "plw 0.1: 4 of 10 steps, loss 0.4"]
    assert written(io.StringIO(), monkeypatch).splitlines() == lines


def test_a_file_gets_nothing_for_what_is_soon_done(monkeypatch):
    assert written(io.StringIO(), monkeypatch, seconds_between_lines=60.0) == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    text = written(Terminal(), monkeypatch)
    assert "| 4/10 [" in text
    assert "\n" not in text.rstrip("\n")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_is_not_shown_is_not_written(monkeypatch, stream):
    assert written(stream, monkeypatch, is_shown=False) == ""
