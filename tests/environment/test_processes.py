"""Is it known whether a process has ended, and does a sweep's cell end with the sweep?"""

import os
import signal
import subprocess
import sys
import time

import pytest

from plw_mlflow.environment import processes

CELL = "import time; from plw_mlflow.environment import processes; processes.end_with_sweep(); print(1); time.sleep(60)"
# Starts a cell, says its process id when it is ready, and waits.
SWEEP = f"""
import os, subprocess, sys
environment = os.environ | {{"PLW_SWEEP": str(os.getpid())}}
cell = subprocess.Popen([sys.executable, "-uc", {CELL!r}], env=environment, stdout=subprocess.PIPE)
cell.stdout.readline()
print(cell.pid, flush=True)
cell.wait()
"""


def test_a_cell_is_killed_with_its_sweep():
    with subprocess.Popen([sys.executable, "-c", SWEEP], stdout=subprocess.PIPE, text=True) as sweep:
        identity = processes.identity(int(sweep.stdout.readline()))
        assert processes.has_ended(identity) is False
        sweep.kill()
    until = time.monotonic() + 30
    while not processes.has_ended(identity):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_cell_ends_at_once_whose_sweep_has_ended_before_it_could_say_so():
    environment = os.environ | {processes.SWEEP: "1"}  # not the process that starts it
    ended = subprocess.run([sys.executable, "-c", CELL], env=environment)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize("process", ["", "another-boot/1/2/3"])
def test_of_a_process_elsewhere_nothing_is_known(process):
    assert processes.has_ended(process) is None
