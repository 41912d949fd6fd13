"""Do the processes of cells end with the sweep, whichever way that ends?"""

import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from plw_mlflow.config import SweepConfig
from plw_mlflow.environment import processes
from plw_mlflow.sweep import local, running
from plw_mlflow.sweep.account import Begun

BUSY = [sys.executable, "-c", "import time; time.sleep(60)"]


class OneCell:
    """An account of a cell that never ends."""

    def __init__(self, raising=None):
        self.left, self.killed, self.raising, self.running = ["cell"], [], raising, {}
        self.begun = Begun(SimpleNamespace(arguments=list, name="cell"), "a-run", 0.0)

    def begin_next(self):
        if not self.left:
            return None
        self.running = {"cell": self.begun}
        self.left = []
        return self.begun

    def look_again(self, seconds):
        if self.raising is not None:
            raise self.raising

    def interrupt(self):
        self.killed.append(self.begun.run_id)


@pytest.fixture
def started(monkeypatch):
    """The processes that are started in place of cells, each with its environment."""
    found, start = [], subprocess.Popen

    def popen(command, env, **more):
        found.append((start(BUSY, **more), env))
        return found[-1][0]

    monkeypatch.setattr(local.subprocess, "Popen", popen)
    return found


def test_cells_end_and_are_marked_where_the_sweep_itself_fails(started):
    account = OneCell(raising=RuntimeError("the store is gone"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="the store is gone"):
        running.run(account, local.Local(SweepConfig(jobs=2)), Mock())
    ((process, environment),) = started
    assert process.returncode == -signal.SIGTERM
    assert account.killed == ["a-run"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert environment[processes.SWEEP] == str(processes.os.getpid())
    assert environment["MLFLOW_RUN_ID"] == "a-run"
