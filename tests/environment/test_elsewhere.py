"""Does a command inside a cluster's job get its variables, and is it interrupted when the job is?"""

import os
import signal
import sys
import threading

import pytest

from plw_mlflow.environment import elsewhere
from plw_mlflow.environment.processes import SWEEP

SHOW = f"import os; print(os.environ['GIVEN'], os.environ['{SWEEP}'], os.getcwd())"
WAIT = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); print('up'); time.sleep(60)"


def test_a_command_runs_in_a_folder_with_variables_and_as_the_child_of_this_process(tmp_path):
    status, printed = elsewhere.run([sys.executable, "-c", SHOW], {"GIVEN": "value"}, str(tmp_path))
    assert (status, printed.decode().split()) == (0, ["value", str(os.getpid()), str(tmp_path)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_interrupts_the_command(tmp_path, number, request):
    found = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's jobs in the background do
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, found))
    before = signal.getsignal(number)
    log = tmp_path / "log.txt"

    def send_when_up():
        while not log.exists() or b"up" not in log.read_bytes():
            ended.wait(0.05)
        os.kill(os.getpid(), number)

    ended = threading.Event()
    threading.Thread(target=send_when_up, daemon=True).start()
    status, printed = elsewhere.run([sys.executable, "-u", "-c", WAIT], {}, str(tmp_path), str(log))
    assert (status, printed) == (130, b"up\n")
    assert signal.getsignal(number) == before
