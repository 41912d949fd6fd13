"""Does a command end as it has to when a scheduler interrupts it, and does not leave it at that?"""

import os
import signal
import subprocess
import sys

from plw_mlflow.environment.provenance import ROOT

PROGRAM = """
import time
from plw_mlflow.command_line import cli

def work():
    print("up", flush=True)
    time.sleep(60)

cli.finish(work)
"""


def test_signals_that_follow_an_interrupt_do_not_change_how_a_command_ends():
    command = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
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
