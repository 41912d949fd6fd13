"""Does a command end as it has to when a scheduler interrupts it, and does not leave it at that?"""

import os
import signal
import subprocess
import sys

import pytest

from plw_mlflow.environment.provenance import ROOT

PROGRAM = """
import sys
import threading
import time
from plw_mlflow.command_line import cli

def work():
    print("up", flush=True)
    if "hangs" in sys.argv:
        threading.Thread(target=time.sleep, args=(600,)).start()
    time.sleep(600)

cli.finish(work)
"""


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_signals_that_follow_an_interrupt_do_not_change_how_a_command_ends(how):
    command = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout.readline() == "up\n"
    command.send_signal(signal.SIGTERM)
    line = command.stderr.readline()
    while command.poll() is None:
        command.send_signal(signal.SIGTERM)
    _, more = command.communicate()
    assert line.startswith("error: interrupted; ")
    assert (command.returncode, more) == (130, "")
