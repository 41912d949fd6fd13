"""Processes: which of the processes of one command this is, which process somebody is, and whether that one still runs.

Of the processes of one command, one alone prints, writes files and logs.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

INTERRUPTED = 130  # exit status of a command that was interrupted
PARENT_REPORTS = "PLW_PARENT_REPORTS"  # set in the environment of a sweep's cells, and of several processes of one
SWEEP = "PLW_SWEEP"  # set in the environment of a sweep's cells: the process id of the sweep
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def reports_interrupts() -> bool:
    """Whether this is the process that prints that a command was interrupted. An interrupt reaches all of them."""
    return is_first_process() and PARENT_REPORTS not in os.environ


def was_interrupted(exit_status: int) -> bool:
    """Whether a process that has ended so was interrupted, and is not to blame.

    Its status is INTERRUPTED, unless the signal has come before it could take signals, or when it no longer did.
    """
    return exit_status in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)


def end_with_sweep() -> None:
    """Have the kernel kill this process when its parent dies, if it belongs to a sweep's cell.

    A sweep that is killed would leave its cells behind, and whoever goes on for it would train them a second time. Only
    Linux can do so. A process that torchrun has started ends with torchrun, which ends with the sweep.
    """
    if (sweep := os.environ.get(SWEEP)) is None:
        return
    with suppress(OSError, AttributeError):  # this is not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if "RANK" not in os.environ and os.getppid() != int(sweep):  # it died before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def identity(pid: int | None = None) -> str:
    """What no other process on any machine is called: boot, process namespace, process id and start time.

    pid: of another process (unset: this one). Empty where the system does not tell, and where there is no such process.
    """
    pid = os.getpid() if pid is None else pid
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if status[0] == "Z" else f"{boot}/{namespace}/{pid}/{status[19]}"  # a zombie has ended


def has_ended(process: str) -> bool | None:
    """Whether a process, by its `identity`, has ended; None where that cannot be known, as on another machine."""
    own, parts = identity().split("/"), process.split("/")
    if len(parts) != 4 or parts[:2] != own[:2] or not re.fullmatch("[0-9]{1,9}", parts[2]):
        return None
    return identity(int(parts[2])) != process
