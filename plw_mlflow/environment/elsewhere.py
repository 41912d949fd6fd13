"""Elsewhere: a command's process on a machine of a cluster, inside a Ray task or a SLURM job, which it ends with."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from plw_mlflow.environment.processes import SWEEP

POLL_SECONDS = 0.2
LOG_BYTES = 1_000_000  # at the end of what a command has printed, which are kept


def run(command: Sequence[str], variables: Mapping[str, str], folder: str, log: str | None = None) -> tuple[int, bytes]:
    """Run a command to its end; returns its exit status, and the end of what it has printed.

    variables: of the environment, beside those of this process. log: a file for what it prints (None: a temporary one).

    It is for the main thread. An interrupt of this process, SIGTERM (a job is cancelled or has to make way) and SIGUSR2
    (its time is about to be over) interrupt the command, which may save a checkpoint.
    """
    environment = os.environ | dict(variables) | {SWEEP: str(os.getpid())}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(log or f"{scratch}/log.txt")
        with path.open("wb") as stream:
            before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR2,)}
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            for number in (signal.SIGUSR2, signal.SIGTERM):  # SLURM sends them to the command, too, which takes one
                before.setdefault(number, signal.signal(number, lambda *_: process.terminate()))
            # A cluster that a shell has started in the background ignores SIGINT, and then Ray's interrupts, too.
            before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                _await(process)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        return process.returncode, path.read_bytes()[-LOG_BYTES:]


def _await(process: subprocess.Popen[bytes]) -> None:
    """Return when a process has ended; an interrupt, which the caller gets by and by, reaches the process, too."""
    while process.poll() is None:
        try:
            time.sleep(POLL_SECONDS)  # as an interrupt from Ray would not end process.wait()
        except KeyboardInterrupt:
            process.terminate()
