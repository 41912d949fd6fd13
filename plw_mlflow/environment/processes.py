"""Processes: which of the processes of one command this is. Of several, one alone prints, writes files and logs."""

from __future__ import annotations

import os

INTERRUPTED = 130  # exit status of a command that was interrupted
PARENT_REPORTS = "PLW_PARENT_REPORTS"  # set in the environment of a sweep's cells, and of several processes of one


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def reports_interrupts() -> bool:
    """Whether this is the process that prints that a command was interrupted. An interrupt reaches all of them."""
    return is_first_process() and PARENT_REPORTS not in os.environ
