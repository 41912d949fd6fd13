"""Several processes end as one does: with one line and its status, and none of them is left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.stores import ROOT

PROGRAM = """
import os, pathlib, sys, time
try:
    pathlib.Path(os.environ["RANK"]).write_text(str(os.getpid()))
    while not all(pathlib.Path(rank).exists() for rank in "01"):  # torchrun ends both where one has ended
        time.sleep(0.01)
    if sys.argv[1] == "fails":
        sys.exit(2)
    if sys.argv[1] == "dies" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
INTERRUPTED = "error: interrupted; the same command goes on from the last checkpoint"


def start(folder, how):
    (folder / "program.py").write_text(PROGRAM)
    options = ["--standalone", "--nproc-per-node=2", "-m", "program", how]
    return subprocess.Popen(
        [sys.executable, "-m", "plw_mlflow.command_line.torchrun", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def assert_ended(folder):
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / rank).read_text()), 0)


@pytest.mark.parametrize("message", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_leaves_no_process(message, tmp_path):
    command = start(tmp_path, "waits")
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert command.poll() is None
        time.sleep(0.05)
    os.killpg(command.pid, message)  # as a terminal does; the two are in sessions of their own
    _, err = command.communicate(timeout=50)
    assert command.returncode == 130
    assert err.startswith(INTERRUPTED)
    assert err.count("\n") == 1
    assert_ended(tmp_path)


@pytest.mark.parametrize(("how", "status", "line"), [("fails", 2, ""), ("dies", 1, "error: process 1 of this command")])
def test_a_failure_has_the_status_of_the_process_that_failed(how, status, line, tmp_path):
    command = start(tmp_path, how)
    _, err = command.communicate(timeout=50)
    assert command.returncode == status
    assert err.startswith(line)
    assert err.count("\n") == bool(line)
    assert_ended(tmp_path)
